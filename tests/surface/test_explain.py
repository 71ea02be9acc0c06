"""explain(): every attention with its idiom or its reason, and the model's cache left as it was."""

import pytest
import torch
from rich.console import Console
from transformers import StaticCache

import sphkv_compile
from sphkv_compile.explain import LENGTHS, bytes_per_token
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.testing.gpt_fast import SliceCopy
from sphkv_compile.testing.tiny import tiny


@pytest.mark.parametrize(("family", "idiom"), [("llama", "static_index"), ("gemma3", "static_index")])
def test_a_model_without_inputs_is_traced_at_one_decode_step(family, idiom):
    e = sphkv_compile.explain(tiny(family), measure=False)
    assert e.matched == len(e.rows) == 2
    assert {row.idiom for row in e.rows} == {idiom}
    assert f"modeling_{family}.py:" in e.rows[0].source


def test_refusals_are_named_with_their_line():
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    e = sphkv_compile.explain(model, torch.zeros(1, 4, dtype=torch.int64), use_cache=False, measure=False)
    assert e.matched == 0 and len(e.refused) == 2
    assert "K and V do not come from a cache" in e.refused[0].reason
    del cache


def test_the_cache_is_as_before():
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids, kept = torch.arange(6)[None], {cache_keyword(model): cache}
    with torch.no_grad():
        model(ids, **kept)
    keys = cache.layers[0].keys.clone()
    sphkv_compile.explain(model, ids[:, :1], use_cache=True, measure=False, **kept)
    assert type(cache.layers[0].keys) is torch.Tensor
    assert torch.equal(cache.layers[0].keys, keys)
    assert int(cache.get_seq_length()) == 6


def test_bytes_by_hand():
    """D 64: codes 32 + 32, radius, index, scale 4, position 4, table 5 a page of 64, anchor row 68 a span of 128."""
    layout = Layout.of(CacheSpec(bits=4))
    assert bytes_per_token(layout, 64, 64, (2, 2)) == pytest.approx(72 + 5 / 64 + 68 / 128)
    row = sphkv_compile.explain(SliceCopy(head_dim=64), torch.zeros(1, 1, 256), 3, measure=False).rows[0]
    assert row.idiom == "slice_copy" and row.dense_bytes == 2 * 128 * 4
    assert row.coded_bytes == pytest.approx(2 * (72 + 5 / 64 + 68 / 128))


def test_break_even_is_a_length_or_none():
    e = sphkv_compile.explain(tiny("llama", head_dim=64))
    assert e.break_even is None or 0 < e.break_even <= LENGTHS[-1]


def test_a_budget_is_explained_at_the_tier_that_it_buys():
    e = sphkv_compile.explain(tiny("llama", head_dim=64), options={"budget": 1.0}, measure=False)
    assert e.matched == 2


def test_it_prints():
    console = Console(width=160)
    with console.capture() as shown:
        console.print(sphkv_compile.explain(tiny("llama"), measure=False))
    text = shown.get()
    assert "static_index" in text and "2 of 2 attentions matched, in 1 graph, at" in text
