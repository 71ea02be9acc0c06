"""The GPU's decode step in the interpreter: its twin of the decoding, its arithmetic and its counters.

The state's specification is ``ops/append.py``, which writes the same tiled pages by other means; attention is held
against float64 over what the cache decodes to. On a device tests/gpu runs the kernels in earnest.
"""

import math
from dataclasses import replace

import pytest
import torch
from inputs import CAPACITY, SINK, SPAN, WINDOW, B, H, make, part, tokens

from sphkv_compile.codecs.codebook import levels, quantize
from sphkv_compile.kernels.gpu import launch, words
from sphkv_compile.ops import attend as blockwise
from sphkv_compile.ops.append import append
from sphkv_compile.ops.pages import with_positions
from sphkv_compile.ops.read import dense
from sphkv_compile.spec import Tier
from sphkv_compile.storage import tiles
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import BASE, FAULT, FROZEN, LENGTH, SPANS, START, Geometry, State
from sphkv_compile.testing.oracle import attention, random_tokens, shuffled_state
from sphkv_compile.testing.planes import around_borders, coded, dumped
from sphkv_compile.testing.retained import retained

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no device")
PADDING = [0, 7]


def shown(holes=False, position=None):
    """A mask over all columns: left padding, and every seventh token hidden. Shapes: -> bool[B, 1, 1, columns]."""
    column = torch.arange(CAPACITY)
    seen = column >= torch.tensor(PADDING)[:, None]
    if position is not None:
        seen &= column <= position
    if holes:
        seen &= (column % 7 != 3) | (column == position)
    return seen.view(B, 1, 1, CAPACITY)


@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (3, 128), (4, 64), (4, 256), (8, 64), (8, 128)])
def test_the_twin_decodes_every_code(bits, dim):
    codes = torch.arange(64 * dim).view(64, dim).mul(2654435761).bitwise_right_shift(7).remainder(2**bits).byte()
    found = dumped(tiles.pack_keys(codes, bits), bits, dim, True)
    assert torch.equal(found, (levels(bits)[codes.int()] / words.step(bits)).half())


def test_eight_bits_are_levels_rounded_to_float16():
    """The portable paths have them in float32: both agree to half a unit in the last place."""
    exact, held = levels(8)[128:], words.level_table(torch.device("cpu"))[:32].view(torch.float16)
    assert words.step(8) == 1 and float(((held - exact) / exact).abs().max()) <= 2**-11


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_on_and_beside_borders_are_coded_as_the_codec_does_it(bits):
    codes, found = coded(around_borders(bits), bits, True)
    want = quantize(around_borders(bits), bits).int()
    assert torch.equal(codes, want) and torch.equal(found, levels(bits)[want].abs())


@pytest.mark.parametrize(
    ("tier", "dim", "group", "dtype", "masked", "count"),
    [
        ("K4V4", 64, 3, torch.float32, False, 400),
        ("K4V2", 128, 8, torch.float16, True, 300),
        ("K3V3", 128, 1, torch.float32, True, 300),
        ("K2V4", 64, 4, torch.float32, False, 300),
        pytest.param("K4V4", 256, 2, torch.float32, True, 300, marks=pytest.mark.slow),
        ("K8V4", 128, 4, torch.float32, True, 300),
        ("K8V8", 64, 2, torch.float16, False, 300),
        pytest.param("K4V4", 64, 12, torch.float32, True, 300, marks=pytest.mark.slow),  # in two passes
        ("K4V4", 64, 2, torch.float32, True, 3),  # sinks alone
        ("K4V4", 64, 2, torch.float32, False, 120),  # no span has left the window
    ],
)
def test_attention_against_float64(tier, dim, group, dtype, masked, count):
    state, layout = make(tier, dim, dtype)
    all_tokens = tokens(count + 1, dim, group, dtype)
    append(state, layout, *part(all_tokens, 0, count), 0, PADDING if masked and count > 7 else [0, 0])
    q, k, v = part(all_tokens, count, count + 1)
    mask = shown(holes=True, position=count) if masked else None
    if masked and count < 7:
        mask = torch.ones_like(mask)
    assert launch.call_served(layout, q, k, v, mask, False)
    out = launch.attend(state, layout, q, k, v, torch.tensor([count]), None, CAPACITY, mask, None, False)
    exact = state._replace(exact_k=state.exact_k.float(), exact_v=state.exact_v.float())
    keys, values = dense(exact, layout, count + 1)
    keys[:, :, count], values[:, :, count] = k[:, :, 0].float(), v[:, :, 0].float()
    want = attention(q, keys, values, None if mask is None else mask[..., : count + 1], False, None)
    assert float((out - want).norm() / want.norm()) < 1e-3  # float16 products; a wrong token gives over 1e-2


