"""Codes of b bits in bytes, laid out so that unpacking is shifts and one concatenation.

A plane of w = 1, 2 or 4 bits puts the elements i, i + n, i + 2n, ... (n = elements w / 8) in byte i, from its low bits
upwards. Three bits are a 2-bit plane of the high bits, then a 1-bit plane of the low bits: 3 -> 2 bits drops a run of
bytes. Codecs that code two elements in one word of 2b bits pack it likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of an element -> widths of its planes, high bits first
_PAIR_PLANES = {2: (4,), 3: (4, 2), 4: (8,), 8: (8, 8)}  # bits of an element -> planes of a word for two


def check_dim(dim: int) -> None:
    """Raises: ValueError: ``dim`` is not a multiple of 8; the message names the nearest."""
    if dim <= 0 or dim % 8:
        nearest = max(8, round(dim / 8) * 8)
        raise ValueError(f"head_dim {dim}: codes are packed in eighths; the nearest multiple of 8 is {nearest}")


def packed_bytes(dim: int, bits: int) -> int:
    """Bytes of ``dim`` codes of ``bits`` bits."""
    check_dim(dim)
    return dim * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Shapes: uint8[..., D] -> uint8[..., D * bits / 8].

    Raises:
        ValueError: D is not a multiple of 8.
    """
    check_dim(codes.shape[-1])
    return _to_planes(codes, _PLANES[bits])


def unpack(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Shapes: uint8[..., D * bits / 8] -> uint8[..., D].

    Raises:
        ValueError: D is not a multiple of 8, or the bytes do not belong to it.
    """
    _check_bytes(packed, dim, bits)
    return _from_planes(packed, dim, _PLANES[bits])


def pack_pairs(words: Tensor, bits: int) -> Tensor:
    """Words of 2 * ``bits`` bits, one for two elements. Shapes: int32[..., D / 2] -> uint8[..., D * bits / 8].

    Raises:
        ValueError: D is not a multiple of 8.
    """
    check_dim(2 * words.shape[-1])
    return _to_planes(words, _PAIR_PLANES[bits])


def unpack_pairs(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Shapes: uint8[..., D * bits / 8] -> int32[..., D / 2].

    Raises:
        ValueError: D is not a multiple of 8, or the bytes do not belong to it.
    """
    _check_bytes(packed, dim, bits)
    return _from_planes(packed.int(), dim // 2, _PAIR_PLANES[bits])


def _check_bytes(packed: Tensor, dim: int, bits: int) -> None:
    if packed.shape[-1] != packed_bytes(dim, bits):
        wanted = packed_bytes(dim, bits)
        raise ValueError(f"{packed.shape[-1]} bytes of codes of head_dim {dim} at {bits} bits; expected {wanted}")


def _to_planes(words: Tensor, widths: tuple[int, ...]) -> Tensor:
    planes, shift = [], sum(widths)
    for width in widths:
        shift -= width
        plane = ((words >> shift) & ((1 << width) - 1)).to(torch.uint8)
        first, *others = plane.chunk(8 // width, -1)
        for place, part in enumerate(others, 1):
            first = first | (part << (width * place))
        planes.append(first)
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def _from_planes(packed: Tensor, count: int, widths: tuple[int, ...]) -> Tensor:
    words: Tensor | None = None
    for width, plane in zip(widths, packed.split([count * width // 8 for width in widths], -1)):
        mask = (1 << width) - 1
        part = torch.cat([(plane >> (width * place)) & mask for place in range(8 // width)], -1) if width < 8 else plane
        words = part if words is None else words << width | part
    assert words is not None
    return words
