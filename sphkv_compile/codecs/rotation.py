"""The fixed random rotation: random signs, then a Hadamard matrix; orthonormal at every common head_dim.

``x_rot = x @ R.T`` and ``x = x_rot @ R``. The code path never multiplies by the dense matrix: a matrix product may
round differently for a different batch, and a key must get the same code alone and in a batch. :func:`rotate` is made
of additions in a fixed order, which is also what a kernel does.

Source: Hadamard matrices of order 2^k (Sylvester), of order q + 1 or 2 (q + 1) for a prime q (Paley), their products.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BASES = (1, 12, 20, 28, 36, 44, 60)
"""Hadamard orders that are no power of two; a head_dim is one of these times a power of two."""


def rotation(dim: int, seed: int = 0) -> Tensor:
    """The orthonormal matrix R, the same on every machine and torch version.

    Shapes: -> float32[D, D]; row 0 is constant up to the signs, from which :func:`rotate` reads them.

    Raises:
        ValueError: no Hadamard matrix of this order is built in; the message names the nearest that are.
    """
    return torch.tensor(_rotation(dim, seed))


def rotate(x: Tensor, rot: Tensor) -> Tensor:
    """x @ R.T, the same bits for a row whatever the batch. Shapes: float[..., D] -> float32[..., D]."""
    dim = x.shape[-1]
    return hadamard(x.float() * rot[0].sign(), transpose=False) * (1 / math.sqrt(dim))


def unrotate(x: Tensor, rot: Tensor) -> Tensor:
    """x @ R, the inverse of :func:`rotate`. Shapes: float[..., D] -> float32[..., D]."""
    dim = x.shape[-1]
    return hadamard(x.float(), transpose=True) * (1 / math.sqrt(dim)) * rot[0].sign()


def hadamard(x: Tensor, transpose: bool) -> Tensor:
    """The Hadamard matrix (entries +-1) times each row: butterflies, then one small base matrix.

    Shapes: float32[..., D] -> float32[..., D].
    """
    dim = x.shape[-1]
    base = _base(dim)
    columns = x.reshape(-1, dim).T.contiguous()  # tokens last: every butterfly then runs over long rows
    half = dim // 2
    while half >= base:
        pairs = columns.view(dim // (2 * half), 2, half * columns.shape[1])
        out = torch.empty_like(pairs)
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        columns = out.view_as(columns)
        half //= 2
    if base > 1:
        columns = _times_base(columns, base, transpose)
    return columns.T.contiguous().view(x.shape)


def _times_base(columns: Tensor, base: int, transpose: bool) -> Tensor:
    """The base matrix times each run of ``base`` elements. Shapes: float32[D, N] -> float32[D, N]."""
    matrix = torch.tensor(_paley(base), device=columns.device)
    matrix = matrix.T if transpose else matrix
    runs = columns.unflatten(0, (-1, base))
    total = runs[:, :1] * matrix[:, :1]
    for j in range(1, base):
        # times +-1 is exact: a fused multiply-add rounds the same
        total = total + runs[:, j : j + 1] * matrix[:, j : j + 1]
    return total.flatten(0, 1)


def _base(dim: int) -> int:
    """The Hadamard order that ``dim`` is a power-of-two multiple of."""
    for base in BASES:
        factor, rest = divmod(dim, base)
        if rest == 0 and factor > 0 and factor & (factor - 1) == 0:
            return base
    known = sorted(b << k for b in BASES for k in range(12) if (b << k) % 8 == 0)
    below = max((d for d in known if d < dim), default=known[0])
    above = min((d for d in known if d > dim), default=known[-1])
    raise ValueError(
        f"head_dim {dim}: no Hadamard matrix of this order is built in; the nearest are {below} and {above}"
    )


@lru_cache(None)
def _rotation(dim: int, seed: int) -> np.ndarray:
    base = _base(dim)
    matrix = _paley(base).astype(np.float64)
    for _ in range(int(math.log2(dim // base))):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix * _signs(dim, seed) / math.sqrt(dim)).astype(np.float32)


def _signs(dim: int, seed: int) -> np.ndarray:
    digest = hashlib.shake_256(f"sphkv rotation {dim} {seed}".encode()).digest(dim)
    return np.frombuffer(digest, np.uint8).astype(np.float64) % 2 * 2 - 1


@lru_cache(None)
def _paley(order: int) -> np.ndarray:
    """A Hadamard matrix whose first row is all ones. Shapes: -> float32[order, order]."""
    if order == 1:
        return np.ones((1, 1), np.float32)
    double = not _is_prime(order - 1)
    q = order // 2 - 1 if double else order - 1
    squares = {i * i % q for i in range(1, q)}
    jacobsthal = np.array([[0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)])
    core = np.zeros((q + 1, q + 1))
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1 if double else -1, jacobsthal
    if double:  # q = 1 mod 4: the core is symmetric, and doubles
        matrix = np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    else:  # q = 3 mod 4: the core is skew
        matrix = core + np.eye(q + 1)
    return (matrix * matrix[0]).astype(np.float32)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
