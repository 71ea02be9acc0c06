"""Many tokens at once in the interpreter: bulk encode against the portable path, byte for byte, and a prefill's
attention against float32 by the book."""

from dataclasses import replace

import inputs
import pytest
import torch
from inputs import B, part, tokens

from sphkv_compile.kernels.gpu import bulk
from sphkv_compile.ops import append as appending
from sphkv_compile.ops.append import append
from sphkv_compile.ops.attend import attend
from sphkv_compile.ops.reference import attend_reference
from sphkv_compile.spec import Tier
from sphkv_compile.storage.state import BASE, FAULT, FROZEN, SPANS, Geometry, State
from sphkv_compile.testing.oracle import shuffled_state
from sphkv_compile.testing.retained import retained

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no device")
CAPACITY = 700


def make(*what, capacity=CAPACITY, **how):
    return inputs.make(*what, capacity=capacity, **how)


def masks(kind, first, count, columns):
    """Shapes: -> bool[B or 1, 1, T or 1, columns] or None."""
    column, row = torch.arange(columns), first + torch.arange(count)[:, None]
    causal = (column <= row).expand(B, 1, count, columns)
    if kind == "none":
        return None
    if kind == "causal":
        return causal[:1]
    padded = causal & (column >= torch.tensor([0, 7]).view(B, 1, 1, 1))
    if kind == "padded":
        return padded
    if kind in ("sliding", "wide"):
        return padded & (column > row - (100 if kind == "sliding" else 250))
    if kind == "holes":
        return padded & ((column % 7 != 3) | (column == row))
    assert kind == "broadcast"
    return (column < first).expand(1, 1, 1, columns)


@pytest.mark.parametrize(
    ("tier", "dim", "group", "dtype", "kind", "held", "count"),
    [
        ("K4V4", 64, 3, torch.float32, "padded", 400, 17),
        ("K4V2", 128, 2, torch.float16, "holes", 300, 9),
        ("K3V3", 128, 1, torch.float32, "causal", 300, 9),
        ("K2V4", 64, 4, torch.float32, "none", 300, 5),
        ("K2V2", 64, 4, torch.float32, "sliding", 400, 40),
        ("K4V4", 256, 1, torch.float32, "broadcast", 300, 3),
        ("K8V4", 128, 2, torch.float32, "padded", 300, 9),
        ("K8V8", 64, 2, torch.float16, "holes", 300, 9),
        ("K4V4", 64, 2, torch.float32, "padded", 100, 70),  # no span has left the window
        ("K4V4", 64, 2, torch.float32, "padded", 0, 70),  # nothing is held
        ("K4V4", 64, 2, torch.float32, "holes", 0, 70),
        ("K4V4", 64, 2, torch.float32, "causal", 0, 70),
    ],
)
def test_attention_against_the_reference(tier, dim, group, dtype, kind, held, count):
    state, layout = make(tier, dim, dtype)
    x = tokens(held + count, dim, group, dtype)
    if held:
        append(state, layout, *part(x, 0, held), 0, [0, 7] if kind in ("padded", "holes", "sliding") else [0, 0])
    new, mask = part(x, held, held + count), masks(kind, held, count, 700)
    assert bulk.attend_served(layout, *new, mask)
    for is_causal in (False, True) if kind in ("none", "causal") else (False,):
        arguments = state, layout, *new, held, 0, held + count if kind == "none" else 700, mask, is_causal, None
        out, want = bulk.attend(*arguments), attend_reference(*arguments)
        gap = (out - want).float().norm() / want.float().norm()
        assert out.dtype == dtype and float(gap) < 2e-3  # float16 products; a wrong token gives over 1e-2


def kept(menu, dim, x, held, starts, span=inputs.SPAN):
    """The first ``held`` tokens in a cache whose heads kept very different shares of them, one of them nothing."""
    uniform = [make(tier, dim, x[1].dtype, span=span) for tier in menu]
    for state, layout in uniform:
        append(state, layout, *part(x, 0, held), 0, starts)
    draw = torch.rand(2, B, inputs.H, CAPACITY, generator=torch.Generator().manual_seed(2))
    share = torch.tensor([[0.9, 0.2], [0.0, 0.5]]).unsqueeze(-1)
    return retained(uniform, torch.where(draw[0] < share, (draw[1] * len(menu)).long(), -1))


