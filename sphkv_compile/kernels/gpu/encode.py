"""Spans of exact keys and values into pages of codes: many at once, and the one of a decode step.

Codes are bit-equal to those of :mod:`sphkv_compile.codecs`, on which a page does not show who wrote it: sums are halved
in the order of :mod:`sphkv_compile.codecs.arith`, quotients and roots are rounded as IEEE has it, and a launch forbids
fused multiply-adds (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.core import constexpr

from sphkv_compile.kernels.gpu.words import gather


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
def columns(at):
    """64 neighbouring columns of many rows, each row in one thread. Shapes: ``at`` pointers[E, 8] -> float32[E, 64]."""
    E: constexpr = at.shape[0]
    parts = ()
    for c in tl.static_range(8):
        parts = parts + (tl.load(at + c * 8).to(tl.float32),)
    for i in tl.static_range(3):
        more, parts = parts, ()
        for c in tl.static_range(4 >> i):
            parts = parts + (tl.join(more[c], more[c + (4 >> i)]),)
    return tl.reshape(tl.permute(parts[0], (0, 2, 3, 4, 1)), (E, 64))


@triton.jit
def turn_columns(x, PARTS: constexpr):
    """Sylvester's matrix times each row over sqrt(D), the far butterflies first, as the codecs do it.

    Shapes: float32[E, 64] -> the same.
    """
    E: constexpr = x.shape[0]
    part = (tl.arange(0, E) // 4 % PARTS)[:, None]
    for i in tl.static_range(PARTS.bit_length() - 1):
        upper = part // (PARTS >> (i + 1)) % 2 == 1
        total = add_across(x, 2, 4 * (PARTS >> (i + 1)))
        x = tl.where(upper, add_across(tl.where(upper, -x, x), 2, 4 * (PARTS >> (i + 1))), total)
    for _ in tl.static_range(6):
        low, high = halves(x)
        x = tl.reshape(tl.join(low + high, low - high), (E, 64))
    return x * ((PARTS * 64) ** -0.5)


@triton.jit
def norm(low, high, PARTS: constexpr):
    """Length of each row from its halves, squares of the upper half added to the lower half.

    Shapes: float32[E, 32] twice -> float32[E, 1].
    """
    low, high = low * low, high * high
    for i in tl.static_range(PARTS.bit_length() - 1):
        low = add_across(low, 2, 4 * (PARTS >> (i + 1)))
        high = add_across(high, 2, 4 * (PARTS >> (i + 1)))
    x = low + high
    for _ in tl.static_range(5):
        low, high = halves(x)
        x = low + high
    return tl.sqrt_rn(x)


@triton.jit
def turn(x, D: constexpr):
    """:func:`turn_columns` for one row that lies across threads. Shapes: float32[D] -> float32[D]."""
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


def _search() -> str:
    """PTX that looks for the last of 128 borders that is not above a value; each lies 512 bytes behind its level."""
    lines = [".reg .pred p; .reg .b64 a, n; .reg .b32 b;", "mov.b64 a, $3;"]
    for step in (64, 32, 16, 8, 4, 2, 1):
        lines.append(f"ld.global.nc.b32 b, [a + {512 + 4 * step}]; setp.ge.s32 p, $2, b; @p add.s64 a, a, {4 * step};")
    lines += ["ld.global.nc.b32 $1, [a];", "sub.s64 n, a, $3; cvt.u32.u64 $0, n; shr.u32 $0, $0, 2;"]
    return "{\n" + "\n".join(lines) + "\n}"


SEARCH = constexpr(_search())


@triton.jit
def search(bits, LEVELS, TWIN: constexpr):
    """Among the levels of eight bits, whose borders are too many for constants. The assembly finds an element's code
    whole before the next one's is begun, which spares registers.

    Shapes: int32[...] -> int32[...] twice, index of the magnitude and bits of its level.
    """
    if TWIN:
        index = tl.zeros(bits.shape, tl.int32)
        for i in tl.static_range(7):
            border = gather(LEVELS + 128 + index + (64 >> i), TWIN)
            index += (bits >= border).to(tl.int32) << (6 - i)
        level = gather(LEVELS + index, TWIN)
    else:
        index, level = tl.inline_asm_elementwise(
            SEARCH, "=r,=r,r,l", [bits, LEVELS.to(tl.int64)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return index, level.to(tl.float32, bitcast=True)


@triton.jit
def quantize(u, LEVELS, BORDERS: constexpr, BITS: constexpr, TWIN: constexpr):
    """Codes and their magnitudes. A value on a border belongs above it, on either side of zero.

    Args:
        BORDERS: bits of the positive borders, ascending; none at 8 bits.

    Shapes: ``LEVELS`` float32, the positive levels, at 8 bits then the border below each; float32[...] -> int32[...],
    of four and eight bits: sign and index of the magnitude; float32[...].
    """
    HALF: constexpr = 1 << (BITS - 1)
    negative = (u < 0).to(tl.int32)
    bits = (u.to(tl.int32, bitcast=True) & 0x7FFFFFFF) - negative
    if BITS == 8:
        index, level = search(bits, LEVELS, TWIN)
    else:
        index = tl.zeros(u.shape, tl.int32)
        borders = ()
        for j in tl.static_range(HALF - 1):
            borders = borders + (tl.full([], BORDERS[j], tl.int32),)
        for i in tl.static_range(BITS - 1):  # the half in which it lies, and the half of that
            above = bits >= borders[(HALF >> (i + 1)) - 1]
            index = index * 2 + above.to(tl.int32)
            more, borders = borders, ()
            for j in tl.static_range((HALF >> (i + 1)) - 1):
                borders = borders + (tl.where(above, more[j + (HALF >> (i + 1))], more[j]),)
        level = gather(LEVELS + index, TWIN).to(tl.float32, bitcast=True)
    if BITS == 4 or BITS == 8:
        code = index | (negative << (BITS - 1))
    else:
        code = tl.where(negative != 0, HALF - 1 - index, HALF + index)
    return code, level


@triton.jit
def behind(LEVELS, BITS: constexpr):
    """Where the values' levels begin, behind those of keys of that width."""
    return LEVELS + (256 if BITS == 8 else 1 << (BITS - 1))


