"""The compared methods do what their papers say, and their bits are counted in full."""

from __future__ import annotations

import math

import pytest
import torch

from examples.eval.ours import Ours
from examples.eval.run import methods
from sphkv_compile.eval.kivi import Kivi, integers
from sphkv_compile.eval.methods import LayerMoments
from sphkv_compile.eval.turboquant import TurboQuant, norm_and_direction, random_rotation, sphere_levels

SEEN = LayerMoments(torch.ones(2, 16), torch.ones(2, 16))


def _slow_group(x: list[float], bits: int) -> list[float]:
    """One group by the textbook: round((x - min) / step) steps above min; step and min in half precision."""
    half = lambda value: torch.tensor(value).half().item()  # noqa: E731
    low, step = half(min(x)), half((max(x) - min(x)) / (2**bits - 1))
    codes = [min(max(round((value - low) / step), 0), 2**bits - 1) for value in x]
    return [low + code * step for code in codes]


@pytest.mark.parametrize("bits, group", [(2, 4), (4, 8)])
def test_kivi_groups_keys_along_tokens_and_values_along_channels(bits, group):
    """Fails if a group runs along the wrong axis, is symmetric, or keeps its step in full precision."""
    spans = torch.randn(2, 3, 8, 16) + 3
    method = Kivi(bits, bits, group)
    keys, values = method.keys(spans, SEEN), method.values(spans)
    for h, n, start, other in [(0, 0, 0, 5), (1, 2, group * (8 // group - 1), 11)]:
        tokens, channels = slice(start, start + group), slice(start, start + group)
        expected = _slow_group(spans[h, n, tokens, other].tolist(), bits)
        torch.testing.assert_close(keys[h, n, tokens, other], torch.tensor(expected), rtol=1e-6, atol=1e-6)
        expected = _slow_group(spans[h, n, 3, channels].tolist(), bits)
        torch.testing.assert_close(values[h, n, 3, channels], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_kivi_error_is_within_half_a_step():
    """Half a step, and what half precision adds to the step (2^-11 of 15 of them) and the zero (2^-11 of it)."""
    x = torch.randn(64, 32) * 10
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    bound = (high - low) / 15 / 2 + 2**-11 * ((high - low) + low.abs())
    assert ((integers(x, 4, 32) - x).abs() <= bound).all()


def test_kivi_keeps_a_constant_group():
    x = torch.full((1, 32), 2.5)
    assert torch.equal(integers(x, 2, 32), x)


def test_kivi_refuses_a_ragged_group():
    with pytest.raises(ValueError, match="expected a divisor of 16"):
        Kivi(4, 4, 32).keys(torch.zeros(1, 1, 16, 8), SEEN)


def test_sphere_levels_in_three_dimensions_are_even():
    """On the ordinary sphere a coordinate is uniform on [-1, 1] (Archimedes), so the levels are cell centres."""
    torch.testing.assert_close(sphere_levels(3, 2), torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=1e-4, rtol=0)


def test_sphere_levels_in_many_dimensions_tend_to_lloyd_max_of_a_gaussian():
    """Max (1960), table I, N = 4: 0.4528 and 1.510."""
    levels = sphere_levels(4096, 2) * math.sqrt(4096)
    torch.testing.assert_close(levels[2:], torch.tensor([0.4528, 1.510]), atol=2e-3, rtol=0)


def test_turboquant_is_a_rotation_of_scalar_codes():
    turn = random_rotation(16)
    torch.testing.assert_close(turn @ turn.T, torch.eye(16), atol=1e-6, rtol=0)
    x = torch.randn(5, 16)
    decoded = norm_and_direction(x, 3)
    coordinates = decoded / x.norm(dim=-1, keepdim=True).half() @ turn.T
    distance = (coordinates[..., None] - sphere_levels(16, 3)).abs()
    assert distance.amin(-1).max() < 1e-5  # every coordinate is a level
    nearest = (x / x.norm(dim=-1, keepdim=True) @ turn.T)[..., None].sub(sphere_levels(16, 3)).abs().argmin(-1)
    assert torch.equal(distance.argmin(-1), nearest)


def test_turboquant_of_zero_is_zero():
    assert norm_and_direction(torch.zeros(2, 16), 4).abs().max() == 0


@pytest.mark.parametrize(
    "method, dim, keys, values",
    [
        # 64 codes of 4 bits, a radius byte, an index byte, a position; an anchor row of 64 bytes and two bf16 per 128
        # tokens, an offset and a tier per 64
        (Ours(4, 4), 64, (256 + 8 + 8 + 32 + (512 + 32) / 128 + 40 / 64) / 64, (256 + 16) / 64),
        (Ours(3, 2), 256, (768 + 8 + 8 + 32 + (2048 + 32) / 128 + 40 / 64) / 256, (512 + 16) / 256),
        (Ours(8, 4), 64, (512 + 16 + 8 + 32 + (512 + 32) / 128 + 40 / 64) / 64, (256 + 16) / 64),
        # 64 tokens of a channel share two half floats; 128 channels do not exist, so a value group holds 64
        (Kivi(4, 4, 64), 64, (64 * 4 + 32) / 64, (64 * 4 + 32) / 64),
        (Kivi(2, 3, 128), 64, (128 * 2 + 32) / 128, (64 * 3 + 32) / 64),
        (TurboQuant(4, 2), 64, (256 + 16) / 64, (128 + 16) / 64),
    ],
    ids=lambda x: f"{x.name}-{x.k_bits}-{x.v_bits}" if hasattr(x, "name") else None,
)
def test_every_stored_bit_is_counted(method, dim, keys, values):
    assert method.stored_bits(dim, 128) == pytest.approx((keys, values), rel=1e-12)
    assert method.total_bits(dim, 128) == pytest.approx((keys + values) / 2, rel=1e-12)


@pytest.mark.parametrize("dim", [64, 256])
def test_references_reach_our_bits(dim):
    """Nothing is extrapolated: either reference is measured above our widest code, and within a fifth of a bit of
    our narrowest (KIVI's values cannot share a step across tokens)."""
    bits = {
        name: [m.total_bits(dim, 128) for m in methods(quick=False) if m.name.startswith(name)]
        for name in ("sphkv", "kivi", "turboquant")
    }
    for name in ("kivi", "turboquant"):
        assert min(bits[name]) <= min(bits["sphkv"]) + 1 / 5 and max(bits["sphkv"]) <= max(bits[name])