@pytest.mark.parametrize(
    ("menu", "dim", "group", "dtype", "kind", "held", "count"),
    [
        (("K4V4", "K4V2"), 128, 2, torch.float32, "padded", 400, 9),
        (("K8V4", "K4V4", "K4V2"), 64, 3, torch.float16, "holes", 400, 9),
        (("K4V4", "K3V3", "K2V2"), 128, 1, torch.float32, "causal", 300, 9),
        (("K4V4", "K4V2"), 64, 2, torch.float32, "none", 300, 40),
        (("K4V4",), 64, 4, torch.float32, "wide", 400, 40),
        (("K4V4", "K4V2"), 64, 2, torch.float32, "sliding", 400, 3),  # in which no coded token is seen
        (("K8V8", "K2V4"), 256, 1, torch.float32, "broadcast", 300, 3),
        (("K4V4", "K4V2"), 64, 2, torch.float32, "padded", 100, 9),  # no span has left the window
    ],
)
def test_attention_over_kept_tokens(menu, dim, group, dtype, kind, held, count):
    """At several tiers, by heads that have from no page to all."""
    x = tokens(held + count, dim, group, dtype)
    state, layout = kept(menu, dim, x, held, [0, 7] if kind in ("padded", "holes", "sliding", "wide") else [0, 0])
    assert held == 100 or (0 in state.held.sum(-1) and int(state.held.sum(-1).max()) > 3)
    new, mask = part(x, held, held + count), masks(kind, held, count, 700)
    assert bulk.attend_served(layout, *new, mask)
    for is_causal in (False, True) if kind in ("none", "causal") else (False,):
        arguments = state, layout, *new, held, 0, held + count if kind == "none" else 700, mask, is_causal, 0.1
        out, want = bulk.attend(*arguments), attend(*arguments)
        gap = (out - want).float().norm(dim=(2, 3)) / want.float().norm(dim=(2, 3))
        assert out.dtype == dtype and float(gap.max()) < 2e-3, gap  # a token of another place gives over 1e-2


@pytest.mark.parametrize("kind", ["none", "wide", "holes"])
def test_parts_of_kept_pages_add_up(monkeypatch, kind):
    """Parts of a few pages that begin and end inside tiers, parts of heads that have fewer pages than parts."""
    monkeypatch.setattr(bulk, "processors", lambda device: 32)
    monkeypatch.setattr(bulk, "PART", 2)
    x = tokens(643, 64, 2)
    state, layout = kept(("K8V4", "K4V4", "K4V2"), 64, x, 640, [0, 7], span=64)
    assert int(state.held.sum(-1).max()) // bulk.PART == 4
    mask = masks(kind, 640, 3, 700)
    arguments = state, layout, *part(x, 640, 643), 640, 0, 643 if kind == "none" else 700, mask, False, None
    out, want = bulk.attend(*arguments), attend(*arguments)
    assert float(((out - want).norm(dim=(2, 3)) / want.norm(dim=(2, 3))).max()) < 2e-3


def test_a_faulty_row_is_not_a_number_and_no_other():
    x = tokens(303, 64, 2)
    state, layout = kept(("K4V4", "K4V2"), 64, x, 300, [0, 7])
    arguments = state, layout, *part(x, 300, 303), 300, 0, 700, masks("padded", 300, 3, 700), False, None
    want = bulk.attend(*arguments)
    state.rows[1, FROZEN] = FAULT
    out = bulk.attend(*arguments)
    assert torch.equal(out[0], want[0]) and bool(out[1].isnan().all()) and not bool(want.isnan().any())


