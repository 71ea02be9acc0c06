"""The allocation against every possible choice where there are few, and against the dual bound where there are many."""

import itertools

import pytest
import torch

from sphkv_compile.policies.solver import Prices, allocate

LOSS = (1.0, 0.0145, 0.0021, 0.001)
PRICES = (0, 108, 140, 204)


def draw(heads, tokens, seed=0, spread=2.0):
    return torch.randn(heads, tokens, generator=torch.Generator().manual_seed(seed)).mul(spread).exp()


def total(worth, loss, chosen):
    """Shapes: float32[H, N], float32[T], int64[H, N] -> float64[H]."""
    return (worth.double().clamp(min=0) * torch.tensor(loss).double()[chosen]).sum(-1)


def run(worth, budget, loss=LOSS, prices=PRICES, page=1, kind=None):
    heads = worth.shape[0]
    kind = torch.zeros(worth.shape, dtype=torch.int64) if kind is None else kind
    table = torch.tensor(loss).view(1, -1, len(prices)).expand(heads, -1, -1)
    return allocate(worth, kind, table, Prices(tuple(p * page for p in prices), page), torch.tensor(budget))


def cost(chosen, page=1):
    counts = torch.stack([(chosen == t).sum(-1) for t in range(len(PRICES))], -1)
    return (-(-counts // page) * page * torch.tensor(PRICES)).sum(-1)


@pytest.mark.parametrize("seed", range(6))
def test_against_every_choice(seed):
    """Seven tokens: never over the budget, and worse than the best of 4^7 by less than what one token can gain."""
    worth = draw(1, 7, seed)
    every = torch.tensor(list(itertools.product(range(4), repeat=7)))
    bytes_, losses = torch.tensor(PRICES)[every].sum(-1), total(worth.expand(len(every), -1), LOSS, every)
    for budget in range(0, 7 * 204 + 50, 61):
        chosen = run(worth, [budget])
        assert int(cost(chosen)) <= budget
        best = float(losses[bytes_ <= budget].min())
        found, gain = float(total(worth, LOSS, chosen)), float(worth.max())
        assert best - 1e-9 <= found < best + gain, budget
        if int(cost(chosen)) == budget:  # nothing is left to spend: this is the best
            assert found <= best * 1.001
    assert run(worth, [7 * 204]).unique().tolist() == [3] and run(worth, [107]).sum() == 0


@pytest.mark.parametrize("share", [0.03, 0.1, 0.25, 0.6])
def test_the_dual_gap_is_a_thousandth(share):
    """Of 2,048 tokens; of very few kept ones, the bytes of less than one more token are a larger part."""
    worth = draw(4, 2048, 3)
    budget = int(share * 2048 * 256)
    chosen = run(worth, [budget] * 4)
    found, slack = total(worth, LOSS, chosen), budget - cost(chosen)
    points = worth.double().unsqueeze(-1) * torch.tensor(LOSS).double()
    gaps = []
    for head in range(4):

        def dual(x, own=points[head]):
            return float((own + x * torch.tensor(PRICES)).amin(-1).sum() - x * budget)

        low, high = 1e-9, 1e3
        for _ in range(200):  # it is concave
            left, right = (low * low * high) ** (1 / 3), (low * high * high) ** (1 / 3)
            low, high = (left, high) if dual(left) < dual(right) else (low, right)
        bound = dual(low)
        gaps.append(float(found[head]) / bound - 1)
        assert gaps[-1] >= -1e-12 and 0 <= int(slack[head]) < 108
        assert float(found[head]) - low * int(slack[head]) < bound * 1.0003
    assert sum(gaps) / 4 < (1e-3 if share > 0.05 else 3e-3)


def test_more_bytes_never_lose_and_pages_are_paid_whole():
    worth, before = draw(3, 3000, 1), None
    for budget in (0, 10_000, 40_000, 41_000, 100_000, 250_000, 3000 * 204 + 64 * 204):
        chosen = run(worth, [budget] * 3, page=64)
        assert bool((cost(chosen, 64) <= budget).all())
        found = total(worth, LOSS, chosen)
        assert before is None or bool((found <= before * (1 + 1e-9)).all())
        before = found
    assert chosen.unique().tolist() == [3]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_no_slot_of_a_page_is_left_empty(share):
    """While tokens are dropped, or coded more coarsely than a page that has room for them."""
    worth = draw(3, 2048, 5)
    chosen = run(worth, [int(share * 2048 * 256)] * 3, page=64)
    for head in range(3):
        counts = torch.bincount(chosen[head], minlength=4)
        assert not bool((counts[1:] % 64).any()) and int(counts[0]) > 0
        least = [float(worth[head][chosen[head] == t].min()) for t in range(1, 4) if counts[t]]
        best = [float(worth[head][chosen[head] == t].max()) for t in range(4) if counts[t]]
        assert all(low >= 0.91 * high for low, high in zip(least, best))  # but for NEAR, the wider a tier, the worthier


def test_worthless_tokens_fill_a_page_that_is_paid_for():
    """The first of them, since none is worth more; the worthy stay. Bug: what lies in the last bin counts as absent."""
    worth = torch.zeros(1, 300)
    worth[0, 100:170] = 1.0
    chosen = run(worth, [2 * 64 * 108], page=64)[0]
    assert chosen[100:170].tolist() == [1] * 70 and chosen[:58].tolist() == [1] * 58
    assert int(chosen.sum()) == 128


def test_heads_do_not_meddle_and_scale_does_not_matter():
    worth = draw(3, 500, 2)
    budgets = [5000, 20_000, 60_000]
    together = run(worth, budgets)
    for head in range(3):
        assert torch.equal(run(worth[head : head + 1] * 2.0**-40, budgets[head : head + 1])[0], together[head])


def test_of_equal_tokens_the_first_win():
    chosen = run(torch.ones(1, 100), [20 * 108 + 50])
    assert chosen[0, :20].tolist() == [1] * 20 and chosen[0, 20:].sum() == 0
    nothing = run(torch.zeros(1, 100), [20 * 108])  # tokens worth nothing may be kept or not, but within the bytes
    assert int(cost(nothing)) <= 20 * 108


def test_many_equal_tokens_share_all_the_bytes():
    """More than there are runs, at one choice and at four; bytes of less than a run are left."""
    worth = torch.ones(2, 20_000)
    one = run(worth, [100 * 12_800] * 2, loss=(1.0, 0.1), prices=(0, 100))
    assert bool(((one > 0).sum(-1) > 12_800 - 5).all()) and bool(((one > 0).sum(-1) <= 12_800).all())
    four = run(worth, [108 * 10_000] * 2)
    assert bool((cost(four) <= 108 * 10_000).all()) and bool((cost(four) > 108 * 9_990).all())


def test_no_number_is_no_trouble():
    worth = draw(1, 300, 8)
    worth[0, 7], worth[0, 9] = float("inf"), float("nan")
    chosen = run(worth, [300 * 50])
    assert chosen[0, 7] == 3 and int(cost(chosen)) <= 300 * 50
    worth[0, 7] = 1.0
    assert run(worth, [300 * 50])[0, 9] == 0
    assert run(torch.empty(2, 0), [100, 100]).shape == (2, 0)


def test_prices_ascend():
    with pytest.raises(ValueError, match="ascending"):
        Prices((0, 10, 10), 1)
    with pytest.raises(ValueError, match="ascending"):
        Prices((5, 10), 1)


def test_what_is_not_there_gets_nothing():
    worth = draw(1, 200, 4)
    worth[0, ::3] = -1
    chosen = run(worth, [1 << 40])
    assert chosen[0, ::3].sum() == 0 and bool((chosen[0, worth[0] >= 0] == 3).all())
    there = worth[:, worth[0] >= 0]
    assert torch.equal(run(worth, [9000])[:, worth[0] >= 0], run(there, [9000]))


def test_kinds_have_their_own_losses():
    """What is held narrow cannot become wide again, and what would change pays for it."""
    worth, kind = draw(1, 400, 5), torch.arange(400).view(1, -1) % 2
    inf = float("inf")
    free, narrow = LOSS, (1.0, LOSS[1], inf, inf)
    chosen = run(worth, [400 * 150], loss=(free, narrow), kind=kind)
    assert int(chosen[0, 1::2].max()) == 1 and int(chosen[0, ::2].max()) == 3
    assert torch.equal(run(worth, [30_000], loss=(free, free), kind=kind), run(worth, [30_000]))
    sticky = (1.1, LOSS[1] + 0.1, LOSS[2], LOSS[3] + 0.1)  # held at 2
    stay = run(worth, [400 * 204], loss=(sticky,))
    assert bool((stay == 2).all()) and bool((run(worth, [400 * 204]) == 3).all())


def test_a_choice_above_the_hull_is_never_made():
    worth = draw(1, 1000, 6)
    chosen = run(worth, [60_000], loss=(1.0, 0.9, 0.01, 0.005))
    assert not bool((chosen == 1).any()) and bool((chosen == 2).any())
