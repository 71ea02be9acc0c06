"""Utilities from exact logits: what is compared is what the plans read, and only the logits differ."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from sphkv_compile.eval import utilities
from sphkv_compile.eval.contenders import METHODS, USUAL, WHOLE, Cell
from sphkv_compile.eval.divergence import STEPS
from sphkv_compile.eval.exact import Exact, FromKeys
from sphkv_compile.eval.retention import SPEC, Coded, Prompt, coded_end, read
from sphkv_compile.ops.pages import read_statistics, with_positions
from sphkv_compile.runtime.retention import Retention
from sphkv_compile.runtime.sites import Sites, stacked
from sphkv_compile.testing.tiny import tiny

PROMPT, MORE = 600, 140
"""So many more that a span leaves the window, among tokens of which some were dropped."""


def ids(length: int = PROMPT + MORE) -> torch.Tensor:
    return torch.randint(5, 100, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return Prompt(tiny("llama", head_dim=64), ids()[:, :PROMPT])


@pytest.fixture(scope="module")
def planned(prompt) -> tuple[FromKeys, Sites]:
    """Two layers of two rows, under a budget that has dropped tokens, and keys of 8 bits: as good as exact."""
    cache = Exact(prompt, PROMPT + MORE, int(0.3 * PROMPT * prompt.token_bytes), tiers="K8V4")
    read(cache, ids()[:, PROMPT:])
    retention, sites = cache.pool.retention, stacked(list(cache.owners.values()))
    assert isinstance(retention, FromKeys) and len(sites.owners) == 2
    held = (with_positions(sites.state, sites.layout).positions >= 0).sum((2, 3))
    assert 0 < int(held.max()) < coded_end(PROMPT + MORE) - SPEC.sink
    return retention, sites


def test_dense_keys_of_all_tokens_are_there(prompt, planned):
    retention, sites = planned
    for owner, site in zip(sites.owners, prompt.sites.values()):
        assert retention.keys[owner].shape[2] == PROMPT + MORE
        assert torch.equal(retention.keys[owner][:, :, :PROMPT], site.k)


def test_plans_by_keys_of_8_bits_are_almost_by_exact_ones(planned):
    """Dropped tokens count for nothing in either; a wrong order of pages, queries or rows would be far off."""
    retention, sites = planned
    there = with_positions(sites.state, sites.layout).positions >= 0
    found, coded = (of._look(retention, sites, 128).expected for of in (FromKeys, Retention))
    assert float((found / coded)[there].log().abs().mean()) < 0.05
    assert not bool(found[~there].any())
    keep = torch.tensor([0, 20, 60, 120]).repeat(*there.shape[:2], 1)
    found, coded = (of._losses(retention, sites, keep, 128) for of in (FromKeys, Retention))
    torch.testing.assert_close(found, coded, rtol=0.1, atol=0)
    assert bool((found[..., :-1] > found[..., 1:]).all())


class Observed(utilities.Unplanned, Exact):
    """With dense keys, and no plan."""


def test_what_is_observed_is_from_keys(prompt):
    """The statistics that are written, against a softmax over the dense keys by hand."""
    cache = Observed(prompt, PROMPT, int(0.2 * PROMPT * prompt.token_bytes), tiers="K4V4")
    owners = list(cache.owners.values())
    ((_, seen),) = cache.pool.retention._observe(owners, 128)
    state, layout, site, place = owners[1].state, owners[1].layout, prompt.sites[1], (1, 0, 3, 17)
    position = int(with_positions(state, layout).positions[place])
    at = range(PROMPT - 125, PROMPT, 4)  # the newest and every fourth before it
    paid = [(site.scale * site.k[1, 0, : p + 1] @ site.q[1, g, p]).softmax(0)[position] for g in (0, 1) for p in at]
    paid_to_it = torch.stack(paid).mean()
    torch.testing.assert_close(seen.recent[2:][place], paid_to_it)  # behind the two rows of layer 0
    torch.testing.assert_close(read_statistics(state, layout)[1][place], paid_to_it, rtol=4e-3, atol=0)


def test_attention_from_keys_against_a_loop():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 20, 8)
    found = utilities.from_keys(q, k, 0.5)
    for h, c in ((0, 3), (1, 14), (1, 17), (0, 19)):
        paid = [
            (0.5 * k[0, h, : 15 + t] @ q[0, 2 * h + g, t]).softmax(0)[c] for g in (0, 1) for t in range(6) if c < 15 + t
        ]
        torch.testing.assert_close(found[0, h, c], torch.stack(paid).mean())


def test_both_are_of_the_same_tokens(prompt):
    """All that have left the window, in one order."""
    limit = int(0.125 * PROMPT * prompt.token_bytes)
    cache = utilities.Unplanned(prompt, PROMPT, limit, tiers="K8V8")
    for layer in prompt.growing:
        coded, exact = utilities.both(cache, layer)
        assert coded.shape == (2, 2, coded_end(PROMPT) - SPEC.sink)
        torch.testing.assert_close(coded, exact, rtol=0.1, atol=1e-6)
    assert int(Coded(prompt, PROMPT, limit, tiers="K8V8").owners[0].state.held.sum()) < cache.owners[0].state.held.sum()


def test_ranks_share_their_mean_where_they_are_equal():
    assert utilities.ranks(torch.tensor([[3.0, 1, 2, 2], [5, 5, 5, 0]])).tolist() == [[4, 1, 2.5, 2.5], [3, 3, 3, 1]]


def test_correlation_is_spearmans():
    order = torch.tensor([2.0, 0, 1, 4, 3])
    distance = (order - torch.arange(5)).square().sum()
    assert float(utilities.correlation(order, torch.arange(5.0).exp())) == pytest.approx(1 - 6 * distance / (5 * 24))
    assert float(utilities.correlation(order, -order)) == pytest.approx(-1)


def test_overlap_is_of_the_best_tenth():
    a, b = torch.arange(40.0), torch.arange(40.0)
    b[38], b[0] = 0, 38
    assert float(utilities.overlap(a, a)) == 1 and float(utilities.overlap(a, b)) == pytest.approx(3 / 4)


def test_a_row_for_the_orders_then_one_for_each_loss():
    todo = utilities.cells([0.15])
    found = list(utilities.rows(tiny("llama", head_dim=64), ids(PROMPT + STEPS + 1)[:1], todo))
    assert [(row["method"], row["budget"]) for row in found] == [(cell.method, cell.budget) for cell in todo]
    assert todo[0] == Cell(utilities.NAME, WHOLE)
    assert 0.9 < found[0]["lowest_correlation"] <= found[0]["correlation"] < 1
    assert 0.5 < found[0]["lowest_overlap"] <= found[0]["overlap"] <= 1
    kl = {row["method"]: row["kl"] for row in found[1:]}
    assert 0 < kl["rdr, one tier, exact logits"] != kl["rdr, one tier"] > 0


def test_what_no_cache_could_do_is_measured_on_request_only():
    assert set(METHODS) - set(USUAL) == {"rdr, exact logits", "rdr, one tier, exact logits"}
