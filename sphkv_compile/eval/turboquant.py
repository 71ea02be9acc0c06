"""TurboQuant-style reference: a random rotation, the norm, and Lloyd-Max codes of each coordinate of the direction.

No anchor and no scale: what a data-oblivious code of norm and direction reaches.

Source: TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate (arXiv 2504.19874), algorithm 1
(the MSE form).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sphkv_compile.eval.methods import LayerMoments, Method


class TurboQuant(Method):
    """``bits`` per coordinate and a float16 norm per vector, for keys and values alike."""

    name = "turboquant"

    def __init__(self, k_bits: int, v_bits: int) -> None:
        self.k_bits, self.v_bits = k_bits, v_bits

    def keys(self, spans: Tensor, seen: LayerMoments) -> Tensor:
        return norm_and_direction(spans, self.k_bits)

    def values(self, spans: Tensor) -> Tensor:
        return norm_and_direction(spans, self.v_bits)

    def stored_bits(self, dim: int, span: int) -> tuple[float, float]:
        return self.k_bits + 16 / dim, self.v_bits + 16 / dim


def norm_and_direction(x: Tensor, bits: int) -> Tensor:
    """Code and decode. Shapes: float32[..., D] -> the same."""
    dim = x.shape[-1]
    turn, levels = random_rotation(dim).to(x.device), sphere_levels(dim, bits).to(x.device)
    norm = x.norm(dim=-1, keepdim=True)
    direction = x / norm.clamp(min=1e-30) @ turn.T
    codes = torch.bucketize(direction, (levels[1:] + levels[:-1]) / 2)
    return norm.half().float() * (levels[codes] @ turn)


@lru_cache(None)
def random_rotation(dim: int) -> Tensor:
    """A rotation drawn evenly from all, the same on every run. Shapes: -> float32[D, D]."""
    gaussian = np.random.default_rng(0).standard_normal((dim, dim))
    q, r = np.linalg.qr(gaussian)
    return torch.tensor(q * np.sign(np.diag(r)), dtype=torch.float32)  # the signs make the draw even (Haar)


@lru_cache(None)
def sphere_levels(dim: int, bits: int) -> Tensor:
    """Lloyd-Max levels of one coordinate of a random unit vector, whose density is (1 - x^2)^((D - 3) / 2).

    Shapes: -> float32[2**bits], ascending.
    """
    grid = np.linspace(-1, 1, 20_001)
    density = (1 - grid**2) ** ((dim - 3) / 2)
    mass, moment = (np.concatenate([[0], np.cumsum((f[1:] + f[:-1]) / 2)]) for f in (density, density * grid))
    levels = np.interp((np.arange(2**bits) + 0.5) / 2**bits, mass / mass[-1], grid)
    for _ in range(20_000):
        edges = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
        before, levels = levels, np.diff(np.interp(edges, grid, moment)) / np.diff(np.interp(edges, grid, mass))
        if np.abs(levels - before).max() < 1e-9:
            return torch.tensor(levels, dtype=torch.float32)
    raise AssertionError("Lloyd's iteration did not converge")