def rows_of(held, heads, dim, span, count):
    """A row for each number of tokens that it holds, the newest ones; none for 0. Its new token, and what it reads."""
    b = len(held)
    layout = Layout("axis_cosine", (Tier(4, 4),), SINK, WINDOW, span, 64, 0, "half", dim, "tiles")
    state = shuffled_state(layout, Geometry(b, heads, count + 1, dim, dim, *2 * (torch.float32,), False), seed=1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, heads, count + 1, dim, generator=generator) for _ in range(3))
    append(state, layout, *part((q, k, v), 0, count), 0, [count - n if n else -1 for n in held])
    return state, layout, part((q, k, v), count, count + 1)


@pytest.mark.parametrize(
    ("held", "heads", "span", "count", "processors"),
    [
        ((400, 0, 40), 1, 128, 400, 2),  # three rows, of which one holds nothing and one no code
        ((400, 170, 300), 3, 64, 400, 2),  # nine heads, more parts than some have pages
        ((1300,), 1, 64, 1300, 0),  # one part of nineteen spans
        ((1300, 200, 1250), 1, 64, 1300, 0),
    ],
)
def test_rows_that_hold_unequal_numbers(held, heads, span, count, processors, monkeypatch):
    """Bugs: a row's parts lost or another's taken, anchors beyond the sixteenth span of a part."""
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    state, layout, (q, k, v) = rows_of(held, heads, 64, span, count)
    out = launch.attend(state, layout, q, k, v, torch.tensor([count]), None, count + 1, None, None, False)
    keys, values = dense(state, layout, count + 1)
    keys[:, :, count], values[:, :, count] = k[:, :, 0], v[:, :, 0]
    column = torch.arange(count + 1)
    seen = torch.stack([(column >= count - n) | (column == count) for n in held])[:, None, None]
    want = attention(q, keys, values, seen, False, None)
    assert float((out - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize(("size", "scale"), [(2e4, 1e-7), (1e5, 1e-8)])
def test_large_queries_stay_finite(size, scale):
    """Bug: queries that are float16 before the logits' factor made them small."""
    state, layout, (q, k, v) = rows_of((300,), 1, 128, 128, 300)
    q = q * size
    out = launch.attend(state, layout, q, k, v, torch.tensor([300]), None, 301, None, scale, False)
    keys, values = dense(state, layout, 301)
    keys[:, :, 300], values[:, :, 300] = k[:, :, 0], v[:, :, 0]
    want = attention(q, keys, values, torch.ones(1, 1, 1, 301, dtype=torch.bool), False, scale)
    assert float((out - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_new_position_may_be_a_tensor_a_number_or_the_counters_own(masked):
    state, layout = make("K4V4", 64)
    x = tokens(301, 64, 2)
    append(state, layout, *part(x, 0, 300), 0, PADDING if masked else [0, 0])
    mask = shown(holes=True, position=300) if masked else None

    def attend(*place):
        return launch.attend(state, layout, *part(x, 300, 301), *place, CAPACITY, mask, None, False)

    by_tensor = attend(torch.tensor([300]), None)
    assert torch.equal(by_tensor, attend(None, 300)) and torch.equal(by_tensor, attend(None, None))
    assert not torch.equal(by_tensor, attend(None, 299))


def assert_same(ours, spec):
    """All of a state, bit for bit but for what is summed in another order."""
    for name, a, b in zip(State._fields, ours, spec):
        if name in ("moments", "energy"):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("tier", "dim", "group", "rope", "masked"),
    [
        ("K4V4", 64, 3, "half", False),
        ("K4V2", 128, 12, "half", True),
        ("K2V2", 64, 1, "interleaved", True),
        ("K3V3", 128, 2, "none", False),
        ("K8V4", 64, 2, "half", True),
        ("K4V8", 128, 1, "half", False),
    ],
)
def test_appends_write_what_the_specification_writes(tier, dim, group, rope, masked):
    """Across the step in which the first span leaves the window, row by row, and its scale is learned."""
    (ours, layout), (spec, _) = make(tier, dim, rope=rope), make(tier, dim, rope=rope)
    before, after = SINK + WINDOW + SPAN - 4, SINK + WINDOW + SPAN + 8
    x = tokens(after, dim, group)
    mask = shown() if masked else None
    starts = PADDING if masked else [0, 0]
    for state in (ours, spec):
        append(state, layout, *part(x, 0, before), 0, starts)
    for t in range(before, after):
        append(spec, layout, *part(x, t, t + 1), t, starts)
        launch.append(ours, layout, *part(x, t, t + 1), torch.tensor([t]), None, mask, False)
    assert spec.rows[:, SPANS].tolist() == [1, 1]
    assert_same(ours, spec)


@pytest.mark.parametrize(("processors", "heads"), [(2, 2), (8, 1)])
def test_a_row_from_its_first_token_and_begun_anew(processors, heads, monkeypatch):
    """Counters from nothing; padding is no token; a write at a row's first position begins it anew. A row's heads are
    of one program, or of several, of which one moves the counters."""
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    assert launch.heads_of_program(2, 2, torch.device("cpu")) == heads
    (ours, layout), (spec, _) = make("K4V4", 64), make("K4V4", 64)
    x, mask = tokens(12, 64, 2), shown()
    for t in (*range(12), *range(9)):
        real = [0 if p <= t else -1 for p in PADDING]
        append(spec, layout, *part(x, t, t + 1), t, [t if r == 0 else -1 for r in real])
        launch.append(ours, layout, *part(x, t, t + 1), torch.tensor([t]), None, mask, False)
        assert ours.rows.tolist() == spec.rows.tolist()
    assert ours.rows[:, START].tolist() == PADDING
    torch.testing.assert_close(ours.moments, spec.moments, rtol=1e-6, atol=0)


def test_a_row_of_several_programs_of_several_heads(monkeypatch):
    """Across the step that encodes the first span."""
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    layout = Layout("axis_cosine", (Tier(4, 2),), SINK, WINDOW, SPAN, 64, 0, "half", 64, "tiles")
    geometry = Geometry(2, 4, CAPACITY, 64, 64, *2 * (torch.float32,), False)
    assert launch.heads_of_program(2, 4, torch.device("cpu")) == 2
    ours, spec = (shuffled_state(layout, geometry) for _ in range(2))
    before = SINK + WINDOW + SPAN - 2
    x = random_tokens(geometry, before + 4)
    for state in (ours, spec):
        append(state, layout, *part(x, 0, before), 0, [0, 0])
    for t in range(before, before + 4):
        append(spec, layout, *part(x, t, t + 1), t, [0, 0])
        launch.append(ours, layout, *part(x, t, t + 1), torch.tensor([t]), None, None, False)
    assert spec.rows[:, SPANS].tolist() == [1, 1]
    assert_same(ours, spec)


def test_a_write_into_codes_is_refused_and_shows():
    state, layout = make("K4V4", 64)
    x = tokens(301, 64, 2)
    append(state, layout, *part(x, 0, 300), 0, [0, 0])
    before = [t.clone() for t in state]
    launch.append(state, layout, *part(x, 300, 301), torch.tensor([50]), None, None, False)
    launch.append(
        state, layout, *part(x, 300, 301), torch.tensor([300]), None, None, False
    )  # nor is any later one written
    assert state.rows[:, FROZEN].tolist() == [FAULT, FAULT]
    state.rows[:, FROZEN] = 1
    for name, a, b in zip(State._fields, state, before):
        assert torch.equal(a, b), name
    state.rows[:, FROZEN] = FAULT
    out = launch.attend(state, layout, *part(x, 300, 301), torch.tensor([51]), None, CAPACITY, None, None, False)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_rolling_window(masked):
    """Tokens leave a sliding window of 200 columns; its pages are used again."""
    columns = 200
    mask = (torch.arange(columns) % 7 != 3).expand(B, 1, 1, columns).contiguous() if masked else None
    (ours, layout), (spec, _) = (make("K4V4", 64, rolling=True, capacity=columns) for _ in range(2))
    x, total = tokens(440, 64, 2), 436
    for state in (ours, spec):
        append(state, layout, *part(x, 0, total), 0, [0, 0])
        state.rows[:, BASE] = total - columns
    for t in range(total, 440):
        q, k, v = part(x, t, t + 1)
        out = launch.attend(ours, layout, q, k, v, None, None, columns, mask, None, True)
        base = t + 1 - columns
        keys, values = dense(spec, layout, columns, base)
        keys[:, :, -1], values[:, :, -1] = k[:, :, 0], v[:, :, 0]
        held = torch.zeros(columns, dtype=torch.bool)
        held[-1] = True
        held |= (keys != 0).any(-1).all(0).all(0)
        held = held if mask is None else held & mask
        want = attention(q, keys, values, held.expand(B, 1, 1, columns), False, None)
        assert float((out - want).norm() / want.norm()) < 1e-3
        launch.append(ours, layout, q, k, v, None, None, mask, True)
        append(spec, layout, q, k, v, t, [0, 0])
        spec.rows[:, BASE] = base
        assert ours.rows.tolist() == spec.rows.tolist()
    assert ours.rows[0, LENGTH] == 440 and math.ceil(columns / SPAN) + 1 == ours.anchors.shape[2]


def kept_of(menu, dim, group, dtype, masked, count):
    """A cache whose heads kept very different shares, what it should read as, and its new token."""
    x = tokens(count + 1, dim, group, dtype)
    uniform = [make(tier, dim, dtype) for tier in menu]
    for state, layout in uniform:
        append(state, layout, *part(x, 0, count), 0, PADDING if masked else [0, 0])
    pages = uniform[0][0].table.shape[2]
    draw = torch.rand(B, H, pages * 64, generator=torch.Generator().manual_seed(2))
    share = torch.tensor([[0.9, 0.2], [0.0, 0.5]]).unsqueeze(-1)
    choice = torch.where(draw < share * 0.7, len(menu) - 1, torch.where(draw < share, 0, -1))
    state, layout = retained(uniform, choice)
    keys, values = zip(*(dense(s._replace(exact_k=s.exact_k.float(), exact_v=s.exact_v.float()), f, count + 1)
                         for s, f in uniform))  # fmt: skip
    tier = torch.full((B, H, count + 1), 0)  # of each position; what is exact is the same in all
    for b in range(B):
        begin, coded = int(state.rows[b, START]) + SINK, int(state.rows[b, SPANS]) * SPAN
        tier[b, :, begin : begin + coded] = choice[b, :, :coded]
    pick = tier.clamp(min=0).unsqueeze(-1)
    k, v = (sum(torch.where(pick == i, side[i], 0) for i in range(len(menu))) for side in (keys, values))
    return state, layout, part(x, count, count + 1), k, v, tier >= 0


@pytest.mark.parametrize(
    ("menu", "dim", "group", "dtype", "masked"),
    [
        (("K4V4", "K4V2"), 128, 4, torch.float32, False),
        (("K4V4", "K4V2"), 64, 8, torch.float16, True),
        (("K4V4",), 64, 2, torch.float32, True),
        (("K4V4", "K3V3", "K2V2"), 128, 1, torch.float32, True),
        (("K8V4", "K4V4"), 64, 2, torch.float32, True),
    ],
)
def test_kept_tokens_at_several_tiers(menu, dim, group, dtype, masked):
    """Any tokens in any order, by the kernels and by the portable path, against float64 over what was kept."""
    count = 420
    state, layout, (q, k, v), keys, values, held = kept_of(menu, dim, group, dtype, masked, count)
    keys[:, :, count], values[:, :, count] = k[:, :, 0].float(), v[:, :, 0].float()
    mask = shown(holes=True, position=count) if masked else torch.ones(B, 1, 1, CAPACITY, dtype=torch.bool)
    seen = (held.unsqueeze(2) & mask[..., : count + 1]).repeat_interleave(group, 1)
    want = attention(q, keys, values, seen, False, None)
    arguments = state, layout, q, k, v
    assert launch.call_served(layout, q, k, v, mask, False)
    out = launch.attend(*arguments, torch.tensor([count]), None, CAPACITY, mask if masked else None, None, False)
    assert float((out - want).norm() / want.norm()) < 1e-3
    causal = mask & (torch.arange(CAPACITY) <= count)
    portable = blockwise.attend(*arguments, count, 0, CAPACITY, causal, False, None)
    assert float((portable - want).norm() / want.norm()) < (1e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("window", [3840, 4096])
def test_a_long_window_is_merged_whole(window):
    """One row, as many parts of its window as combine merges at once, and more."""
    count = window + 300
    layout = Layout("axis_cosine", (Tier(4, 4),), SINK, window, SPAN, 64, 0, "half", 64, "tiles")
    state = shuffled_state(layout, Geometry(1, 1, count + 1, 64, 64, *2 * (torch.float32,), False))
    x = [t[:1, :1] for t in tokens(count + 1, 64, 1)]
    append(state, layout, *part(x, 0, count), 0, [0])
    q, k, v = part(x, count, count + 1)
    out = launch.attend(state, layout, q, k, v, None, count, count + 1, None, None, False)
    keys, values = dense(state, layout, count + 1)
    keys[:, :, count], values[:, :, count] = k[:, :, 0], v[:, :, 0]
    want = attention(q, keys, values, torch.ones(1, 1, 1, count + 1, dtype=torch.bool), False, None)
    assert float((out - want).norm() / want.norm()) < 1e-3


def test_a_kept_cache_from_its_first_token():
    """Filled, filled anew, and the same by both paths; behind its window it cannot be written."""
    (uniform, form), x = make("K4V4", 64), tokens(300, 64, 2)
    append(uniform, form, *part(x, 0, 300), 0, [0, 0])
    layout = replace(form, tiers=(Tier(4, 4), Tier(4, 2)), kept=True)
    state = shuffled_state(layout, Geometry(B, H, CAPACITY, 64, 64, *2 * (torch.float32,), False, 2))
    for _ in range(2):
        append(state, layout, *part(x, 0, 300), 0, [0, 0])
        assert state.held.flatten(0, 1).tolist() == [[4, 0]] * (B * H)
        for a, b in zip(dense(state, layout, 300), dense(uniform, form, 300)):
            assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="drops tokens"):
        append(state, layout, *part(x, 50, 51), 50, [0, 0])
    with pytest.raises(ValueError, match="sliding window"):
        shuffled_state(layout, Geometry(B, H, CAPACITY, 64, 64, *2 * (torch.float32,), True))


def test_a_row_of_kept_tokens_is_not_begun_anew_by_a_step():
    """Its pages are of several sizes: only a plan can give it others. The row says so, and stays as it was."""
    state, layout, *_ = kept_of(("K4V4", "K4V2"), 64, 2, torch.float32, False, 300)
    before = [t.clone() for t in state]
    launch.append(state, layout, *part(tokens(1, 64, 2), 0, 1), torch.tensor([0]), None, None, False)
    assert state.rows[:, FROZEN].tolist() == [FAULT, FAULT]
    state.rows[:, FROZEN] = 1
    for name, a, b in zip(State._fields, state, before):
        assert torch.equal(a, b), name


def test_a_new_span_follows_what_was_kept():
    """At the widest tier, behind each head's own pages; and the queries are remembered."""
    menu, dim, count = ("K4V4", "K4V2"), 64, SINK + WINDOW + 2 * SPAN - 2
    (ours, layout, *_), (spec, *_) = (kept_of(menu, dim, 2, torch.float32, False, count) for _ in range(2))
    x = tokens(count + 4, dim, 2)
    for state in (ours, spec):  # the plan's part: room for what comes
        free = int(state.table.max()) + 100
        for b, h in ((b, h) for b in range(B) for h in range(H)):
            used = int(state.held[b, h].sum())
            state.table[b, h, used : used + 2] = torch.tensor([free, free + 100]) + 200 * (b * H + h)
        grown = torch.zeros((free + 1000) * UNIT, dtype=torch.uint8)
        grown[: state.arena.numel()] = state.arena
        memory = torch.zeros(B, 2 * H, 128, dim)
        ours, spec = (s._replace(arena=grown, queries=memory) if s is state else s for s in (ours, spec))
    before = ours.held.clone()
    for t in range(count, count + 4):
        append(spec, layout, *part(x, t, t + 1), t, [0, 0])
        launch.append(ours, layout, *part(x, t, t + 1), torch.tensor([t]), None, None, False)
    assert (ours.held - before).flatten(0, 1).tolist() == [[2, 0]] * (B * H)
    for name, a, b in zip(State._fields, ours, spec):
        if name == "arena":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert int((ours.queries != 0).any(-1).sum()) == B * 2 * H * 4
    for state in (ours, spec):
        positions = with_positions(state, layout).positions
        new = [sorted(p[p >= SINK + SPAN].tolist())[-SPAN:] for p in positions.flatten(0, 1)]
        assert new == [list(range(SINK + SPAN, SINK + 2 * SPAN))] * (B * H)
