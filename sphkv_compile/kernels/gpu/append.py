"""One new token per row enters the window; a span that leaves it is encoded, in the same launch.

Every decision is made from the counters on the device, so that no step waits for it and a captured graph stays right.
``append`` has one program for each row and kv head, or a few of them. Whichever of a row's programs is the last to have
read its counters moves them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.core import constexpr
from triton.language.extra.cuda import gdc_wait

from sphkv_compile.kernels.gpu.decode import BASE, FAULT, FROZEN, LENGTH, SPANS, START, WIDTH, place
from sphkv_compile.kernels.gpu.encode import behind, encode_keys, encode_values
from sphkv_compile.storage import state

READ = constexpr(state.READ)


@triton.jit
def bf16_nearest(x):
    """To bfloat16, ties to even, as float32; the interpreter's own conversion cuts."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def learn_scale(
    RING_K, MOMENTS, SCALE, slot, ROTARY: constexpr, INTERLEAVED: constexpr, KNOWN: constexpr, D: constexpr,
    SPAN: constexpr,
):  # fmt: skip
    """The pair scale of :mod:`sphkv_compile.codecs.scales` from one span's keys and the queries seen so far.

    Shapes: ``slot`` int32[SPAN], ``MOMENTS`` float64[D + 1], ``SCALE`` float32[D].
    """
    d = tl.arange(0, D)
    if not KNOWN:
        tl.store(SCALE + d, tl.full([D], 1.0, tl.float32))
    else:
        k = tl.load(RING_K + slot[:, None] * D + d[None, :]).to(tl.float32)
        rest = k - (tl.sum(k, 0) / SPAN)[None, :]
        moment = tl.sum(rest * rest, 0) / SPAN
        tl.store(SCALE + d, moment)  # to meet its pair's other half
        tl.debug_barrier()
        if INTERLEAVED:
            other = tl.where(d < ROTARY, d + 1 - d % 2 * 2, d)
        else:
            other = tl.where(d < ROTARY, tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2), d)
        k_pair = (moment + tl.load(SCALE + other)) * 0.5
        seen = tl.load(MOMENTS + D).to(tl.float32)
        q_pair = (tl.load(MOMENTS + d) + tl.load(MOMENTS + other)).to(tl.float32) * 0.5 / tl.maximum(seen, 1.0)
        k_mean = tl.sum(k_pair, 0) / D
        q_mean = tl.sum(q_pair, 0) / D
        # a silent pair gets a large scale, not an infinite one; silence everywhere gives ones
        k_log = tl.log(tl.where(k_mean > 0, k_pair + 1e-4 * k_mean, 1.0))
        q_log = tl.log(tl.where(q_mean > 0, q_pair + 1e-4 * q_mean, 1.0))
        log = k_log * 0.25 - q_log * 0.125
        scale = bf16_nearest(tl.exp(log - tl.sum(log, 0) / D))
        tl.debug_barrier()
        tl.store(SCALE + d, scale)
    tl.debug_barrier()


