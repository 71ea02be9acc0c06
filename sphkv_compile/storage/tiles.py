"""Tiles: the order of a page's code bits that a GPU's kernels read.

A page holds 64 tokens. Its keys are cut into *planes* of 32 tokens by 32 dimensions, its values, turned around, into
planes of 32 dimensions by 32 tokens; plane ``tg * (D / 32) + dq`` has token group ``tg`` and dimension group ``dq``.
One *tile* of 32 rows by 32 bytes holds 8 / b planes of b bits. A 32-bit word of a tile's row holds four neighbouring
elements of each of its planes, placed so that a byte permute can use the word itself as its selectors:

* 4 bits, two planes: nibble b holds the magnitude of element b of the first plane, nibble 4 + b that of the second,
  each in its low three bits; bits 8b + 7 and 8b + 3 are the signs of element b of the first and of the second.
* 2 bits, four planes: the low halves of the nibbles 0..3 and 4..7, then their high halves.
* 3 bits, eight planes in three tiles: tile t has planes 2t and 2t + 1 in the low three bits of its nibbles; planes 6
  and 7 take the top bit of every nibble, their high bit in tile 0, their low bit in tile 2.
* 8 bits, one plane: byte b has element b, the magnitude in its low seven bits and the sign above it.

The codes are the same as everywhere, only their bits lie elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS = 64
"""Tokens of a tiled page."""
EDGE = 32
"""Rows of a tile, and elements of a plane's row."""


def served(dim: int, bits: int) -> bool:
    """Whether codes of this head_dim and width fill whole tiles."""
    planes = TOKENS // EDGE * (dim // EDGE)
    return dim % EDGE == 0 and bits in _PLANES and planes % _PLANES[bits] == 0


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Shapes: uint8[..., 64, D] -> uint8[..., 64 * D * bits / 8]."""
    planes = codes.unflatten(-2, (-1, EDGE)).unflatten(-1, (-1, EDGE)).transpose(-3, -2)
    return _pack(planes.flatten(-4, -3), bits)


def unpack_keys(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Shapes: uint8[..., 64 * D * bits / 8] -> uint8[..., 64, D]."""
    planes = _unpack(packed, bits).unflatten(-3, (-1, dim // EDGE))
    return planes.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Shapes: uint8[..., 64, D] -> uint8[..., 64 * D * bits / 8]."""
    planes = codes.unflatten(-2, (-1, EDGE)).unflatten(-1, (-1, EDGE)).movedim(-3, -1)
    return _pack(planes.flatten(-4, -3), bits)


def unpack_values(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Shapes: uint8[..., 64 * D * bits / 8] -> uint8[..., 64, D]."""
    planes = _unpack(packed, bits).unflatten(-3, (-1, dim // EDGE))
    return planes.movedim(-1, -3).flatten(-2).flatten(-3, -2)


_PLANES = {2: 4, 3: 8, 4: 2, 8: 1}  # planes that share tiles
_TILES = {2: 1, 3: 3, 4: 1, 8: 1}  # tiles that they share


def _pack(planes: Tensor, bits: int) -> Tensor:
    """Shapes: uint8[..., F, 32, 32] -> uint8[..., F / 8 * bits * 1024]."""
    parts = planes.unflatten(-3, (-1, _PLANES[bits])).unflatten(-1, (-1, 4)).to(torch.int64).unbind(-4)
    words = torch.stack(_WORDS[bits](parts), -3)  # [..., tiles, 32, 8]
    return words.to(torch.int32).contiguous().view(torch.uint8).flatten(-4)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Shapes: uint8[..., n] -> uint8[..., F, 32, 32]."""
    words = packed.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    tiles = words.unflatten(-1, (-1, _TILES[bits], EDGE, EDGE // 4)).unbind(-3)
    planes = torch.stack(_ELEMENTS[bits](tiles), -4)  # [..., groups, planes, 32, 8, 4]
    return planes.flatten(-2).flatten(-4, -3).to(torch.uint8)


def _shifts(step: int, like: Tensor) -> Tensor:
    return torch.arange(4, device=like.device) * step


def _int32(word: Tensor) -> Tensor:
    """The same 32 bits as a signed number, for the conversion."""
    return torch.where(word >= 1 << 31, word - (1 << 32), word)


def _put(parts: list[tuple[Tensor, int]]) -> Tensor:
    """Nibble by nibble: value times its place. Shapes: int64[..., 4] each -> int64[...]."""
    total = torch.zeros_like(parts[0][0][..., 0])
    for value, place in parts:
        total = total | (value << (_shifts(4, value) + place)).sum(-1)
    return _int32(total)


def _take(word: Tensor, place: int, mask: int) -> Tensor:
    """Shapes: int64[...] -> int64[..., 4]."""
    return (word.unsqueeze(-1) >> (_shifts(4, word) + place)) & mask


def _words4(parts: tuple[Tensor, ...]) -> list[Tensor]:
    total = torch.zeros_like(parts[0][..., 0])
    for plane, code in enumerate(parts):
        negative = code < 8
        magnitude = torch.where(negative, 7 - code, code - 8)
        total = total | (magnitude << (_shifts(4, code) + 16 * plane)).sum(-1)
        total = total | (negative.long() << (_shifts(8, code) + (3 if plane else 7))).sum(-1)
    return [_int32(total)]


def _elements4(tiles: tuple[Tensor, ...]) -> list[Tensor]:
    (word,), out = tiles, []
    for plane in range(2):
        magnitude = _take(word, 16 * plane, 7)
        negative = (word.unsqueeze(-1) >> (_shifts(8, word) + (3 if plane else 7))) & 1
        out.append(torch.where(negative == 1, 7 - magnitude, 8 + magnitude))
    return out


def _words2(parts: tuple[Tensor, ...]) -> list[Tensor]:
    return [_put([(parts[0], 0), (parts[1], 16), (parts[2], 2), (parts[3], 18)])]


def _elements2(tiles: tuple[Tensor, ...]) -> list[Tensor]:
    return [_take(tiles[0], place, 3) for place in (0, 16, 2, 18)]


def _words3(parts: tuple[Tensor, ...]) -> list[Tensor]:
    words = []
    for t in range(3):
        spare = [((parts[6 + i] >> (2 - t)) & 1, 16 * i + 3) for i in range(2)]
        words.append(_put([(parts[2 * t], 0), (parts[2 * t + 1], 16), *spare]))
    return words


def _elements3(tiles: tuple[Tensor, ...]) -> list[Tensor]:
    out = [_take(word, place, 7) for word in tiles for place in (0, 16)]
    for place in (3, 19):
        high, middle, low = (_take(word, place, 1) for word in tiles)
        out.append(high << 2 | middle << 1 | low)
    return out


def _words8(parts: tuple[Tensor, ...]) -> list[Tensor]:
    (code,) = parts
    byte = torch.where(code < 128, 255 - code, code - 128)
    return [_int32((byte << _shifts(8, code)).sum(-1))]


def _elements8(tiles: tuple[Tensor, ...]) -> list[Tensor]:
    byte = (tiles[0].unsqueeze(-1) >> _shifts(8, tiles[0])) & 255
    return [torch.where(byte < 128, 128 + byte, 255 - byte)]


_WORDS = {2: _words2, 3: _words3, 4: _words4, 8: _words8}
_ELEMENTS = {2: _elements2, 3: _elements3, 4: _elements4, 8: _elements8}
