"""The fused decode step on a device against float64 over what the cache decodes to."""

import pytest
import torch

from sphkv_compile.codecs.codebook import levels, quantize
from sphkv_compile.ops.append import append
from sphkv_compile.ops.read import dense
from sphkv_compile.spec import CacheSpec, Tier
from sphkv_compile.storage import tiles
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import BASE, Geometry, empty_state
from sphkv_compile.testing.oracle import attention
from sphkv_compile.testing.retained import retained

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")]
LIMIT = 2.5e-3
"""Relative error: queries, weights and values are float16 in the products, outputs in the model's dtype."""


def filled(tier, dim, dtype, heads=2, group=4, length=1500, starts=(0, 9), seed=0):
    """A state that holds ``length`` tokens in two rows, the second left-padded, and one more token."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout("axis_cosine", (Tier.parse(tier),), 4, 128, 128, 64, 0, "half", dim, "tiles")
    capacity = length + 300
    geometry = Geometry(2, heads, capacity, dim, dim, dtype, dtype, False)
    pages = layout.spans(capacity, False) * layout.pages_per_span
    size = layout.page_bytes(layout.tiers[0], dim, dim, geometry.itemsize)
    state = empty_state(layout, geometry, torch.zeros(2 * heads * pages * size, dtype=torch.uint8, device="cuda"))
    order = torch.randperm(2 * heads * pages, generator=generator) * (size // UNIT)
    state.table.copy_(order.view(2, heads, pages))
    q = torch.randn(2, heads * group, length + 1, dim, generator=generator)
    k = torch.randn(2, heads, length + 1, dim, generator=generator) + torch.randn(1, heads, 1, dim, generator=generator)
    v = torch.randn(2, heads, length + 1, dim, generator=generator)
    q, k, v = ((x * s).to("cuda", dtype) for x, s in ((q, 2.0), (k, 1.0), (v, 1.0)))
    append(state, layout, q[:, :, :length], k[:, :, :length], v[:, :, :length], 0, list(starts))
    state.rows[:, BASE] = 0
    return state, layout, tuple(x[:, :, length:] for x in (q, k, v)), capacity


def expected(state, layout, new, columns, mask):
    q, k, v = new
    length = int(state.rows[0, 1])
    exact = state._replace(exact_k=state.exact_k.float(), exact_v=state.exact_v.float())
    keys, values = (x.cpu() for x in dense(exact, layout, columns))
    keys[:, :, length], values[:, :, length] = k[:, :, 0].float().cpu(), v[:, :, 0].float().cpu()
    return attention(q.double().cpu(), keys.double(), values.double(), mask.cpu(), False, None)


def shown(length, columns, starts=(0, 9), holes=False):
    column = torch.arange(columns, device="cuda")
    seen = torch.stack([(column <= length) & (column >= start) for start in starts])
    if holes:
        seen &= (column % 7 != 3) | (column == length)
    return seen.view(2, 1, 1, columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("tier", ["K8V4", "K8V8", "K4V4", "K4V2", "K3V2", "K2V2", "K3V3"])
@pytest.mark.parametrize("masked", [False, True])
def test_against_float64(tier, dim, dtype, masked):
    from sphkv_compile.kernels.gpu import launch

    if not launch.layout_served(CacheSpec(bits=tier), dim, dim):
        pytest.skip("three bits need eight planes: head_dim 128 or more")
    state, layout, new, columns = filled(tier, dim, dtype)
    mask = shown(1500, columns, holes=masked)
    pos = torch.tensor([1500], device="cuda")
    out = launch.attend(state, layout, *new, pos, None, columns, mask if masked else None, None, False)
    want = expected(state, layout, new, columns, mask)
    gap = float((out.double().cpu() - want).norm() / want.norm())
    assert gap < LIMIT * (1 if dtype != torch.bfloat16 else 1.5)  # bfloat16 rounds the output itself by 1.1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_kept_tokens(dim, dtype, masked):
    """Heads that kept very different shares, at two tiers, in any order."""
    from sphkv_compile.kernels.gpu import launch

    uniform = [filled(tier, dim, dtype) for tier in ("K4V4", "K4V2")]
    (first, _, new, columns), coded = uniform[0], int(uniform[0][0].rows[:, 2].max()) * 128
    draw = torch.rand(2, 2, coded, generator=torch.Generator().manual_seed(1))
    share = torch.tensor([[0.9, 0.2], [0.0, 0.5]]).unsqueeze(-1)
    choice = torch.where(draw < share * 0.7, 1, torch.where(draw < share, 0, -1))
    state, layout = retained([(s, form) for s, form, _, _ in uniform], choice)
    sides = [dense(s._replace(exact_k=s.exact_k.float(), exact_v=s.exact_v.float()), form, columns)
             for s, form, _, _ in uniform]  # fmt: skip
    tier = torch.zeros(2, 2, columns, dtype=torch.long)
    for row, start in enumerate((0, 9)):
        held = int(first.rows[row, 2]) * 128
        tier[row, :, start + 4 : start + 4 + held] = choice[row, :, :held]
    pick = tier.clamp(min=0).unsqueeze(-1)
    keys, values = (sum(torch.where(pick == i, side[j].cpu(), 0) for i, side in enumerate(sides)) for j in (0, 1))
    q, k, v = new
    keys[:, :, 1500], values[:, :, 1500] = k[:, :, 0].float().cpu(), v[:, :, 0].float().cpu()
    mask = shown(1500, columns, holes=masked)
    seen = ((tier >= 0).unsqueeze(2) & mask.cpu()).repeat_interleave(4, 1)
    want = attention(q.double().cpu(), keys.double(), values.double(), seen, False, None)
    pos = torch.tensor([1500], device="cuda")
    out = launch.attend(state, layout, q, k, v, pos, None, columns, mask if masked else None, None, False)
    gap = float((out.double().cpu() - want).norm() / want.norm())
    assert gap < LIMIT * (1 if dtype != torch.bfloat16 else 1.5)


@pytest.mark.parametrize("group", [1, 8, 9, 16])
def test_groups(group):
    from sphkv_compile.kernels.gpu import launch

    state, layout, new, columns = filled("K4V4", 128, torch.float16, group=group)
    pos = torch.tensor([1500], device="cuda")
    assert launch.call_served(layout, *new, None, False)
    out = launch.attend(state, layout, *new, pos, None, columns, None, None, False)
    want = expected(state, layout, new, columns, shown(1500, columns))
    assert float((out.double().cpu() - want).norm() / want.norm()) < LIMIT


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_assembly_and_twin_decode_every_word_alike(bits, dim):
    """Bit for bit, and to the tables' values at the places that the packing gives."""
    from sphkv_compile.kernels.gpu import words
    from sphkv_compile.testing.planes import dumped

    if not tiles.served(dim, bits):
        pytest.skip("three bits need eight planes: head_dim 128 or more")
    codes = torch.randint(0, 2**bits, (64, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = tiles.pack_keys(codes, bits).cuda()
    twin = dumped(packed, bits, dim, True)
    expected = (levels(bits)[codes.int()] / words.step(bits)).half()
    assert torch.equal(twin.cpu(), expected)
    if torch.cuda.get_device_capability() >= (8, 9):
        assert torch.equal(dumped(packed, bits, dim, False), twin)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_on_and_beside_borders_are_coded_as_the_codec_does_it(bits):
    from sphkv_compile.testing.planes import around_borders, coded

    u = around_borders(bits)
    want = quantize(u, bits).int()
    for twin in (True, False):
        codes, found = coded(u.cuda(), bits, twin)
        assert torch.equal(codes.cpu(), want) and torch.equal(found.cpu(), levels(bits)[want].abs())


def test_a_write_into_codes_gives_not_a_number():
    """On the device a maximum swallows not-a-number, in the interpreter it does not."""
    from sphkv_compile.kernels.gpu import launch

    state, layout, new, columns = filled("K4V4", 64, torch.float32)
    launch.append(state, layout, *new, torch.tensor([200], device="cuda"), None, None, False)
    out = launch.attend(state, layout, *new, torch.tensor([201], device="cuda"), None, columns, None, None, False)
    assert bool(out.isnan().all())