@triton.jit
def standing(
    ROWS, POS, MASK, b, start, mask_row,
    HAS_POS: constexpr, HAS_START: constexpr, MASKED: constexpr, SINK: constexpr, WINDOW: constexpr, SPAN: constexpr,
    KEPT: constexpr,
):  # fmt: skip
    """Row ``b`` before and after the token: first real position, coded spans before and after, the token's position,
    whether it begins the row anew, whether it reaches into codes, or an earlier one did. To begin a row of kept tokens
    anew is such a fault too: its pages are of several sizes, and only a plan can give it others."""
    _, spans, first, base, held = place(ROWS, POS, b, start, HAS_POS, HAS_START, False, SINK)
    begin = tl.load(ROWS + b * WIDTH + START).to(tl.int32)
    faulty = tl.load(ROWS + b * WIDTH + FROZEN) == FAULT
    anew = (begin < 0) | (first <= begin)
    fault = faulty & ~anew
    if KEPT:
        fault = faulty | (anew & (begin >= 0) & (spans > 0))
        anew = anew & ~fault
    if anew:
        real = first >= 0
        if MASKED:
            real = tl.load(MASK + b.to(tl.int64) * mask_row + first - base) != 0
        begin = tl.where(real, first, -1)
        spans = spans * 0
    fault = fault | ((begin >= 0) & (first < begin + SINK + spans * SPAN) & (spans > 0))
    coded = tl.maximum(spans, (first + 1 - begin - SINK - WINDOW) // SPAN)
    coded = tl.where((begin < 0) | fault, spans, coded)
    return begin, spans, coded, first, base, anew, fault


@triton.jit
def advance(row, begin, spans, coded, first, base, anew, fault, frozen, ROLLING: constexpr):
    """The counters of one row, which every program has read."""
    tl.store(row + READ, 0)
    if fault:  # the row stays as it was, and says so
        tl.store(row + FROZEN, FAULT)
    else:
        tl.store(row + START, begin)
        tl.store(row + LENGTH, first + 1)
        tl.store(row + SPANS, coded)
        tl.store(row + BASE, base + 1 if ROLLING else base)
        tl.store(row + FROZEN, ((coded > spans) | (frozen & ~anew)).to(tl.int32))


@triton.jit
def append(
    Q, K, V, WORDS, TABLE, TIERS, POSITIONS, HELD, ANCHORS, STEPS, EXACT_K, EXACT_V, SCALE, MOMENTS, ENERGY, QUERIES,
    SIGNS, LEVELS, FACTORS, ROWS, POS, MASK, start, q_row, q_head, k_row, k_head, v_row, v_head, mask_row, H, NS, NP,
    G: constexpr, D: constexpr, N: constexpr, HEADS: constexpr, KB: constexpr, VB: constexpr,
    SPAN: constexpr, BLOCK: constexpr, SINK: constexpr, RING: constexpr, MEMORY: constexpr,
    KBORDERS: constexpr, VBORDERS: constexpr,
    ROTARY: constexpr, INTERLEAVED: constexpr, KNOWN: constexpr, KEPT: constexpr, TIERCOUNT: constexpr,
    TWIN: constexpr, HAS_POS: constexpr, HAS_START: constexpr, MASKED: constexpr, ROLLING: constexpr, PDL: constexpr,
):  # fmt: skip
    """The token into the window, and the span that leaves it into its pages.

    Grid: (B * H / HEADS,), of HEADS kv heads each: the registers that encode a span leave a multiprocessor room for one
    program, so that where there are more heads than those, one program takes the tokens of several at once.
    """
    if PDL:  # launched while what precedes it still runs, usually the attention, which reads the window
        gdc_wait()
    programs = H // HEADS  # of a row
    b = tl.program_id(0) // programs
    h = tl.program_id(0) % programs * HEADS + tl.arange(0, HEADS)
    bh = b.to(tl.int64) * H + h
    WINDOW: constexpr = RING - SPAN
    begin, spans, coded, first, base, anew, fault = standing(
        ROWS, POS, MASK, b, start, mask_row, HAS_POS, HAS_START, MASKED, SINK, WINDOW, SPAN, KEPT
    )
    frozen = tl.load(ROWS + b * WIDTH + FROZEN) > 0
    tl.debug_barrier()  # every thread has read the row
    if tl.atomic_add(ROWS + b * WIDTH + READ, 1) == programs - 1:
        advance(ROWS + b * WIDTH, begin, spans, coded, first, base, anew, fault, frozen, ROLLING)
    d = tl.arange(0, D)
    moments = MOMENTS + bh * (D + 1)
    if anew:
        tl.store(moments[:, None] + d[None, :], tl.zeros([HEADS, D], tl.float64))
        tl.store(moments + D, tl.zeros([HEADS], tl.float64))
        tl.store(ENERGY + bh * 2, tl.zeros([HEADS], tl.float64))
        tl.store(ENERGY + bh * 2 + 1, tl.zeros([HEADS], tl.float64))
        if KEPT:
            for t in tl.static_range(TIERCOUNT):
                tl.store(HELD + bh * TIERCOUNT + t, tl.zeros([HEADS], tl.int32))
        else:
            for page in tl.range(0, NP):
                none = (bh * NP + page)[:, None] * 64 + tl.arange(0, 64)[None, :]
                tl.store(POSITIONS + none, tl.full([HEADS, 64], -1, tl.int32))
        frozen = first < 0
        tl.debug_barrier()
    if (begin >= 0) & (not fault):
        g = tl.arange(0, N)
        query = Q + b * q_row + (h[:, None] * G + g[None, :]) * q_head
        q = tl.load(query[:, :, None] + d[None, None, :], mask=(g < G)[None, :, None], other=0.0).to(tl.float32)
        if frozen:
            scaled = q * tl.load(SCALE + bh[:, None] * D + d[None, :])[:, None, :]
            energy = tl.sum(tl.sum(scaled * scaled, 2), 1).to(tl.float64)
            tl.store(ENERGY + bh * 2, tl.load(ENERGY + bh * 2) + energy)
            tl.store(ENERGY + bh * 2 + 1, tl.load(ENERGY + bh * 2 + 1) + G)
        else:
            sums = moments[:, None] + d[None, :]
            tl.store(sums, tl.load(sums) + tl.sum(q * q, 1).to(tl.float64))
            tl.store(moments + D, tl.load(moments + D) + G)
        if MEMORY > 0:  # for the statistics
            lane = ((bh[:, None] * G + g[None, :]) * MEMORY + first % MEMORY) * D
            here = QUERIES + lane[:, :, None] + d[None, None, :]
            tl.store(here, q.to(QUERIES.dtype.element_ty), mask=(g < G)[None, :, None])
        slot = tl.where(first < begin + SINK, first - begin, SINK + first % RING)
        new = (bh * (SINK + RING) + slot)[:, None] * D + d[None, :]
        tl.store(EXACT_K + new, tl.load(K + b * k_row + (h * k_head)[:, None] + d[None, :]))
        tl.store(EXACT_V + new, tl.load(V + b * v_row + (h * v_head)[:, None] + d[None, :]))
        if coded > spans:
            tl.debug_barrier()
            at = begin + SINK + spans * SPAN
            row = spans % NS
            for i in tl.range(0, HEADS, num_stages=1):
                one = b.to(tl.int64) * H + tl.program_id(0) % programs * HEADS + i
                slots = one * ((SINK + RING) * D)
                if not frozen:
                    held = SINK + (at + tl.arange(0, SPAN)) % RING
                    learn_scale(
                        EXACT_K + slots, MOMENTS + one * (D + 1), SCALE + one * D, held,
                        ROTARY, INTERLEAVED, KNOWN, D, SPAN,
                    )  # fmt: skip
                page = row * (SPAN // 64)
                if KEPT:  # behind all that the row and head holds
                    page = page * 0
                    for t in tl.static_range(TIERCOUNT):
                        page += tl.load(HELD + one * TIERCOUNT + t)
                pages = one * NP
                encode_keys(
                    WORDS, TABLE + pages, POSITIONS + pages * 64, TIERS + pages,
                    ANCHORS + (one * NS + row) * D, STEPS + (one * NS + row) * 2, FACTORS + one * D,
                    EXACT_K + slots, EXACT_K, SCALE + one * D, SIGNS, LEVELS, at, page, 0, 0,
                    D, KB, VB, SPAN, BLOCK, SINK, RING, KBORDERS, False, KEPT, TWIN,
                )  # fmt: skip
                encode_values(
                    WORDS, TABLE + pages, EXACT_V + slots, EXACT_V, SIGNS, behind(LEVELS, KB), at, page, 0, 0,
                    D, KB, VB, SPAN, BLOCK, SINK, RING, VBORDERS, False, TWIN,
                )  # fmt: skip
                if KEPT:
                    tl.store(HELD + one * TIERCOUNT, tl.load(HELD + one * TIERCOUNT) + SPAN // 64)
