"""Angle codes against arc tangents, and level tables against samples of what they are made for."""

import math

import numpy as np
import pytest
import torch

from sphkv_compile.codecs import chain, tree
from sphkv_compile.codecs.angles import angle_code, lloyd_max, phase_centres, phase_code


@pytest.mark.parametrize("phases", [4, 8, 16, 256])
@pytest.mark.parametrize("shifted", [False, True])
def test_phase_code_is_the_nearest_centre(phases, shifted):
    x, y = torch.randn(2, 500, 3)
    angle = torch.atan2(y.double(), x.double())[..., None]
    gap = (angle - torch.tensor(phase_centres(phases, shifted)) + math.pi).remainder(2 * math.pi) - math.pi
    assert torch.equal(phase_code(x, y, phases, shifted).long(), gap.abs().argmin(-1))


def test_every_axis_and_diagonal_has_a_phase_beside_it():
    """Borders: a point on one may go to either side, but no further."""
    x, y = torch.tensor([[1.0, 1, 0, -1, -1, -1, 0, 1], [0.0, 1, 1, 1, 0, -1, -1, -1]])
    for shifted in (False, True):
        centres = torch.tensor(phase_centres(8, shifted))[phase_code(x, y, 8, shifted).long()]
        gap = (torch.atan2(y, x) - centres + math.pi).remainder(2 * math.pi) - math.pi
        assert (gap.abs() <= math.pi / 8 + 1e-6).all()


def test_angle_code_counts_borders_below_the_angle():
    borders = np.sort(np.random.default_rng(0).uniform(0.1, 3.0, (6, 7)))
    angle = torch.rand(200, 6, dtype=torch.float64) * math.pi
    length = torch.rand(200, 6) + 0.1
    a, b = (length * f for f in (angle.cos().float(), angle.sin().float()))
    expected = (angle[..., None] >= torch.tensor(borders)).sum(-1)
    assert torch.equal(angle_code(a, b, borders).long(), expected)


@pytest.mark.parametrize(
    "bits, top, mse", [(1, 0.7979, 0.3634), (2, 1.510, 0.1175), (3, 2.152, 0.03454), (4, 2.733, 0.009497)]
)
def test_lloyd_max_of_a_gaussian(bits, top, mse):
    """Source: Max, Quantizing for minimum distortion (1960), table I."""
    grid = np.linspace(-8, 8, 16385)
    density = np.exp(-(grid**2) / 2)[None]
    borders, levels = lloyd_max(-8, 8, density, 2**bits)
    assert levels[0, -1] == pytest.approx(top, abs=1.5e-3)
    error = (grid - levels[0][np.searchsorted(borders[0], grid)]) ** 2
    assert (error * density[0]).sum() / density.sum() == pytest.approx(mse, rel=2e-3)


def assert_levels_are_means_of_cells(angles, borders, levels):
    """Shapes: ``angles`` [n, K], ``borders`` [K, m - 1], ``levels`` [K, m]."""
    for column, edges, values in zip(angles.T.numpy(), borders, levels):
        cell = np.searchsorted(edges, column)
        means = np.array([column[cell == i].mean() for i in range(len(values))])
        np.testing.assert_allclose(means, values, atol=0.01)


def test_chain_levels_are_those_of_random_directions():
    x = torch.randn(60_000, 8)
    tails = x.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    angles = torch.atan2(tails[:, 1:-1], x[:, :-2])
    assert_levels_are_means_of_cells(angles, *chain._angle_tables(8, 2))


@pytest.mark.parametrize("left, right", [(2, 2), (4, 2), (16, 16), (32, 16)])
def test_tree_levels_are_those_of_random_directions(left, right):
    lengths = [torch.randn(60_000, size).norm(dim=-1, keepdim=True) for size in (left, right)]
    borders, levels = tree._join_tables(left, right, 2)
    assert_levels_are_means_of_cells(torch.atan2(lengths[1], lengths[0]), borders[None], levels[None])
