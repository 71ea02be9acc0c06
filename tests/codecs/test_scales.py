"""Pair scales: equal within a RoPE pair, commuting with RoPE, and never NaN."""

import pytest
import torch

from sphkv_compile.codecs.scales import pair_scale


def moments(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.1


def partner(i, rope, rotary_dim):
    if i >= rotary_dim:
        return i
    return (i + rotary_dim // 2) % rotary_dim if rope == "half" else i ^ 1


@pytest.mark.parametrize("rope", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_a_pair_shares_its_scale_and_dims_past_rope_do_not(rope, rotary_dim):
    scale = pair_scale(moments(2, 64), moments(2, 64), rope, rotary_dim)
    for i in range(64):
        assert torch.equal(scale[:, i], scale[:, partner(i, rope, rotary_dim)])
    assert scale.unique().numel() > 30


def test_the_fourth_root_of_key_power_over_the_eighth_of_query_power():
    k, q = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    k[[0, 4]], q[[1, 5]] = 16.0**2, 16.0**2
    scale = pair_scale(k, q, "half", 8)
    assert float(scale[0] / scale[2]) == pytest.approx(4, rel=0.01)
    assert float(scale[1] / scale[2]) == pytest.approx(1 / 2, rel=0.01)
    keys_only = pair_scale(k, None, "half", 8)
    assert float(keys_only[1] / keys_only[2]) == 1


def test_values_are_bfloat16_of_geometric_mean_one():
    scale = pair_scale(moments(3, 128) ** 4, moments(3, 128), "half", 128)
    assert torch.equal(scale, scale.bfloat16().float())
    torch.testing.assert_close(scale.log().mean(-1), torch.zeros(3), atol=4e-3, rtol=0)


def test_the_order_of_summation_does_not_show():
    k = torch.rand(1000, 64, dtype=torch.float64)
    chunked = sum(part.sum(0) for part in k.split(7))
    assert torch.equal(pair_scale(k.sum(0), None, "half", 64), pair_scale(chunked, None, "half", 64))


@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_commutes_with_rope(rope):
    scale = pair_scale(moments(16), moments(16), rope, 16)
    turn = torch.eye(16)
    for i in range(16):
        j = partner(i, rope, 16)
        if i < j:
            angle = torch.tensor(0.7 * i + 0.3)
            turn[i, i] = turn[j, j] = angle.cos()
            turn[i, j], turn[j, i] = -angle.sin(), angle.sin()
    torch.testing.assert_close(torch.diag(scale) @ turn, turn @ torch.diag(scale))


@pytest.mark.parametrize("q", [None, "zero"])
def test_silence_gives_ones(q):
    zero = torch.zeros(2, 16, dtype=torch.float64)
    assert torch.equal(pair_scale(zero, None if q is None else zero, "half", 16), torch.ones(2, 16))


def test_one_silent_pair_stays_finite():
    k = moments(64)
    k[[3, 35]] = 0
    scale = pair_scale(k, moments(64), "half", 64)
    assert scale.isfinite().all() and (scale > 0).all()


def test_unknown_rope_gives_ones():
    assert torch.equal(pair_scale(moments(4, 64), moments(4, 64), None, 64), torch.ones(4, 64))


@pytest.mark.parametrize(
    "rope, rotary_dim, match", [("neox", 64, "rope='neox'"), ("half", 63, "63"), ("half", 80, "80")]
)
def test_nonsense_is_refused(rope, rotary_dim, match):
    with pytest.raises(ValueError, match=match):
        pair_scale(moments(64), None, rope, rotary_dim)