@pytest.fixture
def fused(monkeypatch):
    """A function that appends with the bulk encoder."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(appending, "device_encoder", lambda *_: bulk)
            append(*args)

    return run


def check_equal(ours, spec):
    for name, a, b in zip(State._fields, ours, spec):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("tier", "dim", "dtype", "span"),
    [
        ("K4V4", 64, torch.float32, 128),
        ("K4V2", 128, torch.bfloat16, 128),
        ("K3V3", 128, torch.float16, 64),
        pytest.param("K2V4", 256, torch.float32, 128, marks=pytest.mark.slow),
        pytest.param("K4V4", 64, torch.float16, 256, marks=pytest.mark.slow),
        ("K2V2", 64, torch.bfloat16, 64),  # a word has both token halves
        pytest.param("K3V3", 256, torch.float32, 64, marks=pytest.mark.slow),  # two groups of eight planes
        pytest.param("K8V4", 128, torch.bfloat16, 128, marks=pytest.mark.slow),
        pytest.param("K8V8", 64, torch.float32, 64, marks=pytest.mark.slow),
    ],
)
def test_spans_are_encoded_bit_for_bit(fused, tier, dim, dtype, span):
    """Out of the new tokens, out of the window, and across both; row by row, where padding sets the rows apart; after
    a rollback; and from tensors whose heads lie inside tokens."""
    (ours, layout), (spec, _) = make(tier, dim, dtype, span=span), make(tier, dim, dtype, span=span)
    inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(690, dim, 2, dtype)]
    inside[1][:, :, 200], inside[2][:, :, 201] = 0, 0  # a key and a value without direction
    at = 0
    for first, to, starts in ((0, 100, [0, 7]), (100, 310, [0, 7]), (310, 600, [0, 7]), (500, 690, [0, 7])):
        for write, state in ((fused, ours), (append, spec)):
            write(state, layout, *part(inside, first, to), first, starts)
        check_equal(ours, spec)
        at = to
    assert int(spec.rows[0, SPANS]) == layout.coded_spans(at) > 1


def test_kept_spans_are_encoded_bit_for_bit(fused):
    """Behind what a head already keeps, their positions in the page."""
    _, layout = make("K4V4", 64, torch.bfloat16)
    layout = replace(layout, tiers=(Tier(4, 4), Tier(4, 2)), kept=True)
    geometry = Geometry(B, 2, CAPACITY, 64, 64, torch.bfloat16, torch.bfloat16, False, 2)
    ours, spec = (shuffled_state(layout, geometry) for _ in "ab")
    x = tokens(650, 64, 2, torch.bfloat16)
    for first, to in ((0, 320), (320, 650)):
        for write, state in ((fused, ours), (append, spec)):
            write(state, layout, *part(x, first, to), first, [0, 7])
        check_equal(ours, spec)
    assert int(spec.held[..., 0].min()) > 2


def test_a_window_longer_than_a_lap_keeps_its_last_spans(fused):
    """600 tokens into a sliding window of 200: the older spans have no page, and learn the scale all the same."""
    (ours, layout), (spec, _) = (make("K4V4", 64, rolling=True, capacity=200) for _ in range(2))
    x = tokens(600, 64, 2)
    for write, state in ((fused, ours), (append, spec)):
        write(state, layout, *x, 0, [0, 0])
    check_equal(ours, spec)
    assert int(spec.rows[0, SPANS]) > spec.anchors.shape[2]


@pytest.mark.parametrize("kind", ["none", "holes"])
def test_attention_in_a_rolling_window(kind):
    """Pages come round: the page of a token is its number modulo their count, and column 0 is not position 0."""
    state, layout = make("K4V4", 64, rolling=True, capacity=200)
    x = tokens(609, 64, 2)
    append(state, layout, *part(x, 0, 600), 0, [0, 0])
    base = 600 + 9 - 200
    state.rows[:, BASE] = base
    mask = (torch.arange(200) % 7 != 3).expand(B, 1, 9, 200).contiguous() if kind == "holes" else None
    arguments = state, layout, *part(x, 600, 609), 600, base, 200, mask, False, None
    held = torch.arange(200) + base >= 0
    out, want = bulk.attend(*arguments), attend(*arguments)
    assert bool(held.all()) and float((out - want).norm() / want.norm()) < 2e-3


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("padded", "wide", "rolling")]


@pytest.mark.parametrize("kind", ["causal", "holes", *SLOW])
def test_more_spans_than_one_product_takes(monkeypatch, kind):
    """Anchors' products are taken for sixteen spans at once: parts, edges and what is seen whole cross from one such
    group into the next, and in a rolling window a group comes round."""
    monkeypatch.setattr(bulk, "processors", lambda device: 8 if kind in ("padded", "holes") else 1)
    monkeypatch.setattr(bulk, "PART", 2)
    held, rolling = 2600 if kind == "rolling" else 1500, kind == "rolling"
    columns = 1250 if rolling else 1600
    state, layout = make("K4V4", 64, span=64, rolling=rolling, capacity=columns)
    x = tokens(held + 4, 64, 1)
    append(state, layout, *part(x, 0, held), 0, [0, 7])
    base = held + 4 - columns if rolling else 0
    state.rows[:, BASE] = base
    mask = None if rolling else masks("padded" if kind == "wide" else kind, held, 4, columns)
    if kind == "wide":
        mask = mask & (torch.arange(columns) > held + torch.arange(4)[:, None] - 1300)
    arguments = state, layout, *part(x, held, held + 4), held, base, columns, mask, False, None
    out, want = bulk.attend(*arguments), attend(*arguments)
    assert int(state.rows[0, SPANS]) > 16 and state.anchors.shape[2] % 16
    assert float((out - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("kind", ["none", "padded", "sliding", "holes"])
def test_parts_of_a_row_add_up(monkeypatch, kind):
    """A few new tokens after many: parts without a page, with edges, and the one that has the exact tokens."""
    monkeypatch.setattr(bulk, "processors", lambda device: 16)
    monkeypatch.setattr(bulk, "PART", 2)
    state, layout = make("K4V4", 64)
    x = tokens(453, 64, 2)
    append(state, layout, *part(x, 0, 450), 0, [0, 7])
    mask = masks(kind, 450, 3, 700)
    arguments = state, layout, *part(x, 450, 453), 450, 0, 453 if kind == "none" else 700, mask, False, None
    out, want = bulk.attend(*arguments), attend(*arguments)
    assert float((out - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("menu", [("K4V4",), ("K8V4", "K4V4")], ids=["all", "kept"])
def test_a_large_anchor_does_not_drown_the_residual(menu):
    """Keys with a constant fifty times their spread: in float16 as a whole, a key would lose its own part."""
    q, k, v = tokens(320, 128, 2)
    k += 100 * torch.ones(128)
    if len(menu) > 1:
        state, layout = kept(menu, 128, [q, k, v], 300, [0, 0])
    else:
        state, layout = make(*menu, 128, torch.float32)
        append(state, layout, *part([q, k, v], 0, 300), 0, [0, 0])
    new = part([q * 0.05, k, v], 300, 320)
    mask = masks("causal", 300, 20, 700)
    arguments = state, layout, *new, 300, 0, 700, mask, False, None
    out, want = bulk.attend(*arguments), attend(*arguments)
    assert float((out - want).norm() / want.norm()) < 3e-3


def test_a_write_into_codes_sees_only_what_lies_before_it():
    state, layout = make("K4V4", 64)
    x = tokens(400, 64, 2)
    append(state, layout, *x, 0, [0, 7])
    for first in (2, 60, 150, 262):
        arguments = (
            state,
            layout,
            *part(x, first, first + 5),
            first,
            0,
            700,
            masks("padded", first, 5, 700),
            False,
            None,
        )
        out, want = bulk.attend(*arguments), attend(*arguments)
        assert float((out - want).norm() / want.norm()) < 2e-3


def test_what_is_not_served():
    """Additive masks, masks of a head, dtypes that differ, and pages in rows go the portable way."""
    _, layout = make("K4V4", 64)
    several = replace(layout, tiers=(Tier(4, 4), Tier(4, 2)))
    q, k, v = tokens(4, 64, 2)
    seen = torch.ones(B, 1, 4, 700, dtype=torch.bool)
    assert bulk.attend_served(layout, q, k, v, seen) and bulk.attend_served(layout, q, k, v, None)
    assert not bulk.attend_served(layout, q, k, v, seen.float())
    assert not bulk.attend_served(layout, q, k, v, seen.expand(B, 4, 4, 700))
    assert not bulk.attend_served(layout, q.half(), k, v, seen)
    assert not bulk.attend_served(replace(layout, packing="rows"), q, k, v, seen)
    assert bulk.attend_served(replace(several, kept=True), q, k, v, seen)
    assert not bulk.attend_served(several, q, k, v, seen)


@pytest.mark.parametrize("budget", [False, True], ids=["all", "kept"])
def test_only_a_causal_mask_goes_to_the_library(monkeypatch, budget):
    """The library's kernels are asked for plain causal attention alone; a mask that merely resembles it is not that."""
    asked = []
    monkeypatch.setattr(bulk, "_alone", lambda q, k, v, is_causal, scale: asked.append(is_causal) or q)
    state, layout = make("K4V4", 64)
    x = tokens(20, 64, 1)
    if budget:
        layout = replace(layout, tiers=(Tier(4, 4), Tier(4, 2)), kept=True)
        state = shuffled_state(layout, Geometry(B, inputs.H, CAPACITY, 64, 64, *2 * (torch.float32,), False))
    for kind, is_causal, expected in (
        ("none", False, [False]), ("none", True, [True]), ("causal", False, [True]), ("padded", False, []),
        ("holes", False, []), ("causal", True, []),
    ):  # fmt: skip
        asked.clear()
        bulk.attend(state, layout, *x, 0, 0, 20, masks(kind, 0, 20, 20), is_causal, None)
        assert asked == expected, (kind, is_causal)
