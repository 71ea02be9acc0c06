"""Axis cosines: the code of a direction is its angle to every axis of the rotated frame. The default codec."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sphkv_compile.codecs.arith import direction, norm, safe_divide
from sphkv_compile.codecs.base import Codec
from sphkv_compile.codecs.codebook import WIDTHS, check_bits, levels, quantize
from sphkv_compile.codecs.packing import pack, packed_bytes, unpack


class AxisCosine(Codec):
    """sqrt(D) cos(theta_i) of each axis angle, on nested levels: 8 -> 4 -> 3 -> 2 bits drop low bits.

    Source: SPHERICAL KV (angle codes of the direction); levels of a Gaussian coordinate, as in TurboQuant.
    """

    name: ClassVar[str] = "axis_cosine"
    nested: ClassVar[bool] = True
    identity: ClassVar[str] = "q.k = |q| |k| sum_i cos(alpha_i) cos(theta_i)"

    bound: ClassVar[str] = "|dl| <= |q| |e| (B2); in a random frame the std of dl is |q| |e| / sqrt(D) (B3)"

    def code_bytes(self, dim: int, bits: int) -> int:
        check_bits(bits)
        return packed_bytes(dim, bits)

    def encode(self, x: Tensor, bits: int) -> Tensor:
        return pack(quantize(direction(x), bits), bits)

    def decode(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        return levels(bits, codes.device)[unpack(codes, dim, bits).int()]

    def logits(self, q: Tensor, codes: Tensor, bits: int) -> Tensor:
        c = self.decode(codes, q.shape[-1], bits)
        cos_alpha = q * safe_divide(1.0, norm(q))[..., None]
        cos_theta = c / norm(c)[..., None]
        return norm(q)[..., :, None] * norm(c)[..., None, :] * (cos_alpha @ cos_theta.mT)

    def demote(self, codes: Tensor, dim: int, from_bits: int, to_bits: int) -> Tensor:
        check_bits(from_bits)
        check_bits(to_bits)
        if to_bits > from_bits:
            raise ValueError(f"demote from {from_bits} to {to_bits} bits: expected {from_bits} or less of {WIDTHS}")
        if to_bits == from_bits:
            return codes
        return pack(unpack(codes, dim, from_bits) >> (from_bits - to_bits), to_bits)
