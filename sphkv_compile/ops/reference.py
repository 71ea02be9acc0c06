"""The specification of ``attend``: decode the cache to dense keys and values, lay the new ones over it, and do
attention in float32 by the book. Slow, plain, and what every fast path is tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphkv_compile.ops.read import dense
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import State


def attend_reference(
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
    """Attention over ``columns`` columns of the cache, of which the new tokens replace those at ``first``...

    Shapes: ``q`` [B, HQ, T, D], ``k`` [B, H, T, D], ``v`` [B, H, T, Dv], ``mask`` broadcastable to [B, HQ, T, columns]
    -> [B, HQ, T, Dv] in q's dtype.
    """
    keys, values = (x.float() for x in dense(state, layout, columns, base))
    at = first - base
    keys[:, :, at : at + k.shape[2]], values[:, :, at : at + v.shape[2]] = k.float(), v.float()
    group = q.shape[1] // k.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = q.float() @ keys.mT * scale
    if is_causal:
        t, n = logits.shape[-2:]
        logits = logits.masked_fill(~torch.ones(t, n, dtype=torch.bool, device=q.device).tril(), -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.float()
    weights = torch.softmax(logits, -1).nan_to_num(0)  # a row that sees nothing is zero, as in SDPA
    return (weights @ values).to(q.dtype)
