"""B1, B2 and B4 must hold always; B3 and B6 are laws and must fit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_compile.codecs import bounds, get_codec
from sphkv_compile.codecs.pair_polar import PHASE_AMPLITUDE_BITS

SLACK = 1 + 1e-9
seeds = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random(seed, *shape):
    """Normal numbers with outliers. Shapes: -> float64[*shape]."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return x * torch.where(torch.rand(shape, generator=generator(seed + 1)) < 0.05, 30.0, 1.0)


def polar(x):
    first, second = x.chunk(2, -1)
    return torch.hypot(first, second), torch.atan2(second, first)


@given(seeds, st.sampled_from([2, 3, 4, 8]), st.sampled_from([8, 64, 80]))
@settings(max_examples=80)
def test_b1_holds_and_phases_keep_their_cell(seed, bits, dim):
    x, q = random(seed, 10, dim), random(seed + 2, 10, dim)
    x = x * math.sqrt(dim) / x.norm(dim=-1, keepdim=True)
    codec = get_codec("pair_polar")
    c = codec.decode(codec.encode(x, bits), dim, bits).double()
    (rho, theta), (rho_hat, theta_hat) = polar(x), polar(c)
    turn = (theta - theta_hat + math.pi).remainder(2 * math.pi) - math.pi
    cell = math.pi / 2 ** PHASE_AMPLITUDE_BITS[bits][0]
    assert (turn.abs()[rho > 1e-3] <= cell + 1e-4).all()
    dl = (q * (x - c)).sum(-1).abs()
    exact = bounds.phase_bound(polar(q)[0], rho, rho_hat, turn)
    assert (dl <= exact * SLACK + 1e-12).all()
    assert (exact <= bounds.phase_bound(polar(q)[0], rho, rho_hat, torch.full_like(turn, cell + 1e-4)) * SLACK).all()


def test_b1_is_attained_when_every_pair_errs_along_the_query():
    q, x = random(0, 64), random(1, 64)
    amplitude, phase = polar(q)
    error = torch.cat([0.1 * phase.cos(), 0.1 * phase.sin()])
    (rho, theta), (rho_hat, theta_hat) = polar(x), polar(x - error)
    bound = bounds.phase_bound(amplitude, rho, rho_hat, theta - theta_hat)
    torch.testing.assert_close((q * error).sum(), bound)


@given(seeds, st.sampled_from(["axis_cosine", "pair_polar", "chain", "tree"]), st.sampled_from([2, 3, 4]))
@settings(max_examples=60)
def test_b2_and_the_page_certificate_hold(seed, name, bits):
    x, q = random(seed, 3, 16, 64), random(seed + 2, 3, 16, 64)
    codec = get_codec(name)
    error = x - codec.decode(codec.encode(x, bits), 64, bits)
    dl = (q * error).sum(-1).abs()
    assert (dl <= bounds.norm_bound(q, error) * SLACK).all()
    certificate = bounds.certificate(error.float())
    assert torch.equal(certificate, certificate.bfloat16().float())
    assert (dl <= q.norm(dim=-1) * certificate[:, None].double() * (1 + 1e-6)).all()


def test_b2_is_attained_when_the_error_is_along_the_query():
    q = random(0, 5, 64)
    torch.testing.assert_close((q * (0.3 * q)).sum(-1), bounds.norm_bound(q, 0.3 * q))


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dim", [64, 256])
def test_b3_fits_in_a_random_frame(dim, bits):
    x, q = torch.randn(500, dim), torch.randn(200, dim)
    codec = get_codec("axis_cosine")
    c = codec.decode(codec.encode(x, bits), dim, bits)
    error = x - c * (x.norm(dim=-1) / c.norm(dim=-1))[:, None]
    z = (q @ error.T) / bounds.logit_std(q[:, None], error)
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    assert float(z.abs().max()) < 6  # of 100 000 normal numbers none is expected past 4.8


@given(seeds, st.integers(1, 40), st.floats(0, 8), st.booleans())
@settings(max_examples=200)
def test_b4_holds_for_weights_and_outputs(seed, tokens, size, two_groups):
    logits = random(seed, tokens)
    dl = (torch.rand(tokens, generator=generator(seed + 3), dtype=torch.float64) - 0.5) * size
    if two_groups:
        dl = dl.sign() * size / 2
    p, p_hat = logits.softmax(-1), (logits + dl).softmax(-1)
    width = dl.max() - dl.min()
    assert (p - p_hat).abs().sum() / 2 <= bounds.variation_bound(width) * SLACK + 1e-12
    v = random(seed + 5, tokens, 8)
    bound = bounds.output_bound(width, torch.cdist(v, v).max())
    assert ((p_hat - p) @ v).norm() <= bound * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("width", [0.1, 1.0, 5.0])
