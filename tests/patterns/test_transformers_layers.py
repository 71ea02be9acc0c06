"""transformers' own cache layers, updated and attended to as its models do, by chunks and by single tokens."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from toys import HQ, OPTIONS, D, H
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

import sphkv_compile
from sphkv_compile.runtime import log
from sphkv_compile.runtime.guarded import owner_of

W = 16
"""Columns of a sliding window."""


def attention(layer, q, k, v, mask):
    k, v = layer.update(k, v)
    return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def masks(layer, count, window):
    """The causal (and sliding) mask of the next ``count`` tokens, over the columns that the layer will return."""
    columns, offset = layer.get_mask_sizes(count)
    past = int(layer.get_seq_length())
    row = torch.arange(past, past + count).unsqueeze(-1)
    column = torch.arange(offset, offset + columns)
    return ((column <= row) & (column > row - window))[None, None]


@torch.no_grad()
def run(layer, chunks, window=10**6, dynamic=None):
    """Steps ``chunks`` eagerly and compiled. What was said of each graph, in order and without repeats, and
    whether the cache is held as codes at the end."""
    inputs = [[torch.randn(2, heads, t, D) for heads in (HQ, H, H)] for t in chunks]
    eager, ours, said = layer, copy.deepcopy(layer), []
    compiled = torch.compile(attention, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True, dynamic=dynamic)
    for i, (x, count) in enumerate(zip(inputs, chunks)):
        seen, step = [], compiled if i else attention  # a graph that made the layer's tensors would see no cache
        with log.listening(seen.append):
            found = step(ours, *x, masks(ours, count, window))
        expected = attention(eager, *x, masks(eager, count, window))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        said += [v.idiom or v.refusal.code for graph in seen for v in graph.verdicts]
    codes = (owner := owner_of(ours.keys)) is not None and owner.holds_codes
    for name in ("keys", "values"):
        assert torch.equal(getattr(ours, name) + 0, getattr(eager, name)), name
    return [s for i, s in enumerate(said) if not i or s != said[i - 1]], codes


def test_static():
    """A chunked prefill, into pages, then steps."""
    assert run(StaticLayer(64), (3, 9, 9, 1, 5)) == (["static_index"], True)


def test_dynamic():
    assert run(DynamicLayer(), (3, 9, 9, 1, 5)) == (["dynamic_cat"], True)


@pytest.mark.parametrize("layer, idiom", [(StaticLayer(64), "static_index"), (DynamicLayer(), "dynamic_cat")], ids=str)
def test_everything_dynamic(layer, idiom):
    """Rows, heads and head_dim are symbols then; heads and head_dim are fixed by guards."""
    assert run(layer, (3, 5, 1, 1), dynamic=True) == ([idiom], True)


def test_a_window_of_symbolic_size():
    """As a second model of a process has it, whose window is another than the first one's; a guard fixes it."""
    assert run(StaticSlidingWindowLayer(64, W), (W, 1, 1, 1), W, dynamic=True) == (["sliding"], True)


def test_sliding_fills_and_rolls():
    assert run(StaticSlidingWindowLayer(64, W), (3, 5, *[1] * 14), W) == (["static_index", "sliding"], True)


def test_sliding_through_a_chunk_into_the_full_window():
    """The chunk is concatenated, which is refused: the codes are decoded, and imported again by the step after."""
    said, codes = run(StaticSlidingWindowLayer(64, W), (W, 1, 1, 4, 1, 1), W)
    assert said[:2] == ["sliding", "not_an_input"] and codes


def test_sliding_through_a_chunk_across_the_edge():
    said, codes = run(StaticSlidingWindowLayer(64, W), (W - 4, 1, 6, 1, 1), W)
    assert said == ["static_index", "not_an_input", "sliding"] and codes


@pytest.mark.parametrize("chunks", [(W + 4, 1, 1), (W - 1, 1, 1)], ids=["full", "filling"])
def test_a_dynamic_window_is_refused(chunks):
    """Only a part of what was concatenated is kept."""
    assert run(DynamicSlidingWindowLayer(sliding_window=W), chunks, W) == (["not_stored"], False)