@triton.jit
def encode(x, LEVELS, PARTS: constexpr, BORDERS: constexpr, BITS: constexpr, TWIN: constexpr):
    """Codes of the direction, two in an integer, and the radius that keeps the length.

    Shapes: float32[E, 64] -> int32[E, 32], of columns 0..31 and, sixteen bits higher, of 32..63; float16[E, 1].
    """
    low, high = halves(x)
    length = norm(low, high, PARTS)
    some = length > 0
    unit = tl.where(some, tl.div_rn(1.0, tl.where(some, length, 1.0)) * (PARTS * 64) ** 0.5, 0.0)
    pair, level = quantize(low * unit, LEVELS, BORDERS, BITS, TWIN)
    code, level_too = quantize(high * unit, LEVELS, BORDERS, BITS, TWIN)
    pair |= code << 16
    radius = tl.div_rn(length, norm(level, level_too, PARTS))
    return pair, tl.minimum(radius, 65504.0).to(tl.float16)


@triton.jit
def word_bits(pair, unit, b, BITS: constexpr, TILE: constexpr):
    """What two elements add to a word of a tile: see :mod:`sphkv_compile.storage.tiles`.

    Args:
        unit: number of their pair of planes; b: theirs in the word.
    """
    if BITS == 4:
        bits = (pair & 0x70007) << (4 * b)
        bits |= (((pair & 8) << 4) | ((pair >> 16) & 8)) << (8 * b)
    elif BITS == 8:
        bits = ((pair >> (16 * TILE)) & 255) << (8 * b)
    elif BITS == 2:
        bits = pair << (4 * b + unit % 2 * 2)
    else:
        own = tl.where(unit % 4 == TILE, pair << (4 * b), 0)
        bits = own | tl.where(unit % 4 == 3, ((pair >> (2 - TILE)) & 0x10001) << (4 * b + 3), 0)
    return bits


