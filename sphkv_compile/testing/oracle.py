"""What a cache must hold and what attention over it must give, told without pages, rings or blocks.

:class:`CacheOracle` keeps one dense tensor per side and replaces each span by its decoded codes when it leaves the
window; :func:`attention` does attention in float64; :func:`float32_bound` says how far float32 may be from that.
:class:`Pair` writes a state and an oracle alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sphkv_compile.codecs.keys import decode_keys, encode_keys
from sphkv_compile.codecs.scales import pair_scale
from sphkv_compile.codecs.values import decode_values, encode_values
from sphkv_compile.ops.append import append
from sphkv_compile.ops.read import dense
from sphkv_compile.spec import PASSTHROUGH
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import LENGTH, SPANS, START, Geometry, State, empty_state


def shuffled_state(layout: Layout, geometry: Geometry, seed: int = 0) -> State:
    """An empty state that has a page for every slot, scattered over an arena of its own: code that takes pages to lie
    in order fails on it."""
    size = layout.page_bytes(layout.tiers[0], geometry.k_dim, geometry.v_dim, geometry.itemsize)
    state = empty_state(layout, geometry, torch.zeros(0, dtype=torch.uint8))
    pages = state.table.numel()
    state = state._replace(arena=torch.zeros(max(1, pages) * size, dtype=torch.uint8))
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)) * (size // UNIT)
    state.table.copy_(order.int().view_as(state.table))
    return state


class CacheOracle:
    """The dense content that a cache of codes must decode to, bit for bit once rounded to the cache's dtypes.

    Attributes:
        k, v: content by position, before that rounding; zero where no token is held.
        start: each row's first real position, -1 before it came; length: one past the newest position.
        spans: coded spans of each row.

    Shapes: k float32[B, H, L, D], v float32[B, H, L, Dv].
    """

    def __init__(self, layout: Layout, geometry: Geometry):
        g = self.geometry = geometry
        self.layout, self.length = layout, 0
        self.k = torch.zeros(g.batch, g.heads, g.capacity, g.k_dim)
        self.v = torch.zeros(g.batch, g.heads, g.capacity, g.v_dim)
        self.start, self.spans = [-1] * g.batch, [0] * g.batch
        self.scale: list[Tensor | None] = [None] * g.batch
        self._queries: list[list[Tensor]] = [[] for _ in range(g.batch)]

    def dense(self) -> tuple[Tensor, Tensor]:
        """The content in the cache's dtypes: what the user's own tensors would hold."""
        return self.k.to(self.geometry.k_dtype), self.v.to(self.geometry.v_dtype)

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
        if self.spans[row] > (first - begin) // layout.span:  # of a span that is cut, the rest goes back to the window
            self.spans[row] = max(0, (first - begin) // layout.span)
            cut = slice(begin + self.spans[row] * layout.span, max(begin, first))
            for x, rounded in zip((self.k, self.v), self.dense()):
                x[row, :, cut] = rounded[row, :, cut].float()
        while self.spans[row] < layout.coded_spans(self.length - start):
            self._encode(row, begin + self.spans[row] * layout.span)
            self.spans[row] += 1

    def _encode(self, row: int, at: int) -> None:
        """The span at ``at`` becomes what its codes say."""
        layout, tier, span = self.layout, self.layout.tiers[0], slice(at, at + self.layout.span)
        k, v = self.k[row, :, span], self.v[row, :, span]
        scale = self.scale[row]
        if scale is None:
            scale = self.scale[row] = self._learn(row, k)
        if tier.k_bits != PASSTHROUGH:
            rot = layout.rotation(k.shape[-1], k.device)
            lowest = min(t.k_bits for t in layout.tiers)
            coded = encode_keys(k, scale, rot, layout.code, tier.k_bits, lowest)
            self.k[row, :, span] = decode_keys(coded, k.shape[-1], scale, rot, layout.code, tier.k_bits)
        if tier.v_bits != PASSTHROUGH:
            rot = layout.rotation(v.shape[-1], v.device)
            codes = encode_values(v, rot, tier.v_bits)
            self.v[row, :, span] = decode_values(*codes, v.shape[-1], rot, tier.v_bits)

    def _learn(self, row: int, k: Tensor) -> Tensor:
        k = k.double()
        k_moment, q_moment = (k - k.mean(1, keepdim=True)).square().mean(1), None
        if self._queries[row]:
            q = torch.cat(self._queries[row], 1).double()
            q_moment = q.unflatten(0, (k.shape[0], -1)).square().mean((1, 2))
        rope = None if self.layout.rope == "none" else self.layout.rope
        return pair_scale(k_moment, q_moment, rope, self.layout.rotary_dim)


class Pair:
    """A state and its oracle, written alike."""

    def __init__(self, layout: Layout, geometry: Geometry):
        self.layout, self.geometry = layout, geometry
        self.state, self.oracle = shuffled_state(layout, geometry), CacheOracle(layout, geometry)

    def write(self, q: Tensor | None, k: Tensor, v: Tensor, first: int, starts: list[int]) -> Pair:
        """Append to both."""
        append(self.state, self.layout, q, k, v, first, starts)
        self.oracle.append(q, k, v, first, starts)
        return self

    def chunks(self, data: tuple[Tensor, Tensor, Tensor], sizes: Iterable[int], starts: list[int]) -> Pair:
        """Append ``data`` from its begin in pieces of ``sizes`` tokens."""
        at = 0
        for n in sizes:
            q, k, v = (x[:, :, at : at + n] for x in data)
            self.write(q, k, v, at, starts)
            at += n
        return self

    def check(self) -> Pair:
        """Raises: AssertionError: the state's content or counters are not the oracle's, bit for bit."""
        for got, expected in zip(dense(self.state, self.layout, self.geometry.capacity), self.oracle.dense()):
            if not torch.equal(got, expected):
                wrong = (got != expected).any(-1).nonzero().tolist()
                raise AssertionError(f"content differs at (row, head, position) {wrong[:8]}, {len(wrong)} in all")
        rows = self.state.rows
        counters = rows[:, START].tolist(), rows[:, SPANS].tolist(), rows[:, LENGTH].tolist()
        told = self.oracle.start, self.oracle.spans, [self.oracle.length] * len(self.oracle.start)
        if counters != told:
            raise AssertionError(f"starts, spans and lengths are {counters}, expected {told}")
        return self


def random_tokens(g: Geometry, count: int, group: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys with a bias (so that anchors have work to do) and values, the same for the same arguments.

    Shapes: [B, H * group, count, D], [B, H, count, D], [B, H, count, Dv].
    """
    random = torch.Generator().manual_seed(seed)
    sizes = ((g.heads * group, g.k_dim), (g.heads, g.k_dim), (g.heads, g.v_dim))
    q, k, v = (torch.randn(g.batch, h, count, d, generator=random) for h, d in sizes)
    return q.to(g.k_dtype), (k + 1).to(g.k_dtype), v.to(g.v_dtype)


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

    Rounding errors are taken as independent and of mean zero: a sum of n products is then off by at most
    4 sqrt(n) eps |x||y| in all but 1 of 1500 cases. A logit has three such sums (the query's rotation, the anchor, the
    code), the output two (the weighted sum, the rotation back); an error d of all logits moves a weight by a factor
    exp(2 d).

    Source: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis (2019), theorem 2.4.
    """
    eps = torch.finfo(torch.float32).eps
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    largest_logit = scale * float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    logit = 4 * math.sqrt(3 * q.shape[-1]) * eps * largest_logit
    total = 4 * math.sqrt(k.shape[2] + v.shape[-1]) * eps
    rounding = 0.0 if out == torch.float32 else torch.finfo(out).eps / 2
    return float(v.double().norm(dim=-1).max()) * (2 * logit + total) + rounding * float(v.abs().max())
