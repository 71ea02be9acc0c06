"""Levels: against printed digits, against Lloyd-Max, at ties, and the same on every machine."""

import hashlib
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sphkv_compile.codecs import codebook
from sphkv_compile.codecs.codebook import WIDTHS, byte_table, e4m3_value, levels, mse, quantize, thresholds

PRINTED_LEVELS = {
    4: [0.1227, 0.3706, 0.6264, 0.8970, 1.1996, 1.5548, 2.0035, 2.6785],
    3: [0.2441, 0.7524, 1.3484, 2.1739],
    2: [0.4766, 1.5607],
}
PRINTED_THRESHOLDS = [0, 0.2466, 0.4984, 0.7617, 1.0443, 1.3772, 1.7731, 2.3410]
LLOYD_MAX_MSE = {2: 0.11748, 3: 0.03454, 4: 0.009497}  # Max, Quantizing for minimum distortion (1960), table I


@pytest.mark.parametrize("bits", PRINTED_LEVELS)
def test_levels_agree_with_the_design_document(bits):
    """The document's are centroids; ours are e4m3 numbers nearby, at most half a step of three bits away."""
    torch.testing.assert_close(levels(bits)[2 ** (bits - 1) :], torch.tensor(PRINTED_LEVELS[bits]), atol=0, rtol=1 / 16)


@pytest.mark.parametrize("bits", PRINTED_LEVELS)
def test_levels_are_e4m3_numbers_times_a_step(bits):
    table, step = byte_table(bits)
    numbers = torch.tensor(table, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    torch.testing.assert_close(levels(bits)[2 ** (bits - 1) :].double(), numbers * step, atol=1e-7, rtol=0)


def test_e4m3_bytes_have_torchs_values():
    every = [b for b in range(256) if b & 0x7F != 0x7F]  # but for not-a-number
    expected = torch.tensor(every, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert [e4m3_value(b) for b in every] == expected.tolist()


def test_thresholds_agree_with_the_design_document():
    torch.testing.assert_close(thresholds(4)[7:], torch.tensor(PRINTED_THRESHOLDS), atol=2e-3, rtol=0)


@pytest.mark.parametrize("bits", LLOYD_MAX_MSE)
def test_nesting_and_byte_tables_cost_a_tenth_of_a_decibel_at_most(bits):
    """.035 for shared thresholds; e4m3 levels add .06 at 4 bits, where they are finest."""
    cost = 10 * math.log10(mse(bits) / LLOYD_MAX_MSE[bits])
    assert -1e-3 < cost <= 0.035 + (0.063 if bits == 4 else 0.005)  # the printed optimum has four digits


def test_eight_bit_error():
    assert mse(8) == pytest.approx(4.5e-5, rel=0.02)


@pytest.mark.parametrize("bits", WIDTHS)
def test_stated_error_is_what_gaussian_numbers_meet(bits):
    middles = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    u = (torch.special.ndtri(middles)).float()
    error = (u - levels(bits)[quantize(u, bits).int()]).double().square().mean()
    assert float(error) == pytest.approx(mse(bits), rel=0.01)


@pytest.mark.parametrize("bits", WIDTHS)
def test_tables_are_odd_ascending_and_interleaved(bits):
    low, high = thresholds(bits), levels(bits)
    assert torch.equal(low, -low.flip(0)) and torch.equal(high, -high.flip(0))
    assert (high[:-1] < low).all() and (low < high[1:]).all()
    assert len(high) == 2**bits and (high[2 ** (bits - 1) :] > 0).all()


@pytest.mark.parametrize("high, low", [(8, 4), (4, 3), (3, 2), (8, 2)])
def test_dropping_low_bits_is_exact_also_on_every_border(high, low):
    border = thresholds(8)
    u = torch.cat(
        [border, border.nextafter(torch.tensor(-9.0)), border.nextafter(torch.tensor(9.0)), torch.randn(4096)]
    )
    assert torch.equal(quantize(u, high) >> (high - low), quantize(u, low))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_border_belongs_to_the_cell_above(bits):
    assert torch.equal(quantize(thresholds(bits), bits), torch.arange(1, 2**bits, dtype=torch.uint8))
    assert quantize(torch.tensor([0.0, -0.0]), bits).tolist() == [2 ** (bits - 1)] * 2


def test_shared_thresholds_are_the_optimum_of_the_summed_log_errors():
    """Independent of the solver: moving any border either way raises the objective."""

    def error(edges):
        total = 1.0
        for a, b in zip([-math.inf, *edges], [*edges, math.inf]):
            mass = (math.erf(b / 2**0.5) - math.erf(a / 2**0.5)) / 2
            moment = (math.exp(-a * a / 2) - math.exp(-b * b / 2)) / math.sqrt(2 * math.pi)
            total -= moment**2 / mass
        return total

    def objective(positive):
        edges = [*(-t for t in reversed(positive)), 0.0, *positive]
        return sum(math.log(error(edges[offset::stride])) for offset, stride in ((0, 1), (1, 2), (3, 4)))

    best = thresholds(4)[8:].tolist()
    for i in range(len(best)):
        for step in (-1e-3, 1e-3):
            assert objective([t + step * (i == j) for j, t in enumerate(best)]) > objective(best)


def test_tables_are_the_same_on_every_machine():
    """Saved caches hold codes; a reader with other tables would decode them wrongly, and nothing else would show it."""
    digest = hashlib.sha256(b"".join(table(b).numpy().tobytes() for b in WIDTHS for table in (thresholds, levels)))
    assert digest.hexdigest()[:16] == "2c3165ce4b7492d0"


def test_first_use_under_fake_tensors_leaves_real_tables():
    for cached in (codebook._thresholds, codebook._levels, codebook._positive_edges, codebook._nested_edges):
        cached.cache_clear()
    with FakeTensorMode():
        levels(8)
    assert float(levels(8)[-1]) > 2


def test_unknown_width_names_the_nearest():
    with pytest.raises(ValueError, match=r"bits=5.*nearest is 4"):
        levels(5)