def test_b4_is_attained_by_two_groups(width):
    mass = 1 / (1 + math.exp(width / 2))
    p = torch.tensor([mass, 1 - mass], dtype=torch.float64)
    p_hat = (p.log() + torch.tensor([width, 0.0], dtype=torch.float64)).softmax(-1)
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    bound = bounds.output_bound(torch.tensor(width, dtype=torch.float64), torch.cdist(v, v).max())
    torch.testing.assert_close(((p_hat - p) @ v).norm(), bound)


def test_b4_is_tighter_than_the_classic_bound():
    width, v = torch.tensor(0.4), torch.randn(50, 16)
    classic = (width.exp() - 1) * v.norm(dim=-1).max()  # e^(2 eps) - 1 with eps = w / 2
    assert bounds.output_bound(width, torch.cdist(v, v).max()) < classic / 1.5


def chain_cosine(a, b):
    cosine = (a[-1] - b[-1]).cos()
    for i in reversed(range(len(a) - 1)):
        cosine = a[i].cos() * b[i].cos() + a[i].sin() * b[i].sin() * cosine
    return cosine


@given(seeds, st.integers(1, 20), st.floats(0, 2))
@settings(max_examples=100)
def test_chain_bound_holds(seed, count, size):
    a, b = (torch.rand(count, generator=generator(seed + i), dtype=torch.float64) * math.pi for i in (0, 1))
    b_hat = b + size * torch.randn(count, generator=generator(seed + 2), dtype=torch.float64)
    moved = (chain_cosine(a, b) - chain_cosine(a, b_hat)).abs()
    assert moved <= bounds.chain_bound(a, b, b_hat) * SLACK + 1e-12


@pytest.mark.parametrize("at", [0, 1, 4])
def test_chain_bound_is_attained_by_one_small_turn(at):
    """Equal chains after ``at`` make F = 1 there; a quarter turn between a and b makes F as steep as it can be."""
    a, b = (torch.rand(6, generator=generator(i), dtype=torch.float64) + 0.8 for i in (0, 1))
    a[at + 1 :] = b[at + 1 :]
    a[at] = b[at] + math.pi / 2
    b_hat = b.clone()
    b_hat[at] += 1e-6
    moved = (chain_cosine(a, b) - chain_cosine(a, b_hat)).abs()
    torch.testing.assert_close(moved, bounds.chain_bound(a, b, b_hat), rtol=1e-5, atol=0)


@given(seeds, st.floats(0, 1))
@settings(max_examples=100)
def test_tree_bound_holds(seed, size):
    """|dC| <= |dbeta| + max(|dC_L|, |dC_R|) at each join, so the largest angle errors of the levels add up."""
    moved, most = [], 0.0
    sides = [torch.rand(7, generator=generator(seed + i), dtype=torch.float64) * math.pi / 2 for i in (0, 1)]
    shift = size * torch.randn(7, generator=generator(seed + 2), dtype=torch.float64)
    for b in (sides[1], sides[1] + shift):
        cosine = (sides[0][:4] - b[:4]).cos()
        for joins in (slice(4, 6), slice(6, 7)):
            a, c = sides[0][joins], b[joins]
            cosine = a.cos() * c.cos() * cosine[0::2] + a.sin() * c.sin() * cosine[1::2]
        moved.append(cosine)
    for level in (slice(0, 4), slice(4, 6), slice(6, 7)):
        most += shift[level].abs().max()
    assert (moved[0] - moved[1]).abs() <= most * SLACK + 1e-12


@pytest.mark.parametrize("bits", [4, 3])
def test_b6_predicts_the_output_error(bits):
    dim, tokens = 64, 400
    q, x, v = torch.randn(300, dim), torch.randn(tokens, dim), torch.randn(tokens, 32) + 3  # a shared part is no error
    codec = get_codec("axis_cosine")
    c = codec.decode(codec.encode(x, bits), dim, bits)
    x_hat = c * (x.norm(dim=-1) / c.norm(dim=-1))[:, None]
    q = q / math.sqrt(dim)
    v_hat = v + 0.05 * torch.randn_like(v)
    p, p_hat = (q @ x.T).softmax(-1), (q @ x_hat.T).softmax(-1)
    actual = (p_hat @ v_hat - p @ v).square().sum(-1).mean()
    predicted = bounds.output_mse(p, q.norm(dim=-1), (x - x_hat).norm(dim=-1), v, v_hat, dim).mean()
    assert float((actual / predicted).sqrt()) == pytest.approx(1, abs=0.1)
