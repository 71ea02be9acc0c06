"""Angles without transcendental functions of the data, and Lloyd-Max levels of a density given on a grid.

A library's atan2 rounds differently in its vector and its scalar path, so the same row could get another code in
another batch. An angle is coded here by comparing cross products with fixed directions: theta >= t exactly where
b cos t >= a sin t, for (a, b) = r (cos theta, sin theta) and theta, t in [0, pi].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def angle_code(a: Tensor, b: Tensor, borders: np.ndarray) -> Tensor:
    """How many borders are at or below the angle of each (a, b).

    Shapes: ``a``, ``b`` float32[..., N], ``borders`` float64[N or 1, M], radians within (0, pi) -> int32[..., N].
    """
    cos, sin = (torch.tensor(f(borders).astype(np.float32), device=a.device) for f in (np.cos, np.sin))
    code = torch.zeros_like(a, dtype=torch.int32)
    for j in range(borders.shape[-1]):
        code += b * cos[:, j] >= a * sin[:, j]
    return code


def phase_code(x: Tensor, y: Tensor, phases: int, shifted: bool) -> Tensor:
    """The sector of (x, y) among ``phases`` equal ones; centres at (k + 1/2) steps, or at k steps where ``shifted``.

    Shapes: float32[..., N] -> int32[..., N], in 0 .. phases - 1.
    """
    per_quadrant, step = phases // 4, 2 * math.pi / phases
    left, below = x < 0, y < 0
    quadrant = torch.where(below, 3 - left.int(), left.int())
    odd = left ^ below
    a, b = torch.where(odd, y, x).abs(), torch.where(odd, x, y).abs()
    borders = [(k + 0.5) * step for k in range(per_quadrant)] if shifted else [k * step for k in range(1, per_quadrant)]
    within = angle_code(a, b, np.array([borders]))
    return (quadrant * per_quadrant + within) % phases


def phase_centres(phases: int, shifted: bool) -> np.ndarray:
    """The angle of each phase code, in radians. Shapes: -> float64[phases]."""
    return (np.arange(phases) + (0.0 if shifted else 0.5)) * (2 * math.pi / phases)


def lloyd_max(low: float, high: float, density: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Borders and levels of least squared error, for each row's density on an even grid from ``low`` to ``high``.

    The first guess puts levels as dense as the cube root of the density, which is optimal for many levels; a fixed
    number of Lloyd steps then finds the few-level optimum.

    Shapes: ``density`` float64[K, G] -> float64[K, count - 1], float64[K, count].
    Source: Lloyd, Least squares quantization in PCM (1982); Panter and Dite (1951).
    """
    grid = np.linspace(low, high, density.shape[-1])
    mass, moment = _cumulative(density, grid), _cumulative(density * grid, grid)
    spread = _cumulative(np.cbrt(density), grid)
    wanted = np.arange(1, count) / count
    borders = np.stack([np.interp(wanted, row / row[-1], grid) for row in spread])
    for _ in range(100 if count > 16 else 600):
        levels = _cell_means(mass, moment, borders, low, grid[1] - low)
        borders = (levels[:, 1:] + levels[:, :-1]) / 2
    return borders, _cell_means(mass, moment, borders, low, grid[1] - low)


def _cumulative(density: np.ndarray, grid: np.ndarray) -> np.ndarray:
    steps = (density[:, 1:] + density[:, :-1]) / 2 * np.diff(grid)
    return np.concatenate([np.zeros((len(density), 1)), np.cumsum(steps, -1)], -1)


def _cell_means(mass: np.ndarray, moment: np.ndarray, borders: np.ndarray, low: float, step: float) -> np.ndarray:
    place = (borders - low) / step
    index = np.clip(place.astype(int), 0, mass.shape[-1] - 2)

    def per_cell(cumulative: np.ndarray) -> np.ndarray:
        below = np.take_along_axis(cumulative, index, -1)
        above = np.take_along_axis(cumulative, index + 1, -1)
        at = below + (above - below) * (place - index)
        return np.diff(np.concatenate([cumulative[:, :1], at, cumulative[:, -1:]], -1), axis=-1)

    return per_cell(moment) / per_cell(mass)
