"""The matrix that every policy joins."""

import pytest
import torch

from sphkv_compile.policies import DROP, POLICIES, Held
from sphkv_compile.spec import POLICIES as NAMES
from sphkv_compile.spec import Tier


def held(rows: int = 2, heads: int = 3, pages: int = 4, page: int = 8) -> Held:
    positions = torch.arange(pages * page, dtype=torch.int32).view(pages, page).expand(rows, heads, pages, page).clone()
    positions[..., -1, 4:] = -1
    tiers = torch.arange(rows * heads * pages, dtype=torch.uint8).view(rows, heads, pages) % 2
    return Held(positions, tiers, torch.full((rows,), pages * page), (Tier(8, 4), Tier(4, 4)))


def test_spec_and_registry_agree():
    assert tuple(POLICIES) == NAMES


@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_is_a_tier_of_the_menu_or_a_drop(name):
    view = held()
    plan = POLICIES[name]().plan(view, None)
    assert plan.dtype == torch.uint8 and plan.shape == view.positions.shape
    assert set(plan.unique().tolist()) <= {0, 1, DROP}


@pytest.mark.parametrize("name", POLICIES)
def test_plans_are_deterministic(name):
    assert torch.equal(POLICIES[name]().plan(held(), None), POLICIES[name]().plan(held(), None))


def test_keep_all_keeps_every_token_at_its_tier():
    view = held()
    plan = POLICIES["keep_all"]().plan(view, 1)
    assert torch.equal(plan, view.tiers[..., None].expand_as(plan))
