"""Byte arithmetic by hand, and the text that carries a layout through a graph."""

from dataclasses import replace

import pytest
import torch

from sphkv_compile.spec import CacheSpec, Tier
from sphkv_compile.storage.layout import Layout, PageFields


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, "K4V2", "K16V4"])
@pytest.mark.parametrize("rope", [("none", 0), ("half", 64), ("interleaved", 32)])
def test_text_round_trip(bits, rope):
    layout = Layout.of(CacheSpec(bits=bits, window=32, span=64, page=32, sink=2, seed=7), *rope)
    assert Layout.parse(str(layout)) == layout
    kept = replace(layout, tiers=(Tier(8, 4), Tier(4, 2)), kept=True)
    assert Layout.parse(str(kept)) == kept != layout


def test_compiled_code_reads_a_layout_that_nobody_has_read():
    """Bug: a text that is computed when first asked for, under a lock (Python 3.11), which Dynamo refuses."""
    layout = Layout.of(CacheSpec(bits=4, seed=99))
    read = torch.compile(lambda: (str(layout), layout.code.name), backend="eager", fullgraph=True)
    assert read() == (str(layout), "axis_cosine")


def test_fields_of_tiers_by_hand():
    """D 64, Dv 32, keys float32, values bfloat16."""
    layout = Layout.of(CacheSpec())
    expected = {
        Tier(4, 4): PageFields(k=32, v=16, radius=1, v_scale=2, anchor=1, position=0, statistics=0),
        Tier(3, 2): PageFields(k=24, v=8, radius=1, v_scale=2, anchor=1, position=0, statistics=0),
        Tier(8, 3): PageFields(k=64, v=12, radius=2, v_scale=2, anchor=1, position=0, statistics=0),
        Tier(16, 16): PageFields(k=256, v=64, radius=0, v_scale=0, anchor=0, position=0, statistics=0),
        Tier(4, 16): PageFields(k=32, v=64, radius=1, v_scale=0, anchor=1, position=0, statistics=0),
    }
    assert {tier: layout.fields(tier, 64, 32, (4, 2)) for tier in expected} == expected
    assert layout.page_bytes(Tier(4, 4), 64, 32, (4, 2)) == 52 * 64
    assert layout.fields(Tier(4, 4), 64, 32, (4, 2)).metadata == 4
    kept = replace(layout, kept=True)  # a position instead of the anchor's index, which follows from it
    own = kept.fields(Tier(4, 4), 64, 32, (4, 2))
    assert own == PageFields(k=32, v=16, radius=1, v_scale=2, anchor=0, position=4, statistics=4)


def test_a_page_is_whole_units():
    layout = Layout.of(CacheSpec(span=24, page=8))
    assert layout.page_bytes(Tier(3, 3), 40, 40, (4, 4)) == -(-(15 + 15 + 4) * 8 // 64) * 64


@pytest.mark.parametrize(("length", "spans"), [(0, 0), (259, 0), (260, 1), (387, 1), (388, 2), (4096, 30)])
def test_a_span_is_coded_once_it_has_left_the_window_whole(length, spans):
    """Sink 4, window 128, span 128: the first span leaves at 4 + 128 + 128 tokens."""
    layout = Layout.of(CacheSpec())
    assert layout.coded_spans(length) == spans == layout.spans(length, rolling=False)


def test_a_rolling_window_keeps_one_span_more():
    layout = Layout.of(CacheSpec())
    assert [layout.spans(n, rolling=True) for n in (128, 129, 512)] == [2, 3, 5]
