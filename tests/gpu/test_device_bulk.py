"""Many tokens at once on a device: codes against the portable path on the host, byte for byte; attention against the
reference over what the cache decodes to."""

import pytest
import torch

from sphkv_compile.ops import append as appending
from sphkv_compile.ops import decode
from sphkv_compile.ops.append import append
from sphkv_compile.ops.attend import attend as portable
from sphkv_compile.ops.read import exact_positions
from sphkv_compile.ops.reference import attend_reference
from sphkv_compile.spec import CacheSpec, Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, SPANS, Geometry, State
from sphkv_compile.testing.oracle import shuffled_state
from sphkv_compile.testing.retained import retained

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")]
B, H, G, PADDING = 2, 2, 4, (0, 9)
LIMIT = 2.5e-3
"""Relative error: queries, keys, weights and values are float16 in the products, outputs in the model's dtype."""

DIMS = (64, 128, 256)
CASES = [(tier, dim, torch.bfloat16) for tier in ("K8V4", "K8V8", "K4V4", "K4V2", "K3V3", "K2V2") for dim in DIMS]
CASES += [("K4V4", dim, dtype) for dtype in (torch.float16, torch.float32) for dim in DIMS]
TWO = ("K4V4", "K4V2")
MENUS = (TWO, ("K8V4", "K4V4", "K4V2"), ("K4V4", "K3V3", "K2V2"), ("K8V8", "K2V4"))
KEPT = [(menu, dim, torch.bfloat16) for menu in MENUS for dim in DIMS]
KEPT += [(TWO, dim, dtype) for dtype in (torch.float16, torch.float32) for dim in DIMS]


def make(tier, dim, dtype, capacity, rolling=False):
    from sphkv_compile.kernels.gpu import launch

    if not launch.layout_served(CacheSpec(bits=tier), dim, dim):
        pytest.skip("three bits need eight planes: head_dim 128 or more")
    layout = Layout("axis_cosine", (Tier.parse(tier),), 4, 128, 128, 64, 0, "half", dim, "tiles")
    return shuffled_state(layout, Geometry(B, H, capacity, dim, dim, dtype, dtype, rolling)), layout


def on_device(state):
    return State(*(x.cuda() for x in state))


