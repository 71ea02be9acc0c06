"""Moves: a page put together from others holds what direct encoding would have put there, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

from sphkv_compile.codecs import CODECS
from sphkv_compile.codecs.keys import radius_value
from sphkv_compile.kernels.gpu import moving
from sphkv_compile.ops.append import append
from sphkv_compile.ops.moves import move
from sphkv_compile.ops.pages import read_pages
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.moves import Moves
from sphkv_compile.storage.state import Geometry, empty_state
from sphkv_compile.testing.oracle import random_tokens
from sphkv_compile.testing.retained import retained

B, H, SINK, WINDOW, SPAN, COUNT = 2, 2, 4, 16, 64, 500
CASES = [
    (("K4V4", "K4V2"), 64, "rows"),
    (("K4V4", "K4V2"), 128, "tiles"),
    (("K8V4", "K4V4", "K4V2"), 128, "rows"),
    (("K8V4", "K4V4", "K4V2"), 64, "tiles"),
    (("K4V4", "K3V3", "K2V2"), 64, "rows"),
    (("K4V4", "K3V3", "K2V2"), 128, "tiles"),
    (("K8V8", "K3V8", "K2V4"), 128, "tiles"),
    (("K4V8", "K2V2"), 256, "tiles"),
]


def uniform(tier, lowest, dim, packing):
    """A cache of all tokens at one tier, whose radii fit at the lowest."""
    layout = Layout("axis_cosine", (Tier.parse(tier),), SINK, WINDOW, SPAN, 64, 0, "half", dim, packing)
    g = Geometry(B, H, COUNT, dim, dim, torch.float32, torch.float32, False)
    state = empty_state(layout, g, torch.zeros(0, dtype=torch.uint8))
    units = layout.page_bytes(layout.tiers[0], dim, dim, (4, 4)) // UNIT
    state = state._replace(arena=torch.zeros(state.table.numel() * units * UNIT, dtype=torch.uint8))
    state.table.copy_((torch.arange(state.table.numel()) * units).view_as(state.table))
    q, k, v = random_tokens(g, COUNT)
    form = replace(layout, tiers=(layout.tiers[0], Tier.parse(lowest)))  # the menu says how low a radius may go
    append(state, form, q, k, v, 0, [0] * B)
    return state, layout


def cache(menu, dim, packing):
    """Three of five tokens, at any tier of the menu; then the caches of all of them at each."""
    each = [uniform(tier, menu[-1], dim, packing) for tier in menu]
    tokens = each[0][0].table.shape[2] * 64
    draw = torch.rand(B, H, tokens, generator=torch.Generator().manual_seed(3))
    # a radius that is a share of its span's largest was written for the widest tier's
    tier = (draw * len(menu) / 0.6).long() if packing == "tiles" else torch.zeros_like(draw, dtype=torch.long)
    return *retained(each, torch.where(draw < 0.6, tier, -1)), each


def moved(state, layout):
    """Every second token of row 1, head 0, one or two tiers narrower, if it can be; in the place of the old pages."""
    held = int(state.held[1, 0].sum())
    tokens = []
    for page in range(held):
        tier = int(state.tiers[1, 0, page])
        position = read_pages(state, layout, layout.tiers[tier], state.table[1, 0, page : page + 1]).position
        position = position.contiguous().view(torch.int32).flatten().tolist()
        tokens += [
            (min(tier + 1 + at // 2 % 2, len(layout.tiers) - 1), int(state.table[1, 0, page]), tier, slot, at)
            for slot, at in enumerate(position)
            if at >= 0 and at % 2
        ]
    place = iter(state.table[1, 0, :held].tolist())
    rows, counts, told = [], [], {}
    for index in range(len(layout.tiers)):
        mine = [token for token in tokens if token[0] == index]
        counts.append(-(-len(mine) // 64))
        for at in range(0, len(mine), 64):
            rows.append((next(place), mine[at : at + 64]))
            told[rows[-1][0]] = index
    full = [[t[1:4] for t in mine] + [(-1, 0, 0)] * (64 - len(mine)) for _, mine in rows]
    parts = torch.tensor(full).unbind(-1)
    moves = Moves(
        tuple(counts), torch.tensor([offset for offset, _ in rows], dtype=torch.int32),
        torch.tensor([[1, 0]] * len(rows), dtype=torch.int32),
        parts[0].int(), parts[1].to(torch.uint8), parts[2].to(torch.uint8),
    )  # fmt: skip
    return moves, [[t[4] for t in mine] for _, mine in rows], told


@pytest.mark.parametrize(("menu", "dim", "packing"), CASES)
def test_a_moved_token_is_as_if_coded_there(menu, dim, packing):
    state, layout, each = cache(menu, dim, packing)
    moves, positions, tiers = moved(state, layout)
    before = state.arena.clone()
    move(state, layout, moves)
    if packing == "tiles":  # the kernel, interpreted: the same bytes
        fused = state._replace(arena=before.clone())
        moving.move(fused, layout, moves)
        assert torch.equal(fused.arena, state.arena)
    for offset, position in zip(moves.offsets.tolist(), positions):
        index = tiers[offset]
        found = read_pages(state, layout, layout.tiers[index], torch.tensor([offset]))
        got = found.position.contiguous().view(torch.int32).flatten()
        assert got.tolist() == position + [-1] * (64 - len(position))
        direct, own = each[index]
        token = torch.tensor(position) - SINK
        want = read_pages(direct, own, own.tiers[0], direct.table[1, 0])
        here = (found, torch.arange(len(position))), (want, token)
        for name in ("k", "v"):
            a, b = (getattr(x, name).flatten(0, 1)[at] for x, at in here)
            assert torch.equal(a, b), name
        scales = (x.v_scale.contiguous().view(torch.float16).flatten()[at] for x, at in here)
        torch.testing.assert_close(*scales, rtol=1e-3, atol=0)  # a unit of float16
        tops = [s.span_scales[1, 0, :, 1].float().repeat_interleave(SPAN)[token] for s in (state, direct)]
        a, b = (
            radius_value(x.radius.flatten(0, 1)[at].unsqueeze(1), top).squeeze(1) for (x, at), top in zip(here, tops)
        )
        unit = b * 1e-3 if packing == "tiles" else tops[0] / 254
        assert bool(((a - b).abs() <= unit).all())
    written = {
        unit
        for offset in moves.offsets.tolist()
        for unit in range(offset, offset + layout.page_bytes(layout.tiers[tiers[offset]], dim, dim, (4, 4)) // UNIT)
    }
    changed = (state.arena != before).view(-1, UNIT).any(1).nonzero().flatten().tolist()
    assert changed and set(changed) <= written


def test_what_cannot_be_moved_is_refused():
    state, layout, _ = cache(("K4V4", "K4V2"), 64, "rows")
    moves, *_ = moved(state, layout)
    before = state.arena.clone()
    with pytest.raises(ValueError, match="kept=True"):
        move(state, replace(layout, kept=False), moves)
    with pytest.raises(ValueError, match="16 bits"):
        move(state, replace(layout, tiers=(Tier(16, 16), Tier(4, 4))), moves)
    for codec in set(CODECS) - {"axis_cosine"}:
        with pytest.raises(ValueError, match="does not nest"):
            move(state, replace(layout, codec=codec), moves)
    assert torch.equal(state.arena, before)
