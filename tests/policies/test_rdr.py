"""Rate-distortion retention: what it drops, what it spends bits on, and what it leaves alone."""

import pytest
import torch

from sphkv_compile.codecs.codebook import mse
from sphkv_compile.policies import DROP, Held, Rdr
from sphkv_compile.policies.rdr import NOISE
from sphkv_compile.spec import Tier

MENU = tuple(map(Tier.parse, ("K8V4", "K4V4", "K4V2")))
PRICES, PAGE = (204 * 16, 140 * 16, 108 * 16), 16


def held(pages=40, seed=0, tiers=None, fresh=None, kappa=1.0, **known):
    """One row of two heads; attention and values at random."""
    random = torch.Generator().manual_seed(seed)
    shape = 1, 2, pages, PAGE
    order = torch.randperm(pages * PAGE, generator=random)  # tokens lie in pages in any order
    positions = order.view(1, 1, pages, PAGE).expand(shape).int()
    mean, recent, expected = (torch.randn(shape, generator=random).mul(2).exp() / 1e4 for _ in range(3))
    facts = dict(mean=mean, recent=recent, expected=expected, value_norm=torch.rand(shape, generator=random) + 0.5)
    tiers = torch.zeros(1, 2, pages, dtype=torch.uint8) if tiers is None else tiers
    facts |= dict(kappa=torch.full((1, 2), float(kappa)), fresh=fresh) | known
    return Held(positions, tiers, torch.tensor([pages * PAGE + 200]), MENU, PRICES, **facts)


def bytes_of(plan):
    count = torch.stack([(plan == t).sum((2, 3)) for t in range(3)], -1)
    return (-(-count // PAGE) * torch.tensor(PRICES)).sum(-1)


@pytest.mark.parametrize("per_token", [5, 30, 70, 130, 204])
def test_every_head_keeps_within_its_bytes(per_token):
    view = held()
    budget = torch.tensor([[per_token * 640, per_token * 320]])
    plan = Rdr().plan(view, budget)
    assert bool((bytes_of(plan) <= budget).all())
    assert bool((bytes_of(plan) > budget - 2 * PRICES[0]).all()) or per_token == 204
    if per_token == 204:
        assert plan[0, 0].unique().tolist() == [0]


def test_what_no_query_looks_at_goes_first():
    view = held()
    silent = view.positions % 3 == 0
    zeros = {name: torch.where(silent, 0.0, getattr(view, name)) for name in ("mean", "recent", "expected")}
    view = held(**zeros)
    worth = torch.where(silent, 0.0, Rdr().worth(view))  # nor does its youth speak for it here
    policy = Rdr()
    policy.worth = lambda _: worth
    plan = policy.plan(view, torch.tensor([[108 * 300] * 2]))
    assert bool((plan[silent] == DROP).all()) and bool((plan[~silent] != DROP).any())


def test_noisy_heads_buy_key_bits():
    quiet, noisy = (Rdr().plan(held(kappa=kappa), torch.tensor([[150 * 640] * 2])) for kappa in (0.5, 30.0))
    wide = [int((plan == 0).sum()) for plan in (quiet, noisy)]
    assert wide[1] > 2 * wide[0] + 20


def test_precision_only_falls():
    pages = 40
    tiers = torch.arange(pages).view(1, 1, pages).expand(1, 2, pages).remainder(3).to(torch.uint8)
    view = held(tiers=tiers, fresh=torch.zeros(1, 2, 40, PAGE, dtype=torch.bool))
    budget = torch.tensor([[108 * 640] * 2])
    plan = Rdr().plan(view, budget)
    assert bool((plan >= tiers.unsqueeze(-1)).all())
    for fresh in (None, torch.ones(1, 2, 40, PAGE, dtype=torch.bool)):  # unseen, and in a narrow page
        again = Rdr().plan(Held(**{**view.__dict__, "fresh": fresh}), budget)
        assert bool((again >= tiers.unsqueeze(-1)).all())


def test_a_change_of_tier_is_paid_for_and_a_wider_one_cannot_be_had():
    """Rows: tokens of each tier, the widest first, then those no plan has seen. Columns: the drop, narrowest first."""
    rows = Rdr().losses(held(kappa=2.0))[0, 0]
    keys, narrow, wide = 2.0 * mse(4), mse(2), mse(4)
    plain = torch.tensor([1.0, NOISE * (keys + narrow), NOISE * (keys + wide), NOISE * (2.0 * mse(8) + wide)])
    inf = float("inf")
    expected = torch.stack([
        plain + torch.tensor([0.1, 0.1, 0.1, 0.0]),
        plain + torch.tensor([0.1, 0.1, 0.0, inf]),
        plain + torch.tensor([0.1, 0.0, inf, inf]),
        plain,
    ])  # fmt: skip
    torch.testing.assert_close(rows, expected)


def test_of_equal_tokens_the_first_in_the_tables_stay():
    ones = torch.ones(1, 2, 40, PAGE)
    view = held(mean=ones, recent=ones, expected=ones, value_norm=ones)
    policy = Rdr()
    policy.worth = lambda _: ones
    plan = policy.plan(view, torch.tensor([[108 * 160] * 2]))
    assert bool((plan.flatten(2)[..., :160] != DROP).all()) and int((plan != DROP).sum()) == 2 * 160


def test_without_statistics_the_young_and_the_long_stay():
    view = held(mean=None, recent=None, expected=None)
    worth = Rdr().worth(view)
    age = (view.length - view.positions).float()
    assert torch.allclose(worth, view.value_norm / (age + 64))
    some = held(expected=None)
    want = 0.3 * some.mean + 0.5 * some.recent
    assert bool((Rdr().worth(some) > want * some.value_norm).all())


def test_a_plan_needs_a_budget():
    with pytest.raises(ValueError, match="no budget; expected a budget"):
        Rdr().plan(held(), None)
