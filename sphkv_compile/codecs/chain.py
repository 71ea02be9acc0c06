"""The hyperspherical chain: D - 1 angles, each the angle between one coordinate and all that follow."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sphkv_compile.codecs.angles import angle_code, lloyd_max, phase_centres, phase_code
from sphkv_compile.codecs.arith import safe_divide
from sphkv_compile.codecs.base import Codec
from sphkv_compile.codecs.codebook import check_bits
from sphkv_compile.codecs.packing import pack, packed_bytes, unpack


class Chain(Codec):
    """x_i = r sin(t_1) .. sin(t_{i-1}) cos(t_i): the paper's literal form, kept as a check on the others.

    Each angle has its own levels, those of the density sin^(D-1-i); the last, a full turn, has even phases. One code
    in D is padding. Decoding is serial, so no matrix unit can be fed by it.
    Source: SPHERICAL KV (hyperspherical coordinates, angular recurrence).
    """

    name: ClassVar[str] = "chain"
    identity: ClassVar[str] = "F_i = cos(a_i) cos(b_i) + sin(a_i) sin(b_i) F_{i+1}; q.k = |q| |k| F_1"
    bound: ClassVar[str] = "|dl| <= |q| |k| sum_i |db_i| prod_{j<i} |sin(a_j) sin(b^_j)|; and B2"

    def code_bytes(self, dim: int, bits: int) -> int:
        check_bits(bits)
        return packed_bytes(dim, bits)

    def encode(self, x: Tensor, bits: int) -> Tensor:
        check_bits(bits)
        x = x.float()
        head, tail = x[..., :-2], _tails(x)[..., 1:-1]
        codes = angle_code(head, tail, _angle_tables(x.shape[-1], bits)[0])
        last = phase_code(x[..., -2:-1], x[..., -1:], 1 << bits, shifted=False)
        return pack(torch.cat([codes, last, torch.zeros_like(last)], -1).to(torch.uint8), bits)

    def decode(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        cos, sin = self._cos_sin(codes, dim, bits)
        ones = torch.ones_like(cos[..., :1])
        reach = torch.cat([ones, sin.cumprod(-1)], -1)  # the last sine is signed and ends the chain
        return math.sqrt(dim) * reach * torch.cat([cos, ones], -1)

    def logits(self, q: Tensor, codes: Tensor, bits: int) -> Tensor:
        dim = q.shape[-1]
        tails = _tails(q)
        cos_a = safe_divide(q[..., :-1], tails[..., :-1])
        sin_a = safe_divide(torch.cat([tails[..., 1:-1], q[..., -1:]], -1), tails[..., :-1])
        cos_b, sin_b = self._cos_sin(codes, dim, bits)
        chain = q.new_ones(())
        for i in reversed(range(dim - 1)):
            chain = (
                cos_a[..., :, None, i] * cos_b[..., None, :, i]
                + sin_a[..., :, None, i] * sin_b[..., None, :, i] * chain
            )
        return tails[..., :, None, 0] * math.sqrt(dim) * chain

    def _cos_sin(self, codes: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
        """Shapes: uint8[..., bytes] -> float32[..., D - 1] each."""
        place = torch.arange(dim - 1, device=codes.device)
        index = unpack(codes, dim, bits)[..., :-1].int()
        cos, sin = (torch.tensor(table, device=codes.device)[place, index] for table in _cos_sin_tables(dim, bits))
        return cos, sin


def _tails(x: Tensor) -> Tensor:
    """The length of what starts at each coordinate. Shapes: float32[..., D] -> float32[..., D]."""
    return (x * x).flip(-1).cumsum(-1).flip(-1).sqrt()


@lru_cache(None)
def _angle_tables(dim: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Borders and levels of the first D - 2 angles, in radians.

    Shapes: -> float64[D - 2, 2**bits - 1], float64[D - 2, 2**bits].
    """
    power = np.arange(dim - 2, 0, -1)[:, None]
    density = np.sin(np.linspace(0, math.pi, 4097)) ** power
    borders, levels = lloyd_max(0, math.pi, density, 1 << bits)
    return np.round(borders, 8), np.round(levels, 8)


@lru_cache(None)
def _cos_sin_tables(dim: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Shapes: -> float32[D - 1, 2**bits] each."""
    angles = np.concatenate([_angle_tables(dim, bits)[1], phase_centres(1 << bits, shifted=False)[None]])
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
