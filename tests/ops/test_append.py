"""Appending: whatever the order and size of the writes, the cache decodes to what the oracle says, bit for bit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_compile.ops import schema
from sphkv_compile.ops.append import append, first_position, real_starts
from sphkv_compile.ops.read import dense
from sphkv_compile.spec import BITS, Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, Geometry
from sphkv_compile.testing.oracle import CacheOracle, Pair, random_tokens, shuffled_state

SINK, WINDOW, SPAN, PAGE = 2, 8, 16, 8


def layout_of(k_bits=4, v_bits=4, codec="axis_cosine", rope="half", rotary_dim=16):
    return Layout(codec, (Tier(k_bits, v_bits),), SINK, WINDOW, SPAN, PAGE, 0, rope, rotary_dim)


def geometry_of(batch=2, heads=2, capacity=96, k_dim=16, v_dim=16, dtype=torch.float32, rolling=False):
    return Geometry(batch, heads, capacity, k_dim, v_dim, dtype, dtype, rolling)


CHUNKS = (30, 1, 1, 20, 8, 1, 19)


@pytest.mark.parametrize("bits", list(itertools.product(BITS, BITS)), ids=lambda b: "K{}V{}".format(*b))
def test_every_pair_of_widths(bits):
    g = geometry_of()
    pair = Pair(layout_of(*bits), g).chunks(random_tokens(g, 80), CHUNKS, [0, 7]).check()
    assert min(pair.oracle.spans) > 1


@pytest.mark.parametrize("codec", ["axis_cosine", "pair_polar", "chain", "tree"])
def test_every_codec(codec):
    g = geometry_of()
    Pair(layout_of(codec=codec), g).chunks(random_tokens(g, 80), CHUNKS, [0, 7]).check()


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_dims_and_dtypes(dim, dtype):
    g = geometry_of(batch=1, heads=1, capacity=48, k_dim=dim, v_dim=dim, dtype=dtype)
    Pair(layout_of(rotary_dim=dim), g).chunks(random_tokens(g, 44), (20, 1, 23), [0]).check()


def test_values_may_be_narrower_and_of_another_dtype():
    g = Geometry(2, 2, 96, 32, 16, torch.float32, torch.bfloat16, False)
    Pair(layout_of(rotary_dim=32), g).chunks(random_tokens(g, 80), CHUNKS, [0, 7]).check()


@pytest.mark.parametrize("rope, rotary_dim", [("half", 16), ("half", 8), ("interleaved", 16), ("none", 0)])
def test_pair_scales_follow_the_rotary_embedding(rope, rotary_dim):
    """The oracle learns them by the book; with a recognised RoPE they are not ones."""
    g = geometry_of()
    pair = Pair(layout_of(rope=rope, rotary_dim=rotary_dim), g).chunks(random_tokens(g, 80), CHUNKS, [0, 7]).check()
    assert torch.equal(pair.state.pair_scale, torch.stack(pair.oracle.scale))
    assert bool((pair.state.pair_scale == 1).all()) == (rope == "none")


def _codes(state, layout, g):
    """What an append codes and counts, pages in the order of the tokens."""
    names = ("positions", "anchors", "span_scales", "pair_scale", "moments", "rows", "tiers")
    size = layout.page_bytes(layout.tiers[0], g.k_dim, g.v_dim, g.itemsize) // 64
    pages = state.arena.view(-1, 64)[state.table.long().unsqueeze(-1) + torch.arange(size)]
    return {**{name: getattr(state, name) for name in names}, "pages": pages}


@pytest.mark.parametrize(
    "sizes", [(30, 30, 20), (1,) * 80, (7, 1, 1, 40, 31), (2, 78)], ids=lambda s: f"{len(s)}chunks"
)
def test_one_shot_chunks_and_single_tokens_give_the_same_codes(sizes):
    """R9, down to the byte. Moments are sums of squares in another order: they agree once rounded, as the scale is."""
    layout, g = layout_of(), geometry_of()
    data = random_tokens(g, 80)
    one = _codes(Pair(layout, g).chunks(data, (80,), [0, 7]).check().state, layout, g)
    other = _codes(Pair(layout, g).chunks(data, sizes, [0, 7]).check().state, layout, g)
    torch.testing.assert_close(one.pop("moments"), other.pop("moments"), rtol=1e-14, atol=0)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("start", [1, 7, 29, 50])
def test_a_padded_row_has_the_codes_of_the_row_alone(start):
    """R3: shifted by the padding, everything that depends on content is equal bit for bit."""
    layout, g = layout_of(), geometry_of()
    data = random_tokens(g, 80)
    both = Pair(layout, g).chunks(data, CHUNKS, [0, start])
    alone_g = geometry_of(batch=1)
    alone = Pair(layout, alone_g)
    alone.write(*(x[1:, :, start:] for x in data), 0, [0])
    one, two = _codes(alone.state, layout, alone_g), _codes(both.state, layout, g)
    pages = both.oracle.spans[1] * layout.pages_per_span
    assert both.oracle.spans[1] == alone.oracle.spans[0] == (80 - start - SINK - WINDOW) // SPAN
    for name in ("pages", "anchors", "span_scales"):
        count = pages if name == "pages" else both.oracle.spans[1]
        assert torch.equal(one[name][0, :, :count], two[name][1, :, :count]), name
    assert torch.equal(one["pair_scale"][0], two["pair_scale"][1])
    k, v = dense(both.state, layout, 80)
    k_alone, v_alone = dense(alone.state, layout, 80 - start)
    assert torch.equal(k[1:, :, start:], k_alone) and torch.equal(v[1:, :, start:], v_alone)
    assert not k[1, :, :start].any()


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("bits", [2, 16])
def test_prompts_shorter_than_the_window_are_exact(count, bits):
    """R10."""
    g = geometry_of()
    data = random_tokens(g, count)
    pair = Pair(layout_of(bits, bits), g).chunks(data, (count,), [0, 0]).check()
    assert torch.equal(dense(pair.state, pair.layout, count)[0], data[1])
    pair.write(*random_tokens(g, 60, seed=2), count, [0, 0])
    pair.check()


@pytest.mark.parametrize(
    "first", [78, 73, 57, 50, 43, 20, 10, 2, 1, 0], ids=lambda f: f"back_to_{f}"
)  # the window, span edges, mid span, the first span, sinks, and a reset
def test_a_write_drops_what_lay_at_and_after_it(first):
    g = geometry_of()
    pair = Pair(layout_of(), g).chunks(random_tokens(g, 80), CHUNKS, [0, 7])
    pair.write(*random_tokens(g, 1, seed=3), first, [first, first])
    pair.check()
    pair.write(*random_tokens(g, 90 - first, seed=4), first + 1, [first, first])
    pair.check()


def test_after_a_reset_the_scales_are_learnt_anew():
    g = geometry_of()
    pair = Pair(layout_of(), g).chunks(random_tokens(g, 80), CHUNKS, [0, 7])
    old = pair.state.pair_scale.clone()
    pair.write(*random_tokens(g, 80, seed=5), 0, [0, 0])
    pair.check()
    assert not torch.equal(old, pair.state.pair_scale)


@settings(max_examples=40)
@given(st.data())
def test_any_run_of_writes_and_rollbacks(data):
    """Rows with paddings of their own, chunks of any size, rollbacks to anywhere."""
    starts = [data.draw(st.integers(0, 40), "start") for _ in range(2)]
    g = geometry_of(heads=1)
    pair, at = Pair(layout_of(3, 2), g), 0
    for step in range(data.draw(st.integers(1, 6), "steps")):
        first = data.draw(st.one_of(st.just(at), st.integers(0, at)), "first")
        count = data.draw(st.integers(1, 40), "count")
        if first + count > g.capacity:
            continue
        real = [s if s < first + count else -1 for s in (max(first, s) for s in starts)]
        pair.write(*random_tokens(g, count, seed=step), first, real)
        pair.check()
        at = first + count


def test_rows_that_are_all_padding_hold_nothing():
    g = geometry_of()
    pair = Pair(layout_of(), g).chunks(random_tokens(g, 40), (40,), [0, -1]).check()
    assert not dense(pair.state, pair.layout, 40)[0][1].any()
    pair.write(*random_tokens(g, 40, seed=2), 40, [0, 45])  # and its first real token may come later
    pair.check()


def test_a_rolling_window_holds_the_newest_columns():
    """Columns shift by one at each step; codes and pages are reused in turn. Positions go on: 300 in 40 columns."""
    window, layout = 40, layout_of()
    g = geometry_of(batch=1, capacity=window, rolling=True)
    state, oracle = shuffled_state(layout, g), CacheOracle(layout, geometry_of(batch=1, capacity=400))
    q, k, v = random_tokens(g, 300)
    text = str(layout)
    fill = q[:, :, :window], k[:, :, :window], v[:, :, :window]
    schema.append(*state, *fill, torch.arange(window), None, None, text, False)
    oracle.append(*fill, 0, [0])
    for p in range(window, 300):
        new = (q[:, :, p : p + 1], k[:, :, p : p + 1], v[:, :, p : p + 1])
        schema.append(*state, *new, None, None, None, text, True)
        oracle.append(*new, p, [0])
        if p % 13 == 0 or p > 295:
            base = p + 1 - window
            assert int(state.rows[0, BASE]) == base
            got = dense(state, layout, window)
            assert torch.equal(got[0], oracle.k[:, :, base : p + 1]) and torch.equal(
                got[1], oracle.v[:, :, base : p + 1]
            )


@pytest.mark.parametrize("pos", [[5, 7], [6, 5], [0, 0], [-1, 0]], ids=str)
def test_positions_that_are_not_consecutive_are_refused_and_nothing_is_written(pos):
    layout, g = layout_of(), geometry_of()
    pair = Pair(layout, g).chunks(random_tokens(g, 10), (10,), [0, 0])
    before = [t.clone() for t in pair.state]
    q, k, v = random_tokens(g, 2)
    with pytest.raises(ValueError, match="consecutive"):
        schema.append(*pair.state, q, k, v, torch.tensor(pos), None, None, str(layout), False)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.state))


@pytest.mark.parametrize("pos, start", [(torch.tensor([11]), None), (None, 12)], ids=["pos", "start"])
def test_a_write_that_leaves_a_gap_is_refused(pos, start):
    """The slots between are undefined: the dense buffer has zeros or old tokens there, the codes have nothing."""
    layout, g = layout_of(), geometry_of()
    pair = Pair(layout, g).chunks(random_tokens(g, 10), (10,), [0, 0])
    before = [t.clone() for t in pair.state]
    with pytest.raises(ValueError, match="holds 10 tokens"):
        schema.append(*pair.state, *random_tokens(g, 1), pos, start, None, str(layout), False)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.state))


def test_a_write_past_the_capacity_is_refused():
    layout, g = layout_of(), geometry_of(capacity=64)
    pair = Pair(layout, g).chunks(random_tokens(g, 60), (60,), [0, 0])
    q, k, v = random_tokens(g, 6)
    with pytest.raises(IndexError, match=r"64 columns; expected 58 or less for the first of 6 .*max_cache_len"):
        schema.attend(*pair.state, q, k, v, torch.arange(60, 66), None, 64, None, True, None, str(layout), False)


def test_a_span_without_a_page_is_refused():
    layout, g = layout_of(), geometry_of()
    pair = Pair(layout, g)
    pair.state.table[1, 1, 0] = -1
    with pytest.raises(RuntimeError, match="no page is reserved"):
        append(pair.state, layout, *random_tokens(g, 40), 0, [0, 0])


class TestStarts:
    """Where a row's first real token is: the first that may see itself."""

    def causal(self, padding, count, columns, first=0):
        seen = torch.arange(columns) <= (first + torch.arange(count)).unsqueeze(1)
        return torch.stack([seen & (torch.arange(columns) >= p) for p in padding]).unsqueeze(1)

    def test_without_a_mask_all_are_real(self):
        assert real_starts(None, 5, 0, 3, 2) == [5, 5]

    @pytest.mark.parametrize("additive", [False, True])
    def test_left_padding(self, additive):
        mask = self.causal([0, 3, 9], 6, 20)
        if additive:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        assert real_starts(mask, 0, 0, 6, 3) == [0, 3, -1]

    def test_a_later_chunk(self):
        assert real_starts(self.causal([2, 8], 4, 20, first=6), 6, 0, 4, 2) == [6, 8]

    def test_a_mask_for_all_rows(self):
        assert real_starts(self.causal([2], 6, 20), 0, 0, 6, 3) == [2, 2, 2]

    def test_a_mask_that_broadcasts_over_queries(self):
        mask = torch.tensor([[False, True, True, True]]).view(1, 1, 1, 4)
        assert real_starts(mask, 0, 0, 3, 1) == [1]

    def test_a_mask_that_broadcasts_over_columns(self):
        mask = torch.tensor([False, True, True]).view(1, 1, 3, 1)
        assert real_starts(mask, 0, 0, 3, 1) == [1]

    def test_a_mask_per_head_counts_what_any_head_sees(self):
        mask = self.causal([4], 6, 20).expand(1, 2, 6, 20).clone()
        mask[:, 1] = self.causal([2], 6, 20)[:, 0]
        assert real_starts(mask, 0, 0, 6, 1) == [2]

    def test_positions_of_a_rolled_window(self):
        """Columns are relative to the base; starts are positions."""
        assert real_starts(torch.ones(1, 1, 1, 8, dtype=torch.bool), 20, 13, 1, 1) == [20]


def test_first_position_of_each_way_to_say_it():
    g = geometry_of()
    pair = Pair(layout_of(), g).chunks(random_tokens(g, 10), (10,), [0, 0])
    assert first_position(pair.state, torch.tensor([9, 10]), None, 2) == (9, 0)
    assert first_position(pair.state, None, 4, 2) == (4, 0)
    assert first_position(pair.state, None, None, 2) == (10, 0)
    pair.state.rows[:, BASE] = 3
    assert first_position(pair.state, torch.tensor([7]), None, 1) == (10, 3)
