"""Nested scalar levels for a coordinate of a random direction: 2, 3, 4 and 8 bits in one family.

On the sphere of radius sqrt(D) a coordinate's density tends to a standard Gaussian, so the levels do not depend on D.
The 4-, 3- and 2-bit codes share thresholds: dropping the low bit of a code gives the next narrower code exactly. The
shared thresholds minimise the sum of the three log errors; where Lloyd's rule puts a threshold half way between the two
levels beside it, ours is the weighted mean of those midpoints over the widths that use the threshold. An 8-bit code is
a 4-bit code and the number of a Lloyd-Max level inside that code's cell.

Everything is computed, in float64 and to convergence far below the last stored digit, so every machine has the same.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)
"""Code widths in bits per element."""

_STRIDE = {4: 1, 3: 2, 2: 4}  # a b-bit code uses every stride-th of the 4-bit thresholds
_TOLERANCE = 1e-11
_erfc = np.frompyfunc(math.erfc, 1, 1)  # not torch's: tables may be built under a fake tensor mode
_DIGITS = 8  # kept before rounding to float32: what differs between machines is thousands of times smaller


def check_bits(bits: int) -> None:
    """Raises: ValueError: ``bits`` is no code width; the message names the nearest."""
    if bits not in WIDTHS:
        nearest = min(WIDTHS, key=lambda width: abs(width - bits))
        raise ValueError(f"bits={bits!r}: expected one of {WIDTHS}; the nearest is {nearest}")


def thresholds(bits: int, device: torch.device | str | None = None) -> Tensor:
    """Ascending cell borders; the code of u is the number of borders <= u.

    Shapes: -> float32[2**bits - 1].
    """
    check_bits(bits)
    return torch.tensor(_thresholds(bits), device=device)


def levels(bits: int, device: torch.device | str | None = None) -> Tensor:
    """The value of each code, ascending; codes >= 2**(bits - 1) are positive.

    Shapes: -> float32[2**bits].
    """
    check_bits(bits)
    return torch.tensor(_levels(bits), device=device)


def quantize(u: Tensor, bits: int) -> Tensor:
    """The code of each coordinate: how many borders are <= u.

    A value on a border belongs above it at every width, so ties nest too.

    Shapes: float32[...] -> uint8[...].
    """
    borders = thresholds(bits, u.device)
    if bits == 8:
        return torch.bucketize(u.contiguous(), borders, right=True).to(torch.uint8)
    codes = torch.zeros_like(u, dtype=torch.uint8)
    for border in borders.unbind():  # a few passes of comparisons: a third of the time of a search per element
        codes += u >= border
    return codes


@lru_cache(None)
def mse(bits: int) -> float:
    """Expected squared error of the levels on a standard Gaussian."""
    check_bits(bits)
    edges = np.concatenate([[-np.inf], _thresholds(bits).astype(float), [np.inf]])
    mass, moment = _mass(edges), _moment(edges)
    level = _levels(bits).astype(float)
    return float(1 - 2 * (moment * level).sum() + (mass * level**2).sum())


@lru_cache(None)
def _thresholds(bits: int) -> np.ndarray:
    return _mirror(_positive_edges(bits)[:-1], around_zero=True)


@lru_cache(None)
def _levels(bits: int) -> np.ndarray:
    if bits == 8:
        return _mirror(_centroids(_positive_edges(8)), around_zero=False)
    table, step = byte_table(bits)
    return _mirror(np.array([e4m3_value(byte) for byte in table]) * step, around_zero=False)


@lru_cache(None)
def byte_table(bits: int) -> tuple[tuple[int, ...], float]:
    """The positive levels at 2, 3 or 4 bits as e4m3 bytes, ascending, and the step that they are multiples of.

    A GPU decodes a level by permuting bytes of a table in a register, so levels are e4m3 numbers. The step is the one,
    within an octave, whose rounded levels have the least error; at 4 bits that costs 1.4 % of the error, at 2 and 3
    bits next to nothing.
    """
    edges = _positive_edges(bits)
    mass, moment = _mass(edges), _moment(edges)
    bytes_ = np.arange(0x08, 0x7F)  # the normal numbers
    values = np.array([e4m3_value(int(b)) for b in bytes_])

    def rounded(step: float) -> np.ndarray:
        return np.abs(values - (moment / mass / step)[:, None]).argmin(1)

    def error(step: float) -> float:
        level = values[rounded(step)] * step
        return float((mass * level**2 - 2 * moment * level).sum())

    step = min((round(2 ** (-i / 256), 6) for i in range(256)), key=error)
    return tuple(int(b) for b in bytes_[rounded(step)]), step


def e4m3_value(byte: int) -> float:
    """The value of a positive e4m3 byte, and of its negative with the sign bit set."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9
    return -value if byte & 0x80 else value


