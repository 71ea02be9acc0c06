"""The tensors that hold one site's cache, under the names that the ops use.

The order of the fields of :class:`State` is the order of the ops' state arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sphkv_compile.storage.layout import Layout

START, LENGTH, SPANS, BASE, FROZEN, READ = range(6)
"""Columns of ``rows``: first real position, end position, coded spans, position of column 0, pair scale is fixed, and
how many programs of a running step have read the others: zero between steps."""
WIDTH = READ + 1

FAULT = 2
"""Value of FROZEN in a row whose codes a GPU's step was told to write into, or whose kept tokens it was to begin anew:
only the host can undo a code, and only a plan gives pages. The row's
attention gives not-a-number from then on, nothing more is written, and the next plan raises; eager code that reads the
cache finds it as it was before."""

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}
"""Of keys and values."""

HIDDEN = -1e4
"""An additive mask hides at and below this: exp(-1e4) is zero. Models write -inf, the least float, -1e9 or -1e4."""


class State(NamedTuple):
    """One site's cache.

    Shapes: B rows, H kv heads, P pages, N spans, D / Dv head_dim of keys / values, R ring slots.

    * ``arena`` uint8[bytes]: pages of every site of the cache.
    * ``table`` int32[B, H, P]: a page's offset in the arena, in units of 64 bytes; -1 where none is reserved.
    * ``tiers`` uint8[B, H, P]: a page's tier, an index into the layout's menu.
    * ``positions`` int32[B, H, P, page]: the position that each slot holds; -1 where none. Pages of kept tokens hold
      their positions themselves, and this is empty: P is 0.
    * ``held`` int32[B, H, tiers]: pages in use by tier, where pages are of kept tokens; else tiers is 0.
    * ``anchors`` int8[B, H, N, D]: each span's mean key, rotated and scaled.
    * ``span_scales`` bfloat16[B, H, N, 2]: of the anchor row, and of the span's radii.
    * ``exact_k`` / ``exact_v`` model dtype[B, H, sink + R, D]: sinks, then the window ring (position p at p mod R).
    * ``pair_scale`` float32[B, H, D]: s of :mod:`sphkv_compile.codecs.scales`.
    * ``moments`` float64[B, H, D + 1]: sum of q^2 per dimension, and the number of queries in it.
    * ``rows`` int64[B, WIDTH]: the counters named above.
    * ``energy`` float64[B, H, 2]: sum of |s q|^2 since the pair scale was fixed, and the number of queries in it; the
      error certificates need it.
    * ``queries`` model dtype[B, HQ, Q, D]: the newest queries (position p at p mod Q), where pages are of kept tokens;
      else Q is 0.
    """

    arena: Tensor
    table: Tensor
    tiers: Tensor
    positions: Tensor
    held: Tensor
    anchors: Tensor
    span_scales: Tensor
    exact_k: Tensor
    exact_v: Tensor
    pair_scale: Tensor
    moments: Tensor
    rows: Tensor
    energy: Tensor
    queries: Tensor

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not grow with the number of tokens: ring, sinks, scales, moments, counters, queries."""
        fixed = (self.exact_k, self.exact_v, self.pair_scale, self.moments, self.rows, self.energy, self.queries)
        return sum(t.numel() * t.element_size() for t in fixed)

    @property
    def table_bytes(self) -> int:
        """Bytes beside the pages that grow with the capacity: tables, positions, anchors."""
        grown = (self.table, self.tiers, self.positions, self.held, self.anchors, self.span_scales)
        return sum(t.numel() * t.element_size() for t in grown)


STATE_FIELDS = State._fields


class Geometry(NamedTuple):
    """Shape of one site's dense cache, and ``group``, the query heads of a kv head.

    Shapes: K [batch, heads, capacity, k_dim], V [batch, heads, capacity, v_dim].
    """

    batch: int
    heads: int
    capacity: int
    k_dim: int
    v_dim: int
    k_dtype: torch.dtype
    v_dtype: torch.dtype
    rolling: bool
    group: int = 1

    @property
    def itemsize(self) -> tuple[int, int]:
        return self.k_dtype.itemsize, self.v_dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens that the cache has room for, over rows and kv heads."""
        return self.batch * self.heads * self.capacity

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense cache."""
        k, v = self.itemsize
        return self.tokens * (self.k_dim * k + self.v_dim * v)


@torch.inference_mode(False)
def empty_state(layout: Layout, g: Geometry, arena: Tensor) -> State:
    """A state that holds no token.

    Every tensor is initialised: masked slots are read and multiplied by zero, and 0 * NaN is NaN. None is an inference
    tensor, so that a cache may be used in inference mode and outside of it in turn.

    Raises:
        ValueError: a rolling window whose layout keeps single tokens.
    """
    if layout.kept and g.rolling:
        raise ValueError(
            "kept=True with a sliding window that is full: its pages are used again in turn, so none of them can keep "
            "single tokens; expected a layout with kept=False there"
        )
    spans = layout.spans(g.capacity, g.rolling)
    pages, device, slots = spans * layout.pages_per_span, arena.device, layout.sink + layout.ring
    if layout.kept:
        pages += len(layout.tiers)  # of each, one may be filled in part
    head = (g.batch, g.heads)

    def make(*shape: int, dtype: torch.dtype, fill: float = 0) -> Tensor:
        return torch.full((*head, *shape), fill, dtype=dtype, device=device)

    rows = torch.zeros(g.batch, WIDTH, dtype=torch.int64, device=device)
    rows[:, START] = -1
    return State(
        arena=arena,
        table=make(pages, dtype=torch.int32, fill=-1),
        tiers=make(pages, dtype=torch.uint8),
        positions=make(0 if layout.kept else pages, layout.page, dtype=torch.int32, fill=-1),
        held=make(len(layout.tiers) if layout.kept else 0, dtype=torch.int32),
        anchors=make(spans, g.k_dim, dtype=torch.int8),
        span_scales=make(spans, 2, dtype=torch.bfloat16),
        exact_k=make(slots, g.k_dim, dtype=g.k_dtype),
        exact_v=make(slots, g.v_dim, dtype=g.v_dtype),
        pair_scale=make(g.k_dim, dtype=torch.float32, fill=1),
        moments=make(g.k_dim + 1, dtype=torch.float64),
        rows=rows,
        energy=make(2, dtype=torch.float64),
        queries=torch.zeros(g.batch, g.heads * g.group, layout.queries, g.k_dim, dtype=g.k_dtype, device=device),
    )
