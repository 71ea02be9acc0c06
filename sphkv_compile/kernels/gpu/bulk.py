"""Launches what many tokens at once need: spans into codes, and a prefill's attention over codes and new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_compile.kernels.gpu.encode import encode_spans
from sphkv_compile.kernels.gpu.launch import codebooks, signs_of
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import State


def encode(
    state: State, layout: Layout, members: Tensor, k: Tensor, v: Tensor, origin: int, spans: range, first: int
) -> None:
    """Encode ``spans`` of the rows ``members``, from the window up to position ``first`` and from ``k``, ``v`` from it
    on, with the state's pair scales; every span has its pages.

    Args:
        members: int64[rows].
        origin: position at which the rows' span 0 begins.

    Shapes: ``k`` / ``v`` [B, H, T, D], of all rows.
    """
    (tier,) = layout.tiers
    h, d = k.shape[1], k.shape[3]
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    encode_spans[(len(spans), members.numel() * h)](
        k, v, state.arena.view(torch.int32), state.table, state.tiers, state.positions, state.anchors,
        state.span_scales, state.exact_k, state.exact_v, state.pair_scale, signs_of(layout, d, k.device),
        members.to(k.device, torch.int32), origin, spans.start, first,
        *k.stride()[:3], *v.stride()[:3], h, state.anchors.shape[2], state.table.shape[2],
        D=d, KB=tier.k_bits, VB=tier.v_bits, SPAN=layout.span, SINK=layout.sink, RING=layout.ring,
        enable_fp_fusion=False, num_warps=16 if d == 256 else 8, **codebooks(tier),
    )  # fmt: skip
