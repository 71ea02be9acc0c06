"""Rearranging a cache of kept tokens: content, tables and bytes, against caches that hold every token at one tier."""

import itertools
from dataclasses import replace

import pytest
import torch

from sphkv_compile.ops.append import append
from sphkv_compile.ops.pages import with_positions
from sphkv_compile.ops.read import dense
from sphkv_compile.policies import DROP
from sphkv_compile.runtime.pool import page_bytes, reserve
from sphkv_compile.runtime.retain import rearrange
from sphkv_compile.spec import Tier
from sphkv_compile.storage.arena import Arena, ArenaFull
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import LENGTH, Geometry, empty_state
from sphkv_compile.testing.oracle import random_tokens

MENU = tuple(map(Tier.parse, ("K8V4", "K4V4", "K4V2")))
LAYOUT = Layout("axis_cosine", MENU, 4, 16, 32, 16, 0, "half", 32, "rows", True)
G = Geometry(2, 3, 700, 32, 32, torch.float32, torch.float32, False, 2)


class Cache:
    """The cache under test, and where each of its coded tokens should be by now."""

    def __init__(self, nbytes=1 << 20):
        self.arena = Arena(nbytes)
        self.state = empty_state(LAYOUT, G, self.arena.data)
        self.tokens = random_tokens(G, 700)
        self.length = 0
        self.tier = torch.full((G.batch, G.heads, 700), -2)  # -1: dropped, -2: not coded yet

    def grow(self, count):
        reserve(self.state, LAYOUT, G, self.arena, count)
        q, k, v = (x[:, :, self.length : self.length + count] for x in self.tokens)
        append(self.state, LAYOUT, q, k, v, self.length, [0, 0])
        self.length += count
        coded = LAYOUT.sink + LAYOUT.coded_spans(self.length) * LAYOUT.span
        self.tier[:, :, LAYOUT.sink : coded][self.tier[:, :, LAYOUT.sink : coded] == -2] = 0

    def rearrange(self, tier):
        """To ``tier`` of each position, or -1."""
        positions = with_positions(self.state, LAYOUT).positions
        choice = tier.gather(2, positions.clamp(min=0).flatten(2).long()).view(positions.shape)
        done = rearrange(self.state, LAYOUT, G, self.arena, torch.where(choice < 0, DROP, choice).to(torch.uint8))
        self.tier = torch.where(self.tier >= 0, tier, self.tier)
        return done

    def check(self, direct):
        """Tables, bytes and content."""
        s, tiers = self.state, len(MENU)
        positions = with_positions(s, LAYOUT).positions
        used = s.held.sum(-1)
        assert bool((positions >= 0).flatten(2).sum(-1).eq((self.tier >= 0).sum(-1)).all())
        for b in range(G.batch):
            for h in range(G.heads):
                mine, n = s.tiers[b, h].tolist(), int(used[b, h])
                assert mine[:n] == sorted(mine[:n], reverse=True)
                assert [mine[:n].count(t) for t in range(tiers)] == s.held[b, h].tolist()
                filled = (positions[b, h, :n] >= 0).sum(-1)
                for t in range(tiers):  # one page of a tier is filled in part, at most
                    of_tier = filled[s.tiers[b, h, :n] == t]
                    assert int((of_tier < LAYOUT.page).sum()) <= 1 and bool((of_tier > 0).all())
                assert bool((s.table[b, h, :n] >= 0).all())
        sizes = torch.tensor([page_bytes(LAYOUT, G, t) for t in range(tiers)])
        places = [(o, int(sizes[t])) for o, t in zip(s.table.flatten().tolist(), s.tiers.flatten().tolist()) if o >= 0]
        assert self.arena.used == sum(size for _, size in places)
        places.sort()
        assert all(a + size // 64 <= b for (a, size), (b, _) in itertools.pairwise(places)), "two pages share bytes"
        k, v = dense(s, LAYOUT, self.length)
        for index, (want_k, want_v) in enumerate(direct):
            at = self.tier[:, :, : self.length] == index
            torch.testing.assert_close(k[at], want_k[:, :, : self.length][at], rtol=0.02, atol=0.02)
            torch.testing.assert_close(v[at], want_v[:, :, : self.length][at], rtol=2e-3, atol=1e-3)
        assert not bool(k[self.tier[:, :, : self.length] == -1].any())


@pytest.fixture(scope="module")
def direct():
    """Keys and values of every position, at each tier."""
    out = []
    for tier in MENU:
        layout = replace(LAYOUT, tiers=(tier,), kept=False)
        arena = Arena(1 << 20)
        state = empty_state(layout, G, arena.data)
        reserve(state, layout, G, arena, 700)
        q, k, v = random_tokens(G, 700)
        append(state, layout, q, k, v, 0, [0, 0])
        assert int(state.rows[0, LENGTH]) == 700
        out.append(dense(state, layout, 700))
    return out


def narrower(tier, seed, drop=0.3):
    """Some tokens one or two tiers down, some dropped."""
    draw = torch.rand(tier.shape, generator=torch.Generator().manual_seed(seed))
    down = torch.where(draw < drop, -1, torch.where(draw < drop + 0.2, (tier + 1).clamp(max=2), tier))
    return torch.where(tier < 0, tier, down)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_growing_and_rearranging_in_turns(seed, direct):
    cache = Cache()
    cache.grow(200)
    for turn in range(6):
        cache.rearrange(narrower(cache.tier, seed * 10 + turn))
        cache.check(direct)
        cache.grow(77)
        cache.check(direct)


def test_what_stays_is_not_touched(direct):
    cache = Cache()
    cache.grow(400)
    before = cache.state.table.clone(), cache.arena.data.clone()
    done = cache.rearrange(cache.tier)
    assert done == (0, 0, 0, 0, 0)
    assert torch.equal(cache.state.table, before[0]) and torch.equal(cache.arena.data, before[1])
    cache.rearrange(narrower(cache.tier, 1))
    table = cache.state.table.clone()
    assert cache.rearrange(cache.tier).moved == 0 and torch.equal(cache.state.table, table)


def test_a_policy_is_told_what_its_plan_did_wrong():
    """Another shape or dtype than what it was shown."""
    cache = Cache()
    for wrong in (torch.zeros(2, 3, 40, 16), torch.zeros(2, 3, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"returned torch.*; expected torch.uint8 \[2 rows, 3 kv heads, pages, 16"):
            rearrange(cache.state, LAYOUT, G, cache.arena, wrong)


def test_everything_can_go_and_its_bytes_serve_again(direct):
    """Bug: a page given up is not given back, and the arena, which is just large enough, runs out."""
    once = Cache()
    once.grow(400)
    cache = Cache(once.arena.used)
    for turn in range(3):
        cache.grow(100)
        done = cache.rearrange(torch.where(cache.tier >= 0, -1, cache.tier))
        assert done.dropped and done.freed_pages and done.new_pages == 0 and cache.arena.used == 0, turn
        cache.check(direct)
    cache.grow(100)
    cache.check(direct)


def test_an_arena_too_small_for_it_leaves_all_as_it_was(direct):
    """Four tokens of a page become narrower: there are two pages, filled in part, where there was one."""
    probe = Cache()
    probe.grow(52)
    cache = Cache(probe.arena.used)  # one span: two pages a head
    cache.grow(52)
    before = cache.state.table.clone(), cache.arena.data.clone(), cache.arena.used
    few = torch.where(cache.tier >= 0, (torch.arange(700) < 8).long(), cache.tier)
    with pytest.raises(ArenaFull):
        cache.rearrange(few)
    assert torch.equal(cache.state.table, before[0]) and torch.equal(cache.arena.data, before[1])
    assert cache.arena.used == before[2]
    cache.check(direct)
    cache.rearrange(torch.where(cache.tier >= 0, 2, cache.tier))
    cache.check(direct)


def test_a_row_begun_anew_gets_pages_of_its_own(direct):
    """Bug: narrow pages of what was there before pass for reserved ones, and a wide page is written over two."""
    cache = Cache()
    cache.grow(300)
    cache.rearrange(torch.where(cache.tier >= 0, 2, cache.tier))
    q, k, v = (x[:, :, :200] for x in cache.tokens)
    with pytest.raises(RuntimeError, match="no page is reserved"):
        append(cache.state, LAYOUT, q, k, v, 0, [0, 0])
    cache.state.held.zero_()
    cache.state.rows.copy_(empty_state(LAYOUT, G, cache.arena.data).rows)
    cache.length, cache.tier = 0, torch.full_like(cache.tier, -2)
    cache.grow(200)
    cache.check(direct)


def test_reserving_stops_at_the_capacity_and_takes_all_or_nothing():
    cache = Cache()
    cache.grow(650)
    reserve(cache.state, LAYOUT, G, cache.arena, 300)
    full = int((cache.state.table >= 0).sum(-1).max())
    assert full == LAYOUT.spans(700, False) * LAYOUT.pages_per_span
    small = Cache(20_000)
    with pytest.raises(ArenaFull):
        reserve(small.state, LAYOUT, G, small.arena, 300)
    assert small.arena.used == 0 and bool((small.state.table < 0).all())


def test_tiers_that_do_not_nest_are_refused_before_anything_is_given_up():
    cache = Cache()
    cache.grow(200)
    used = cache.arena.used
    choice = torch.full((*cache.state.table.shape, LAYOUT.page), DROP, dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not nest"):
        rearrange(cache.state, replace(LAYOUT, codec="chain"), G, cache.arena, choice)
    assert cache.arena.used == used


def test_a_token_never_gets_wider(direct):
    cache = Cache()
    cache.grow(300)
    cache.rearrange(torch.where(cache.tier >= 0, 2, cache.tier))
    table = cache.state.table.clone()
    with pytest.raises(
        ValueError, match=r"makes K8V4 of a token .* at K4V2; expected K4V2, .* K8V4/K4V4/K4V2, or DROP"
    ):
        cache.rearrange(torch.where(cache.tier >= 0, 0, cache.tier))
    assert torch.equal(cache.state.table, table)
