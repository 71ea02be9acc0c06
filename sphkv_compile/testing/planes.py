"""What a GPU's kernel makes of a page's codes, written out: for tests, no product ever stores it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import constexpr

from sphkv_compile.kernels.gpu.words import level_table, planes


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
