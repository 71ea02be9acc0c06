"""Launches what many tokens at once need: spans into codes, and a prefill's attention over codes and new tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sphkv_compile.kernels.gpu import words
from sphkv_compile.kernels.gpu.decode import LOG2E
from sphkv_compile.kernels.gpu.encode import encode_spans
from sphkv_compile.kernels.gpu.launch import (
    borders_of,
    converts,
    encoding_block,
    levels_of,
    menu_of,
    processors,
    signs_of,
)
from sphkv_compile.kernels.gpu.prefill import extents, prefill, turn_queries
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import START, State

PART = 16
"""Pages that a part of a row takes at least, where a few new tokens alone would leave most of the device idle."""
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def encode(
    state: State, layout: Layout, members: Tensor, k: Tensor, v: Tensor, origin: int, spans: range, first: int
) -> None:
    """Encode ``spans`` of the rows ``members``, from the window up to position ``first`` and from ``k``, ``v`` from it
    on, with the state's pair scales; every span has its pages.

    Args:
        members: int64[rows].
        origin: position at which the rows' span 0 begins.

    Shapes: ``k`` / ``v`` [B, H, T, D], of all rows, in the window's dtype.
    """
    tier = layout.tiers[0]
    h, d = k.shape[1], k.shape[3]
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    factors = torch.empty(members.numel() * h * len(spans), d, dtype=torch.float32, device=k.device)
    encode_spans[(len(spans), members.numel() * h, 2)](
        k, v, state.arena.view(torch.int32), state.table, state.tiers, state.positions, state.held,
        state.anchors, state.span_scales, state.exact_k, state.exact_v, state.pair_scale, signs_of(layout, d, k.device),
        levels_of(tier, k.device), members.to(k.device, torch.int32), factors, origin, spans.start, first,
        *k.stride()[:3], *v.stride()[:3], h, state.anchors.shape[2], state.table.shape[2],
        D=d, KB=tier.k_bits, VB=tier.v_bits, SPAN=layout.span, SINK=layout.sink, RING=layout.ring,
        KEPT=layout.kept, TIERCOUNT=len(layout.tiers), TWIN=not converts(k.device), enable_fp_fusion=False,
        **encoding_block(layout, d), **borders_of(tier),
    )  # fmt: skip


def attend_served(layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether :func:`attend` is made for such a call."""
    return (
        layout.tiled
        and (layout.kept or len(layout.tiers) == 1)
        and q.dtype == k.dtype == v.dtype
        and q.dtype in TYPES
        and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1))
    )


