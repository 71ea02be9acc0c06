"""A machine asks a cache for whatever comes to its mind, beside an oracle that holds dense tensors."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from caches import model
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sphkv_compile import SphericalCache

HEADS, GROUP, DIM = 2, 2, 16
MOST, ROWS = 200, 6
SDPA = torch.nn.functional.scaled_dot_product_attention


class Oracle:
    """Dense keys and values of a layer. At fewer than 16 bits what left the window is what the cache decodes."""

    def __init__(self, k, v):
        self.k, self.v = k, v


class Caches(RuleBasedStateMachine):
    """Several caches, each with its oracle: forks of the first, which must not see one another."""

    @initialize(
        bits=st.sampled_from([16, 16, 4, "K8V4", "K4V2"]),
        sizes=st.sampled_from([(4, 8, 16, 8), (0, 0, 16, 16), (1, 3, 32, 16), (4, 40, 16, 8), (7, 1, 8, 8)]),
        capacity=st.sampled_from([None, MOST]),
        plan_every=st.sampled_from([1, 7, 128]),
        seed=st.integers(0, 99),
        tokens=st.sampled_from([1, 5, 30, 60, 90]),
    )
    def begin(self, bits, sizes, capacity, plan_every, seed, tokens):
        sink, window, span, page = sizes
        self.exact, self.random = bits == 16, torch.Generator().manual_seed(seed)
        self.config = model().config
        cache = SphericalCache(
            self.config, max_cache_len=capacity, bits=bits, sink=sink, window=window, span=span, page=page,
            plan_every=plan_every,
        )  # fmt: skip
        self.caches: list[tuple[SphericalCache, list[Oracle]]] = [(cache, self.nothing(2))]
        self.attend(0, tokens)

    def nothing(self, rows):
        return [Oracle(*(torch.zeros(rows, HEADS, 0, DIM) for _ in range(2))) for _ in range(2)]

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def pick(self, which):
        return self.caches[which % len(self.caches)]

    WHICH = st.integers(0, 5)

    @rule(which=WHICH, count=st.integers(1, 4))
    def decode(self, which, count):
        self.attend(which, count)

    @rule(which=WHICH, count=st.integers(20, 70))
    def prefill(self, which, count):
        self.attend(which, count)

    def attend(self, which, count):
        """New tokens in every layer; the attention of each is that over the oracle's keys and values."""
        cache, oracles = self.pick(which)
        rows, _, length, _ = oracles[0].k.shape
        if length + count > MOST:
            return
        for layer, oracle in enumerate(oracles):
            k, v = self.draw(rows, HEADS, count, DIM), self.draw(rows, HEADS, count, DIM)
            q = self.draw(rows, HEADS * GROUP, count, DIM)
            if not self.exact and length:  # codes are what they decode to
                oracle.k, oracle.v = cache.layers[layer].keys, cache.layers[layer].values
            oracle.k, oracle.v = torch.cat([oracle.k, k], 2), torch.cat([oracle.v, v], 2)
            mask = torch.ones(count, length + count, dtype=torch.bool).tril(length)
            got = SDPA(q, *cache.update(k, v, layer), attn_mask=mask[None, None], enable_gqa=True)
            want = SDPA(q, oracle.k, oracle.v, attn_mask=mask, enable_gqa=True)
            # float32 sums of 200 terms of size 1 on both sides
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)

    @rule(which=WHICH, count=st.one_of(st.integers(0, 5), st.integers(0, 80)))
    def crop(self, which, count):
        cache, oracles = self.pick(which)
        length = oracles[0].k.shape[2]
        count = min(count, length)
        cache.crop(-count)
        for oracle in oracles:
            oracle.k, oracle.v = oracle.k[:, :, : length - count], oracle.v[:, :, : length - count]

    @rule(which=WHICH, order=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS))
    def batch_select_indices(self, which, order):
        cache, oracles = self.pick(which)
        rows = torch.tensor(order) % oracles[0].k.shape[0]
        cache.batch_select_indices(rows)
        for oracle in oracles:
            oracle.k, oracle.v = oracle.k[rows], oracle.v[rows]

    @rule(which=WHICH, order=st.permutations(range(ROWS)))
    def reorder_cache(self, which, order):
        cache, oracles = self.pick(which)
        rows = torch.tensor(order)[: oracles[0].k.shape[0]] % oracles[0].k.shape[0]
        cache.reorder_cache(rows)
        for oracle in oracles:
            oracle.k, oracle.v = oracle.k[rows], oracle.v[rows]

    @rule(which=WHICH, repeats=st.integers(1, 3))
    def batch_repeat_interleave(self, which, repeats):
        cache, oracles = self.pick(which)
        if oracles[0].k.shape[0] * repeats <= ROWS:
            cache.batch_repeat_interleave(repeats)
            for oracle in oracles:
                oracle.k, oracle.v = (x.repeat_interleave(repeats, 0) for x in (oracle.k, oracle.v))

    @rule(which=WHICH, tokens=st.integers(1, 60))
    def reset(self, which, tokens):
        cache, oracles = self.pick(which)
        cache.reset()
        oracles[:] = self.nothing(oracles[0].k.shape[0])
        self.attend(which, tokens)

    @precondition(lambda self: len(self.caches) < 3)
    @rule(which=WHICH)
    def fork(self, which):
        cache, oracles = self.pick(which)
        self.caches.append((copy.deepcopy(cache), [Oracle(o.k.clone(), o.v.clone()) for o in oracles]))

    @rule(which=WHICH)
    def save_and_load(self, which):
        cache, oracles = self.pick(which)
        if oracles[0].k.shape[2]:
            with tempfile.TemporaryDirectory() as folder:
                cache.save(Path(folder, "cache"))
                self.caches[which % len(self.caches)] = SphericalCache.load(Path(folder, "cache"), self.config), oracles

    @rule(which=WHICH, more=st.integers(0, 3))
    def plan_in_another_arena(self, which, more):
        cache, _ = self.pick(which)
        for pool in cache.coded.pools.values():
            pool.resize(pool.arena.nbytes * more)
            pool.plan(0)

    @invariant()
    def pages_are_where_they_should_be(self):
        for cache, oracles in self.caches:
            assert cache.get_seq_length() == oracles[0].k.shape[2]
            for pool in cache.coded.pools.values():
                tables = [owner.state.table for owner in pool.members]
                pages = torch.cat([t[t >= 0].unique() for t in tables])
                assert len(pages) == len(pages.unique()), "two layers hold one page"
                owner = pool.members[0]
                g = owner.geometry
                size = owner.layout.page_bytes(owner.layout.tiers[0], g.k_dim, g.v_dim, g.itemsize)
                assert pool.arena.used == len(pages) * size, "a page is lost, or held twice"

    @invariant()
    def what_is_read_is_what_was_written(self):
        for cache, oracles in self.caches if self.exact else ():
            for layer, oracle in zip(cache.layers, oracles):
                if layer.is_initialized and oracle.k.shape[2]:
                    assert torch.equal(layer.keys, oracle.k) and torch.equal(layer.values, oracle.v)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


class TestMachine(Caches.TestCase):  # type: ignore[name-defined]
    settings = settings(max_examples=60, stateful_step_count=15, **QUIET)


@pytest.mark.slow
class TestMachineAtLength(Caches.TestCase):  # type: ignore[name-defined]
    settings = settings(max_examples=2000, stateful_step_count=25, **QUIET)
