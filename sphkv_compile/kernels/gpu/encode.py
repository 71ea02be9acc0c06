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
def add_across(x, N: constexpr, STEP: constexpr):
    """Sum over N rows that lie STEP rows apart, given to all of them. Shapes: [E, C] -> [E, C]."""
    E: constexpr = x.shape[0]
    C: constexpr = x.shape[1]
    total = tl.sum(tl.reshape(x, (E // (N * STEP), N, STEP, C)), 1)
    return tl.reshape(tl.broadcast_to(total[:, None, :, :], (E // (N * STEP), N, STEP, C)), (E, C))


@triton.jit
def halves(x):
    """The lower and the upper half of every row, without leaving a thread. Shapes: [E, C] -> [E, C / 2] twice."""
    E: constexpr = x.shape[0]
    C: constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (E, 2, C // 2)), (0, 2, 1)))


@triton.jit
def turn_columns(x, PARTS: constexpr):
    """Sylvester's matrix times each row over sqrt(D), the far butterflies first, as the codecs do it.

    Shapes: eight float32[E, 8] -> the same.
    """
    E: constexpr = x[0].shape[0]
    part = (tl.arange(0, E) // 4 % PARTS)[:, None]
    for i in tl.static_range(PARTS.bit_length() - 1):
        upper = part // (PARTS >> (i + 1)) % 2 == 1
        out = ()
        for c in tl.static_range(8):
            total = add_across(x[c], 2, 4 * (PARTS >> (i + 1)))
            rest = add_across(tl.where(upper, -x[c], x[c]), 2, 4 * (PARTS >> (i + 1)))
            out = out + (tl.where(upper, rest, total),)
        x = out
    for i in tl.static_range(3):
        out = ()
        for c in tl.static_range(8):
            if c // (4 >> i) % 2 == 0:
                out = out + (x[c] + x[c + (4 >> i)],)
            else:
                out = out + (x[c - (4 >> i)] - x[c],)
        x = out
    out = ()
    for c in tl.static_range(8):
        y = x[c]
        for _ in tl.static_range(3):
            low, high = halves(y)
            y = tl.reshape(tl.join(low + high, low - high), (E, 8))
        out = out + (y * ((PARTS * 64) ** -0.5),)
    return out


@triton.jit
def squares(low, high, PARTS: constexpr):
    """Squares of a lower and an upper column of each row, added. Shapes: float32[E, 8] twice -> the same."""
    low, high = low * low, high * high
    for i in tl.static_range(PARTS.bit_length() - 1):
        low = add_across(low, 2, 4 * (PARTS >> (i + 1)))
        high = add_across(high, 2, 4 * (PARTS >> (i + 1)))
    return low + high


@triton.jit
def root_of_sum(x):
    """Root of each row's sum, the upper half added to the lower half. Shapes: four float32[E, 8] -> float32[E, 1]."""
    y = (x[0] + x[2]) + (x[1] + x[3])
    for _ in tl.static_range(3):
        low, high = halves(y)
        y = low + high
    return tl.sqrt_rn(y)


@triton.jit
def turn(x, D: constexpr):
    """The same for one row that lies across threads. Shapes: float32[D] -> float32[D]."""
    for _ in tl.static_range(D.bit_length() - 1):
        a, b = tl.split(tl.permute(tl.reshape(x, (2, D // 2)), (1, 0)))
        x = tl.reshape(tl.join(a + b, a - b), (D,))
    return x * (D**-0.5)


@triton.jit
def fold_rows(x, ROWS: constexpr, D: constexpr):
    """Sum of the rows, upper half to lower half. Shapes: float32[ROWS, D] -> float32[D]."""
    for i in tl.static_range(ROWS.bit_length() - 1):
        x = tl.sum(tl.reshape(x, (2, ROWS >> (i + 1), D)), 0)
    return tl.reshape(x, (D,))


@triton.jit
def quantize(u, LEVELS, BORDERS: constexpr, BITS: constexpr):
    """Sign, index of the magnitude, and the magnitude. A value on a border belongs above it, on either side of zero.

    Args:
        BORDERS: bits of the positive borders, ascending.

    Shapes: ``LEVELS`` float32, the positive levels; float32[...] -> int32[...], int32[...], float32[...].
    """
    negative = (u < 0).to(tl.int32)
    bits = (u.to(tl.int32, bitcast=True) & 0x7FFFFFFF) - negative
    index = tl.zeros(u.shape, tl.int32)
    borders = ()
    for j in tl.static_range((1 << (BITS - 1)) - 1):
        borders = borders + (tl.full([], BORDERS[j], tl.int32),)
    for i in tl.static_range(BITS - 1):  # the half in which it lies, and the half of that
        above = bits >= borders[(1 << (BITS - 2 - i)) - 1]
        index = index * 2 + above.to(tl.int32)
        more, borders = borders, ()
        for j in tl.static_range((1 << (BITS - 2 - i)) - 1):
            borders = borders + (tl.where(above, more[j + (1 << (BITS - 2 - i))], more[j]),)
    return negative, index, tl.load(LEVELS + index)


@triton.jit
def encode(x, LEVELS, PARTS: constexpr, BORDERS: constexpr, BITS: constexpr):
    """Codes of the direction, two in an integer, and the radius that keeps the length.

    Shapes: eight float32[E, 8] -> four int32[E, 8], of columns 0..31 beside those 32 further; float16[E, 1].
    """
    HALF: constexpr = 1 << (BITS - 1)
    parts = ()
    for c in tl.static_range(4):
        parts = parts + (squares(x[c], x[c + 4], PARTS),)
    length = root_of_sum(parts)
    some = length > 0
    unit = tl.where(some, tl.div_rn(1.0, tl.where(some, length, 1.0)) * (PARTS * 64) ** 0.5, 0.0)
    pairs, parts = (), ()
    for c in tl.static_range(4):
        negative, index, level = quantize(x[c] * unit, LEVELS, BORDERS, BITS)
        negative_too, index_too, level_too = quantize(x[c + 4] * unit, LEVELS, BORDERS, BITS)
        parts = parts + (squares(level, level_too, PARTS),)
        if BITS == 4:
            pair = index | (index_too << 16) | (negative << 7) | (negative_too << 3)
        else:
            pair = tl.where(negative != 0, HALF - 1 - index, HALF + index)
            pair |= tl.where(negative_too != 0, HALF - 1 - index_too, HALF + index_too) << 16
        pairs = pairs + (pair,)
    radius = tl.div_rn(length, root_of_sum(parts))
    return pairs, tl.minimum(radius, 65504.0).to(tl.float16)


@triton.jit
def word_bits(pair, unit, b, BITS: constexpr, TILE: constexpr):
    """What two elements add to a word of a tile: see :mod:`sphkv_compile.storage.tiles`.

    Args:
        unit: number of their pair of planes; b: theirs in the word.
    """
    if BITS == 4:
        bits = ((pair & 0x70007) << (4 * b)) | ((pair & 0x88) << (8 * b))
    elif BITS == 2:
        bits = pair << (4 * b + unit % 2 * 2)
    else:
        own = tl.where(unit % 4 == TILE, pair << (4 * b), 0)
        bits = own | tl.where(unit % 4 == 3, ((pair >> (2 - TILE)) & 0x10001) << (4 * b + 3), 0)
    return bits


@triton.jit
def store_words(at, pairs, unit, inside, BITS: constexpr, VALUES: constexpr):
    """Codes of 64 columns of each row into the tiles of its page.

    Args:
        at: where the page's keys, or values, begin.
        unit: number of the pair of planes that these columns are; inside: the token's number among 32.

    Shapes: pointers[E, 1], four int32[E, 8], int32[E, 1].
    """
    E: constexpr = inside.shape[0]
    TILES: constexpr = 3 if BITS == 3 else 1
    ACROSS: constexpr = 4 if BITS == 3 else 4 // BITS  # pairs that share tiles: they lie in rows beside each other
    column = tl.arange(0, 8)[None, :]
    for tile in tl.static_range(TILES):
        words = at + (unit // ACROSS * TILES + tile) * 256
        for c in tl.static_range(4):
            if VALUES:
                bits = add_across(word_bits(pairs[c], unit, inside % 4, BITS, tile), 4, 1)
                place = (c * 8 + column) * 8 + inside // 4
            else:
                bits = word_bits(pairs[c], unit, column % 4, BITS, tile)
                bits = tl.sum(tl.reshape(bits, (E, 2, 4)), 2)
                place = inside * 8 + c * 2 + tl.arange(0, 2)[None, :]
            if ACROSS > 1:
                bits = add_across(bits, ACROSS, 4)
            tl.store(words + place, bits)


@triton.jit
def exact(
    HELD, NEW, position, first, token,
    D: constexpr, SINK: constexpr, RING: constexpr, HAS_NEW: constexpr,
):  # fmt: skip
    """Where exact rows lie, those before position ``first`` in the window's ring, the others in the new tokens.

    Args:
        token: stride of ``NEW``.

    Shapes: ``position`` int32[...] -> pointers[...].
    """
    at = HELD + (SINK + position % RING) * D
    if HAS_NEW:
        at = tl.where(position >= first, NEW + (position - first).to(tl.int64) * token, at)
    return at


@triton.jit
def anchor_of(
    ANCHOR, STEP, FACTOR, HELD, NEW, SCALE, SIGNS, at, first, token,
    D: constexpr, SPAN: constexpr, SINK: constexpr, RING: constexpr, HAS_NEW: constexpr,
):  # fmt: skip
    """Write the anchor of the span at positions ``at``.., and the factor of every column that precedes the turn, for
    every thread to read; return the anchor's step."""
    d = tl.arange(0, D)
    factor = tl.div_rn(1.0, tl.load(SCALE + d)) * tl.load(SIGNS + d)
    tl.store(FACTOR + d, factor)
    EIGHTH: constexpr = SPAN // 8
    rows = ()
    for i in tl.static_range(EIGHTH):
        place = exact(HELD, NEW, at + i * 8 + tl.arange(0, 8), first, token, D, SINK, RING, HAS_NEW)
        rows = rows + (tl.load(place[:, None] + d[None, :]).to(tl.float32),)
    for i in tl.static_range(EIGHTH.bit_length() - 1):
        more, rows = rows, ()
        for row in tl.static_range(EIGHTH >> (i + 1)):
            rows = rows + (more[row] + more[row + (EIGHTH >> (i + 1))],)
    mean = tl.div_rn(fold_rows(rows[0], 8, D), SPAN * 1.0)
    row = turn(mean * factor, D)
    step = bf16_up(tl.div_rn(tl.max(tl.abs(row), 0), 127.0))
    anchor = tl.where(step > 0, round_even(tl.div_rn(row, tl.where(step > 0, step, 1.0))), 0.0)
    tl.store(ANCHOR + d, anchor.to(tl.int8))
    tl.store(STEP, step.to(tl.bfloat16))
    tl.store(STEP + 1, 1.0)
    tl.debug_barrier()
    return step


@triton.jit
def rows_of(D: constexpr, SPAN: constexpr):
    """Which columns and tokens of a block a thread holds: 64 columns of one token.

    Four neighbouring tokens, then the parts of a token, then its page's other half: what shares a word lies in a warp.

    Shapes: -> part of the token and number of its pair of planes int32[E, 1], number of the token in the block and
    among 32 int32[E, 1], its first eight columns int32[E, 8].
    """
    PARTS: constexpr = D // 64
    e = tl.arange(0, (SPAN if SPAN < 128 else 128) * PARTS)[:, None]
    part = e // 4 % PARTS
    half = e // (4 * PARTS) % 2
    inside = e // (8 * PARTS) % 8 * 4 + e % 4
    token = e // (64 * PARTS) * 64 + half * 32 + inside
    return half * PARTS + part, token, inside, part * 64 + tl.arange(0, 8)[None, :]


@triton.jit
def encode_keys(
    WORDS, TABLE, POSITIONS, TIERS, ANCHOR, STEP, FACTOR, HELD, NEW, SCALE, SIGNS, LEVELS,
    at, page, first, token_stride,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, SINK: constexpr, RING: constexpr,
    BORDERS: constexpr, HAS_NEW: constexpr, KEPT: constexpr,
):  # fmt: skip
    """The keys of the span at positions ``at``.. into its pages, with its anchor, its positions and its tier.

    Args:
        page: its first page in ``TABLE``, ``POSITIONS`` and ``TIERS``.
        first: position of the first row of ``NEW``; what lies before is in the window.

    Shapes: ``FACTOR`` float32[D], of this program alone.
    """
    step = anchor_of(
        ANCHOR, STEP, FACTOR, HELD, NEW, SCALE, SIGNS, at, first, token_stride, D, SPAN, SINK, RING, HAS_NEW
    )
    unit, row, inside, column = rows_of(D, SPAN)
    for block in tl.range(0, tl.cdiv(SPAN, 128), num_stages=1):
        token = block * 128 + row
        own = page + token // 64
        words = WORDS + tl.load(TABLE + own).to(tl.int64) * 16
        place = exact(HELD, NEW, at + token, first, token_stride, D, SINK, RING, HAS_NEW) + column
        x = ()
        for c in tl.static_range(8):
            x = x + (tl.load(place + c * 8).to(tl.float32) * tl.load(FACTOR + column + c * 8),)
        turned = turn_columns(x, D // 64)
        x = ()
        for c in tl.static_range(8):
            x = x + (turned[c] - tl.load(ANCHOR + column + c * 8).to(tl.float32) * step,)
        pairs, radius = encode(x, LEVELS, D // 64, BORDERS, KB)
        store_words(words, pairs, unit, inside, KB, False)
        words += 2 * (KB + VB) * D
        tl.store((words + token % 64).to(tl.pointer_type(tl.float16)), radius)
        if KEPT:
            tl.store(words + 64 + token % 64, at + token)
        else:
            tl.store(POSITIONS + own * 64 + token % 64, at + token)
        tl.store(TIERS + own, 0)


@triton.jit
def encode_values(
    WORDS, TABLE, HELD, NEW, SIGNS, LEVELS, at, page, first, token_stride,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, SINK: constexpr, RING: constexpr,
    BORDERS: constexpr, HAS_NEW: constexpr,
):  # fmt: skip
    """The same span's values; arguments as for :func:`encode_keys`."""
    unit, row, inside, column = rows_of(D, SPAN)
    for block in tl.range(0, tl.cdiv(SPAN, 128), num_stages=1):
        token = block * 128 + row
        words = WORDS + tl.load(TABLE + page + token // 64).to(tl.int64) * 16 + 2 * KB * D
        place = exact(HELD, NEW, at + token, first, token_stride, D, SINK, RING, HAS_NEW) + column
        x = ()
        for c in tl.static_range(8):
            x = x + (tl.load(place + c * 8).to(tl.float32) * tl.load(SIGNS + column + c * 8),)
        pairs, weight = encode(turn_columns(x, D // 64), LEVELS, D // 64, BORDERS, VB)
        store_words(words, pairs, unit, inside, VB, True)
        tl.store((words + 2 * VB * D + token % 64).to(tl.pointer_type(tl.float16)) + 1, weight)


@triton.jit(do_not_specialize=["origin", "span", "first"])
def encode_spans(
    K, V, WORDS, TABLE, TIERS, POSITIONS, HELD, ANCHORS, STEPS, EXACT_K, EXACT_V, SCALE, SIGNS, LEVELS,
    MEMBERS, FACTORS, origin, span, first, k_row, k_head, k_token, v_row, v_head, v_token, H, NS, NP,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, SINK: constexpr, RING: constexpr,
    KBORDERS: constexpr, VBORDERS: constexpr, KEPT: constexpr, TIERCOUNT: constexpr,
):  # fmt: skip
    """Spans ``span``.. of some rows: keys, and values beside them. Grid: (spans, rows * H, 2).

    Args:
        MEMBERS: int32, the rows of the batch.
        origin: position at which their span 0 begins.
        first: position of the first token of ``K`` and ``V``.

    Shapes: ``K`` / ``V`` [B, H, T, D], ``EXACT_K`` / ``EXACT_V`` [B, H, SINK + RING, D], as before the new tokens;
    ``LEVELS`` float32, the positive levels of keys, then of values; ``FACTORS`` float32[rows * H, spans, D] of scratch.
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
    at = origin + s * SPAN
    if tl.program_id(2) == 0:
        encode_keys(
            WORDS, TABLE + pages, POSITIONS + pages * 64, TIERS + pages,
            ANCHORS + (bh * NS + slot) * D, STEPS + (bh * NS + slot) * 2,
            FACTORS + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D,
            EXACT_K + held, K + b * k_row + h * k_head, SCALE + bh * D, SIGNS, LEVELS, at, page,
            first, k_token, D, KB, VB, SPAN, SINK, RING, KBORDERS, True, KEPT,
        )  # fmt: skip
    else:
        encode_values(
            WORDS, TABLE + pages, EXACT_V + held, V + b * v_row + h * v_head, SIGNS, LEVELS + (1 << (KB - 1)),
            at, page, first, v_token, D, KB, VB, SPAN, SINK, RING, VBORDERS, True,
        )  # fmt: skip
