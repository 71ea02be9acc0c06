"""Retention: what a policy chose becomes pages and tables, between two steps.

A page all of whose tokens stay is left where it is if it is full. The others of a tier, and the tokens that come to it
from wider tiers, are packed into new pages by position, so that a row and kv head has one partly filled page of a tier
at most. Bytes of pages that are given up serve the new ones at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.ops.moves import check_moves, move
from sphkv_compile.ops.pages import trimmed, with_positions
from sphkv_compile.policies import DROP
from sphkv_compile.runtime.pool import give_back, page_bytes
from sphkv_compile.storage.arena import Arena
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.moves import Moves
from sphkv_compile.storage.state import Geometry, State


class Done(NamedTuple):
    """What one rearrangement did. Units: tokens of a kv head, pages."""

    dropped: int
    demoted: int
    moved: int
    freed_pages: int
    new_pages: int


def rearrange(state: State, layout: Layout, g: Geometry, arena: Arena, choice: Tensor) -> Done:
    """Bring every token to its tier, or drop it; tables, counters and the arena follow.

    Pages that are reserved for spans to come stay behind those in use.

    Args:
        choice: tier of each token, an index into the menu not smaller than its own, or :data:`DROP`; what it says of
            empty slots does not matter.

    Shapes: ``choice`` uint8[B, H, P, page], of all places of the tables or of the first, with all that are in use.

    Raises:
        ValueError: a token would get wider, ``choice`` has another shape, or the layout's tiers do not nest.
        ArenaFull: the new pages do not fit where the old ones were. In all cases nothing has changed.
    """
    check_moves(layout)
    expected = (g.batch, g.heads, layout.page)
    if choice.dtype != torch.uint8 or choice.dim() != 4 or (*choice.shape[:2], choice.shape[3]) != expected:
        raise ValueError(
            f"sphkv: the policy's plan() returned {choice.dtype} {list(choice.shape)}; expected torch.uint8 [{g.batch} "
            f"rows, {g.heads} kv heads, pages, {layout.page} slots], as Held.positions is shaped"
        )
    heads, slots = g.batch * g.heads, choice.shape[2]
    first = trimmed(state, slots)
    positions = with_positions(first, layout).positions.view(heads, slots, layout.page)
    used = state.held.sum(-1).view(heads, 1)
    table, tier = first.table.view(heads, slots), first.tiers.view(heads, slots)
    wanted = torch.where(positions >= 0, choice.view(heads, slots, layout.page), DROP)
    if bool((wanted < tier.unsqueeze(-1)).any()):
        at = (wanted < tier.unsqueeze(-1)).nonzero()[0].tolist()
        was, now = (str(layout.tiers[int(x[tuple(at[: x.dim()])])]) for x in (tier, wanted))
        raise ValueError(
            f"sphkv: the policy's plan() makes {now} of a token that is coded at {was}; expected {was}, a tier that "
            f"follows it in the menu {'/'.join(map(str, layout.tiers))}, or DROP"
        )

    there = positions >= 0
    stays = there & (wanted == tier.unsqueeze(-1))
    in_use = torch.arange(slots, device=used.device) < used
    count, kept = there.sum(-1), stays.sum(-1)
    whole = in_use & (kept == layout.page)
    single = _single(in_use & (kept == count) & (count > 0) & ~whole, wanted, whole, tier, len(layout.tiers))
    whole = whole | single
    goes = there & (wanted == DROP)
    dropped, demoted = torch.stack([goes.sum(), (there & ~stays & ~goes).sum()]).tolist()

    packed = there & ~goes & ~whole.unsqueeze(-1)
    head, slot, inside = packed.nonzero(as_tuple=True)
    to = wanted[head, slot, inside].long()
    # by tier, then head, then position
    order = ((to * heads + head) << 32 | positions[head, slot, inside]).argsort()
    head, slot, inside, to = (x[order] for x in (head, slot, inside, to))
    page, within, of = _pages(to * heads + head, layout.page)
    target, owner = of // heads, of % heads

    old = in_use & ~whole
    given, counts = table[old], torch.bincount(target, minlength=len(layout.tiers)).tolist()
    with arena.all_or_nothing():
        give_back(given, tier[old], layout, g, arena)
        taken = [o for index, count in enumerate(counts) for o in arena.take(page_bytes(layout, g, index), count)]
    offsets = torch.tensor(taken, dtype=torch.int32, device=used.device)

    shape = (target.shape[0], layout.page)
    sources = torch.full(shape, -1, dtype=torch.int32, device=used.device)
    sources[page, within] = table[head, slot]
    tiers, places = (torch.zeros(shape, dtype=torch.uint8, device=used.device) for _ in range(2))
    tiers[page, within], places[page, within] = tier[head, slot], inside.to(torch.uint8)
    owners = torch.stack([owner // g.heads, owner % g.heads], 1).int()
    move(state, layout, Moves(tuple(counts), offsets, owners, sources, tiers, places))
    _tables(state, layout, whole, in_use, offsets, owner, target)
    return Done(dropped, demoted, head.shape[0], given.shape[0], target.shape[0])


def _single(alone: Tensor, wanted: Tensor, whole: Tensor, tier: Tensor, menu: int) -> Tensor:
    """Partly filled pages that may stay too: where nothing else is packed into their tier.

    Shapes: ``alone`` bool[heads, P], all of whose tokens stay; ``wanted`` int64[heads, P, page] -> bool[heads, P].
    """
    single = torch.zeros_like(alone)
    for index in range(menu):
        packed = ((wanted == index) & ~whole.unsqueeze(-1)).sum(-1)  # of each page, tokens that go to this tier
        only = (packed > 0).sum(-1, keepdim=True) == 1
        single |= alone & (tier == index) & only & (packed > 0)
    return single


def _pages(group: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted tokens into pages, each of one group: page and slot of every token, then, of every page, its group.

    Shapes: int64[n] -> int64[n] twice, int64[M].
    """
    groups, count = torch.unique_consecutive(group, return_counts=True)
    pages = -(-count // page)
    first = pages.cumsum(0) - pages
    rank = torch.arange(group.shape[0], device=group.device) - (count.cumsum(0) - count).repeat_interleave(count)
    return first.repeat_interleave(count) + rank // page, rank % page, groups.repeat_interleave(pages)


def _tables(
    state: State, layout: Layout, whole: Tensor, in_use: Tensor, offsets: Tensor, owner: Tensor, target: Tensor
) -> None:
    """Each head's pages anew: the narrowest first, then those reserved, which are of the widest.

    Shapes: ``whole``, ``in_use`` bool[heads, P], of the first places; ``offsets``, ``owner``, ``target`` [M] of the new
    pages.
    """
    heads, slots = whole.shape[0], state.table.shape[2]
    menu = len(layout.tiers)
    whole, in_use = (F.pad(x, (0, slots - x.shape[1])) for x in (whole, in_use))
    table, tiers = state.table.view(heads, slots), state.tiers.view(heads, slots)
    reserved = ~in_use & (table >= 0)
    keep_head, keep_slot = (whole | reserved).nonzero(as_tuple=True)
    rank = torch.where(reserved[keep_head, keep_slot], menu, menu - 1 - tiers[keep_head, keep_slot].long())
    head = torch.cat([keep_head, owner])
    rank = torch.cat([rank, menu - 1 - target])
    offset = torch.cat([table[keep_head, keep_slot], offsets])
    order = (head * (menu + 1) + rank).argsort(stable=True)
    head, rank, offset = head[order], rank[order], offset[order]
    count = torch.bincount(head, minlength=heads)
    slot = torch.arange(head.shape[0], device=head.device) - (count.cumsum(0) - count)[head]
    table.fill_(-1)
    tiers.zero_()
    table[head, slot] = offset.int()
    tiers[head, slot] = torch.where(rank == menu, 0, menu - 1 - rank).to(torch.uint8)
    held = torch.zeros(heads, menu, dtype=torch.int32, device=head.device)
    used = rank < menu
    held.index_put_((head[used], menu - 1 - rank[used]), torch.ones_like(head[used], dtype=torch.int32), True)
    state.held.copy_(held.view_as(state.held))
