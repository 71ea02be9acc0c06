"""Staggered pair-polar: a pair of dimensions is a phase and an amplitude; odd rings are turned by half a phase step."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sphkv_compile.codecs.angles import lloyd_max, phase_centres, phase_code
from sphkv_compile.codecs.arith import direction
from sphkv_compile.codecs.base import Codec
from sphkv_compile.codecs.codebook import check_bits
from sphkv_compile.codecs.packing import pack_pairs, packed_bytes, unpack_pairs

PHASE_AMPLITUDE_BITS = {2: (3, 1), 3: (3, 3), 4: (4, 4), 8: (8, 8)}
"""Bits per element -> bits of a pair's phase and of its amplitude."""


class PairPolar(Codec):
    """Pairs (i, i + D/2) of the rotated residual as phase code and amplitude ring.

    Neighbouring rings are staggered, which packs their points more evenly than rings with equal phases.
    Source: SPHERICAL KV (angle codes); staggered rings as in amplitude-phase shift keying.
    """

    name: ClassVar[str] = "pair_polar"
    identity: ClassVar[str] = "q.k = sum_p |q_p| rho_p cos(phi_p - theta_p)"
    bound: ClassVar[str] = (
        "|dl| <= sum_p |q_p| sqrt((rho - rho^)^2 + 4 rho rho^ sin^2(dtheta / 2)), dtheta <= pi / 2^P (B1)"
    )

    def code_bytes(self, dim: int, bits: int) -> int:
        check_bits(bits)
        return packed_bytes(dim, bits)

    def encode(self, x: Tensor, bits: int) -> Tensor:
        check_bits(bits)
        first, second = direction(x).chunk(2, -1)
        even, even_error = _nearest(first, second, bits, odd=False)
        odd, odd_error = _nearest(first, second, bits, odd=True)
        return pack_pairs(torch.where(odd_error < even_error, odd, even), bits)

    def decode(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        words = unpack_pairs(codes, dim, bits)
        return torch.cat([torch.tensor(part, device=codes.device)[words] for part in _points(bits)], -1)

    def logits(self, q: Tensor, codes: Tensor, bits: int) -> Tensor:
        first, second = q.chunk(2, -1)
        length, phi = torch.hypot(first, second), torch.atan2(second, first)
        words = unpack_pairs(codes, q.shape[-1], bits)
        rho, theta = (torch.tensor(part, device=codes.device)[words] for part in _polar(bits))
        total = q.new_zeros(())
        for p in range(words.shape[-1]):  # pair by pair: all of them at once would be T x N x D
            turn = phi[..., :, None, p] - theta[..., None, :, p]
            total = total + length[..., :, None, p] * rho[..., None, :, p] * turn.cos()
        return total


def _nearest(x: Tensor, y: Tensor, bits: int, odd: bool) -> tuple[Tensor, Tensor]:
    """The nearest point on the odd or the even rings: its word, and its squared error less |(x, y)|^2.

    Shapes: float32[..., P] -> int32[..., P], float32[..., P].
    """
    phase_bits, _ = PHASE_AMPLITUDE_BITS[bits]
    phase = phase_code(x, y, 1 << phase_bits, shifted=odd)
    centres = phase_centres(1 << phase_bits, shifted=odd)
    cos, sin = (torch.tensor(f(centres).astype(np.float32), device=x.device)[phase] for f in (np.cos, np.sin))
    along = x * cos + y * sin
    rings = torch.tensor(_rings(bits)[int(odd) :: 2], device=x.device)
    ring = torch.bucketize(along.contiguous(), (rings[1:] + rings[:-1]) / 2, right=True, out_int32=True)
    amplitude = rings[ring]
    return (2 * ring + int(odd)) << phase_bits | phase, amplitude * (amplitude - 2 * along)


@lru_cache(None)
def _rings(bits: int) -> np.ndarray:
    """Amplitudes: Lloyd-Max levels of a Rayleigh amplitude's part along its coded phase. Shapes: -> float32[2**A]."""
    phase_bits, amplitude_bits = PHASE_AMPLITUDE_BITS[bits]
    sector = math.pi / 2**phase_bits
    cos = np.cos((np.arange(64) + 0.5) / 64 * sector)[:, None]
    along = np.linspace(0, 7, 8193)
    density = (along / cos**2 * np.exp(-((along / cos) ** 2) / 2)).mean(0, keepdims=True)
    return np.round(lloyd_max(0, 7, density, 2**amplitude_bits)[1][0], 8).astype(np.float32)


@lru_cache(None)
def _polar(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Amplitude and phase of every word. Shapes: -> float32[2**(2 bits)] each."""
    phases = 1 << PHASE_AMPLITUDE_BITS[bits][0]
    theta = [phase_centres(phases, shifted=bool(ring % 2)) for ring in range(len(_rings(bits)))]
    return np.repeat(_rings(bits), phases), np.concatenate(theta).astype(np.float32)


@lru_cache(None)
def _points(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The two coordinates of every word's point. Shapes: -> float32[2**(2 bits)] each."""
    rho, theta = (part.astype(np.float64) for part in _polar(bits))
    return (rho * np.cos(theta)).astype(np.float32), (rho * np.sin(theta)).astype(np.float32)
