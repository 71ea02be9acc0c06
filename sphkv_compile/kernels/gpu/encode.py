"""Spans of exact keys and values into pages of codes: many at once, and the one of a decode step.

Codes are bit-equal to those of :mod:`sphkv_compile.codecs`, on which a page does not show who wrote it: sums are halved
in the order of :mod:`sphkv_compile.codecs.arith`, quotients and roots are rounded as IEEE has it, and a launch forbids
fused multiply-adds (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.core import constexpr


@triton.jit
def round_even(x):
    """To the nearest whole number, ties to even, for |x| below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def bf16_up(x):
    """The least bfloat16 that is not below a positive ``x``, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def turn(x, ROWS: constexpr, D: constexpr):
    """Sylvester's matrix times each row over sqrt(D), the far butterflies first, as the codecs do it.

    Shapes: float32[ROWS, D] -> float32[ROWS, D].
    """
    for _ in tl.static_range(D.bit_length() - 1):
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))
        x = tl.reshape(tl.join(a + b, a - b), (ROWS, D))
    return x * (D**-0.5)


@triton.jit
def fold_columns(x, ROWS: constexpr, D: constexpr):
    """Sum of each row, upper half to lower half. Shapes: float32[ROWS, D] -> float32[ROWS]."""
    for i in tl.static_range(D.bit_length() - 1):
        x = tl.sum(tl.reshape(x, (ROWS, 2, D >> (i + 1))), 1)
    return tl.reshape(x, (ROWS,))


@triton.jit
def fold_rows(x, ROWS: constexpr, D: constexpr):
    """Sum of the rows, upper half to lower half. Shapes: float32[ROWS, D] -> float32[D]."""
    for i in tl.static_range(ROWS.bit_length() - 1):
        x = tl.sum(tl.reshape(x, (2, ROWS >> (i + 1), D)), 0)
    return tl.reshape(x, (D,))


@triton.jit
def quantize(u, BORDERS: constexpr, LEVELS: constexpr, HALF: constexpr):
    """Codes, and the magnitudes that they stand for. A value on a border belongs above it, on either side of zero.

    Args:
        BORDERS: bits of the positive borders, ascending; LEVELS: the HALF positive levels.

    Shapes: float32[...] -> int32[...], float32[...].
    """
    negative = u < 0
    bits = (u.to(tl.int32, bitcast=True) & 0x7FFFFFFF) - negative.to(tl.int32)
    index = tl.zeros(u.shape, tl.int32)
    level = tl.full(u.shape, LEVELS[0], tl.float32)
    for i in tl.static_range(HALF - 1):
        above = bits >= BORDERS[i]
        index += above.to(tl.int32)
        level = tl.where(above, LEVELS[i + 1], level)
    return tl.where(negative, HALF - 1 - index, HALF + index), level


@triton.jit
def encode(x, ROWS: constexpr, D: constexpr, BORDERS: constexpr, LEVELS: constexpr, HALF: constexpr):
    """Codes of the direction, and the radius that keeps the length.

    Shapes: float32[ROWS, D] -> int32[ROWS, D], float16[ROWS].
    """
    length = tl.sqrt_rn(fold_columns(x * x, ROWS, D))
    some = length > 0
    unit = tl.where(some, tl.div_rn(1.0, tl.where(some, length, 1.0)) * D**0.5, 0.0)
    code, level = quantize(x * unit[:, None], BORDERS, LEVELS, HALF)
    radius = tl.div_rn(length, tl.sqrt_rn(fold_columns(level * level, ROWS, D)))
    return code, tl.minimum(radius, 65504.0).to(tl.float16)


@triton.jit
def store_words(at, planes, BITS: constexpr, F: constexpr):
    """Codes in plane order into a page's tiles. Shapes: ``planes`` int32[F, 32, 32]: plane, row, element."""
    GROUP: constexpr = 8 if BITS == 3 else 8 // BITS
    TILES: constexpr = GROUP * BITS // 8
    code = tl.reshape(planes, (F // GROUP, GROUP, 32, 8, 4))
    p = tl.reshape(tl.arange(0, GROUP), (1, GROUP, 1, 1, 1))
    b = tl.reshape(tl.arange(0, 4), (1, 1, 1, 1, 4))
    group = tl.arange(0, F // GROUP)[:, None, None]
    place = at + group * (TILES * 256) + tl.arange(0, 32)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    for tile in tl.static_range(TILES):
        if BITS == 4:
            negative = code < 8
            bits = tl.where(negative, 7 - code, code - 8) << (4 * b + 16 * p)
            bits = bits | (negative.to(tl.int32) << (8 * b + 7 - 4 * p))
        elif BITS == 2:
            bits = code << (4 * b + p % 2 * 16 + p // 2 * 2)
        else:
            own = tl.where(p // 2 == tile, code << (4 * b + p % 2 * 16), 0)
            spare = tl.where(p >= 6, ((code >> (2 - tile)) & 1) << (4 * b + 3 + p % 2 * 16), 0)
            bits = own | spare
        tl.store(place + tile * 256, tl.sum(tl.sum(bits, 4), 1))


@triton.jit
def key_planes(code, D: constexpr):
    """Shapes: int32[64, D] -> int32[D / 16, 32, 32]."""
    return tl.reshape(tl.permute(tl.reshape(code, (2, 32, D // 32, 32)), (0, 2, 1, 3)), (D // 16, 32, 32))


@triton.jit
def value_planes(code, D: constexpr):
    """Shapes: int32[64, D] -> int32[D / 16, 32, 32]."""
    return tl.reshape(tl.permute(tl.reshape(code, (2, 32, D // 32, 32)), (0, 2, 3, 1)), (D // 16, 32, 32))


@triton.jit
def exact(
    HELD, NEW, position, first, token,
    D: constexpr, SINK: constexpr, RING: constexpr, HAS_NEW: constexpr,
):  # fmt: skip
    """Exact rows, those before position ``first`` from the window's ring, the others from the new tokens.

    Args:
        token: stride of ``NEW``.

    Shapes: ``position`` int32[64] -> float32[64, D].
    """
    d = tl.arange(0, D)
    held = HELD + (SINK + position % RING)[:, None] * D + d[None, :]
    if HAS_NEW:
        late = position >= first
        new = NEW + (position - first).to(tl.int64)[:, None] * token + d[None, :]
        early = tl.load(held, mask=(~late)[:, None], other=0.0).to(tl.float32)
        x = tl.where(late[:, None], tl.load(new, mask=late[:, None], other=0.0).to(tl.float32), early)
    else:
        x = tl.load(held).to(tl.float32)
    return x


@triton.jit
def encode_span(
    WORDS, TABLE, POSITIONS, TIERS, ANCHOR, STEP, HELD_K, HELD_V, NEW_K, NEW_V, SCALE, SIGNS,
    at, page, first, k_token, v_token,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, SINK: constexpr, RING: constexpr,
    KBORDERS: constexpr, KLEVELS: constexpr, VBORDERS: constexpr, VLEVELS: constexpr, HAS_NEW: constexpr,
    KEPT: constexpr,
):  # fmt: skip
    """The span at positions ``at``.. into its pages.

    Args:
        page: its first page in ``TABLE``, ``POSITIONS`` and ``TIERS``.
        first: position of the first row of ``NEW_K`` and ``NEW_V``; what lies before is in the window.
    """
    PAGES: constexpr = SPAN // 64
    d = tl.arange(0, D)
    token = tl.arange(0, 64)
    signs = tl.load(SIGNS + d)
    inverse = tl.div_rn(1.0, tl.load(SCALE + d))
    # pages are added in pairs that lie half a span apart, as the halving of the whole span would do it
    PAIRS: constexpr = 1 if PAGES == 1 else PAGES // 2
    total = tl.zeros([64, D], tl.float32)
    for i in tl.static_range(PAIRS):
        x = exact(HELD_K, NEW_K, at + i * 64 + token, first, k_token, D, SINK, RING, HAS_NEW)
        if PAGES > 1:
            x += exact(HELD_K, NEW_K, at + (i + PAIRS) * 64 + token, first, k_token, D, SINK, RING, HAS_NEW)
        total += x
    mean = tl.div_rn(fold_rows(total, 64, D), SPAN * 1.0)
    row = tl.reshape(turn(tl.reshape(mean * inverse * signs, (1, D)), 1, D), (D,))
    step = bf16_up(tl.div_rn(tl.max(tl.abs(row), 0), 127.0))
    anchor = tl.where(step > 0, round_even(tl.div_rn(row, tl.where(step > 0, step, 1.0))), 0.0)
    tl.store(ANCHOR + d, anchor.to(tl.int8))
    tl.store(STEP, step.to(tl.bfloat16))
    tl.store(STEP + 1, 1.0)
    for half in tl.range(0, PAGES, num_stages=1):  # not unrolled: one page already fills the instruction cache
        position = at + half * 64 + token
        base = WORDS + tl.load(TABLE + page + half).to(tl.int64) * 16
        k = exact(HELD_K, NEW_K, position, first, k_token, D, SINK, RING, HAS_NEW) * inverse[None, :] * signs[None, :]
        code, radius = encode(turn(k, 64, D) - (anchor * step)[None, :], 64, D, KBORDERS, KLEVELS, 1 << (KB - 1))
        store_words(base, key_planes(code, D), KB, D // 16)
        v = exact(HELD_V, NEW_V, position, first, v_token, D, SINK, RING, HAS_NEW) * signs[None, :]
        code, weight = encode(turn(v, 64, D), 64, D, VBORDERS, VLEVELS, 1 << (VB - 1))
        store_words(base + 2 * KB * D, value_planes(code, D), VB, D // 16)
        low = radius.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(base + 2 * (KB + VB) * D + token, low | high)
        if KEPT:
            tl.store(base + 2 * (KB + VB) * D + 64 + token, position)
        else:
            tl.store(POSITIONS + (page + half) * 64 + token, position)
        tl.store(TIERS + page + half, 0)


@triton.jit(do_not_specialize=["origin", "span", "first"])
def encode_spans(
    K, V, WORDS, TABLE, TIERS, POSITIONS, HELD, ANCHORS, STEPS, EXACT_K, EXACT_V, SCALE, SIGNS, MEMBERS,
    origin, span, first, k_row, k_head, k_token, v_row, v_head, v_token, H, NS, NP,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, SINK: constexpr, RING: constexpr,
    KBORDERS: constexpr, KLEVELS: constexpr, VBORDERS: constexpr, VLEVELS: constexpr,
    KEPT: constexpr, TIERCOUNT: constexpr,
):  # fmt: skip
    """Spans ``span``.. of some rows. Grid: (spans, rows * H).

    Args:
        MEMBERS: int32, the rows of the batch.
        origin: position at which their span 0 begins.
        first: position of the first token of ``K`` and ``V``.

    Shapes: ``K`` / ``V`` [B, H, T, D], ``EXACT_K`` / ``EXACT_V`` [B, H, SINK + RING, D], as before the new tokens.
    """
    s = span + tl.program_id(0)
    b = tl.load(MEMBERS + tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    bh = b * H + h
    slot = s % NS
    page = slot * (SPAN // 64)
    if KEPT:  # behind all that the row and head holds; the host counts these once they are written
        page = tl.program_id(0) * (SPAN // 64)
        for t in tl.static_range(TIERCOUNT):
            page += tl.load(HELD + bh * TIERCOUNT + t)
    held = bh * ((SINK + RING) * D)
    pages = bh * NP
    encode_span(
        WORDS, TABLE + pages, POSITIONS + pages * 64, TIERS + pages,
        ANCHORS + (bh * NS + slot) * D, STEPS + (bh * NS + slot) * 2,
        EXACT_K + held, EXACT_V + held, K + b * k_row + h * k_head, V + b * v_row + h * v_head, SCALE + bh * D, SIGNS,
        origin + s * SPAN, page, first, k_token, v_token,
        D, KB, VB, SPAN, SINK, RING, KBORDERS, KLEVELS, VBORDERS, VLEVELS, True, KEPT,
    )  # fmt: skip
