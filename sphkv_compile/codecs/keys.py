"""Keys: anchor, scale, rotation, codes and radius of one span of consecutive tokens.

    a' = H(a / s)          a: mean key of the span; int8, one row per span
    x  = H(k / s) - a'     the residual, with a' as stored, so that the anchor's own error is coded too
    c  = decode(encode(x)) codes of the direction of x, |c| near sqrt(D)
    r  = |x| / |c|         radius: the decoded residual keeps its true length

Identity I5: q.k = q'.a' + r (q'.c) with q' = H(s q), because H is orthonormal: the logit needs no dense key.
All arithmetic is float32, in an order that depends on the span alone (:mod:`sphkv_compile.codecs.arith`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sphkv_compile.codecs.arith import bf16_up, fold_sum, norm, safe_divide
from sphkv_compile.codecs.base import Codec
from sphkv_compile.codecs.codebook import WIDTHS
from sphkv_compile.codecs.rotation import rotate, unrotate


@dataclass(frozen=True)
class KeySpan:
    """The stored form of a span's keys.

    Shapes: S tokens, D head_dim, leading dimensions free.
        codes uint8[..., S, code_bytes]; radius uint8[..., S, radius_bytes]; top float32[...];
        anchor int8[..., D]; anchor_scale float32[...]. ``top`` and ``anchor_scale`` are representable in bfloat16.
    Units: at 2, 3, 4 bits a radius is a byte in 255ths of ``top``, at 8 bits a float16 fraction of it. Absolute radii
    are float16 at every width, and ``top`` is 1.
    """

    codes: Tensor
    radius: Tensor
    top: Tensor
    anchor: Tensor
    anchor_scale: Tensor


def radius_bytes(bits: int) -> int:
    """Bytes of one token's radius: a byte would cost more than the codes' own error at 8 bits."""
    return 2 if bits == 8 else 1


def encode_keys(
    k: Tensor,
    scale: Tensor,
    rot: Tensor,
    codec: Codec,
    bits: int,
    lowest_bits: int | None = None,
    use_anchor: bool = True,
    absolute_radius: bool = False,
) -> KeySpan:
    """Code one span.

    Args:
        lowest_bits: the narrowest width that the span may be demoted to: its radius will fit under ``top`` there too.
        use_anchor: off for spans with no mean worth removing, and for tests.
        absolute_radius: for a kernel that reads a radius without its span's maximum.

    Shapes: ``k`` float[..., S, D], ``scale`` float32[..., D], ``rot`` float32[D, D].
    """
    turned = rotate(k.float() * (1 / scale)[..., None, :], rot)
    anchor, anchor_scale = _anchor(k.float(), scale, rot, use_anchor)
    x = turned - _anchor_row(anchor, anchor_scale)[..., None, :]
    dim, length = k.shape[-1], norm(x)
    codes = codec.encode(x, bits)
    radius = safe_divide(length, norm(codec.decode(codes, dim, bits)))
    if absolute_radius:
        return KeySpan(codes, _half(radius), torch.ones_like(anchor_scale), anchor, anchor_scale)
    tallest = radius.amax(-1)
    for width in _widths_below(codec, bits, lowest_bits):
        lower = codec.decode(codec.demote(codes, dim, bits, width), dim, width)
        tallest = torch.maximum(tallest, safe_divide(length, norm(lower)).amax(-1))
    top = bf16_up(tallest)
    return KeySpan(codes, _fraction(radius, top, bits), top, anchor, anchor_scale)


def decode_keys(span: KeySpan, dim: int, scale: Tensor, rot: Tensor, codec: Codec, bits: int) -> Tensor:
    """The dense keys of a span. Shapes: -> float32[..., S, D]."""
    residual = radius_value(span.radius, span.top)[..., None] * codec.decode(span.codes, dim, bits)
    turned = residual + anchor_value(span)[..., None, :]
    return unrotate(turned, rot) * scale[..., None, :]


def demote_keys(
    span: KeySpan, dim: int, codec: Codec, from_bits: int, to_bits: int, absolute_radius: bool = False
) -> KeySpan:
    """The span at a lower width, from its codes alone: r' = r |c_hi| / |c_lo|.

    The codes equal those of direct encoding; the radius is within one unit of its storage.

    Raises:
        ValueError: the codec does not nest, or the width would rise.
    """
    if from_bits == to_bits:
        return span
    codes = codec.demote(span.codes, dim, from_bits, to_bits)
    high = norm(codec.decode(span.codes, dim, from_bits))
    low = norm(codec.decode(codes, dim, to_bits))
    radius = radius_value(span.radius, span.top) * safe_divide(high, low)
    stored = _half(radius) if absolute_radius else _fraction(radius, span.top, to_bits)
    return replace(span, codes=codes, radius=stored)


def rotate_query(q: Tensor, scale: Tensor, rot: Tensor) -> Tensor:
    """q' = H(s q). Shapes: float[..., D], ``scale`` broadcast against it -> float32[..., D]."""
    return rotate(q.float() * scale, rot)


def anchor_value(span: KeySpan) -> Tensor:
    """The stored anchor a' in the rotated, scaled frame. Shapes: -> float32[..., D]."""
    return _anchor_row(span.anchor, span.anchor_scale)


def radius_value(radius: Tensor, top: Tensor) -> Tensor:
    """Shapes: uint8[..., S, 1 or 2], float32[...] -> float32[..., S]."""
    if radius.shape[-1] == 2:
        return radius.contiguous().view(torch.float16).squeeze(-1).float() * top[..., None]
    return radius.squeeze(-1).float() * (top / 255)[..., None]


def _fraction(radius: Tensor, top: Tensor, bits: int) -> Tensor:
    if radius_bytes(bits) == 2:
        return _half(safe_divide(radius, top[..., None]))
    units = safe_divide(radius, (top / 255)[..., None])
    return units.round().clamp(max=255).to(torch.uint8)[..., None]


def _half(x: Tensor) -> Tensor:
    """As float16, whose largest number stands for any larger one. Shapes: float32[...] -> uint8[..., 2]."""
    return x.clamp(max=65504.0).half()[..., None].view(torch.uint8)


def _anchor(k: Tensor, scale: Tensor, rot: Tensor, use_anchor: bool) -> tuple[Tensor, Tensor]:
    """int8 row and its bfloat16 step, rounded up so that nothing clips."""
    mean = fold_sum(k, -2) / k.shape[-2]
    row = rotate(mean * (1 / scale), rot)
    if not use_anchor:
        row = torch.zeros_like(row)
    step = bf16_up(row.abs().amax(-1) / 127)
    return safe_divide(row, step[..., None]).round().to(torch.int8), step


def _anchor_row(anchor: Tensor, anchor_scale: Tensor) -> Tensor:
    return anchor.float() * anchor_scale[..., None]


def _widths_below(codec: Codec, bits: int, lowest_bits: int | None) -> list[int]:
    if lowest_bits is None or not codec.nested:
        return []
    return [width for width in WIDTHS if lowest_bits <= width < bits]
