"""The matrix that every policy joins."""

import dataclasses

import pytest
import torch

from sphkv_compile.policies import DROP, POLICIES, Held
from sphkv_compile.spec import POLICIES as NAMES
from sphkv_compile.spec import SHARING, Tier

PRICES = 120, 80
"""Bytes of a page of each tier."""


def held(rows: int = 2, heads: int = 3, pages: int = 4, page: int = 8) -> Held:
    positions = torch.arange(pages * page, dtype=torch.int32).view(pages, page).expand(rows, heads, pages, page).clone()
    positions[..., -1, 4:] = -1
    tiers = torch.arange(rows * heads * pages, dtype=torch.uint8).view(rows, heads, pages) % 2
    share = torch.rand(positions.shape, generator=torch.Generator().manual_seed(1))
    length = torch.full((rows,), pages * page)
    return Held(positions, tiers, length, (Tier(8, 4), Tier(4, 4)), PRICES, mean=share, recent=share)


def budget(per_head: int) -> torch.Tensor:
    return torch.full((2, 3), per_head)


def test_spec_and_registry_agree():
    assert tuple(POLICIES) == NAMES
    assert tuple(name for name, policy in POLICIES.items() if policy.shares) == SHARING


@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_is_a_tier_of_the_menu_or_a_drop(name):
    view = held()
    plan = POLICIES[name]().plan(view, budget(250))
    assert plan.dtype == torch.uint8 and plan.shape == view.positions.shape
    assert set(plan.unique().tolist()) <= {0, 1, DROP}


@pytest.mark.parametrize("name", POLICIES)
def test_plans_are_deterministic(name):
    assert torch.equal(*(POLICIES[name]().plan(held(), budget(250)) for _ in "ab"))


@pytest.mark.parametrize("name", POLICIES)
def test_with_bytes_for_all_nothing_is_dropped(name):
    view = held()
    plan = POLICIES[name]().plan(view, budget(4 * PRICES[0]))
    assert bool((plan[view.positions >= 0] != DROP).all())


@pytest.mark.parametrize(
    ("name", "worth"),
    [
        ("window", lambda view: view.positions.float()),
        ("heavy_hitter", lambda view: view.mean),
        ("expected_attention", lambda view: view.recent),
        ("snapkv", lambda view: torch.nn.functional.avg_pool1d(view.recent.flatten(2), 5, 1, 2).view_as(view.recent)),
    ],
)
def test_what_eviction_keeps(name, worth):
    """The most worthy tokens, at the tier that they have; bytes for one page of each tier."""
    view = held(pages=6)
    share = torch.where(view.positions >= 0, view.mean, 0.0)  # here tokens lie in order, so neighbours are neighbours
    view = dataclasses.replace(view, mean=share, recent=share, tiers=torch.zeros_like(view.tiers))
    plan = POLICIES[name]().plan(view, torch.full((2, 3), 2 * PRICES[0]))
    kept = plan[0, 0] != DROP
    assert set(plan[0, 0].unique().tolist()) == {0, DROP} and int(kept.sum()) == 16
    least = worth(view)[0, 0][view.positions[0, 0] >= 0].topk(16).values[-1]
    assert bool((worth(view)[0, 0][kept] >= 0.99 * least).all())  # tokens that differ by less are equal to the solver


def test_expected_attention_reads_what_is_expected_and_values_lengths():
    view = held()
    random = torch.Generator().manual_seed(3)
    expected, norm = (torch.rand(view.positions.shape, generator=random) for _ in range(2))
    policy, some = POLICIES["expected_attention"](), torch.full((2, 3), 2 * PRICES[0])
    assert torch.equal(
        policy.plan(dataclasses.replace(view, expected=expected, value_norm=norm), some),
        policy.plan(dataclasses.replace(view, recent=expected * norm), some),
    )


@pytest.mark.parametrize(("bytes_", "tiers", "kept"), [(4 * 120, {0}, 28), (4 * 119, {1}, 28), (2 * 80, {1}, 16)])
def test_uniform_is_the_widest_tier_that_fits_or_the_newest_at_the_narrowest(bytes_, tiers, kept):
    view = held()
    view = dataclasses.replace(view, tiers=torch.zeros_like(view.tiers))
    plan = POLICIES["uniform"]().plan(view, torch.full((2, 3), bytes_))[view.positions >= 0].view(2, 3, -1)
    assert set(plan[plan != DROP].tolist()) == tiers and bool(((plan != DROP).sum(-1) == kept).all())
    assert bool((plan[..., -kept:] != DROP).all())  # tokens lie in order here


def test_keep_all_keeps_every_token_at_its_tier():
    view = held()
    plan = POLICIES["keep_all"]().plan(view, 1)
    assert torch.equal(plan, view.tiers[..., None].expand_as(plan))
