"""Tiles are a rearrangement of code bits: nothing is lost, and each bit lies where the kernels look for it."""

import pytest
import torch

from sphkv_compile.storage import tiles

SHAPES = [(bits, dim) for bits in (2, 3, 4, 8) for dim in (64, 128, 256) if tiles.served(dim, bits)]


@pytest.mark.parametrize(("bits", "dim"), SHAPES)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_there_and_back(bits, dim, side):
    pack, unpack = getattr(tiles, f"pack_{side}"), getattr(tiles, f"unpack_{side}")
    codes = torch.randint(0, 2**bits, (2, 3, 64, dim), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, 8 * bits * dim) and torch.equal(unpack(packed, dim, bits), codes)


def test_three_bits_need_eight_planes():
    assert not tiles.served(64, 3) and tiles.served(128, 3) and not tiles.served(80, 4)


def changed(pack, token, dim, code, bits, rest):
    """The bytes that one code changes. Units: index -> value, xor."""
    codes = torch.full((64, 128), rest, dtype=torch.uint8)
    before = pack(codes, bits)
    codes[token, dim] = code
    gap = before ^ pack(codes, bits)
    return {int(i): int(gap[i]) for i in gap.nonzero()}


def test_one_key_by_hand():
    """Token 33, dimension 70: plane 1 * 4 + 2 is the first of tile 3; row 1, element 2 of word 1."""
    word = 3 * 1024 + 32 + 4
    assert changed(tiles.pack_keys, 33, 70, 2, 4, 8) == {word + 1: 0x05, word + 2: 0x80}  # magnitude 5, negative


def test_one_value_by_hand():
    """Token 33, dimension 40: plane 1 * 4 + 1 is the second of tile 2; row 8, element 1 of word 0."""
    word = 2 * 1024 + 8 * 32
    assert changed(tiles.pack_values, 33, 40, 15, 4, 8) == {word + 2: 0x70}  # magnitude 7 in nibble 4 + 1


def test_spare_bits_by_hand():
    """Three bits, token 32, dimension 96: plane 7, element 0; a bit in the top of nibble 4 of each of three tiles."""
    assert changed(tiles.pack_keys, 32, 96, 7, 3, 0) == {2: 8, 1024 + 2: 8, 2048 + 2: 8}
