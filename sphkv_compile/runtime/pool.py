"""A pool: the arena that the sites of one cache share, and the plans that are made between steps."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch

from sphkv_compile.policies import DROP, Held, Policy
from sphkv_compile.storage.arena import Arena
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import FAULT, FROZEN, LENGTH, SPANS, START, Geometry, State

if TYPE_CHECKING:
    from sphkv_compile.runtime.ownership import Owner


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
    """

    def __init__(self, nbytes: int, policy: Policy, plan_every: int, device: torch.device):
        self.arena = Arena(nbytes, device)
        self.policy, self.plan_every = policy, plan_every
        self.owners: weakref.WeakSet[Owner] = weakref.WeakSet()
        self.tokens_left = 0
        self.plans = self.freed_pages = 0

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        """The same pages at the same offsets, without owners: who is copied joins."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.arena, twin.policy, twin.owners = (
            copy.deepcopy(self.arena, memo),
            copy.deepcopy(self.policy),
            weakref.WeakSet(),
        )
        return twin

    def step(self, tokens: int) -> None:
        """Account for ``tokens`` new tokens; plan when what was reserved may not suffice."""
        self.tokens_left -= tokens
        if self.tokens_left < 0:
            self.plan(tokens)

    def plan(self, tokens: int) -> None:
        """Let the policy decide, then reserve pages for ``tokens`` more and for ``plan_every`` after them."""
        self.plans += 1
        self.tokens_left = self.plan_every
        for owner in list(self.owners):
            if owner.holds_codes:
                check_rows(owner.state)
                self._retain(owner)
                reserve(owner.state, owner.layout, owner.geometry, self.arena, tokens + self.plan_every)

    def _retain(self, owner: Owner) -> None:
        state = owner.state
        held = Held(state.positions, state.tiers, state.rows[:, LENGTH], owner.layout.tiers)
        tiers = self.policy.plan(held, None)
        drop = (tiers == DROP) & (state.positions >= 0)
        if bool(drop.any()):
            state.positions.masked_fill_(drop, -1)
            self.freed_pages += release_empty(state, owner.layout, owner.geometry, self.arena)

    @torch.inference_mode(False)
    def grow(self, nbytes: int) -> None:
        """A larger arena that holds the same pages at the same offsets; every state is pointed at it."""
        old = self.arena.data
        data = old.new_zeros(old.numel() + -(-nbytes // 64) * 64)
        data[: old.numel()] = old
        self.arena.data = data
        for owner in self.owners:
            owner.state = owner.state._replace(arena=data)
        CHANGES[0] += 1


def check_rows(state: State) -> None:
    """Raises: RuntimeError: a step on a GPU was told to write into codes, and left the row as it was."""
    if bool((state.rows[:, FROZEN] == FAULT).any()):
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
    """Give a page to every slot that ``tokens`` more tokens can fill."""
    if layout.kept:
        _reserve_behind(state, layout, g, arena, tokens)
        return
    total = state.anchors.shape[2]
    size = page_bytes(layout, g)
    table = state.table[:, 0].tolist()  # read once: a long cache has thousands of pages
    for row, (start, length, spans, *_) in enumerate(state.rows.tolist()):
        end = layout.coded_spans(max(length, start) + tokens - max(start, 0))
        slots = sorted({j % total for j in range(spans, min(end, spans + total))}) if total else []
        pages = [slot * layout.pages_per_span + i for slot in slots for i in range(layout.pages_per_span)]
        empty = [p for p in pages if table[row][p] < 0]
        if empty:
            with arena.all_or_nothing():
                offsets = [[arena.take(size) for _ in empty] for _ in range(g.heads)]
            state.table[row, :, empty] = torch.tensor(offsets, dtype=torch.int32, device=state.table.device)


def _reserve_behind(state: State, layout: Layout, g: Geometry, arena: Arena, tokens: int) -> None:
    """The same where pages are of kept tokens: behind those in use, at the widest tier. What a row that began anew left
    there at other tiers goes back."""
    behind = torch.arange(state.table.shape[2], device=state.table.device) >= state.held.sum(-1, keepdim=True)
    left = (behind & (state.table >= 0) & (state.tiers > 0)).nonzero().tolist()
    table, tiers, used = state.table.tolist(), state.tiers.tolist(), state.held.sum(-1).tolist()
    offsets: dict[tuple[int, int, int], int] = {}
    with arena.all_or_nothing():
        for row, head, slot in left:
            arena.give(table[row][head][slot], page_bytes(layout, g, tiers[row][head][slot]))
            table[row][head][slot] = offsets[row, head, slot] = -1
        for row, (start, length, spans, *_) in enumerate(state.rows.tolist()):
            end = layout.coded_spans(max(length, start) + tokens - max(start, 0))
            count = (min(end, state.anchors.shape[2]) - spans) * layout.pages_per_span
            for head, first in enumerate(used[row]):
                for slot in range(first, first + count):
                    if table[row][head][slot] < 0:
                        offsets[row, head, slot] = arena.take(page_bytes(layout, g))
    if offsets:  # at once: each write of its own is a launch
        device = state.table.device
        at = tuple(torch.tensor(list(offsets), device=device).unbind(1))
        state.table[at] = torch.tensor(list(offsets.values()), dtype=torch.int32, device=device)
        state.tiers[at] = 0


def release_empty(state: State, layout: Layout, g: Geometry, arena: Arena) -> int:
    """Return pages that hold no token any more; returns how many."""
    empty = (state.table >= 0) & (state.positions < 0).all(-1)
    coded = torch.arange(state.table.shape[2], device=state.table.device) < _coded_pages(state, layout)
    gone = (empty & coded).nonzero().tolist()
    for row, head, page in gone:
        arena.give(int(state.table[row, head, page]), page_bytes(layout, g, int(state.tiers[row, head, page])))
        state.table[row, head, page] = -1
    return len(gone)


def _coded_pages(state: State, layout: Layout) -> torch.Tensor:
    """Pages of spans that were encoded already; those reserved ahead are empty too, and stay."""
    live = torch.where(state.rows[:, START] >= 0, state.rows[:, SPANS], 0)
    return (live * layout.pages_per_span).view(-1, 1, 1)