def attend(
    state: State,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    base: int,
    columns: int,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of new tokens over the coded cache and themselves; it reads counters on the host.

    Same arguments, shapes and result as :func:`sphkv_compile.ops.reference.attend_reference`; ``mask`` bool[B or 1, 1,
    T or 1, columns or more].
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    lo = hi = bits = None
    if mask is not None:
        lo, hi, bits = extents_of(mask if mask.stride(3) == 1 else mask.contiguous(), columns)
    nothing_held = all(start < 0 or first <= start for start in state.rows[:, START].tolist())
    if nothing_held and _only_causal(first - base, q.shape[2], lo, hi, bits, is_causal):
        return _alone(q, k, v, is_causal or mask is not None, scale)
    return over_codes(state, layout, q, k, v, first, base, columns, is_causal, scale, lo, hi, bits)


def extents_of(mask: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The interval of columns that each row of a mask shows; if some row shows no interval, a bit for every column too.

    Shapes: -> int32[B or 1, T or 1], the same, int32[B or 1, T or 1, words].
    """
    b, _, t, _ = mask.shape
    width = triton.cdiv(columns, 256) * 8 + 6  # whole words on either side, so that a block may begin anywhere
    lo, hi = torch.empty(2, b, t, dtype=torch.int32, device=mask.device)
    holes = torch.zeros(1, dtype=torch.int32, device=mask.device)
    bytes_ = mask.view(torch.uint8)
    launched = extents[(triton.cdiv(t, 16), b)]
    numbers = t, columns, mask.stride(0), mask.stride(2), width
    launched(bytes_, lo, hi, holes, holes, *numbers, ROWS=16, PACK=False)
    if not bool(holes):
        return lo, hi, None
    bits = torch.zeros(b, t, width, dtype=torch.int32, device=mask.device)
    launched(bytes_, lo, hi, holes, bits, *numbers, ROWS=16, PACK=True)
    return lo, hi, bits


def _only_causal(
    own: int, count: int, lo: Tensor | None, hi: Tensor | None, bits: Tensor | None, is_causal: bool
) -> bool:
    """Whether, with nothing held, new tokens see each other causally or without any mask.

    Args:
        own: column of the first new token.
    """
    if lo is None or hi is None:
        return own == 0 or not is_causal
    if is_causal or bits is not None or lo.shape[1] != count:
        return False
    ends = torch.arange(own + 1, own + count + 1, device=hi.device)
    return bool((hi == ends).all() & (lo <= own).all())


def _alone(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """Attention among the new tokens alone, by the library's kernels; those for float32 know no groups."""
    group = q.shape[1] // k.shape[1]
    if q.dtype == torch.float32:
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=group > 1).contiguous()


def over_codes(
    state: State,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    base: int,
    columns: int,
    is_causal: bool,
    scale: float | None,
    lo: Tensor | None,
    hi: Tensor | None,
    bits: Tensor | None,
) -> Tensor:
    """The launch itself, with the mask as :func:`extents_of` tells it."""
    b, hq, t, d = q.shape
    h, device = k.shape[1], q.device
    g = hq // h
    signs, twin = signs_of(layout, d, device), not converts(device)
    single = q.dtype == torch.float32
    # as many query rows and exact tokens at once as registers allow
    rows = 32 if single or twin else 64 if d == 256 or bits is not None or t * g <= 64 else 128
    block = 32 if single or twin or d == 256 or bits is not None else 64
    warps = 4 if rows == 64 else 8  # four of Hopper's share 64 rows of a product: four more would read past them
    qscale = (d**-0.5 if scale is None else scale) * LOG2E
    step = 1.0 if layout.kept else words.step(layout.tiers[0].k_bits)  # each kept tier has its own
    menu = {name: each for name, each in menu_of(layout.tiers).items() if name != "WEIGHTS"}
    turned = torch.empty(b * h, t * g, d, dtype=torch.float16, device=device)
    blocks, pages = triton.cdiv(t * g, rows) * b * h, max(1, state.table.shape[2])
    used = int(state.held.sum(-1).max()) if layout.kept else pages  # kept, they may be few of those there is room for
    parts = max(1, min(processors(device) // blocks, used // PART))
    split = parts > 1
    out = torch.empty(parts, b, hq, t, d, dtype=torch.float32 if split else q.dtype, device=device)
    lse = torch.empty(parts, b, hq, t if split else 0, dtype=torch.float32, device=device)
    bounds = tuple(state.rows if x is None else x for x in (lo, hi, bits))  # what is not there is not read
    turn_queries[(triton.cdiv(t * g, 32), b * h)](
        q, state.pair_scale, signs, turned, t, qscale * step, *q.stride()[:3], h,
        G=g, D=d, ROWS=32, num_warps=4,
    )  # fmt: skip
    prefill[(triton.cdiv(t * g, rows), b * h, parts)](
        q, k, v, turned, state.arena.view(torch.int32), words.level_table(device), state.table, state.held,
        state.anchors, state.span_scales, state.exact_k, state.exact_v, signs, state.rows, *bounds, out, lse,
        first, base, columns, t, qscale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *_steps(lo), *_steps(bits), h, max(1, state.anchors.shape[2]), pages,
        G=g, D=d, **menu, SPAN=layout.span, SINK=layout.sink, RING=layout.ring, KEPT=layout.kept,
        TWIN=twin, CAUSAL=is_causal, BOUNDED=lo is not None, MASKED=bits is not None,
        PRECISION="tf32x3" if single else "tf32", ROWS=rows, BLOCK=block, STAGES=2, SPLIT=split,
        num_stages=2, num_warps=warps,
    )  # fmt: skip
    if not split:
        return out[0]
    weight = torch.softmax(lse * math.log(2), 0).unsqueeze(-1)
    return (out * weight).sum(0).to(q.dtype)


def _steps(x: Tensor | None) -> tuple[int, int]:
    """Strides over rows and tokens of what may be the same for all of them."""
    if x is None:
        return 0, 0
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0
