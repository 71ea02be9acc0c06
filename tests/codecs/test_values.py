"""Values: length kept, nested, batch-invariant, and the scale rule that attention prefers."""

import pytest
import torch

from sphkv_compile.codecs.rotation import rotation
from sphkv_compile.codecs.values import decode_values, demote_values, encode_values


@pytest.mark.parametrize("bits, most", [(8, 0.008), (4, 0.1), (3, 0.19), (2, 0.36)])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_error_and_length(dim, bits, most):
    v, rot = torch.randn(3, 50, dim), rotation(dim)
    decoded = decode_values(*encode_values(v, rot, bits), dim, rot, bits)
    assert most / 2 < (decoded - v).norm() / v.norm() < most
    torch.testing.assert_close(decoded.norm(dim=-1), v.norm(dim=-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("high, low", [(8, 4), (8, 2), (4, 3), (4, 2), (3, 2)])
def test_demotion_equals_direct_encoding(high, low):
    v, rot = torch.randn(200, 64), rotation(64)
    codes, scale = demote_values(*encode_values(v, rot, high), 64, high, low)
    direct_codes, direct_scale = encode_values(v, rot, low)
    assert torch.equal(codes, direct_codes)
    ulp = (scale.view(torch.int16) - direct_scale.view(torch.int16)).abs()
    assert ulp.max() <= 2  # the ratio of code lengths may carry one rounding into the next


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_row_does_not_depend_on_its_batch(dim, bits):
    v, rot = torch.randn(4, 33, dim), rotation(dim)
    codes, scale = encode_values(v, rot, bits)
    for index in ((2, 7), (3,), (slice(1, 3),)):
        alone_codes, alone_scale = encode_values(v[index].clone(), rot, bits)
        assert torch.equal(codes[index], alone_codes) and torch.equal(scale[index], alone_scale)


def test_zero_and_huge_values():
    v, rot = torch.stack([torch.zeros(64), torch.full((64,), 6e4), torch.eye(64)[0]]), rotation(64)
    decoded = decode_values(*encode_values(v, rot, 4), 64, rot, 4)
    assert not decoded[0].any() and decoded.isfinite().all()
    assert (decoded - v)[2].norm() < 0.25


def test_keeping_the_length_beats_least_squares_where_values_share_a_mean():
    """Attention averages coding noise away but not the shrinking of a shared direction that least squares brings."""
    v, rot = torch.randn(512, 64) + torch.randn(64), rotation(64)
    weights = torch.randn(64, 512).softmax(-1)
    decoded = decode_values(*encode_values(v, rot, 2), 64, rot, 2)
    shrink = (v * decoded).sum(-1, keepdim=True) / (decoded**2).sum(-1, keepdim=True)
    kept, least = (weights @ (x - v) for x in (decoded, shrink * decoded))
    assert kept.norm() < 0.9 * least.norm()
