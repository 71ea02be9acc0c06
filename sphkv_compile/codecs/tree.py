"""The recursive polar tree: pairs have a phase, and every two parts are joined by the angle between their lengths."""

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
from sphkv_compile.codecs.packing import pack_pairs, packed_bytes, unpack_pairs

LEAF_JOIN_BITS = {2: (3, 1), 3: (4, 2), 4: (5, 3), 8: (9, 7)}
"""Bits per element -> bits of a leaf's phase and of an angle that joins two parts."""


class Tree(Codec):
    """D/2 leaf phases and D/2 - 1 joins: length_left = r cos(beta), length_right = r sin(beta), beta in [0, pi/2].

    Encoding runs from the leaves up, and each length is the part that lies along what was coded below it. At a level of
    odd count the last part waits for the next level, so any even D has a tree.
    Source: SPHERICAL KV (angle codes); PolarQuant's recursive polar transform.
    """

    name: ClassVar[str] = "tree"
    identity: ClassVar[str] = "C = cos(alpha) cos(beta) C_L + sin(alpha) sin(beta) C_R, C = cos(phi - theta) at a leaf"
    bound: ClassVar[str] = "|dC| <= |dbeta| + max(|dC_L|, |dC_R|): |dl| <= |q| |k| times the sum over levels; and B2"

    def code_bytes(self, dim: int, bits: int) -> int:
        check_bits(bits)
        return packed_bytes(dim, bits)

    def encode(self, x: Tensor, bits: int) -> Tensor:
        check_bits(bits)
        leaf_bits, join_bits = LEAF_JOIN_BITS[bits]
        first, second = x.float().chunk(2, -1)
        leaf = phase_code(first, second, 1 << leaf_bits, shifted=False)
        cos, sin = _look_up(_leaf_tables(bits), leaf)
        lengths = first * cos + second * sin
        joins = []
        for pairs, borders, *tables in _levels(x.shape[-1], bits):
            left, right, waiting = lengths[..., :pairs], lengths[..., pairs : 2 * pairs], lengths[..., 2 * pairs :]
            code = angle_code(left, right, borders)
            cos, sin = _look_up(tables, code)
            lengths = torch.cat([left * cos + right * sin, waiting], -1)
            joins.append(code)
        joined = torch.cat([*joins, torch.zeros_like(leaf[..., :1])], -1)
        return pack_pairs(leaf << join_bits | joined, bits)

    def decode(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        leaf, joins = self._split(codes, dim, bits)
        lengths = torch.full_like(leaf[..., :1], math.sqrt(dim), dtype=torch.float32)
        for code, (pairs, _, *tables) in zip(reversed(joins), reversed(_levels(dim, bits))):
            cos, sin = _look_up(tables, code)
            joined, waiting = lengths[..., :pairs], lengths[..., pairs:]
            lengths = torch.cat([joined * cos, joined * sin, waiting], -1)
        cos, sin = _look_up(_leaf_tables(bits), leaf)
        return torch.cat([lengths * cos, lengths * sin], -1)

    def logits(self, q: Tensor, codes: Tensor, bits: int) -> Tensor:
        dim = q.shape[-1]
        leaf, joins = self._split(codes, dim, bits)
        first, second = q.chunk(2, -1)
        length = torch.hypot(first, second)
        cos_cos, sin_sin = _products(first, second, length, _look_up(_leaf_tables(bits), leaf))
        cosine = cos_cos + sin_sin  # cos(phi - theta)
        for code, (pairs, _, *tables) in zip(joins, _levels(dim, bits)):
            left, right, waiting = length[..., :pairs], length[..., pairs : 2 * pairs], length[..., 2 * pairs :]
            whole = torch.hypot(left, right)
            cos_cos, sin_sin = _products(left, right, whole, _look_up(tables, code))
            joined = cos_cos * cosine[..., :pairs] + sin_sin * cosine[..., pairs : 2 * pairs]
            length = torch.cat([whole, waiting], -1)
            cosine = torch.cat([joined, cosine[..., 2 * pairs :]], -1)
        return length * math.sqrt(dim) * cosine.squeeze(-1)

    def _split(self, codes: Tensor, dim: int, bits: int) -> tuple[Tensor, list[Tensor]]:
        """Leaf phases, and the join codes of each level from the leaves up."""
        words = unpack_pairs(codes, dim, bits)
        join_bits = LEAF_JOIN_BITS[bits][1]
        counts = [pairs for pairs, *_ in _levels(dim, bits)]
        joins = (words & ((1 << join_bits) - 1))[..., : sum(counts)].split(counts, -1)
        return words >> join_bits, list(joins)


def _products(a: Tensor, b: Tensor, whole: Tensor, cos_sin: list[Tensor]) -> tuple[Tensor, Tensor]:
    """cos(alpha) cos(beta) and sin(alpha) sin(beta) for every query and token; alpha comes from the query's two sides.

    Shapes: ``a``, ``b``, ``whole`` [..., T, n], ``cos_sin`` [..., N, n] each -> [..., T, N, n] each.
    """
    cos, sin = cos_sin
    cos_alpha, sin_alpha = safe_divide(a, whole), safe_divide(b, whole)
    return cos_alpha[..., :, None, :] * cos[..., None, :, :], sin_alpha[..., :, None, :] * sin[..., None, :, :]


def _look_up(tables: tuple[np.ndarray, ...] | list[np.ndarray], code: Tensor) -> list[Tensor]:
    """A cosine and a sine table at each code. Shapes: float32[n or 1, M], int32[..., n] -> float32[..., n] each."""
    place = torch.arange(code.shape[-1], device=code.device) % len(tables[0])
    return [torch.tensor(table, device=code.device)[place, code] for table in tables]


@lru_cache(None)
def _leaf_tables(bits: int) -> tuple[np.ndarray, np.ndarray]:
    centres = phase_centres(1 << LEAF_JOIN_BITS[bits][0], shifted=False)[None]
    return np.cos(centres).astype(np.float32), np.sin(centres).astype(np.float32)


@lru_cache(None)
def _levels(dim: int, bits: int) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """From the leaves up: how many joins a level has, their borders in radians, their cosines and sines."""
    sizes, out = [2] * (dim // 2), []
    while len(sizes) > 1:
        pairs = len(sizes) // 2
        tables = [_join_tables(sizes[i], sizes[i + pairs], LEAF_JOIN_BITS[bits][1]) for i in range(pairs)]
        borders, levels = (np.stack(part) for part in zip(*tables))
        out.append((pairs, borders, np.cos(levels).astype(np.float32), np.sin(levels).astype(np.float32)))
        sizes = [sizes[i] + sizes[i + pairs] for i in range(pairs)] + sizes[2 * pairs :]
    return out


@lru_cache(None)
def _join_tables(left: int, right: int, join_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd-Max of the angle between the lengths of ``left`` and ``right`` Gaussian dimensions."""
    angle = np.linspace(0, math.pi / 2, 4097)
    density = (np.cos(angle) ** (left - 1) * np.sin(angle) ** (right - 1))[None]
    borders, levels = lloyd_max(0, math.pi / 2, density, 1 << join_bits)
    return np.round(borders[0], 8), np.round(levels[0], 8)
