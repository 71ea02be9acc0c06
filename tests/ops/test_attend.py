"""Attention over codes against attention in float64 over what the oracle says the cache holds."""

import itertools

import pytest
import torch

from sphkv_compile.ops import schema
from sphkv_compile.ops.attend import attend
from sphkv_compile.ops.read import dense
from sphkv_compile.ops.reference import attend_reference
from sphkv_compile.spec import BITS, Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import BASE, Geometry
from sphkv_compile.testing.oracle import CacheOracle, Pair, attention, float32_bound, random_tokens

SINK, WINDOW, SPAN, PAGE = 2, 8, 16, 8
CAPACITY = 96
PADDING = [0, 7]


def layout_of(k_bits=4, v_bits=4, codec="axis_cosine", rope="half", rotary_dim=16):
    return Layout(codec, (Tier(k_bits, v_bits),), SINK, WINDOW, SPAN, PAGE, 0, rope, rotary_dim)


def geometry_of(batch=2, heads=2, capacity=CAPACITY, k_dim=16, v_dim=16, dtype=torch.float32, rolling=False):
    return Geometry(batch, heads, capacity, k_dim, v_dim, dtype, dtype, rolling)


def causal(first, count, columns=CAPACITY, padding=PADDING):
    """What a causal mask with left padding shows. Shapes: -> bool[B, 1, count, columns]."""
    column = torch.arange(columns)
    seen = column <= (first + torch.arange(count)).unsqueeze(1)
    return torch.stack([seen & (column >= p) for p in padding]).unsqueeze(1)


def additive(mask, dtype=torch.float32):
    """The same as an additive mask, with small biases where it shows (as ALiBi has)."""
    bias = torch.linspace(-1, 0, mask.shape[-1]).expand(mask.shape).to(dtype)
    return torch.where(mask, bias, torch.finfo(dtype).min)


def check(pair, new, first, columns=CAPACITY, mask=None, is_causal=False, scale=None, base=0):
    """``attend`` on the state, and the specification, against the oracle.

    The specification decodes to the cache's dtypes; ``attend`` has no need to round.
    """
    q, k, v = new
    results = []
    for f, content in ((attend, (pair.oracle.k, pair.oracle.v)), (attend_reference, pair.oracle.dense())):
        content = [x[:, :, base : base + columns].clone() for x in content]
        for x, y in zip(content, (k, v)):
            x[:, :, first - base : first - base + k.shape[2]] = y
        expected = attention(q, *content, mask, is_causal, scale)
        bound = float32_bound(q, *content, scale, q.dtype)
        out = f(pair.state, pair.layout, q, k, v, first, base, columns, mask, is_causal, scale)
        assert out.dtype == q.dtype and out.shape == expected.shape
        worst = float((out.double() - expected).abs().max())
        assert worst <= bound, f"{f.__module__}: {worst:.3g} > {bound:.3g}"
        assert bound < 0.05 * float(expected.abs().max())  # else the bound would hide a fault
        results.append(expected)
    return results[0]


def filled(layout, g, count=70, group=2):
    """A cache that holds ``count`` tokens, row 1 padded."""
    return Pair(layout, g).chunks(random_tokens(g, count, group), (count,), PADDING[: g.batch])


@pytest.mark.parametrize("bits", list(itertools.product(BITS, BITS)), ids=lambda b: "K{}V{}".format(*b))
def test_every_pair_of_widths(bits):
    g = geometry_of()
    check(filled(layout_of(*bits), g), random_tokens(g, 1, seed=2), 70, mask=causal(70, 1))