def tokens(count, dim, dtype, group=G, seed=0):
    """Shapes: [B, H * group, count, D], [B, H, count, D] twice."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    k = normal(B, H, count, dim) + normal(1, H, 1, dim)
    return [x.to(dtype) for x in (normal(B, H * group, count, dim) * 2, k, normal(B, H, count, dim))]


def part(x, *index):
    return [t[:, :, slice(*index)] for t in x]


def masks(kind, first, count, columns):
    """Shapes: -> bool[B or 1, 1, T or 1, columns] or None."""
    column, row = torch.arange(columns, device="cuda"), first + torch.arange(count, device="cuda")[:, None]
    causal = (column <= row).expand(B, 1, count, columns)
    padded = causal & (column >= torch.tensor(PADDING, device="cuda").view(B, 1, 1, 1))
    return {
        "none": None,
        "causal": causal[:1],
        "padded": padded,
        "sliding": padded & (column > row - 700),
        "holes": padded & ((column % 7 != 3) | (column == row)),
        "broadcast": (column < first).expand(1, 1, 1, columns),
    }[kind]


@pytest.mark.parametrize(("tier", "dim", "dtype"), CASES)
def test_codes_are_those_of_the_host(tier, dim, dtype):
    """One-shot, chunks, a padded row, a rollback, tensors whose heads lie inside tokens. A fused multiply-add or an
    approximate quotient moves codes; a wrong stride or slot moves whole spans."""
    spec, layout = make(tier, dim, dtype, 2100)
    ours = on_device(spec)
    x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens(2000, dim, dtype)]
    x[1][:, :, 200], x[2][:, :, 201] = 0, 0  # a key and a value without direction
    new = [t.cuda() for t in x]
    assert appending.device_encoder(layout, new[1]) is not None
    # A rollback into codes decodes the span that it cuts: float32 shows in which order the device adds there.
    rollback = () if dtype == torch.float32 else ((1500, 2000),)
    for first, to in ((0, 1000), (1000, 1003), (1003, 1800), *rollback):
        append(spec, layout, *part(x, first, to), first, list(PADDING))
        append(ours, layout, *part(new, first, to), first, list(PADDING))
        for name, a, b in zip(State._fields, ours, spec):
            if name in ("moments", "energy"):  # float32 sums over a million terms, in another order
                torch.testing.assert_close(a.cpu(), b, rtol=4e-6, atol=0)
            else:
                assert torch.equal(a.cpu(), b), f"{name}: {float((a.cpu() != b).double().mean()):.2e} differ"
    assert int(spec.rows[0, SPANS]) > 10


def test_codes_of_a_decode_step_are_those_of_a_prefill():
    """One token at a time through the append kernel, against one shot: one body encodes both."""
    from sphkv_compile.kernels.gpu import launch

    spec, layout = make("K4V4", 128, torch.bfloat16, 700)
    ours, one = on_device(spec), on_device(spec)
    x = [t.cuda() for t in tokens(700, 128, torch.bfloat16)]
    append(one, layout, *x, 0, [0, 0])
    append(ours, layout, *part(x, 0, 270), 0, [0, 0])
    for t in range(270, 700):
        launch.append(ours, layout, *part(x, t, t + 1), None, None, None, False)
    held = exact_positions(layout, 0, 700, int(one.rows[0, SPANS]), layout.sink)[1].cuda()
    for name, a, b in zip(State._fields, ours, one):
        if name in ("exact_k", "exact_v"):  # a slot of a token that is coded by now holds what it will
            a, b = a[:, :, held], b[:, :, held]
        if name not in ("moments", "energy"):
            assert torch.equal(a, b), name


def check(state, layout, new, first, base, columns, mask, is_causal):
    arguments = state, layout, *new, first, base, columns, mask, is_causal, None
    assert decode.many_on_device(layout, *new, mask) is not None
    out = decode.attend(*arguments)
    exact = state._replace(exact_k=state.exact_k.float(), exact_v=state.exact_v.float())  # decoded without rounding
    expected = portable if layout.kept else attend_reference
    want = expected(exact, layout, *(x.float() for x in new), first, base, columns, mask, is_causal, None)
    gap = float((out.float() - want).norm() / want.norm())
    assert out.dtype == new[0].dtype and gap < LIMIT * (1 if out.dtype != torch.bfloat16 else 1.5), gap


@pytest.mark.parametrize(("tier", "dim", "dtype"), CASES)
@pytest.mark.parametrize("count", [2, 17, 256])
def test_attention_over_widths_and_dtypes(tier, dim, dtype, count):
    state, layout = make(tier, dim, dtype, 1800)
    state, x = on_device(state), [t.cuda() for t in tokens(1500 + count, dim, dtype)]
    append(state, layout, *part(x, 0, 1500), 0, list(PADDING))
    check(state, layout, part(x, 1500, 1500 + count), 1500, 0, 1800, masks("padded", 1500, count, 1800), False)


@pytest.mark.parametrize("held", [0, 100, 300, 1021, 4096])
@pytest.mark.parametrize("count", [2, 17, 256])
@pytest.mark.parametrize("kind", ["none", "is_causal", "causal", "padded", "sliding", "holes", "broadcast"])
def test_attention_over_masks_and_lengths(kind, count, held):
    if kind == "broadcast" and not held:
        pytest.skip("shows nothing")
    state, layout = make("K4V4", 128, torch.bfloat16, 4500)
    state, x = on_device(state), [t.cuda() for t in tokens(held + count, 128, torch.bfloat16)]
    if held:
        starts = list(PADDING) if kind in ("padded", "sliding", "holes") else [0, 0]
        append(state, layout, *part(x, 0, held), 0, starts)
    is_causal = kind == "is_causal"
    mask = masks("none" if is_causal else kind, held, count, 4500)
    columns = held + count if mask is None else 4500
    check(state, layout, part(x, held, held + count), held, 0, columns, mask, is_causal)


def kept(menu, x, held, capacity, starts=PADDING):
    """The first ``held`` tokens in a cache whose heads kept very different shares of them, one of them nothing."""
    uniform = []
    for tier in menu:
        state, layout = make(tier, x[1].shape[3], x[1].dtype, capacity)
        uniform.append((on_device(state), layout))
        append(*uniform[-1], *part(x, 0, held), 0, list(starts))
    draw = torch.rand(2, B, H, capacity, generator=torch.Generator().manual_seed(2))
    share = torch.tensor([[0.9, 0.2], [0.0, 0.5]]).unsqueeze(-1)
    return retained(uniform, torch.where(draw[0] < share, (draw[1] * len(menu)).long(), -1))


@pytest.mark.parametrize(("menu", "dim", "dtype"), KEPT)
@pytest.mark.parametrize("count", [2, 17, 256])
@pytest.mark.parametrize("kind", ["padded", "sliding", "holes"])
def test_kept_tokens_over_tiers_and_dtypes(menu, dim, dtype, count, kind):
    x = [t.cuda() for t in tokens(1500 + count, dim, dtype)]
    state, layout = kept(menu, x, 1500, 1800)
    check(state, layout, part(x, 1500, 1500 + count), 1500, 0, 1800, masks(kind, 1500, count, 1800), False)


@pytest.mark.parametrize("held", [100, 1021, 4096])
@pytest.mark.parametrize("count", [2, 17, 1200])
@pytest.mark.parametrize("kind", ["none", "is_causal", "causal", "broadcast"])
def test_kept_tokens_over_masks_and_lengths(kind, count, held):
    """A few new tokens over parts of the pages, and more than the portable path takes at once."""
    x = [t.cuda() for t in tokens(held + count, 128, torch.bfloat16)]
    state, layout = kept(TWO, x, held, 5500, [0, 0])
    is_causal = kind == "is_causal"
    mask = masks("none" if is_causal else kind, held, count, 5500)
    columns = held + count if mask is None else 5500
    check(state, layout, part(x, held, held + count), held, 0, columns, mask, is_causal)


@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_groups_over_kept_tokens(group):
    x = [t.cuda() for t in tokens(900, 64, torch.float16, group)]
    state, layout = kept(TWO, x, 800, 1000)
    check(state, layout, part(x, 800, 900), 800, 0, 1000, masks("padded", 800, 100, 1000), False)


def test_the_first_prompt_under_a_budget_is_plain_attention():
    """Nothing is held yet: 32,768 tokens at once, which the portable path could not."""
    geometry = Geometry(1, 1, 40000, 64, 64, torch.bfloat16, torch.bfloat16, False, 2)
    layout = Layout("axis_cosine", tuple(map(Tier.parse, TWO)), 4, 128, 128, 64, 0, "half", 64, "tiles", True)
    state = on_device(shuffled_state(layout, geometry))
    q, k, v = (torch.randn(1, h, 32768, 64, device="cuda", dtype=torch.bfloat16) for h in (2, 1, 1))
    assert decode.many_on_device(layout, q, k, v, None) is not None
    out = decode.attend(state, layout, q, k, v, 0, 0, 40000, None, True, None)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(out, want)


@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_groups(group):
    """Rows of a program straddle tokens where the group does not divide its rows."""
    state, layout = make("K4V4", 64, torch.float16, 1000)
    state, x = on_device(state), [t.cuda() for t in tokens(900, 64, torch.float16, group)]
    append(state, layout, *part(x, 0, 800), 0, list(PADDING))
    check(state, layout, part(x, 800, 900), 800, 0, 1000, masks("padded", 800, 100, 1000), False)


@pytest.mark.parametrize("kind", ["none", "holes"])
def test_a_rolling_window(kind):
    """Pages come round, and column 0 is not position 0."""
    state, layout = make("K4V4", 128, torch.float16, 1000, rolling=True)
    state, x = on_device(state), [t.cuda() for t in tokens(2540, 128, torch.float16)]
    append(state, layout, *part(x, 0, 2500), 0, [0, 0])
    base = 2540 - 1000
    state.rows[:, BASE] = base
    column = torch.arange(1000, device="cuda")
    mask = (column % 7 != 3).expand(B, 1, 40, 1000) if kind == "holes" else None
    check(state, layout, part(x, 2500, 2540), 2500, base, 1000, mask, False)


def test_a_write_into_codes_sees_only_what_lies_before_it():
    state, layout = make("K4V4", 128, torch.bfloat16, 1500)
    state, x = on_device(state), [t.cuda() for t in tokens(1200, 128, torch.bfloat16)]
    append(state, layout, *x, 0, list(PADDING))
    for first in (2, 100, 523, 1000):
        check(state, layout, part(x, first, first + 5), first, 0, 1500, masks("padded", first, 5, 1500), False)


def test_the_portable_path_agrees_and_hidden_rows_are_zero():
    """Rows of a mask that show nothing, as padding's own queries have it."""
    state, layout = make("K4V4", 128, torch.float16, 1000)
    state, x = on_device(state), [t.cuda() for t in tokens(800, 128, torch.float16)]
    append(state, layout, *part(x, 0, 600), 0, list(PADDING))
    mask = masks("holes", 600, 200, 1000).clone()
    mask[1, :, 50:120] = False
    arguments = state, layout, *part(x, 600, 800), 600, 0, 1000, mask, False, None
    out, want = decode.attend(*arguments), portable(*arguments)
    assert not bool(out[1, :, 50:120].any()) and not bool(out.isnan().any())
    assert float((out - want).float().norm() / want.float().norm()) < LIMIT
