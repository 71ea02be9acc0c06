"""Shares of heads: the least sum of losses under one total, against every choice that there is."""

import itertools

import pytest
import torch

from sphkv_compile.policies.shares import EQUAL, GRID, keepers, shares, whole


def losses(heads, seed):
    """Falling with the share and convex, as different from head to head as they are in models."""
    random = torch.Generator().manual_seed(seed)
    scale, power = torch.randn(heads, 1, generator=random).mul(3).exp(), 1 + torch.rand(heads, 1, generator=random) * 3
    return scale * torch.tensor(GRID) ** -power


@pytest.mark.parametrize("seed", range(5))
def test_against_every_choice(seed):
    """Three heads: no choice of grid points within the total loses less than what a multiplier finds before the rest is
    handed out."""
    found = losses(3, seed)
    weights = torch.tensor([1.0, 2.0, 0.5])
    got = shares(found, weights)
    assert float((got * weights).sum()) == pytest.approx(float(weights.sum()), rel=1e-5)
    grid = torch.tensor(GRID)
    least = min(
        sum(float(found[i, j]) for i, j in enumerate(choice))
        for choice in itertools.product(range(len(GRID)), repeat=3)
        if float((grid[list(choice)] * weights).sum()) <= float(weights.sum())
    )
    # the loss at the shares that were found, between grid points as at the next lower one
    index = [int((grid <= share + 1e-6).sum()) - 1 for share in got.tolist()]
    assert sum(float(found[i, max(0, j)]) for i, j in enumerate(index)) <= least * 1.35


def test_equal_heads_share_alike():
    assert torch.allclose(shares(losses(1, 0).expand(7, -1), torch.ones(7)), torch.ones(7))


def test_who_loses_nothing_gives():
    found = losses(2, 0)
    found[0] = 0
    got = shares(found, torch.ones(2))
    assert got[0] < 0.3 and got[1] > 1.7


def test_what_others_have_left_is_shared_alike_or_by_what_is_lost():
    """Bug: shares of less than an equal one on average are solved for as if there were that much."""
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    for mean in (0.1, 0.5, 0.9):
        got = shares(losses(4, 1), weights, mean)
        assert float((got * weights).sum()) == pytest.approx(mean * float(weights.sum()), rel=1e-5)
    found = losses(4, 1)
    assert not torch.allclose(shares(found, weights, 0.5), 0.5 * shares(found, weights), rtol=0.01)


def test_keepers_are_those_that_lose_most_with_an_equal_share():
    found = torch.zeros(5, len(GRID))
    found[:, EQUAL] = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])
    found[0, 0] = 100.0  # with less than that; nobody asks
    needs, least = torch.full((5,), 500.0), torch.full((5,), 100.0)
    assert keepers(found, needs, least, 5000, 2).nonzero().flatten().tolist() == [1, 3]  # of equal ones the first
    assert keepers(found, needs, least, 5000, 0).sum() == 0 and keepers(found, needs, least, 5000, 5).all()


@pytest.mark.parametrize(("room", "count"), [(400, 0), (500, 0), (1299, 1), (1300, 2), (1699, 2), (2500, 5)])
def test_no_more_keepers_than_leave_the_others_the_least(room, count):
    """Five heads of 500 bytes, or 100 at least."""
    needs, least = torch.full((5,), 500.0), torch.full((5,), 100.0)
    kept = keepers(losses(5, 2), needs, least, room, 5)
    assert int(kept.sum()) == count
    assert count == 0 or float(needs[kept].sum() + least[~kept].sum()) <= room


def test_whole_units_by_hand():
    found = whole(torch.tensor([2.9, 1.6, 0.5, 3.0, 1.5]) * 100, 100)
    assert found.tolist() == [300, 200, 0, 300, 100]  # two whole units of what .9, .6, .5 and .5 leave
    assert whole(torch.full((4,), 250.0), 100).tolist() == [300, 300, 200, 200]
    wanted = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 5000
    found = whole(wanted, 64)
    assert wanted.sum() - 64 < found.sum() <= wanted.sum() and bool(((found - wanted).abs() < 64).all())
