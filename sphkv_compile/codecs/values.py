"""Values: rotated, coded by axis cosines, one float16 scale a token; no anchor and no pair scale.

The attention output is a weighted sum of values, o = H^T (sum_j p_j r_j c_j): it is un-rotated once per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_compile.codecs.arith import norm, safe_divide
from sphkv_compile.codecs.axis_cosine import AxisCosine
from sphkv_compile.codecs.rotation import rotate, unrotate

_CODEC = AxisCosine()
_F16_MAX = 65504.0


def encode_values(v: Tensor, rot: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scale r = |x| / |c|, which keeps the value's length.

    Shapes: ``v`` float[..., D] -> uint8[..., code_bytes], float16[...].
    """
    x = rotate(v, rot)
    codes = _CODEC.encode(x, bits)
    return codes, _to_half(safe_divide(norm(x), norm(_CODEC.decode(codes, v.shape[-1], bits))))


def decode_values(codes: Tensor, scale: Tensor, dim: int, rot: Tensor, bits: int) -> Tensor:
    """The dense values. Shapes: uint8[..., code_bytes], float16[...] -> float32[..., D]."""
    return unrotate(scale.float()[..., None] * _CODEC.decode(codes, dim, bits), rot)


def demote_values(codes: Tensor, scale: Tensor, dim: int, from_bits: int, to_bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scale at a lower width, from the codes alone.

    Raises:
        ValueError: the width would rise.
    """
    if from_bits == to_bits:
        return codes, scale
    lower = _CODEC.demote(codes, dim, from_bits, to_bits)
    ratio = safe_divide(norm(_CODEC.decode(codes, dim, from_bits)), norm(_CODEC.decode(lower, dim, to_bits)))
    return lower, _to_half(scale.float() * ratio)


def _to_half(x: Tensor) -> Tensor:
    return x.clamp(max=_F16_MAX).to(torch.float16)
