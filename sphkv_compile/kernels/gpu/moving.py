"""Pages put together from tokens of other pages, code to code: what :mod:`sphkv_compile.ops.moves` does, on a GPU.

New pages are first made beside the arena, then copied into it, since they may lie where a page is still read.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import constexpr

from sphkv_compile.codecs import codebook
from sphkv_compile.kernels.gpu.encode import norm, rows_of, store_words
from sphkv_compile.kernels.gpu.launch import converts
from sphkv_compile.kernels.gpu.words import gather
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.moves import Moves
from sphkv_compile.storage.state import State

WIDTHS = constexpr(codebook.WIDTHS)


def move(state: State, layout: Layout, moves: Moves) -> None:
    """Arguments as for :func:`sphkv_compile.ops.moves.move`."""
    d, device = state.exact_k.shape[-1], state.arena.device
    words = state.arena.view(torch.int32)
    kbits, vbits = (tuple(getattr(tier, side) for tier in layout.tiers) for side in ("k_bits", "v_bits"))
    made, first = [], 0
    for index, (tier, count) in enumerate(zip(layout.tiers, moves.counts)):
        if count:
            size = layout.page_bytes(tier, d, d, (2, 2)) // 4
            out = torch.empty(count, size, dtype=torch.int32, device=device)
            of = slice(first, first + count)
            gather_pages[(count, 2)](
                words, moves.sources[of], moves.tiers[of], moves.slots[of], positive_levels(device), out,
                D=d, SIZE=size, TIER=index, KBITS=kbits, VBITS=vbits, TWIN=not converts(device),
                num_warps=d // 32, enable_fp_fusion=False,
            )  # fmt: skip
            made.append((out, moves.offsets[of], size))
        first += count
    for out, offsets, size in made:
        put_pages[(out.shape[0],)](out, offsets, words, SIZE=size, num_warps=4)


@lru_cache(None)
def positive_levels(device: torch.device) -> Tensor:
    """Of 2, 3, 4 and 8 bits, one after the other. Shapes: -> float32[142]."""
    return torch.cat([codebook.levels(bits)[1 << (bits - 1) :] for bits in codebook.WIDTHS]).to(device)


@triton.jit
def word_pair(word, unit, b, BITS: constexpr, TILE: constexpr):
    """What a word holds of two elements: the inverse of :func:`sphkv_compile.kernels.gpu.encode.word_bits`."""
    if BITS == 4:
        pair = (word >> (4 * b)) & 0x70007
        pair |= ((word >> (8 * b + 4)) & 8) | (((word >> (8 * b)) & 8) << 16)
    elif BITS == 8:
        pair = ((word >> (8 * b)) & 255) << (16 * TILE)
    elif BITS == 2:
        pair = (word >> (4 * b + unit % 2 * 2)) & 0x30003
    else:
        own = tl.where(unit % 4 == TILE, (word >> (4 * b)) & 0x70007, 0)
        pair = own | tl.where(unit % 4 == 3, ((word >> (4 * b + 3)) & 0x10001) << (2 - TILE), 0)
    return pair


@triton.jit
def load_words(at, unit, inside, there, BITS: constexpr, VALUES: constexpr):
    """Codes of 64 columns of each row: the inverse of :func:`sphkv_compile.kernels.gpu.encode.store_words`.

    Shapes: pointers[E, 1], int32[E, 1] twice, bool[E, 1] -> int32[E, 32].
    """
    TILES: constexpr = 3 if BITS == 3 else 2 if BITS == 8 else 1
    ACROSS: constexpr = 4 if BITS == 3 else 2 if BITS == 2 else 1
    column = tl.arange(0, 32)[None, :]
    if VALUES:
        place, b = column * 8 + inside // 4, inside % 4
    else:
        place, b = inside * 8 + column // 4, column % 4
    pair = tl.zeros([inside.shape[0], 32], tl.int32)
    for tile in tl.static_range(TILES):
        word = tl.load(at + (unit // ACROSS * TILES + tile) * 256 + place, mask=there, other=0)
        pair |= word_pair(word, unit, b, BITS, tile)
    return pair


@triton.jit
def narrowed(code, FROM: constexpr, TO: constexpr):
    """A code without its low bits; at 4 and 8 bits it is a sign above the magnitude's number, below a number."""
    if FROM == TO:
        out = code
    elif FROM < 4:
        out = code >> (FROM - TO)
    else:
        magnitude = (code & ((1 << (FROM - 1)) - 1)) >> (FROM - TO)
        negative = (code >> (FROM - 1)) & 1
        if TO == 4:
            out = magnitude | (negative << 3)
        else:
            out = tl.where(negative == 1, (1 << (TO - 1)) - 1 - magnitude, (1 << (TO - 1)) + magnitude)
    return out


@triton.jit
def level(code, LEVELS, BITS: constexpr, TWIN: constexpr):
    """The positive level of each code, in float32."""
    HALF: constexpr = 1 << (BITS - 1)
    if BITS == 4 or BITS == 8:
        index = code & (HALF - 1)
    else:
        index = tl.where(code < HALF, HALF - 1 - code, code - HALF)
    return gather(LEVELS + (14 if BITS == 8 else HALF - 2) + index, TWIN).to(tl.float32, bitcast=True)