@triton.jit
def store_words(at, pair, unit, inside, BITS: constexpr, VALUES: constexpr):
    """Codes of 64 columns of each row into the tiles of its page.

    Args:
        at: where the page's keys, or values, begin.
        unit: number of the pair of planes that these columns are; inside: the token's number among 32.

    Shapes: pointers[E, 1], int32[E, 32], int32[E, 1] twice.
    """
    E: constexpr = inside.shape[0]
    TILES: constexpr = 3 if BITS == 3 else 2 if BITS == 8 else 1
    # pairs of planes that share tiles: they lie in rows beside each other
    ACROSS: constexpr = 4 if BITS == 3 else 2 if BITS == 2 else 1
    column = tl.arange(0, 32)[None, :]
    for tile in tl.static_range(TILES):
        words = at + (unit // ACROSS * TILES + tile) * 256
        if VALUES:
            bits = add_across(word_bits(pair, unit, inside % 4, BITS, tile), 4, 1)
            place = column * 8 + inside // 4
        else:
            bits = tl.sum(tl.reshape(word_bits(pair, unit, column % 4, BITS, tile), (E, 8, 4)), 2)
            place = inside * 8 + tl.arange(0, 8)[None, :]
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
        token: stride of ``NEW``, which is of the window's type.

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
def rows_of(D: constexpr, BLOCK: constexpr):
    """Which columns and tokens of a block a thread holds: 64 columns of one token.

    Four neighbouring tokens, then the parts of a token, then its page's other half: what shares a word lies in a warp.

    Shapes: -> number of the pair of planes, of the token in the block and among 32 int32[E, 1], the first eight columns
    int32[E, 8].
    """
    PARTS: constexpr = D // 64
    e = tl.arange(0, BLOCK * PARTS)[:, None]
    part = e // 4 % PARTS
    half = e // (4 * PARTS) % 2
    inside = e // (8 * PARTS) % 8 * 4 + e % 4
    token = e // (64 * PARTS) * 64 + half * 32 + inside
    return half * PARTS + part, token, inside, part * 64 + tl.arange(0, 8)[None, :]


@triton.jit
def encode_keys(
    WORDS, TABLE, POSITIONS, TIERS, ANCHOR, STEP, FACTOR, HELD, NEW, SCALE, SIGNS, LEVELS,
    at, page, first, token_stride,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, BLOCK: constexpr, SINK: constexpr, RING: constexpr,
    BORDERS: constexpr, HAS_NEW: constexpr, KEPT: constexpr, TWIN: constexpr,
):  # fmt: skip
    """The keys of the span at positions ``at``.. into its pages, with its anchor, its positions and its tier.

    Args:
        page: its first page in ``TABLE``, ``POSITIONS`` and ``TIERS``.
        first: position of the first row of ``NEW``; what lies before is in the window.
        BLOCK: tokens that are encoded at once.

    Shapes: ``FACTOR`` float32[D], of this program alone.
    """
    step = anchor_of(
        ANCHOR, STEP, FACTOR, HELD, NEW, SCALE, SIGNS, at, first, token_stride, D, SPAN, SINK, RING, HAS_NEW
    )
    unit, row, inside, column = rows_of(D, BLOCK)
    for block in tl.range(0, SPAN // BLOCK, num_stages=1):
        token = block * BLOCK + row
        own = page + token // 64
        words = WORDS + tl.load(TABLE + own).to(tl.int64) * 16
        place = exact(HELD, NEW, at + token, first, token_stride, D, SINK, RING, HAS_NEW) + column
        x = turn_columns(columns(place) * columns(FACTOR + column), D // 64) - columns(ANCHOR + column) * step
        pair, radius = encode(x, LEVELS, D // 64, BORDERS, KB, TWIN)
        store_words(words, pair, unit, inside, KB, False)
        words += 2 * (KB + VB) * D
        tl.store((words + token % 64).to(tl.pointer_type(tl.float16)), radius)
        if KEPT:
            tl.store(words + 64 + token % 64, at + token)
            tl.store(words + 128 + token % 64, tl.zeros(token.shape, tl.int32))  # no attention was counted yet
        else:
            tl.store(POSITIONS + own * 64 + token % 64, at + token)
        tl.store(TIERS + own, 0)


@triton.jit
def encode_values(
    WORDS, TABLE, HELD, NEW, SIGNS, LEVELS, at, page, first, token_stride,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, BLOCK: constexpr, SINK: constexpr, RING: constexpr,
    BORDERS: constexpr, HAS_NEW: constexpr, TWIN: constexpr,
):  # fmt: skip
    """The same span's values; arguments as for :func:`encode_keys`."""
    unit, row, inside, column = rows_of(D, BLOCK)
    for block in tl.range(0, SPAN // BLOCK, num_stages=1):
        token = block * BLOCK + row
        words = WORDS + tl.load(TABLE + page + token // 64).to(tl.int64) * 16 + 2 * KB * D
        place = exact(HELD, NEW, at + token, first, token_stride, D, SINK, RING, HAS_NEW) + column
        x = turn_columns(columns(place) * columns(SIGNS + column), D // 64)
        pair, weight = encode(x, LEVELS, D // 64, BORDERS, VB, TWIN)
        store_words(words, pair, unit, inside, VB, True)
        tl.store((words + 2 * VB * D + token % 64).to(tl.pointer_type(tl.float16)) + 1, weight)


@triton.jit(do_not_specialize=["origin", "span", "first"])
def encode_spans(
    K, V, WORDS, TABLE, TIERS, POSITIONS, HELD, ANCHORS, STEPS, EXACT_K, EXACT_V, SCALE, SIGNS, LEVELS,
    MEMBERS, FACTORS, origin, span, first, k_row, k_head, k_token, v_row, v_head, v_token, H, NS, NP,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, BLOCK: constexpr, SINK: constexpr, RING: constexpr,
    KBORDERS: constexpr, VBORDERS: constexpr, KEPT: constexpr, TIERCOUNT: constexpr, TWIN: constexpr,
):  # fmt: skip
    """Spans ``span``.. of some rows. Grid: (spans, rows * H, 2): keys, then values.

    Args:
        MEMBERS: int32, the rows of the batch.
        origin: position at which their span 0 begins.
        first: position of the first token of ``K`` and ``V``.

    Shapes: ``K`` / ``V`` [B, H, T, D], ``EXACT_K`` / ``EXACT_V`` [B, H, SINK + RING, D], as before the new tokens;
    ``LEVELS`` float32, what :func:`quantize` reads for keys, then for values; ``FACTORS`` float32[rows * H,
    spans, D] of scratch.
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
            first, k_token, D, KB, VB, SPAN, BLOCK, SINK, RING, KBORDERS, True, KEPT, TWIN,
        )  # fmt: skip
    else:
        encode_values(
            WORDS, TABLE + pages, EXACT_V + held, V + b * v_row + h * v_head, SIGNS, behind(LEVELS, KB),
            at, page, first, v_token, D, KB, VB, SPAN, BLOCK, SINK, RING, VBORDERS, True, TWIN,
        )  # fmt: skip
