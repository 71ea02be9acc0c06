"""Statistics against float64 over what the cache decodes to, by torch and by the kernel, interpreted."""

import dataclasses
import math

import pytest
import torch
from test_moves import cache

from sphkv_compile.kernels.gpu import statistics as kernels
from sphkv_compile.ops import statistics
from sphkv_compile.ops.pages import read_statistics, value_lengths, with_positions, write_statistics
from sphkv_compile.ops.read import dense
from sphkv_compile.ops.statistics import HALF_LIFE, mean_attention, observe, realised_losses
from sphkv_compile.storage.state import LENGTH

GROUP, SCALE = 3, 0.3


def expected(state, layout, queries, at):
    """Shapes: -> float64[B, H, positions]."""
    h, length = state.exact_k.shape[1], int(state.rows[0, LENGTH])
    keys, _ = dense(state, layout, length)
    held = keys.abs().sum(-1) > 0  # a dropped token reads as zeros
    q = queries.double().unflatten(1, (h, -1))
    logits = (q @ keys.double().mT.unsqueeze(2)) * SCALE
    column = torch.arange(length)
    seen = (column <= at.unsqueeze(-1)) & held[:, :, None, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    looks = (at >= column.unsqueeze(-1)).sum(-1)
    return weights.sum((2, 3)) / (looks.clamp(min=1) * GROUP)


@pytest.mark.parametrize(
    ("menu", "dim", "packing", "count"),
    [
        (("K4V4", "K4V2"), 64, "rows", 60),
        (("K8V4", "K4V4", "K4V2"), 64, "tiles", 50),
        (("K4V4", "K3V3", "K2V2"), 128, "tiles", 22),
    ],
)
@pytest.mark.parametrize("every", [1, 4])
def test_against_float64(menu, dim, packing, count, every, monkeypatch):
    """Queries from before the newest coded tokens on: some look at fewer of them. In two parts, each by itself."""
    state, layout, _ = cache(menu, dim, packing)
    length = int(state.rows[0, LENGTH])
    first = length - count
    at = torch.arange(first, length, every)
    q = torch.randn(2, 2 * GROUP, len(at), dim, generator=torch.Generator().manual_seed(5))
    parts = (4, len(at) - 4) if every == 4 else (len(at),)
    found = mean_attention(state, layout, q, at, SCALE, parts)
    positions = with_positions(state, layout).positions
    own = positions.clamp(min=0).long().flatten(2)
    wanted = [expected(state, layout, q[:, :, of], at[of]) for of in torch.arange(len(at)).split(parts)]
    wanted = [want.gather(2, own).view(positions.shape) * (positions >= 0) for want in wanted]
    assert bool((positions >= first).any()) == (count > 48)
    for mean, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(mean.double(), want, rtol=1e-4, atol=1e-9)
    if packing == "tiles":
        monkeypatch.setattr(statistics, "gpu", lambda *_: kernels)
        for mean, want in zip(mean_attention(state, layout, q, at, SCALE, parts), wanted, strict=True):
            torch.testing.assert_close(mean.double(), want, rtol=5e-3, atol=1e-7)  # queries are float16


FORMS = [(("K4V4", "K4V2"), 64, "rows"), (("K8V4", "K4V4", "K4V2"), 128, "tiles")]


@pytest.mark.parametrize(("menu", "dim", "packing"), FORMS)
def test_statistics_and_lengths_lie_where_their_page_has_them(menu, dim, packing):
    """Written and read back, with every other byte of every page as it was; lengths are those of decoded values."""
    state, layout, _ = cache(menu, dim, packing)
    there = with_positions(state, layout).positions >= 0
    keys = dense(state, layout, 500)
    one, two = (torch.rand(there.shape, generator=torch.Generator().manual_seed(i)) * 1e-4 for i in range(2))
    write_statistics(state, layout, one, two)
    for found, wanted in zip(read_statistics(state, layout), (one, two)):
        assert torch.equal(found[there], wanted.bfloat16().float()[there])
    assert all(torch.equal(a, b) for a, b in zip(keys, dense(state, layout, 500)))
    positions = with_positions(state, layout).positions
    length = keys[1].norm(dim=-1).gather(2, positions.clamp(min=0).long().flatten(2)).view(positions.shape)
    ratio = (value_lengths(state, layout) / length)[there]
    assert float((ratio - 1).abs().max()) < 0.25 and float((ratio - 1).abs().mean()) < 0.06


@pytest.mark.parametrize(("menu", "dim", "packing"), FORMS)
def test_what_is_observed_is_remembered(menu, dim, packing):
    """A mean over a life of two observations, and one that forgets half of the first in its half-life."""
    state, layout, _ = cache(menu, dim, packing)
    memory = torch.randn(2, 2 * GROUP, 128, dim, generator=torch.Generator().manual_seed(5))
    state = state._replace(queries=memory)
    length, there = int(state.rows[0, LENGTH]), with_positions(state, layout).positions >= 0

    def expected_of(count):
        """By every fourth of the newest queries, the last of them included."""
        at = torch.arange(length - 1, length - count - 1, -statistics.EVERY).flip(0)
        return mean_attention(state, layout, memory[:, :, at % 128], at, SCALE)[0]

    assert torch.equal(observe(state, layout, 128, SCALE).fresh, there)
    first = expected_of(128)
    for found in read_statistics(state, layout):
        torch.testing.assert_close(found[there], first[there], rtol=4e-3, atol=0)
    memory.copy_(torch.randn(memory.shape, generator=torch.Generator().manual_seed(6)))
    assert not bool(observe(state, layout, 32, SCALE).fresh.any())
    new = expected_of(32)
    age = (length - with_positions(state, layout).positions).float()
    assert bool((age[there] >= 16).all())
    looks = age.clamp(max=32)
    mean, recent = read_statistics(state, layout)
    kept = 0.5 ** (looks / HALF_LIFE)
    torch.testing.assert_close(mean[there], (first + (new - first) * looks / age)[there], rtol=8e-3, atol=1e-9)
    torch.testing.assert_close(recent[there], (first * kept + new * (1 - kept))[there], rtol=8e-3, atol=1e-9)


@pytest.mark.parametrize("begun", [False, True])
def test_a_kernel_remembers_the_same(begun, monkeypatch):
    """Interpreted, from the same means: what it tells, and every byte of the arena. Some pages end before they are
    full, and tables before their end."""
    state, layout, _ = cache(("K8V4", "K4V4", "K4V2"), 128, "tiles")
    state = state._replace(queries=torch.zeros(2, 2 * GROUP, 128, 128))
    shape = (*state.table.shape, layout.page)
    new, one, two = (torch.rand(shape, generator=torch.Generator().manual_seed(i)) * 1e-3 for i in range(3))
    if begun:
        write_statistics(state, layout, one, two * (two > 1e-4))  # some begin now
    monkeypatch.setattr(statistics, "mean_attention", lambda *_: [new])
    twin = state._replace(arena=state.arena.clone())
    portable = observe(state, layout, 100, SCALE, fused=False)
    monkeypatch.setattr(statistics, "gpu", lambda *_: kernels)
    fused = observe(twin, layout, 100, SCALE)
    there = portable.positions >= 0
    assert 0 < there.float().mean() < 1
    assert torch.equal(fused.positions, portable.positions)
    for name in ("fresh", "mean", "recent", "lengths"):
        a, b = getattr(fused, name)[there], getattr(portable, name)[there]
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert bool(portable.fresh[there].all()) != begun
    for a, b in zip(read_statistics(twin, layout), read_statistics(state, layout)):
        assert float((a[there] == b[there]).float().mean()) > 0.99  # but where a last bit decides how to round
        torch.testing.assert_close(a[there], b[there], rtol=2**-7, atol=0)
    write_statistics(twin, layout, one, two)
    write_statistics(state, layout, one, two)
    assert torch.equal(twin.arena, state.arena)


@pytest.mark.parametrize("rope", ["half", "interleaved"])
@pytest.mark.parametrize("rotary", [64, 32])
def test_expected_attention_against_queries_turned_one_by_one(rope, rotary):
    """Remembered queries, their pairs turned as complex numbers to later positions, look at all tokens."""
    state, layout, _ = cache(("K4V4", "K4V2"), 64, "rows")
    layout = dataclasses.replace(layout, rope=rope, rotary_dim=rotary)
    memory = torch.randn(2, 2 * GROUP, 128, 64, generator=torch.Generator().manual_seed(5))
    state = state._replace(queries=memory)
    length, count = int(state.rows[0, LENGTH]), 30
    frequencies = 1e4 ** -(torch.arange(rotary // 2, dtype=torch.float64) / (rotary // 2))
    queries = []
    for i in reversed(range(count - 1, -1, -statistics.EVERY)):
        was, now = length - count + i, length + 2 * i
        q = memory[:, :, was % 128].double()
        head, rest = q[..., :rotary], q[..., rotary:]
        pairs = head.unflatten(-1, (2, -1)).transpose(-1, -2) if rope == "half" else head.unflatten(-1, (-1, 2))
        turn = torch.polar(torch.ones_like(frequencies), (now - was) * frequencies)
        z = torch.view_as_complex(pairs.contiguous()) * turn
        pairs = torch.view_as_real(z)
        head = pairs.transpose(-1, -2).flatten(-2) if rope == "half" else pairs.flatten(-2)
        queries.append(torch.cat([head, rest], -1))
    want = expected(state, layout, torch.stack(queries, 2), torch.full((len(queries),), length))
    positions = with_positions(state, layout).positions
    want = want.gather(2, positions.clamp(min=0).long().flatten(2)).view(positions.shape) * (positions >= 0)
    found = observe(state, layout, count, SCALE, frequencies.float().expand(2, -1)).expected
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-9)


def test_losses_against_a_sum_over_tokens():
    state, layout, _ = cache(("K4V4", "K4V2"), 64, "rows")
    length, positions = int(state.rows[0, LENGTH]), with_positions(state, layout).positions
    q = torch.randn(2, 2 * GROUP, 40, 64, generator=torch.Generator().manual_seed(5))
    worth = torch.where(positions >= 0, torch.rand(positions.shape, generator=torch.Generator().manual_seed(2)), -1.0)
    keep = torch.tensor([0, 1, 50, 200, 10000]).expand(2, 2, 5).contiguous()
    found = realised_losses(state, layout, worth, keep, q, length - 40, SCALE)

    keys, _ = dense(state, layout, length)
    logits = (q.double().unflatten(1, (2, -1)) @ keys.double().mT.unsqueeze(2)) * SCALE
    at = torch.arange(length - 40, length)
    seen = (torch.arange(length) <= at.unsqueeze(-1)) & (keys.abs().sum(-1) > 0)[:, :, None, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    lengths = value_lengths(state, layout).double()
    for b in range(2):
        for h in range(2):
            there = positions[b, h] >= 0
            order = worth[b, h][there].argsort(descending=True)
            tokens, length_of = positions[b, h][there][order].long(), lengths[b, h][there][order]
            paid = weights[b, h][..., tokens] * length_of / length_of.mean()
            for i, count in enumerate(keep[b, h].tolist()):
                wanted = paid[..., count:].sum(-1).square().mean()
                assert float(found[b, h, i]) == pytest.approx(float(wanted), rel=1e-3, abs=1e-12)
