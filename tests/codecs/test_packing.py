"""Bytes of codes: round trips, the layout that kernels read, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphkv_compile.codecs.packing import pack, pack_pairs, packed_bytes, unpack, unpack_pairs

DIMS = st.integers(1, 32).map(lambda n: 8 * n)


@given(DIMS, st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 2**31))
def test_round_trip(dim, bits, seed):
    codes = torch.randint(0, 2**bits, (3, 2, dim), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, packed_bytes(dim, bits))
    assert torch.equal(unpack(packed, dim, bits), codes)


@given(DIMS, st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**31))
def test_pair_words_round_trip(dim, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 4**bits, (5, dim // 2), generator=generator, dtype=torch.int32)
    packed = pack_pairs(words, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, packed_bytes(dim, bits))
    assert torch.equal(unpack_pairs(packed, dim, bits), words)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_layout_of_a_plane(bits):
    codes = torch.randint(0, 2**bits, (16,), dtype=torch.uint8)
    count = 16 * bits // 8
    for i, byte in enumerate(pack(codes, bits).tolist()):
        assert byte == sum(int(codes[i + place * count]) << (bits * place) for place in range(8 // bits))


def test_three_bits_are_a_two_bit_plane_and_a_one_bit_plane():
    codes = torch.randint(0, 8, (64,), dtype=torch.uint8)
    packed = pack(codes, 3)
    assert torch.equal(packed[:16], pack(codes >> 1, 2)) and torch.equal(packed[16:], pack(codes & 1, 1))


@pytest.mark.parametrize("dim, nearest", [(102, 104), (12, 16), (3, 8)])
def test_dim_must_be_a_multiple_of_eight(dim, nearest):
    with pytest.raises(ValueError, match=rf"head_dim {dim}.*nearest multiple of 8 is {nearest}"):
        pack(torch.zeros(dim, dtype=torch.uint8), 4)


def test_bytes_of_another_width_are_refused():
    with pytest.raises(ValueError, match="head_dim 64 at 4 bits; expected 32"):
        unpack(torch.zeros(16, dtype=torch.uint8), 64, 4)
