"""Sums and roundings whose result for one row depends on nothing but that row.

A library reduction or matrix product may group its terms by batch size, and the last bit moves. Codes must not: a token
gets the same code alone, in a batch, in one prefill or in chunks. So sums here are halvings in a fixed order, made of
single IEEE operations, which a kernel can repeat bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fold_sum(x: Tensor, dim: int = -1) -> Tensor:
    """Sum along ``dim`` by adding the upper half to the lower half until one element is left."""
    x = x.movedim(dim, -1)
    while (n := x.shape[-1]) > 1:
        half = n // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([folded, x[..., 2 * half :]], -1) if n % 2 else folded
    return x.squeeze(-1)


def norm(x: Tensor) -> Tensor:
    """Euclidean length of each row, for lengths between 1e-18 and 1e18. Shapes: float32[..., D] -> float32[...]."""
    # by way of float64: on a CPU the float32 root is the vector library's, and every sixth is off by one unit
    return fold_sum(x * x).double().sqrt().float()


def direction(x: Tensor) -> Tensor:
    """x scaled to length sqrt(D); zero stays zero. Shapes: float[..., D] -> float32[..., D]."""
    x = x.float()
    return x * safe_divide(math.sqrt(x.shape[-1]), norm(x))[..., None]


def safe_divide(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """Quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def bf16_up(x: Tensor) -> Tensor:
    """The least bfloat16 value >= x, as float32, for x >= 0. Shapes: float32[...] -> float32[...]."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
