"""The key pipeline: identity, precision, nesting, and every awkward span."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_compile.codecs import CODECS, get_codec
from sphkv_compile.codecs.keys import (
    KeySpan,
    anchor_value,
    decode_keys,
    demote_keys,
    encode_keys,
    radius_bytes,
    radius_value,
    rotate_query,
)
from sphkv_compile.codecs.rotation import rotation

AXIS = get_codec("axis_cosine")
HEAD_DIMS = [64, 80, 96, 112, 128, 256]
FIELDS = list(KeySpan.__dataclass_fields__)


def scale_of(dim):
    return (torch.rand(dim) + 0.5).bfloat16().float()


def keys(*shape):
    """Keys with most of their energy in a constant vector, as real ones have. Shapes: -> float32[*shape]."""
    return torch.randn(shape) + 3 * torch.randn(*shape[:-2], 1, shape[-1])


def relative_error(k, k_hat):
    return float((k - k_hat).norm() / (k - k.mean(-2, keepdim=True)).norm())


@pytest.mark.parametrize("bits, most", [(8, 0.0075), (4, 0.1), (3, 0.19), (2, 0.36)])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_error_follows_the_width(dim, bits, most):
    k, scale, rot = keys(2, 128, dim), torch.ones(dim), rotation(dim)
    span = encode_keys(k, scale.expand(2, dim), rot, AXIS, bits)
    error = relative_error(k, decode_keys(span, dim, scale.expand(2, dim), rot, AXIS, bits))
    assert most / 2 < error < most


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_logit_from_codes_is_the_logit_of_the_decoded_key(codec, bits):
    """Identity I5, with every stored part as it is stored."""
    codec, dim = get_codec(codec), 64
    k, q, scale, rot = keys(64, dim), torch.randn(5, dim), scale_of(dim), rotation(dim)
    span = encode_keys(k, scale, rot, codec, bits)
    turned = rotate_query(q, scale, rot)
    radius = radius_value(span.radius, span.top)
    logits = (turned @ anchor_value(span))[:, None] + radius * codec.logits(turned, span.codes, bits)
    dense = q.double() @ decode_keys(span, dim, scale, rot, codec, bits).double().T
    torch.testing.assert_close(logits.double(), dense, atol=2e-4, rtol=1e-5)


def test_shapes_and_types():
    span = encode_keys(keys(2, 3, 16, 64), torch.ones(2, 3, 64), rotation(64), AXIS, 3)
    assert {f: (tuple(getattr(span, f).shape), getattr(span, f).dtype) for f in FIELDS} == {
        "codes": ((2, 3, 16, 24), torch.uint8),
        "radius": ((2, 3, 16, 1), torch.uint8),
        "top": ((2, 3), torch.float32),
        "anchor": ((2, 3, 64), torch.int8),
        "anchor_scale": ((2, 3), torch.float32),
    }
    for row in (span.top, span.anchor_scale):
        assert torch.equal(row, row.bfloat16().float())
    assert encode_keys(keys(16, 64), torch.ones(64), rotation(64), AXIS, 8).radius.shape == (16, radius_bytes(8))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_span_does_not_depend_on_its_batch(codec, bits, dim):
    codec, rot = get_codec(codec), rotation(dim)
    k, scale = keys(3, 5, 40, dim), torch.stack([scale_of(dim) for _ in range(15)]).view(3, 5, dim)
    whole = encode_keys(k, scale, rot, codec, bits, lowest_bits=2)
    decoded = decode_keys(whole, dim, scale, rot, codec, bits)
    alone = encode_keys(k[1, 2].clone(), scale[1, 2], rot, codec, bits, lowest_bits=2)
    across = encode_keys(k.transpose(0, 1), scale.transpose(0, 1), rot, codec, bits, lowest_bits=2)
    for field in FIELDS:
        assert torch.equal(getattr(whole, field)[1, 2], getattr(alone, field)), field
        assert torch.equal(getattr(whole, field).transpose(0, 1), getattr(across, field)), field
    assert torch.equal(decoded[1, 2], decode_keys(alone, dim, scale[1, 2], rot, codec, bits))


@given(st.sampled_from([(8, 4), (8, 3), (8, 2), (4, 3), (4, 2), (3, 2)]), st.integers(0, 2**31))
@settings(max_examples=60)
def test_demotion_equals_direct_encoding(widths, seed):
    high, low = widths
    torch.manual_seed(seed)
    k, scale, rot = keys(24, 64) * 10 ** torch.randn(()), scale_of(64), rotation(64)
    wide = encode_keys(k, scale, rot, AXIS, high, lowest_bits=2)
    demoted = demote_keys(wide, 64, AXIS, high, low)
    direct = encode_keys(k, scale, rot, AXIS, low, lowest_bits=2)
    assert torch.equal(demoted.codes, direct.codes)
    assert torch.equal(demoted.anchor, direct.anchor)
    unit = demoted.top / 255
    gap = radius_value(demoted.radius, demoted.top) - radius_value(direct.radius, direct.top)
    slack = unit * (demoted.top != direct.top)  # two tops: the half units of their roundings differ too
    assert (gap.abs() <= unit * 1.001 + slack).all()


def test_demotion_step_by_step_keeps_the_codes():
    k, scale, rot = keys(64, 64), scale_of(64), rotation(64)
    span = encode_keys(k, scale, rot, AXIS, 8, lowest_bits=2)
    for high, low in ((8, 4), (4, 3), (3, 2)):
        span = demote_keys(span, 64, AXIS, high, low)
        assert torch.equal(span.codes, encode_keys(k, scale, rot, AXIS, low).codes)
    assert relative_error(k, decode_keys(span, 64, scale, rot, AXIS, 2)) < 0.4


@pytest.mark.parametrize("lowest", [4, 3, 2])
def test_top_leaves_room_for_every_demotion(lowest):
    """Coordinates just under a border: their narrow code is half as long as the wide one, so the radius must double."""
    rot, x = rotation(64), torch.full((8, 64), 1.04)
    x[:, 0] = 2.0
    span = encode_keys(x @ rot, torch.ones(64), rot, AXIS, 4, lowest_bits=lowest, use_anchor=False)
    demoted = demote_keys(span, 64, AXIS, 4, lowest) if lowest < 4 else span
    decoded = decode_keys(demoted, 64, torch.ones(64), rot, AXIS, lowest)
    torch.testing.assert_close(decoded.norm(dim=-1), x.norm(dim=-1), rtol=3e-3, atol=0)


@pytest.mark.parametrize("codec", [name for name in CODECS if not CODECS[name].nested])
def test_a_codec_that_does_not_nest_says_so(codec):
    span = encode_keys(keys(8, 64), torch.ones(64), rotation(64), get_codec(codec), 4, lowest_bits=2)
    with pytest.raises(ValueError, match=f"{codec}.*axis_cosine"):
        demote_keys(span, 64, get_codec(codec), 4, 2)


AWKWARD = {
    "zero": torch.zeros(16, 64),
    "constant": torch.randn(64, generator=torch.Generator().manual_seed(1)).expand(16, 64),
    "one hot": torch.eye(64)[:16],
    "huge": torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) * 1e15,
    "tiny": torch.randn(16, 64, generator=torch.Generator().manual_seed(3)) * 1e-12,
    "one outlier token": torch.cat(
        [torch.randn(15, 64, generator=torch.Generator().manual_seed(4)), torch.ones(1, 64) * 1e4]
    ),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_awkward_spans_stay_finite_and_near(codec, bits, name):
    k, codec, rot = AWKWARD[name], get_codec(codec), rotation(64)
    span = encode_keys(k, torch.ones(64), rot, codec, bits, lowest_bits=2)
    decoded = decode_keys(span, 64, torch.ones(64), rot, codec, bits)
    assert decoded.isfinite().all()
    usual = {8: 0.0075, 4: 0.1, 3: 0.19, 2: 0.36}[bits]  # of a random direction
    deviation = (k - k.mean(-2, keepdim=True)).norm()
    anchor_step = span.anchor_scale * k.numel() ** 0.5  # a constant span leaves only what int8 could not hold
    assert (decoded - k).norm() <= 1.5 * usual * deviation + anchor_step
    if name == "zero":
        assert not span.radius.any() and not decoded.any()


def test_a_constant_added_to_all_keys_is_free():
    """What the anchor is for: without it the same constant ruins the codes."""
    k, scale, rot = torch.randn(128, 64), torch.ones(64), rotation(64)
    bias = 20 * torch.randn(64)

    def error(keys, **options):
        span = encode_keys(keys, scale, rot, AXIS, 4, **options)
        return float((decode_keys(span, 64, scale, rot, AXIS, 4) - keys).norm() / k.norm())

    assert error(k + bias) < 1.15 * error(k)
    assert error(k + bias, use_anchor=False) > 10 * error(k)


def test_without_anchor_the_stored_anchor_is_zero():
    span = encode_keys(keys(16, 64), torch.ones(64), rotation(64), AXIS, 4, use_anchor=False)
    assert not span.anchor.any() and not span.anchor_scale.any()


def test_half_precision_keys_are_widened_first():
    k = keys(16, 64).bfloat16()
    one, other = (encode_keys(x, torch.ones(64), rotation(64), AXIS, 4) for x in (k, k.float()))
    assert all(torch.equal(getattr(one, field), getattr(other, field)) for field in FIELDS)