@pytest.mark.parametrize("codec", ["axis_cosine", "pair_polar", "chain", "tree"])
def test_every_codec(codec):
    g = geometry_of()
    check(filled(layout_of(codec=codec), g), random_tokens(g, 3, seed=2), 70, mask=causal(70, 3))


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 5, 6, 7, 8])
def test_head_dims_and_groups(dim, group):
    """R6."""
    g = geometry_of(k_dim=dim, v_dim=dim)
    new = random_tokens(g, 1, group, seed=2)
    check(filled(layout_of(rotary_dim=dim), g, 40, group), new, 40, mask=causal(40, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_dtypes(dtype, bits):
    g = geometry_of(dtype=dtype)
    check(filled(layout_of(bits, bits), g), random_tokens(g, 2, seed=2), 70, mask=causal(70, 2))


def test_values_may_be_narrower_and_of_another_dtype():
    g = Geometry(2, 2, CAPACITY, 32, 16, torch.float32, torch.bfloat16, False)
    check(filled(layout_of(rotary_dim=32), g), random_tokens(g, 2, seed=2), 70, mask=causal(70, 2))


@pytest.mark.parametrize("count", [1, 2, 7, 20, 26])
def test_new_tokens_see_each_other(count):
    """Chunked prefill: the new keys are exact and lie over what the cache holds."""
    g = geometry_of()
    check(filled(layout_of(), g), random_tokens(g, count, seed=2), 70, mask=causal(70, count))


def test_many_queries_are_handled_in_pieces():
    """More queries than one piece, so that rows of the mask and of the output are offset."""
    g = geometry_of(batch=1, heads=1, capacity=400)
    pair = Pair(layout_of(), g).chunks(random_tokens(g, 70), (70,), [0])
    check(pair, random_tokens(g, 300, seed=2), 70, 400, mask=causal(70, 300, 400, [0]))


@pytest.mark.parametrize("filled_to", [0, 1, 2, 9, 10, 25, 26, 27, 42])
def test_every_stage_of_filling(filled_to):
    """Nothing, sinks, a partly filled window, the first span about to leave, just left."""
    g = geometry_of(batch=1)
    pair = Pair(layout_of(), g)
    if filled_to:
        pair.chunks(random_tokens(g, filled_to), (filled_to,), [0])
    check(pair, random_tokens(g, 1, seed=2), filled_to, mask=causal(filled_to, 1, padding=[0]))


class TestMasks:
    def test_none_reads_all_columns(self):
        """A slice that ends with the newest token needs no mask for one query."""
        g = geometry_of(batch=1)
        check(Pair(layout_of(), g).chunks(random_tokens(g, 70), (70,), [0]), random_tokens(g, 1, seed=2), 70, 71)

    def test_none_stops_at_the_columns_read(self):
        g = geometry_of(batch=1)
        pair = Pair(layout_of(), g).chunks(random_tokens(g, 70), (70,), [0])
        check(pair, random_tokens(g, 1, seed=2), 30, 31)  # and a write into codes drops what follows it

    def test_is_causal_is_aligned_top_left_as_in_sdpa(self):
        g = geometry_of(batch=1)
        new = random_tokens(g, 40)
        expected = check(Pair(layout_of(), g), new, 0, 40, is_causal=True)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*new, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(sdpa.double(), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_additive(self, dtype):
        g = geometry_of()
        check(filled(layout_of(), g), random_tokens(g, 5, seed=2), 70, mask=additive(causal(70, 5), dtype))

    def test_additive_minus_infinity(self):
        g = geometry_of()
        mask = torch.zeros(2, 1, 5, CAPACITY).masked_fill(~causal(70, 5), -torch.inf)
        check(filled(layout_of(), g), random_tokens(g, 5, seed=2), 70, mask=mask)

    def test_a_mask_per_query_head(self):
        g = geometry_of()
        mask = causal(70, 5).expand(2, 4, 5, CAPACITY) & (torch.rand(2, 4, 5, CAPACITY) < 0.5)
        check(filled(layout_of(), g), random_tokens(g, 5, seed=2), 70, mask=mask)

    def test_an_additive_mask_per_query_head(self):
        """ALiBi: each query head has a slope of its own."""
        g = geometry_of()
        distance = (torch.arange(CAPACITY) - 70).clamp(max=0).float()
        mask = torch.tensor([1, 0.5, 0.25, 0.125]).view(1, 4, 1, 1) * distance + additive(causal(70, 5)).clamp(min=-1e9)
        check(filled(layout_of(), g), random_tokens(g, 5, seed=2), 70, mask=mask)

    def test_a_mask_that_broadcasts_over_rows_and_queries(self):
        g = geometry_of()
        pair = Pair(layout_of(), g).chunks(random_tokens(g, 70), (70,), [0, 0])
        mask = causal(70, 1, padding=[0])
        assert mask.shape == (1, 1, 1, CAPACITY)
        check(pair, random_tokens(g, 1, seed=2), 70, mask=mask)

    def test_holes(self):
        """A mask that hides some held tokens: a chunk that does not see the whole past."""
        g = geometry_of()
        mask = causal(70, 5) & (torch.rand(2, 1, 5, CAPACITY) < 0.3)
        check(filled(layout_of(), g), random_tokens(g, 5, seed=2), 70, mask=mask)

    def test_a_query_that_sees_nothing_gets_zeros(self):
        g = geometry_of()
        mask = causal(70, 3)
        mask[1, :, 1] = False
        expected = check(filled(layout_of(), g), random_tokens(g, 3, seed=2), 70, mask=mask)
        assert not expected[1, :, 1].any()

    def test_a_window_of_the_mask(self):
        """A full-length cache whose mask slides."""
        g = geometry_of()
        mask = causal(70, 5) & (torch.arange(CAPACITY) > (70 + torch.arange(5)).unsqueeze(1) - 24)
        check(filled(layout_of(), g), random_tokens(g, 5, seed=2), 70, mask=mask)

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
    def test_slots_after_the_newest_token_are_refused(self, kind):
        layout, g = layout_of(), geometry_of()
        pair = filled(layout, g)
        mask = causal(70, 1)
        mask[..., 90] = True
        mask = mask if kind == torch.bool else additive(mask)
        with pytest.raises(RuntimeError, match="shows cache slots from 71 on"):
            attend(pair.state, layout, *random_tokens(g, 1, seed=2), 70, 0, CAPACITY, mask, False, None)

    def test_slots_dropped_by_a_rollback_are_refused(self):
        """Written once, dropped by a write before them: the dense buffer still has them."""
        layout, g = layout_of(), geometry_of()
        pair = filled(layout, g)
        with pytest.raises(RuntimeError, match="shows cache slots from 51 on"):
            attend(pair.state, layout, *random_tokens(g, 1, seed=2), 50, 0, CAPACITY, causal(69, 1), False, None)

    def test_a_mask_that_broadcasts_over_columns_shows_later_slots_too(self):
        layout, g = layout_of(), geometry_of()
        pair = filled(layout, g)
        everything = torch.ones(2, 1, 1, 1, dtype=torch.bool)
        new = random_tokens(g, 1, seed=2)
        with pytest.raises(RuntimeError, match="shows cache slots"):
            schema.attend(
                *pair.state, *new, torch.tensor([70]), None, CAPACITY, everything, False, None, str(layout), False
            )


@pytest.mark.parametrize("scale", [None, 0.05, 1.0])
def test_scale(scale):
    g = geometry_of()
    check(filled(layout_of(), g), random_tokens(g, 2, seed=2), 70, mask=causal(70, 2), scale=scale)


@pytest.mark.parametrize("first", [69, 65, 50, 33, 20, 9, 1, 0])
def test_attention_after_a_write_at_an_earlier_position(first):
    """``attend`` runs before ``append``: it must not see what the write is about to drop."""
    g = geometry_of()
    check(filled(layout_of(), g), random_tokens(g, 2, seed=2), first, mask=causal(first, 2))


def test_a_rolling_window():
    """Columns count from the base; sinks and older spans that have rolled out of sight are not seen."""
    window, layout = 40, layout_of()
    g = geometry_of(batch=1, capacity=window, rolling=True)
    pair = Pair(layout, g)
    pair.oracle = CacheOracle(layout, geometry_of(batch=1, capacity=200))
    data = random_tokens(g, 120)
    for p in range(120):
        new = tuple(x[:, :, p : p + 1] for x in data)
        full, base = p >= window, max(0, p + 1 - window)
        if p > 20 and p % 7 == 0:
            mask = torch.arange(window).view(1, 1, 1, -1) <= p - base
            check(pair, new, p, window, mask=mask, base=base)
        schema.append(*pair.state, *new, None if full else torch.tensor([p]), None, None, str(layout), full)
        pair.oracle.append(*new, p, [0])
    assert int(pair.state.rows[0, BASE]) == 80


def test_rows_that_hold_nothing_do_not_disturb_the_others():
    layout, g = layout_of(), geometry_of()
    pair = Pair(layout, g).chunks(random_tokens(g, 70), (70,), [0, -1])
    check(pair, random_tokens(g, 2, seed=2), 70, mask=causal(70, 2, padding=[0, 71]))


@pytest.mark.parametrize("tiers", [("K4V4", "K4V2"), ("K8V16", "K8V4"), ("K16V16", "K16V4")], ids="-".join)
def test_pages_of_two_tiers_and_dropped_pages(tiers):
    """Each page is read at its own tier; what it would say at another is never multiplied in, be it not-a-number."""
    menu, g, data = tuple(map(Tier.parse, tiers)), geometry_of(), random_tokens(geometry_of(), 70)
    wide, narrow = (Pair(layout_of(t.k_bits, t.v_bits), g).chunks(data, (70,), PADDING).state for t in menu)
    junk = torch.full((64 * UNIT,), 0xFF, dtype=torch.uint8)  # NaN in every float format
    tables = wide.table + 64, narrow.table + 64 + wide.arena.numel() // UNIT
    odd = (torch.arange(wide.table.shape[2]) % 2).expand_as(wide.table)
    state = wide._replace(
        arena=torch.cat([junk, wide.arena, narrow.arena]),
        table=torch.where(odd.bool(), tables[1], tables[0]),
        tiers=odd.to(torch.uint8),
    )
    state.positions[0, 1, 1], state.table[0, 1, 1] = -1, -1  # dropped: its offset reads the junk
    layout = Layout("axis_cosine", menu, SINK, WINDOW, SPAN, PAGE, 0, "half", 16)
    q, k, v = random_tokens(g, 2, seed=2)
    content = [x.clone() for x in dense(state, layout, CAPACITY)]
    for x, y in zip(content, (k, v)):
        x[:, :, 70:72] = y
    assert not content[0][0, 1, 10:18].any()  # the dropped page
    mask = causal(70, 2)
    mask = mask.expand(2, 2, 2, CAPACITY).repeat_interleave(2, 1)
    mask[0, 2:, :, 10:18] = False  # which the oracle must leave out, not see as zeros
    expected = attention(q, *content, mask, False, None)
    out = attend(state, layout, q, k, v, 70, 0, CAPACITY, causal(70, 2), False, None)
    assert float((out - expected).abs().max()) <= float32_bound(q, *content, None)
