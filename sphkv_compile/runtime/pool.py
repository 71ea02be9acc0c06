"""A pool: the arena that the sites of one cache share, and the plans that are made between steps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sphkv_compile.ops.pages import holding, pages_in_use
from sphkv_compile.runtime.sites import TABLES, counters, stacked, together
from sphkv_compile.storage.arena import Arena, ArenaFull
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import FAULT, FROZEN, LENGTH, SPANS, START, Geometry, State

if TYPE_CHECKING:
    from sphkv_compile.runtime.ownership import Owner
    from sphkv_compile.runtime.retention import Retention

T = TypeVar("T")
CHANGES = [0]
"""How often any cache has changed hands or been laid out anew; while it stands still, what a runner found last time
still holds."""


class Pool:
    """Pages of several sites in one allocation.

    Pages are reserved at plan time for all the spans that may leave a window until the next plan, so that no step ever
    allocates. A plan reads the states' counters once; steps in between only count tokens.

    Args:
        nbytes: of the arena.
        plan_every: tokens between two plans.
        retention: what a budget makes of caches that may drop tokens; None: all tokens stay as they were coded.
    """

    def __init__(self, nbytes: int, plan_every: int, device: torch.device, retention: Retention | None = None):
        self.dead: list[tuple[Tensor, Tensor, Layout, Geometry]] = []
        self._arena = Arena(nbytes, device)
        self.plan_every, self.retention = plan_every, retention
        self.owners: weakref.WeakSet[Owner] = weakref.WeakSet()
        self.tokens_left = self.queries = 0
        self.plans = 0

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        """The same pages at the same offsets, without owners: who is copied joins."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.arena, twin.owners, twin.dead = copy.deepcopy(self.arena, memo), weakref.WeakSet(), []
        if self.retention is not None:
            twin.retention = self.retention.anew()
        return twin

    @property
    def arena(self) -> Arena:
        """Where the pages lie. Those of owners that have died, whose tables are in ``dead``, are free first."""
        while self.dead:
            with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
                table, tiers, layout, g = self.dead.pop()
                there = (table >= 0) & ~repeated(table)
                give_back(table[there], tiers[there], layout, g, self._arena)
        return self._arena

    @arena.setter
    def arena(self, arena: Arena) -> None:
        self._arena = arena

    @property
    def members(self) -> list[Owner]:
        """The owners, the oldest first, so that every rank plans alike."""
        return sorted(self.owners, key=lambda owner: owner.serial)

    def step(self, tokens: int) -> None:
        """Account for ``tokens`` new tokens; plan when what was reserved may not suffice."""
        self.tokens_left -= tokens
        if self.tokens_left < 0:
            self.plan(tokens)
        self.queries += tokens

    def settle(self, tokens: int) -> None:
        """After a call of ``tokens``: many of them are more than was reserved within the budget."""
        if self.retention is not None and tokens > self.plan_every:
            self.plan(0)

    def plan(self, tokens: int) -> None:
        """Let the policy decide, then reserve pages for ``tokens`` more, and for as many after them as come before the
        next plan."""
        self.plans += 1
        self.tokens_left = -1  # should this fail, the next step plans
        owners = [owner for owner in self.members if owner.holds_codes]
        if owners:
            check_rows(counters(owners, FROZEN))
        if self.retention is not None:
            kept = [owner for owner in owners if owner.layout.kept]
            for owner in kept:
                owner.unshare()  # statistics and tiers are each row's own
            self.retention.plan(self, kept)
        self.reserve(owners, max(tokens, self.plan_every))
        self.tokens_left = max(0, self.plan_every - tokens)

    def reserve(self, owners: list[Owner], tokens: int) -> None:
        """Give a page to every slot that so many more tokens can fill, in a larger arena if need be."""
        groups = together(owners)
        need = 0
        for group in groups:
            sites = stacked(group, (*TABLES, "rows"))
            count = int(missing(sites.state, sites.layout, tokens).sum())
            need += count * page_bytes(sites.layout, sites.geometry)
        if self.arena.used + need > self.arena.nbytes:
            self.resize(self.arena.used + need)
        for group in groups:
            self.fit(partial(self._reserve, group, tokens))

    def _reserve(self, owners: list[Owner], tokens: int) -> None:
        sites = stacked(owners, (*TABLES, "rows"))
        reserve(sites.state, sites.layout, sites.geometry, self.arena, tokens)
        sites.write_tables()

    def fit(self, take: Callable[[], T]) -> T:
        """``take`` pages; where they would fit but for holes between others, once these are closed, and where whole
        pages do not even so, in a larger arena, which the plan makes smaller again."""
        nbytes = self.arena.nbytes
        while True:
            try:
                return take()
            except ArenaFull:
                self.resize(nbytes)
                nbytes += nbytes // 8 + UNIT

    @torch.inference_mode(False)
    def resize(self, nbytes: int) -> None:
        """An arena of ``nbytes``, or of what is used if that is more, in which pages lie without holes. One of the same
        size stays where it is, so that a captured graph finds it."""
        members = self.members  # who dies from here on does so with the new offsets
        arena = self._allocated(max(nbytes, self.arena.used))
        old, new = self.arena.data.view(-1, UNIT), arena.data.view(-1, UNIT)
        for group in together(members):
            sites = stacked(group, TABLES)
            table, tiers = sites.state.table, sites.state.tiers
            there = table >= 0
            for index in range(len(sites.layout.tiers)):
                here, size = there & (tiers == index), page_bytes(sites.layout, sites.geometry, index)
                was, which = table[here].long().unique(return_inverse=True)  # rows may share a page
                first, units = arena.take_run(size, was.numel()), torch.arange(size // UNIT, device=was.device)
                now = first + torch.arange(was.numel(), device=was.device) * (size // UNIT)
                new[now.unsqueeze(-1) + units] = old[was.unsqueeze(-1) + units]
                table[here] = now[which].to(table.dtype)
            sites.write_tables()
        if arena.nbytes == self.arena.nbytes:
            self.arena.data.copy_(arena.data)
            arena.data, self.arena = self.arena.data, arena
            return
        self.arena = arena
        for owner in members:
            owner.state = owner.state._replace(arena=arena.data)
        CHANGES[0] += 1

    def _allocated(self, nbytes: int) -> Arena:
        try:
            return Arena(nbytes, self.arena.data.device)
        except RuntimeError as fault:  # of which torch.OutOfMemoryError is one
            raise MemoryError(
                f"sphkv: no memory for {nbytes:,} bytes of pages, of which {self.arena.used:,} are in use; the cache "
                "is as it was. Free memory on the device, crop or reset the cache, or give fewer bits or a budget"
            ) from fault


def check_rows(frozen: Tensor) -> None:
    """Raises: RuntimeError: a step on a GPU was told to write into codes, and left the row as it was."""
    if bool((frozen == FAULT).any()):
        raise RuntimeError(
            "sphkv: a decode step on the GPU wrote at a position that is coded already, which only eager code can "
            "undo; its row has given not-a-number since. Crop the cache in eager code (cache.crop) before going on."
        )


def page_bytes(layout: Layout, g: Geometry, tier: int = 0) -> int:
    """Bytes of one page of this site."""
    return layout.page_bytes(layout.tiers[tier], g.k_dim, g.v_dim, g.itemsize)


def arena_bytes(layout: Layout, g: Geometry) -> int:
    """Bytes of the pages that a site needs when it is full."""
    pages = layout.spans(g.capacity, g.rolling) * layout.pages_per_span + (len(layout.tiers) if layout.kept else 0)
    return g.batch * g.heads * pages * page_bytes(layout, g)


def reserve(state: State, layout: Layout, g: Geometry, arena: Arena, tokens: int) -> None:
    """Give a page to every slot that ``tokens`` more tokens can fill.

    Where pages are of kept tokens, these lie behind those in use, at the widest tier; what a row that began anew left
    there at other tiers goes back.
    """
    if layout.kept:
        behind = ~pages_in_use(state) & (state.table >= 0) & (state.tiers > 0)
        give_back(state.table[behind], state.tiers[behind], layout, g, arena)
        state.table[behind], state.tiers[behind] = -1, 0
    empty = missing(state, layout, tokens)
    offsets = arena.take(page_bytes(layout, g), int(empty.sum()))
    state.table[empty] = torch.tensor(offsets, dtype=torch.int32, device=state.table.device)


def give_back(offsets: Tensor, tiers: Tensor, layout: Layout, g: Geometry, arena: Arena) -> None:
    """Return pages, each of its tier. Shapes: int32[n], uint8[n]."""
    for tier in range(len(layout.tiers)):
        arena.give(offsets[tiers == tier].tolist(), page_bytes(layout, g, tier))


def repeated(table: Tensor) -> Tensor:
    """Places whose page stands in an earlier place too: rows that stem from one row share what it held.

    Shapes: int32[B, H, P] -> bool[B, H, P].
    """
    pages, order = table.flatten().sort(stable=True)
    again = torch.zeros_like(pages, dtype=torch.bool)
    again[order[1:]] = (pages[1:] == pages[:-1]) & (pages[1:] >= 0)
    return again.view_as(table)


def unshare(state: State, layout: Layout, g: Geometry, arena: Arena) -> None:
    """A page for every row that holds it, so that what one row writes is not seen by another.

    Raises:
        ArenaFull: the copies do not fit; what was copied stays, and a second call does the rest.
    """
    again, held = repeated(state.table), holding(state, layout)
    state.table[again & ~held] = -1  # reserved, by more than one
    units = state.arena.view(-1, UNIT)
    for tier in range(len(layout.tiers)):
        here, size = again & held & (state.tiers == tier), page_bytes(layout, g, tier)
        was = state.table[here].long()
        now = torch.tensor(arena.take(size, was.numel()), dtype=torch.int64, device=was.device)
        each = torch.arange(size // UNIT, device=was.device)
        units[now.unsqueeze(-1) + each] = units[was.unsqueeze(-1) + each]
        state.table[here] = now.to(state.table.dtype)


def missing(state: State, layout: Layout, tokens: int) -> Tensor:
    """Which places of the tables ``tokens`` more tokens can fill, and have no page. Shapes: -> bool[B, H, P]."""
    total, device = state.anchors.shape[2], state.table.device
    start, length, spans = (state.rows[:, column] for column in (START, LENGTH, SPANS))
    reach = torch.maximum(length, start) + tokens - start.clamp(min=0) - layout.sink - layout.window
    end = torch.div(reach, layout.span, rounding_mode="floor").clamp(min=0)
    place = torch.arange(state.table.shape[2], device=device)
    if layout.kept:
        first = state.held.sum(-1, keepdim=True)
        count = (end.clamp(max=total) - spans).clamp(min=0) * layout.pages_per_span
        ahead = (place >= first) & (place < first + count.view(-1, 1, 1))
    else:  # a rolling window's spans come round to their places again
        lap = (place // layout.pages_per_span - spans.view(-1, 1, 1)) % max(1, total)
        ahead = lap < (end - spans).view(-1, 1, 1)
    return ahead & (state.table < 0)