@triton.jit
def gather_codes(
    at, bits, unit, inside, there, LEVELS,
    PARTS: constexpr, TO: constexpr, VALUES: constexpr, TWIN: constexpr,
):  # fmt: skip
    """Codes of tokens from pages of any width at the width TO, and what their radii are to be multiplied by.

    Shapes: pointers[E, 1], int32[E, 1] -> int32[E, 32], two codes in an integer, and float32[E, 1].
    """
    # an empty slot holds the least level, as every packing has it
    pair = tl.full([inside.shape[0], 32], (1 << TO) * 0x10001 - 0x10001 if TO == 4 or TO == 8 else 0, tl.int32)
    ratio = tl.full(inside.shape, 1.0, tl.float32)
    for i in tl.static_range(4):
        if WIDTHS[i] >= TO:
            mine = there & (bits == WIDTHS[i])
            wide = load_words(at, unit, inside, mine, WIDTHS[i], VALUES)
            low, high = wide & 0xFFFF, wide >> 16
            low_to, high_to = narrowed(low, WIDTHS[i], TO), narrowed(high, WIDTHS[i], TO)
            pair = tl.where(mine, low_to | (high_to << 16), pair)
            if WIDTHS[i] > TO:
                long = norm(level(low, LEVELS, WIDTHS[i], TWIN), level(high, LEVELS, WIDTHS[i], TWIN), PARTS)
                short = norm(level(low_to, LEVELS, TO, TWIN), level(high_to, LEVELS, TO, TWIN), PARTS)
                ratio = tl.where(mine, tl.div_rn(long, short), ratio)
    return pair, ratio


@triton.jit
def gather_pages(
    WORDS, SOURCES, TIERS, SLOTS, LEVELS, OUT,
    D: constexpr, SIZE: constexpr, TIER: constexpr, KBITS: constexpr, VBITS: constexpr, TWIN: constexpr,
):  # fmt: skip
    """New pages of one tier. Grid: (pages, 2): keys and what is beside the codes, then values.

    Shapes: ``SOURCES`` int32[pages, 64], ``TIERS`` / ``SLOTS`` uint8[pages, 64] -> ``OUT`` int32[pages, SIZE].
    """
    PARTS: constexpr = D // 64
    KB: constexpr = KBITS[TIER]
    VB: constexpr = VBITS[TIER]
    page = tl.program_id(0)
    unit_to, token, inside_to, _ = rows_of(D, 64)
    source = tl.load(SOURCES + page * 64 + token)
    tier = tl.load(TIERS + page * 64 + token).to(tl.int32)
    slot = tl.load(SLOTS + page * 64 + token).to(tl.int32)
    there = source >= 0
    kbits, vbits = tl.zeros(tier.shape, tl.int32), tl.zeros(tier.shape, tl.int32)
    for i in tl.static_range(TIER + 1):
        kbits, vbits = tl.where(tier == i, KBITS[i], kbits), tl.where(tier == i, VBITS[i], vbits)
    words = WORDS + tl.where(there, source, 0).to(tl.int64) * 16
    beside = words + 2 * (kbits + vbits) * D
    unit, inside = slot // 32 * PARTS + unit_to % PARTS, slot % 32
    out = OUT + page.to(tl.int64) * SIZE + tl.zeros(tier.shape, tl.int32)
    scales = (beside + slot).to(tl.pointer_type(tl.float16))
    scales_to = (out + 2 * (KB + VB) * D + token).to(tl.pointer_type(tl.float16))
    if tl.program_id(1) == 0:
        pair, ratio = gather_codes(words, kbits, unit, inside, there, LEVELS, PARTS, KB, False, TWIN)
        store_words(out, pair, unit_to, inside_to, KB, False)
        radius = tl.load(scales, mask=there, other=0.0).to(tl.float32) * ratio
        tl.store(scales_to, tl.minimum(radius, 65504.0).to(tl.float16))
        position = tl.load(beside + 64 + slot, mask=there, other=-1)
        tl.store(out + 2 * (KB + VB) * D + 64 + token, position)
        tl.store(out + 2 * (KB + VB) * D + 128 + token, tl.load(beside + 128 + slot, mask=there, other=0))
    else:
        at = words + 2 * kbits * D
        pair, ratio = gather_codes(at, vbits, unit, inside, there, LEVELS, PARTS, VB, True, TWIN)
        store_words(out + 2 * KB * D, pair, unit_to, inside_to, VB, True)
        scale = tl.load(scales + 1, mask=there, other=0.0).to(tl.float32) * ratio
        tl.store(scales_to + 1, tl.minimum(scale, 65504.0).to(tl.float16))


@triton.jit
def put_pages(MADE, OFFSETS, WORDS, SIZE: constexpr):
    """Copy new pages into the arena. Grid: (pages,)."""
    page = tl.program_id(0).to(tl.int64)
    to = WORDS + tl.load(OFFSETS + page).to(tl.int64) * 16
    for begin in tl.range(0, SIZE, 1024):
        i = begin + tl.arange(0, 1024)
        tl.store(to + i, tl.load(MADE + page * SIZE + i, mask=i < SIZE), mask=i < SIZE)
