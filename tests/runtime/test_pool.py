"""Plans: pages are there before a step needs them, and come back when a policy lets go."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager

from sphkv_compile.ops.append import append
from sphkv_compile.ops.read import dense
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool, arena_bytes, page_bytes
from sphkv_compile.runtime.sites import together
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import FAULT, FROZEN, LENGTH, Geometry
from sphkv_compile.testing.oracle import random_tokens

LAYOUT = Layout.of(CacheSpec(bits=4, window=8, span=16, page=8), "half", 16)


def made(capacity: int = 200, plan_every: int = 8, rolling: bool = False) -> Owner:
    g = Geometry(2, 2, capacity, 16, 16, torch.float32, torch.float32, rolling)
    pool = Pool(arena_bytes(LAYOUT, g), plan_every, torch.device("cpu"))
    owner = Owner(LAYOUT, g, pool)
    owner.holds_codes = True
    return owner


@pytest.mark.parametrize("chunks", [[1] * 180, [64, 1, 1, 50, 1, 60], [180], [7] * 25])
@pytest.mark.parametrize("plan_every", [1, 8, 128])
def test_every_step_finds_its_pages(chunks, plan_every):
    """Bug: a plan that reserves for the tokens after it, and not for the chunk at hand. append would raise."""
    owner, at = made(plan_every=plan_every), 0
    q, k, v = random_tokens(owner.geometry, 200)
    for count in chunks:
        part = slice(at, at + count)
        owner.pool.step(count)
        append(owner.state, LAYOUT, q[:, :, part], k[:, :, part], v[:, :, part], at, [0, 0])
        at += count
    assert owner.state.rows[:, LENGTH].tolist() == [at, at]
    used = int((owner.state.table >= 0).sum()) * page_bytes(LAYOUT, owner.geometry)
    assert owner.pool.arena.used == used <= owner.pool.arena.nbytes


@pytest.mark.parametrize(("tokens", "plans"), [(1, 3), (7, 4), (50, 3), (75, 2)])
def test_plans_are_rare(tokens, plans):
    """Of 150 tokens, however they come: once in 50, so that a memory of as many queries misses none."""
    owner = made(plan_every=50)
    for _ in range(0, 150, tokens):
        owner.pool.step(tokens)
    assert owner.pool.plans == plans


def test_a_rolling_window_does_not_grow():
    """2,000 tokens through a window of 40: no page more than its laps need, and the arena as it was."""
    owner = made(capacity=40, rolling=True)
    q, k, v = random_tokens(owner.geometry, 100)
    for at in range(2000):
        one = slice(at % 100, at % 100 + 1)
        owner.pool.step(1)
        append(owner.state, LAYOUT, q[:, :, one], k[:, :, one], v[:, :, one], at, [0, 0])
    assert owner.pool.arena.used <= owner.pool.arena.nbytes == arena_bytes(LAYOUT, owner.geometry)
    assert int(owner.state.positions.max()) < 2000 <= int(owner.state.positions.max()) + 8 + 2 * 16


def test_growing_keeps_what_is_held_bit_for_bit():
    owner = made(capacity=100)
    q, k, v = random_tokens(owner.geometry, 90)
    owner.pool.step(90)
    append(owner.state, LAYOUT, q, k, v, 0, [0, 0])
    before = dense(owner.state, LAYOUT, 90)
    wanted = owner.geometry._replace(capacity=300)
    owner.pool.resize(arena_bytes(LAYOUT, wanted))
    owner.relayout(300, rolling=False)
    assert all(torch.equal(a, b) for a, b in zip(before, dense(owner.state, LAYOUT, 90)))
    owner.pool.step(200)
    more = random_tokens(owner.geometry, 200, seed=5)
    append(owner.state, LAYOUT, *more, 90, [0, 0])
    coded = slice(0, 4 + 4 * 16)  # sinks and the four spans that had left the window
    after = dense(owner.state, LAYOUT, 90)
    assert all(torch.equal(a[:, :, coded], b[:, :, coded]) for a, b in zip(before, after))


def test_a_resized_arena_has_no_holes():
    """Pages of two owners, between them those that a third gave back, in an arena of just what is used."""
    first = made()
    g, pool = first.geometry, first.pool
    gone, second = Owner(LAYOUT, g, pool), Owner(LAYOUT, g, pool)
    owners = (first, gone, second)
    for owner in owners:
        owner.holds_codes = True
    pool.step(130)
    for seed, owner in enumerate(owners):
        append(owner.state, LAYOUT, *random_tokens(g, 130, seed=seed), 0, [0, 0])
    before = [dense(owner.state, LAYOUT, 130) for owner in (first, second)]
    del owner, owners, gone
    pool.resize(0)
    assert pool.arena.nbytes == pool.arena.used == pool.arena.tail * 64
    for owner, (k, v) in zip((first, second), before):
        assert owner.state.arena is pool.arena.data
        assert all(torch.equal(a, b) for a, b in zip((k, v), dense(owner.state, LAYOUT, 130)))
    address = pool.arena.data.data_ptr()
    pool.resize(pool.arena.nbytes)  # where a captured graph knows it
    assert pool.arena.data.data_ptr() == address and first.state.arena is pool.arena.data
    for owner, (k, v) in zip((first, second), before):
        assert all(torch.equal(a, b) for a, b in zip((k, v), dense(owner.state, LAYOUT, 130)))
    offsets = torch.cat([o.state.table[o.state.table >= 0] for o in (first, second)])
    assert offsets.unique().numel() == offsets.numel()


def test_a_row_that_a_device_could_not_write_is_an_error_at_the_next_plan():
    owner = made()
    owner.pool.plan(1)
    owner.state.rows[1, FROZEN] = FAULT
    with pytest.raises(RuntimeError, match=r"coded already.*cache\.crop"):
        owner.pool.plan(1)
    owner.export("eager code reads it")
    assert owner.state.rows[1, FROZEN] == 1  # what it holds is sound, and may be taken over again


def test_who_dies_while_a_graph_is_traced_gives_its_pages_back():
    """The garbage collector may come by inside of a fake tensor's kernel, where every real tensor counts as meta."""
    owner = made()
    owner.pool.step(100)
    append(owner.state, LAYOUT, *random_tokens(owner.geometry, 100), 0, [0, 0])
    pool = owner.pool
    assert pool.arena.used > 0
    with FakeTensorMode() as mode, in_kernel_invocation_manager(mode):
        del owner
        gc.collect()
    assert pool.arena.used == 0


def test_sites_of_one_kind_go_in_nearly_equal_groups():
    """Bug: thirty layers at once and two after them, which cost a plan as much again."""
    first = made()
    kinds = first.geometry, first.geometry._replace(batch=3)
    owners = [Owner(LAYOUT, geometry, first.pool) for geometry in kinds for _ in range(7)]
    slots = owners[0].state.table.numel() * LAYOUT.page
    groups = together(owners[:7], most=3 * slots)
    assert [len(group) for group in groups] == [2, 2, 3]
    assert [owner for group in groups for owner in group] == owners[:7]
    assert [len(group) for group in together(owners, most=1)] == [1] * 14  # at least one
    assert [len(group) for group in together(owners, most=1 << 40)] == [7, 7]  # kinds are not mixed
