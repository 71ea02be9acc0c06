"""What a cache must hold and what attention over it must give, told without pages, rings or blocks.

:class:`CacheOracle` keeps one dense tensor per side and replaces each span by its decoded codes when the span leaves the
window; :func:`attention` does attention in float64; :func:`float32_bound` says how far float32 may be from that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphkv_compile.codecs.keys import decode_keys, encode_keys
from sphkv_compile.codecs.scales import pair_scale
from sphkv_compile.codecs.values import decode_values, encode_values
from sphkv_compile.runtime.layout import UNIT, Layout
from sphkv_compile.runtime.state import Geometry, State, empty_state
from sphkv_compile.spec import PASSTHROUGH


def shuffled_state(layout: Layout, geometry: Geometry, seed: int = 0) -> State:
    """An empty state that has a page for every slot, scattered over an arena of its own: code that takes pages to lie in
    order fails on it."""
    size = layout.page_bytes(layout.tiers[0], geometry.k_dim, geometry.v_dim, geometry.itemsize)
    pages = geometry.batch * geometry.heads * layout.spans(geometry.capacity, geometry.rolling) * layout.pages_per_span
    state = empty_state(layout, geometry, torch.zeros(max(1, pages) * size, dtype=torch.uint8))
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)) * (size // UNIT)
    state.table.copy_(order.int().view_as(state.table))
    return state


class CacheOracle:
    """The dense content that a cache of codes must decode to, bit for bit.

    Attributes:
        k, v: content by position; zero where no token is held.
        start: each row's first real position, -1 before it came; length: one past the newest position.
        spans: coded spans of each row.

    Shapes: k [B, H, L, D], v [B, H, L, Dv].
    """

    def __init__(self, layout: Layout, geometry: Geometry):
        g = geometry
        self.layout, self.length = layout, 0
        self.k = torch.zeros(g.batch, g.heads, g.capacity, g.k_dim, dtype=g.k_dtype)
        self.v = torch.zeros(g.batch, g.heads, g.capacity, g.v_dim, dtype=g.v_dtype)
        self.start, self.spans = [-1] * g.batch, [0] * g.batch
        self.scale: list[Tensor | None] = [None] * g.batch
        self._queries: list[list[Tensor]] = [[] for _ in range(g.batch)]

    def append(self, q: Tensor | None, k: Tensor, v: Tensor, first: int, starts: list[int]) -> None:
        """Write tokens at ``first``..; what lay there and after is dropped.

        Shapes: ``q`` [B, HQ, T, D], ``k`` [B, H, T, D], ``v`` [B, H, T, Dv].
        """
        self.length = first + k.shape[2]
        self.k[:, :, first:], self.v[:, :, first:] = 0, 0
        for row in range(k.shape[0]):
            if self.start[row] < 0 or first <= self.start[row]:
                self.start[row], self.spans[row], self.scale[row] = starts[row], 0, None
                self._queries[row].clear()
                self.k[row], self.v[row] = 0, 0
            if self.start[row] >= 0:
                self._append_row(row, q, k, v, first)

    def _append_row(self, row: int, q: Tensor | None, k: Tensor, v: Tensor, first: int) -> None:
        layout, start = self.layout, self.start[row]
        begin, at = start + layout.sink, max(first, start)
        self.k[row, :, at : self.length] = k[row, :, at - first :]
        self.v[row, :, at : self.length] = v[row, :, at - first :]
        if q is not None and self.scale[row] is None:  # queries up to the one that completes the first span
            self._queries[row].append(q[row, :, at - first : max(at, begin + layout.window + layout.span) - first])
        self.spans[row] = min(self.spans[row], max(0, (first - begin) // layout.span))
        while self.spans[row] < layout.coded_spans(self.length - start):
            self._encode(row, begin + self.spans[row] * layout.span)
            self.spans[row] += 1

    def _encode(self, row: int, at: int) -> None:
        """The span at ``at`` becomes what its codes say."""
        layout, tier, span = self.layout, self.layout.tiers[0], slice(at, at + self.layout.span)
        k, v = self.k[row, :, span].float(), self.v[row, :, span].float()
        if self.scale[row] is None:
            self.scale[row] = self._learn(row, k)
        if tier.k_bits != PASSTHROUGH:
            rot, scale = layout.rotation(k.shape[-1], k.device), self.scale[row]
            lowest = min(t.k_bits for t in layout.tiers)
            coded = encode_keys(k, scale, rot, layout.code, tier.k_bits, lowest)
            self.k[row, :, span] = decode_keys(coded, k.shape[-1], scale, rot, layout.code, tier.k_bits).to(self.k.dtype)
        if tier.v_bits != PASSTHROUGH:
            rot = layout.rotation(v.shape[-1], v.device)
            codes = encode_values(v, rot, tier.v_bits)
            self.v[row, :, span] = decode_values(*codes, v.shape[-1], rot, tier.v_bits).to(self.v.dtype)

    def _learn(self, row: int, k: Tensor) -> Tensor:
        k = k.double()
        k_moment, q_moment = (k - k.mean(1, keepdim=True)).square().mean(1), None
        if self._queries[row]:
            q = torch.cat(self._queries[row], 1).double()
            q_moment = q.unflatten(0, (k.shape[0], -1)).square().mean((1, 2))
        rope = None if self.layout.rope == "none" else self.layout.rope
        return pair_scale(k_moment, q_moment, rope, self.layout.rotary_dim)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Attention in float64 over dense keys and values; a query that sees nothing gets zeros.

    Shapes: ``q`` [B, HQ, T, D], ``k`` [B, H, N, D], ``v`` [B, H, N, Dv], ``mask`` broadcastable to [B, HQ, T, N]
    -> float64[B, HQ, T, Dv].
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    return torch.softmax(logits, -1).nan_to_num(0) @ v


def float32_bound(q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: torch.dtype = torch.float32) -> float:
    """How far attention computed in float32 and rounded to ``out`` may be from the exact one.

    A dot product of length n is off by at most n eps |x||y|. Keys, queries and values are each rotated once more (D terms)
    and an anchor is added, hence four times D eps for a logit; an error d of all logits moves a weight by a factor
    exp(2 d), and the weighted sum of N values adds N eps.
    """
    eps = torch.finfo(torch.float32).eps
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    largest = float(v.double().norm(dim=-1).max())
    logit = 4 * q.shape[-1] * eps * scale * float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    rounding = 0.0 if out == torch.float32 else torch.finfo(out).eps
    return largest * (2 * logit + (k.shape[2] + v.shape[-1]) * eps + rounding)