def _mirror(positive: np.ndarray, around_zero: bool) -> np.ndarray:
    """The whole odd-symmetric table from its non-negative half, in float32."""
    half = np.round(positive, _DIGITS).astype(np.float32)
    return np.concatenate([-half[:0:-1] if around_zero else -half[::-1], half])


@lru_cache(None)
def _positive_edges(bits: int) -> np.ndarray:
    """Cell borders from 0 to infinity."""
    if bits == 8:
        return _refined_edges(_positive_edges(4), parts=16)
    return _nested_edges()[:: _STRIDE[bits]]


@lru_cache(None)
def _nested_edges() -> np.ndarray:
    """The 4-bit borders that minimise the sum of log MSE at 4, 3 and 2 bits.

    With levels at their centroids, d MSE_b / dt = pdf(t) (hi - lo) (2t - lo - hi) for the levels lo, hi beside t at
    width b; setting the sum of these over MSE_b to zero gives t as a weighted mean of midpoints.
    """
    edges = np.array([*np.arange(8) * 0.3, math.inf])
    for _ in range(5000):
        weight, pull = np.zeros(9), np.zeros(9)
        for stride in _STRIDE.values():
            level = _centroids(edges[::stride])
            error = 1 - 2 * float((_mass(edges[::stride]) * level**2).sum())
            gap, middle = np.diff(level), (level[1:] + level[:-1]) / 2
            weight[stride:-1:stride] += gap / error
            pull[stride:-1:stride] += gap / error * middle
        new = edges.copy()
        new[1:-1] = pull[1:-1] / weight[1:-1]
        moved, edges = np.abs(new[:-1] - edges[:-1]).max(), new
        if moved < _TOLERANCE:
            return edges
    raise AssertionError("the nested thresholds did not converge")


def _refined_edges(coarse: np.ndarray, parts: int) -> np.ndarray:
    """Each cell of ``coarse`` cut into ``parts`` by Lloyd's rule, all cells at once."""
    low, high = coarse[:-1, None], np.minimum(coarse[1:], coarse[-2] + 3.0)[:, None]
    edges = low + (high - low) * np.arange(parts + 1) / parts
    edges[-1, -1] = math.inf
    for _ in range(20000):
        level = _centroids(edges)
        inner = (level[:, 1:] + level[:, :-1]) / 2
        moved = np.abs(inner - edges[:, 1:-1]).max()
        edges[:, 1:-1] = inner
        if moved < _TOLERANCE:
            return np.concatenate([edges[:, :-1].ravel(), [math.inf]])
    raise AssertionError("the 8-bit thresholds did not converge")


def _centroids(edges: np.ndarray) -> np.ndarray:
    return _moment(edges) / _mass(edges)


def _mass(edges: np.ndarray) -> np.ndarray:
    """Gaussian probability of each cell; from the upper tail, which keeps its digits at large edges."""
    upper = np.asarray(_erfc(edges / math.sqrt(2)), float) / 2
    return upper[..., :-1] - upper[..., 1:]


def _moment(edges: np.ndarray) -> np.ndarray:
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    return density[..., :-1] - density[..., 1:]
