"""The evaluation of budgets: what is measured is what ships, every stored byte counts, and more of them lose less."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import StaticCache

import sphkv_compile
from sphkv_compile.eval import contenders, divergence, tables
from sphkv_compile.eval.baselines import POSITION, Evicted, Recency, Recoded
from sphkv_compile.eval.contenders import METHODS, WHOLE, Cell, cells
from sphkv_compile.eval.kivi import Kivi
from sphkv_compile.eval.quanto import Quanto
from sphkv_compile.eval.retention import WINDOW, Cache, Coded, Prompt, coded_end, continue_greedily, geometry, read
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.policies import KeepAll
from sphkv_compile.runtime.budget import full_bytes
from sphkv_compile.spec import CacheSpec
from sphkv_compile.testing.tiny import tiny

PROMPT, STEPS, SHARE = 600, 40, 0.2
CAPACITY = PROMPT + STEPS


def ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(5, 100, (rows, CAPACITY + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def document():
    return divergence.Document(tiny("llama", head_dim=64), ids(), PROMPT)


def kl(document: divergence.Document, cache: Cache) -> float:
    return document.score(Cell("", 0), cache)["kl"]


def limit(document: divergence.Document, share: float) -> int:
    return int(share * PROMPT * document.prompt.token_bytes)


def test_what_is_measured_is_what_ships(document):
    """The same prompt and the same tokens through torch.compile: the same logits, and the same bytes."""
    model = tiny("llama", head_dim=64)
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    cache.early_initialization(1, model.config.num_key_value_heads, 64, model.dtype, "cpu")
    options = {"inductor": False, "budget": limit(document, SHARE), "window": WINDOW}
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend=sphkv_compile.backend, options=options, fullgraph=True)
    with torch.no_grad():
        for part in ids()[:, :-1].split((PROMPT, STEPS), 1):
            compiled = step(part, **{cache_keyword(model): cache}, use_cache=True).logits
    ours = Coded(document.prompt, CAPACITY, limit(document, SHARE))
    torch.testing.assert_close(read(ours, document.following), compiled, atol=2e-4, rtol=2e-4)
    assert ours.counted_bytes == sphkv_compile.report(cache).budgeted_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_reference_is_the_model(family):
    model = tiny(family, head_dim=64)
    with torch.no_grad():
        expected = model(ids(2)[:, :-1]).logits[:, PROMPT:]
    prompt = Prompt(model, ids(2)[:, :PROMPT])
    following = ids(2)[:, PROMPT:-1]
    torch.testing.assert_close(read(Cache(prompt), following), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read(Cache(prompt), following, chunk=16), expected, atol=1e-4, rtol=1e-4)


def test_exact_tiers_are_dense(document):
    assert abs(kl(document, Coded(document.prompt, CAPACITY, bits=16))) < 1e-6


def test_a_baseline_that_keeps_everything_loses_nothing(document):
    assert kl(document, Evicted(document.prompt, limit(document, 2.0), Recency)) == 0


def test_dropping_nothing_is_one_tier(document, monkeypatch):
    """Pages of kept tokens, none of which was dropped, against pages of consecutive ones."""
    monkeypatch.setattr(Coded, "counted_bytes", 0)  # more is held than the budget that we claim
    kept = Coded(document.prompt, CAPACITY, limit(document, SHARE), tiers="K4V4", policy=KeepAll())
    whole = Coded(document.prompt, CAPACITY, bits="K4V4")
    assert kept.spec.chooses and not whole.spec.chooses
    expected = read(whole, document.following)
    torch.testing.assert_close(read(kept, document.following), expected, atol=1e-4, rtol=1e-4)


def test_a_budget_that_holds_all_tokens_chooses_nothing(document):
    shapes = [geometry(site, CAPACITY) for site in document.prompt.growing.values()]
    enough = full_bytes(CacheSpec(bits="K8V4", window=WINDOW), shapes)
    cache = Coded(document.prompt, CAPACITY, enough)
    assert not cache.spec.chooses and cache.counted_bytes <= enough


@pytest.mark.parametrize("method", [name for name, contender in METHODS.items() if contender.budgeted])
def test_bytes_are_within_the_budget(document, method):
    found = {}
    for share in (0.15, 0.3):
        (row,) = contenders.rows([Cell(method, share)], document.prompt, PROMPT, STEPS, document.score)
        assert 0.6 < row["total_bytes_per_token"] / (4 * 64 * share) <= 1
        found[share] = row["kl"]
    assert found[0.15] > found[0.3] > 0


@pytest.mark.parametrize("method", ["rdr", "H2O bf16", "ExpectedAttention bf16"])
def test_a_stream_stays_within_the_budget(method):
    model, stream = tiny("llama", head_dim=64), ids()[:, : PROMPT + 1]
    (row,) = divergence.rows(model, stream, [Cell(method, 0.25)], streaming=True)
    assert 0.3 < row["total_bytes_per_token"] / (4 * 64 * 0.25) <= 1 and row["kl"] > 0
    assert (row["aside_bytes_per_token"] > 0) == (method == "rdr")
    assert row["perplexity"] == pytest.approx(row["dense_perplexity"] * torch.tensor(row["nll_delta"]).exp().item())


def test_methods_differ():
    """With heads enough that some have pages to give to others, and not bytes for all."""
    share = 0.15
    wide = divergence.Document(tiny("llama", heads=6, kv_heads=6, head_dim=64), ids(), PROMPT)
    todo = cells(list(METHODS), [share])
    found = {row["method"]: row["kl"] for row in contenders.rows(todo, wide.prompt, PROMPT, STEPS, wide.score)}
    assert len({round(x, 9) for x in found.values()}) == len(METHODS), found
    assert [cell.budget for cell in todo] == [share if METHODS[cell.method].budgeted else WHOLE for cell in todo]


def test_a_budget_that_is_too_small_is_said(document):
    (row,) = contenders.rows([Cell("rdr", 0.001)], document.prompt, PROMPT, STEPS, document.score)
    assert "at least" in row["refused"] and row["total_bytes_per_token"] is None


def test_sliding_windows_stay_dense_and_are_not_counted():
    prompt = Prompt(tiny("gemma3", head_dim=64), ids()[:, :PROMPT])
    assert list(prompt.growing) == [1] and prompt.token_bytes == 2 * 2 * 64 * 2
    cache = Coded(prompt, CAPACITY, int(0.2 * PROMPT * prompt.token_bytes))
    assert list(cache.owners) == [1] and list(cache.k) == [0]
    read(cache, ids()[:, PROMPT:-1])
    assert cache.k[0].shape[2] == CAPACITY


def test_bytes_of_exact_tokens(document):
    cache = Evicted(document.prompt, limit(document, 0.2), Recency)
    held = cache.held[0][0, :, 4 : coded_end(PROMPT)].sum(-1)
    heads, each = document.prompt.heads, 2 * 64 * 2 + POSITION
    assert len(set(held.tolist())) == 1 and cache.counted_bytes == int(held[0]) * heads * each
    assert cache.counted_bytes <= limit(document, 0.2) < cache.counted_bytes + heads * each


def test_bytes_of_coarse_tokens(document):
    method = Kivi(4, 2, 32)
    cache = Recoded(document.prompt, method)
    tokens = coded_end(PROMPT) - 4
    assert cache.counted_bytes == tokens * document.prompt.heads * 2 * 64 * method.total_bits(64, 128) / 8
    spans = document.prompt.sites[0].k[0, :, 4 : 4 + tokens].unflatten(1, (-1, 128))
    assert torch.equal(cache.k[0][0, :, 4 : 4 + tokens], method.keys(spans, None).flatten(1, 2))
    assert torch.equal(cache.k[0][:, :, 4 + tokens :], document.prompt.sites[0].k[:, :, 4 + tokens :])


def test_quanto_is_the_cache_of_transformers():
    pytest.importorskip("optimum.quanto")
    spans = torch.randn(2, 3, 128, 64)
    found = Quanto(4).values(spans)
    assert 0.001 < (found - spans).square().mean() < 0.02
    torch.testing.assert_close(found[1, 2, 5], Quanto(4).values(spans[1:, 2:])[0, 0, 5])


def test_rows_of_a_batch_are_read_alike():
    """Whoever stands beside a row does not change what it says, where nothing is shared but the call."""
    prompt = Prompt(tiny("llama", head_dim=64), ids(2)[:, :PROMPT])
    alone = Prompt(prompt.model, ids(2)[1:, :PROMPT])
    last = ids(2)[:, PROMPT : PROMPT + 1]
    both = continue_greedily(Coded(prompt, CAPACITY, bits="K4V4"), last, 8)
    assert both.shape == (2, 8)
    assert torch.equal(both[1:], continue_greedily(Coded(alone, CAPACITY, bits="K4V4"), last[1:], 8))


def test_means_are_geometric():
    rows = [{"model": "m", "method": "rdr", "budget": b, "kl": x} for b, x in ((0.1, 1.0), (0.1, 4.0), (0.2, 3.0))]
    refused = {"model": "m", "method": "rdr", "budget": 0.01, "refused": "too small"}
    assert tables.means([*rows, refused], "m") == {"rdr": {0.2: pytest.approx(3.0), 0.1: pytest.approx(2.0)}}
    assert tables.means([dict(row, needle=row["kl"]) for row in rows], "m", "needle")["rdr"][0.1] == 2.5
