"""What a GPU's kernels make of a page's codes, and which codes they choose, written out for tests."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import constexpr

from sphkv_compile.codecs.codebook import thresholds
from sphkv_compile.kernels.gpu.encode import quantize
from sphkv_compile.kernels.gpu.launch import borders_of, levels_of
from sphkv_compile.kernels.gpu.words import level_table, planes
from sphkv_compile.spec import Tier


@triton.jit
def _dump(BYTES, WORDS, LEVELS, OUT, BITS: constexpr, PLANES: constexpr, TWIN: constexpr):
    i = tl.arange(0, 32)
    out = planes(BYTES, WORDS, LEVELS, i, BITS, PLANES, TWIN)
    for j in tl.static_range(PLANES):
        tl.store(OUT + j * 1024 + i[:, None] * 32 + i[None, :], out[j])


def dumped(packed: Tensor, bits: int, dim: int, twin: bool) -> Tensor:
    """Keys of a page as the kernels decode them, in units of the width's step. Shapes: uint8[n] -> float16[64, D]."""
    count = 2 * dim // 32
    out = torch.empty(count, 32, 32, dtype=torch.float16, device=packed.device)
    _dump[(1,)](packed, packed.view(torch.int32), level_table(packed.device), out, bits, count, twin, num_warps=1)
    return out.view(2, count // 2, 32, 32).transpose(1, 2).reshape(64, dim)


@triton.jit
def _code(U, LEVELS, CODES, FOUND, BORDERS: constexpr, BITS: constexpr, TWIN: constexpr, N: constexpr):
    i = tl.arange(0, N)
    code, level = quantize(tl.load(U + i), LEVELS, BORDERS, BITS, TWIN)
    tl.store(CODES + i, code)
    tl.store(FOUND + i, level)


def coded(u: Tensor, bits: int, twin: bool) -> tuple[Tensor, Tensor]:
    """Codes as the kernels choose them, and their magnitudes.

    At 4 and 8 bits the kernels' code is a sign and the index of a magnitude; here it ascends, as everywhere else.

    Shapes: float32[n], n a power of two -> int32[n], float32[n].
    """
    tier, codes, found = Tier(bits, bits), torch.empty_like(u, dtype=torch.int32), torch.empty_like(u)
    levels, borders = levels_of(tier, u.device), borders_of(tier)["KBORDERS"]
    _code[(1,)](u, levels, codes, found, borders, bits, twin, u.numel())
    half = 1 << (bits - 1)
    if bits in (4, 8):
        codes = torch.where(codes < half, codes + half, 2 * half - 1 - codes)
    return codes, found


def around_borders(bits: int) -> Tensor:
    """Every border, the float32 numbers beside it, both zeros, and what lies far out. Shapes: -> float32[1024]."""
    borders = thresholds(bits)
    far = torch.tensor([-0.0, 1e-30, -1e-30, 100.0, -100.0])
    beside = [borders.nextafter(torch.tensor(to)) for to in (-math.inf, math.inf)]
    values = torch.cat([borders, *beside, far])
    return torch.cat([values, torch.randn(1024 - values.numel(), generator=torch.Generator().manual_seed(0))])
