"""The one test matrix that every codec joins: bytes, coding gain, logits, batches, odd dims."""

import math

import pytest
import torch

from sphkv_compile.codecs import CODECS, get_codec
from sphkv_compile.spec import CODECS as SPEC_CODECS

WIDTHS = [2, 3, 4, 8]
GAIN = {  # dB at 2, 3, 4 bits on a random direction of 64 dimensions, least-squares radius
    "axis_cosine": (9.47, 14.88, 20.54),
    "pair_polar": (9.44, 15.16, 20.95),
    "tree": (9.26, 14.64, 20.32),
    "chain": (9.10, 14.51, 20.11),
}
every_codec = pytest.mark.parametrize("codec", [get_codec(name) for name in CODECS], ids=list(CODECS))
every_width = pytest.mark.parametrize("bits", WIDTHS)


def gain(codec, x, bits):
    """Coding gain in dB, with the radius that makes the squared error least."""
    c = codec.decode(codec.encode(x, bits), x.shape[-1], bits)
    radius = (x * c).sum(-1, keepdim=True) / (c * c).sum(-1, keepdim=True)
    return 10 * math.log10(x.square().sum() / (x - radius * c).square().sum())


@every_codec
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coding_gain(codec, bits):
    assert gain(codec, torch.randn(8000, 64), bits) == pytest.approx(GAIN[codec.name][bits - 2], abs=0.15)


@every_codec
def test_eight_bits_gain_at_least_forty_two_decibels(codec):
    assert gain(codec, torch.randn(300, 64), 8) > 42


@every_codec
@every_width
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 112, 128, 256])
def test_bytes_and_length_of_the_code_vector(codec, bits, dim):
    codes = codec.encode(torch.randn(2, 30, dim), bits)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 30, codec.code_bytes(dim, bits))
    assert codec.code_bytes(dim, bits) == dim * bits // 8
    c = codec.decode(codes, dim, bits)
    assert c.dtype == torch.float32 and c.shape == (2, 30, dim)
    assert 0.92 < (c.norm(dim=-1) / math.sqrt(dim)).mean() < 1.02  # centroids of 2 bits are 6 % short


@every_codec
@every_width
@pytest.mark.parametrize("dim", [64, 80, 96])
def test_logits_by_the_identity_are_the_dot_products(codec, bits, dim):
    q, x = torch.randn(2, 3, dim), torch.randn(2, 5, dim)
    q[0, 0] = 0
    q[0, 1, dim // 2 :] = 0
    codes = codec.encode(x, bits)
    dense = q.double() @ codec.decode(codes, dim, bits).double().mT
    torch.testing.assert_close(codec.logits(q, codes, bits).double(), dense, atol=5e-5, rtol=0)


@every_codec
@every_width
@pytest.mark.parametrize("dim", [64, 80])
def test_a_row_does_not_depend_on_its_batch(codec, bits, dim):
    x = torch.randn(5, 37, dim)
    codes = codec.encode(x, bits)
    decoded = codec.decode(codes, dim, bits)
    for index in ((3, 11), (slice(None), 36), (slice(2, 4),)):
        assert torch.equal(codes[index], codec.encode(x[index].clone(), bits))
        assert torch.equal(decoded[index], codec.decode(codes[index].clone(), dim, bits))
    assert torch.equal(codes, codec.encode(x.mT.contiguous().mT, bits))


@every_codec
@every_width
def test_only_the_direction_counts(codec, bits):
    x = torch.randn(20, 64)
    assert torch.equal(codec.encode(x, bits), codec.encode(x * 2.0**20, bits))


@every_codec
@every_width
def test_decoding_a_code_vector_is_stable(codec, bits):
    """A code's own vector lies in its cell; a wrong border or a swapped sign would move it."""
    codes = codec.encode(torch.randn(50, 64), bits)
    c = codec.decode(codes, 64, bits)
    again = codec.decode(codec.encode(c, bits), 64, bits)
    again = again * (c.norm(dim=-1) / again.norm(dim=-1))[:, None]
    assert ((again - c).norm(dim=-1) / c.norm(dim=-1)).mean() < {2: 0.2, 3: 0.08, 4: 0.03, 8: 0.003}[bits]


@every_codec
@every_width
def test_zero_has_a_code(codec, bits):
    assert codec.decode(codec.encode(torch.zeros(3, 64), bits), 64, bits).isfinite().all()


@every_codec
def test_demotion_nests_or_is_refused(codec):
    x = torch.randn(40, 64)
    for high, low in ((8, 4), (4, 3), (3, 2), (8, 2)):
        codes = codec.encode(x, high)
        if codec.nested:
            assert torch.equal(codec.demote(codes, 64, high, low), codec.encode(x, low))
        else:
            with pytest.raises(ValueError, match=codec.name):
                codec.demote(codes, 64, high, low)


def test_demotion_never_rises():
    codec = get_codec("axis_cosine")
    with pytest.raises(ValueError, match="from 2 to 4"):
        codec.demote(codec.encode(torch.randn(64), 2), 64, 2, 4)


@every_codec
def test_unknown_width_is_refused(codec):
    with pytest.raises(ValueError, match="nearest is 4"):
        codec.encode(torch.randn(64), 5)
    with pytest.raises(ValueError, match="nearest is 4"):
        codec.code_bytes(64, 5)


def test_names_are_those_of_the_spec_and_the_nearest_is_offered():
    assert set(CODECS) == set(SPEC_CODECS)
    with pytest.raises(ValueError, match="did you mean 'pair_polar'"):
        get_codec("pairpolar")
