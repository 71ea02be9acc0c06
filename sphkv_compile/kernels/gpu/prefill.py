"""Attention of many new tokens over codes, sinks, window and themselves: one softmax, nothing decoded in memory.

A program owns ROWS query rows of one kv head: its G query heads take turns, row r is head r % G of token r // G, so
that a page is decoded once for all of them. A page's keys are decoded to float16 with their radius in them, and their
anchor's product is added to theirs; its values are summed in the turned frame and turned back before the exact tokens
are added, under the same running maximum. Pages of kept tokens are visited tier by tier; what a query sees of them, and
which anchors theirs are, follows from the position of each token.

All logits are in units of log 2. What a query may see is an interval of columns, from a mask too where its rows are
intervals (causal, left-padded, sliding); only a mask with holes is looked at beside every key, a bit for each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.core import constexpr

from sphkv_compile.kernels.gpu.decode import EMPTY, FAULT, FROZEN, HIDDEN, WIDTH, coded_range, hadamard, place
from sphkv_compile.kernels.gpu.words import elements, integers


@triton.jit
def extents(
    MASK, LO, HI, HOLES, BITS, T, columns, mask_row, mask_token, words, ROWS: constexpr, PACK: constexpr
):  # fmt: skip
    """The columns that each row of a mask shows: from, to, and whether any row has a hole between; or a bit for each.

    Grid: (ceil(T / ROWS), B). Shapes: ``MASK`` uint8[B, 1, T, columns] -> ``LO`` / ``HI`` int32[B, T], 0 for a row
    that shows nothing; ``HOLES`` int32[1], set to 1 or left; if PACK ``BITS`` int32[B, T, words] instead, behind two
    words of nothing.
    """
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (t < T)[:, None]
    low = tl.full([ROWS], 2147483647, tl.int32)
    stop = tl.zeros([ROWS], tl.int32)
    count = tl.zeros([ROWS], tl.int32)
    rows = MASK + b * mask_row + t.to(tl.int64)[:, None] * mask_token
    for at in tl.range(0, columns, 256):
        column = (at + tl.arange(0, 256))[None, :]
        seen = tl.load(rows + column, mask=inside & (column < columns), other=0) != 0
        if PACK:
            bits = tl.reshape(seen.to(tl.int32), (ROWS, 8, 32)) << tl.arange(0, 32)[None, None, :]
            word = (b * T + t)[:, None] * words + 2 + at // 32 + tl.arange(0, 8)[None, :]
            tl.store(BITS + word, tl.sum(bits, 2), mask=inside)
        else:
            low = tl.minimum(low, tl.min(tl.where(seen, column, 2147483647), 1))
            stop = tl.maximum(stop, tl.max(tl.where(seen, column + 1, 0), 1))
            count += tl.sum(seen.to(tl.int32), 1)
    if not PACK:
        low = tl.minimum(low, stop)
        tl.store(LO + b * T + t, low, mask=t < T)
        tl.store(HI + b * T + t, stop, mask=t < T)
        if tl.max((stop - low - count), 0) > 0:
            tl.store(HOLES, 1)


@triton.jit
def shown(BITS, column, N: constexpr):
    """What a mask shows of N columns from ``column`` on. Shapes: ``BITS`` pointers[ROWS] to rows -> bool[ROWS, N]."""
    at = tl.maximum(column + 64, 0)
    shift = (at % 32).to(tl.uint32)
    a = tl.load(BITS + at // 32).to(tl.uint32, bitcast=True)
    b = tl.load(BITS + at // 32 + 1).to(tl.uint32, bitcast=True)
    j = tl.arange(0, N)
    word = ((a >> shift) | ((b << 1) << (31 - shift)))[:, None]
    if N == 64:
        c = tl.load(BITS + at // 32 + 2).to(tl.uint32, bitcast=True)
        word = tl.where((j < 32)[None, :], word, ((b >> shift) | ((c << 1) << (31 - shift)))[:, None])
    return ((word >> (j % 32).to(tl.uint32)[None, :]) & 1) != 0


@triton.jit
def visible(BITS, lo, hi, column, N: constexpr, MASKED: constexpr):
    """Which of N columns from ``column`` on each row sees. Shapes: -> bool[ROWS, N]."""
    j = column + tl.arange(0, N)
    seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
    if MASKED:
        seen = seen & shown(BITS, column, N)
    return seen


@triton.jit
def query_rows(block, T, G: constexpr, ROWS: constexpr):
    """Token and head of each row, and whether there is such a row; those that are not repeat the last."""
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < T * G
    row = tl.minimum(row, T * G - 1)
    return row // G, row % G, inside


@triton.jit(do_not_specialize=["T"])
def turn_queries(
    Q, SCALE, SIGNS, TURNED, T, factor, q_row, q_head, q_token, H,
    G: constexpr, D: constexpr, ROWS: constexpr,
):  # fmt: skip
    """q' = H(s q) times ``factor``. Grid: (ceil(T * G / ROWS), B * H). Shapes: -> float16[B * H, T * G, D]."""
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    t, g, inside = query_rows(block, T, G, ROWS)
    at = Q + bh // H * q_row + (bh % H * G + g)[:, None] * q_head + t.to(tl.int64)[:, None] * q_token + d[None, :]
    x = tl.load(at).to(tl.float32) * (tl.load(SCALE + bh * D + d) * tl.load(SIGNS + d))[None, :]
    x = (hadamard(x, ROWS, D) * (factor * D**-0.5)).to(tl.float16)
    tl.store(TURNED + (bh * T * G + (t * G + g))[:, None] * D + d[None, :], x, mask=inside[:, None])


@triton.jit
def tile(at, LEVELS, BITS: constexpr, D: constexpr, VALUES: constexpr, TWIN: constexpr):
    """A page's keys, or its values turned around, in units of the width's step.

    Shapes: -> float16[64, D], or float16[D, 64].
    """
    GROUP: constexpr = 8 if BITS == 3 else 8 // BITS
    TILES: constexpr = GROUP * BITS // 8
    DQ: constexpr = D // 32
    INNER: constexpr = 2 if GROUP > DQ else 1  # token groups that share a word
    group = tl.arange(0, 2 * DQ // GROUP)[:, None, None]
    at = at + group * (TILES * 256) + tl.arange(0, 32)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    parts = elements(at, LEVELS, BITS, TWIN)
    for i in tl.static_range(5 if BITS == 3 else 6 - BITS.bit_length()):
        joined = ()
        for j in tl.static_range((16 if BITS == 3 else 16 // BITS) >> i):
            joined = joined + (tl.join(parts[j], parts[j + ((16 if BITS == 3 else 16 // BITS) >> i)]),)
        parts = joined
    # token group, dim group, row, word, the rest of token group and dim group, element
    x = tl.reshape(parts[0], (2 // INNER, DQ * INNER // GROUP, 32, 8, INNER, GROUP // INNER, 4))
    if VALUES:
        out = tl.reshape(tl.permute(x, (1, 5, 2, 0, 4, 3, 6)), (D, 64))
    else:
        out = tl.reshape(tl.permute(x, (0, 4, 2, 1, 5, 3, 6)), (64, D))
    return out


@triton.jit
def weigh(x, top, total):
    """A block of logits into the running softmax. Shapes: float32[ROWS, N] -> weights, new top and total, shrinkage."""
    new = tl.maximum(top, tl.max(x, 1))
    shrink = tl.exp2(top - new)
    p = tl.exp2(x - new[:, None])
    return p, new, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def coded_pages(
    q, top, total, acc, WORDS, LEVELS, TABLE, ANCHORS, STEPS, bits, lo, hi, begin, base, low, stop,
    page, end, skip, skipped, NS, NP,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, KSTEP: constexpr,
    TWIN: constexpr,
    EDGE: constexpr, MASKED: constexpr, STAGES: constexpr,
):  # fmt: skip
    """Pages ``page``..``end`` but for ``skip``..``skip + skipped``; values in units of their width's step.

    Args:
        EDGE: some tokens of these pages are hidden from some rows.
    """
    PER_SPAN: constexpr = SPAN // 64
    AT_ONCE: constexpr = 16  # spans whose anchors one product takes: the fewest columns that it knows
    WORDS_K: constexpr = 2 * KB * D
    WORDS_V: constexpr = 2 * VB * D
    d = tl.arange(0, D)
    i = tl.arange(0, 64)
    j = tl.arange(0, AT_ONCE)
    for some in tl.range(page // (AT_ONCE * PER_SPAN), tl.cdiv(end, AT_ONCE * PER_SPAN)):
        from_ = tl.maximum(page, some * (AT_ONCE * PER_SPAN))
        to = tl.minimum(end, (some + 1) * (AT_ONCE * PER_SPAN))
        jump = tl.minimum(tl.maximum(skip, from_), to)
        jumped = tl.minimum(tl.maximum(skip + skipped, from_), to) - jump
        if from_ < to - jumped:
            # Anchors' products stand apart: added to a key in float16, a large one would round the residual away.
            spans = (some * AT_ONCE + j) % NS
            anchors = tl.load(ANCHORS + spans.to(tl.int64)[:, None] * D + d[None, :]).to(tl.float16)
            scales = tl.load(STEPS + spans * 2).to(tl.float32) * (1.0 / KSTEP)
            same = tl.dot(q, tl.trans(anchors)) * scales[None, :]
            unit = tl.load(TABLE + tl.where(from_ < jump, from_, from_ + jumped) % NP)
            for n in tl.range(from_, to - jumped, num_stages=STAGES):
                t = tl.where(n < jump, n, n + jumped)
                ahead = tl.minimum(n + 1, to - jumped - 1)
                unit_ahead = tl.load(TABLE + tl.where(ahead < jump, ahead, ahead + jumped) % NP)
                words = WORDS + unit.to(tl.int64) * 16
                meta = tl.load(words + WORDS_K + WORDS_V + i)
                radius = (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
                weight = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                own = tl.sum(tl.where((j == t // PER_SPAN - some * AT_ONCE)[None, :], same, 0.0), 1)
                k = tile(words, LEVELS, KB, D, False, TWIN) * radius[:, None]
                x = tl.dot(q, tl.trans(k)) + own[:, None]
                if EDGE:
                    token = t * 64 + i
                    seen = visible(bits, lo, hi, begin + t * 64 - base, 64, MASKED)
                    x = tl.where(seen & ((token >= low) & (token < stop))[None, :], x, HIDDEN)
                p, top, total, shrink = weigh(x, top, total)
                v = tile(words + WORDS_K, LEVELS, VB, D, True, TWIN)
                acc = tl.dot((p * weight[None, :]).to(tl.float16), tl.trans(v), acc * shrink[:, None])
                unit = unit_ahead
    return top, total, acc


@triton.jit
def shown_at(BITS, column):
    """What a mask shows of any columns. Shapes: ``BITS`` pointers[ROWS] to rows, int32[N] -> bool[ROWS, N]."""
    word = tl.load(BITS[:, None] + ((column + 64) // 32)[None, :])
    return ((word >> (column % 32)[None, :]) & 1) != 0


@triton.jit
def kept_pages(
    q, top, total, acc, WORDS, LEVELS, TABLE, ANCHORS, STEPS, bits, lo, hi, begin, base, low, stop, page, end, edge,
    D: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr, KSTEP: constexpr, RATIO: constexpr,
    TWIN: constexpr, MASKED: constexpr, STAGES: constexpr,
):  # fmt: skip
    """Pages ``page``..``end`` of kept tokens of one tier, in any order; values in units of their step over ``RATIO``.

    A page's tokens may be of as many spans: their anchors are gathered, a row for each, and multiplied as the keys are.
    Products made before, gathered for each query and token, would be four times the bytes, and memory of their own.

    Args:
        edge: some of what is held is hidden from some rows.
    """
    WORDS_K: constexpr = 2 * KB * D
    WORDS_V: constexpr = 2 * VB * D
    d = tl.arange(0, D)
    i = tl.arange(0, 64)
    if page < end:
        unit = tl.load(TABLE + page)
        for t in tl.range(page, end, num_stages=STAGES):
            unit_ahead = tl.load(TABLE + tl.minimum(t + 1, end - 1))
            words = WORDS + unit.to(tl.int64) * 16
            meta = tl.load(words + WORDS_K + WORDS_V + i)
            token = tl.load(words + WORDS_K + WORDS_V + 64 + i) - begin
            there = (token >= low) & (token < stop)  # an empty slot has a negative position
            span = tl.where(there, token, 0).to(tl.uint32) // SPAN
            radius = (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
            weight = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * RATIO
            anchors = integers(tl.load(ANCHORS + span[:, None] * D + d[None, :]), TWIN)
            # four times each: so few as the tokens are, every thread would load those of all its columns
            scale = tl.load(STEPS + span[:, None] * 2 + tl.zeros([1, 4], tl.int32)).to(tl.float32)
            scale = tl.max(scale, 1) * (1.0 / KSTEP)
            x = tl.dot(q, tl.trans(anchors)) * scale[None, :] + tl.where(there, 0.0, HIDDEN)[None, :]
            k = tile(words, LEVELS, KB, D, False, TWIN) * radius[:, None]
            x = tl.dot(q, tl.trans(k), x) * KSTEP
            column = token + (begin - base)
            if MASKED:
                x = tl.where(shown_at(bits, tl.where(there, column, 0)), x, HIDDEN)
            if edge:
                x = tl.where((column[None, :] >= lo[:, None]) & (column[None, :] < hi[:, None]), x, HIDDEN)
            p, top, total, shrink = weigh(x, top, total)
            v = tile(words + WORDS_K, LEVELS, VB, D, True, TWIN)
            acc = tl.dot((p * weight[None, :]).to(tl.float16), tl.trans(v), acc * shrink[:, None])
            unit = unit_ahead
    return top, total, acc


@triton.jit
def exact_tokens(q, k, v, top, total, acc, seen, qscale, PRECISION: constexpr):
    """Exact tokens into the softmax. Shapes: ``k`` / ``v`` [N, D], ``seen`` bool[ROWS, N]."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qscale
    p, top, total, shrink = weigh(tl.where(seen, x, HIDDEN), top, total)
    return top, total, tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit(do_not_specialize=["first", "base_", "columns", "T"])
def prefill(
    Q, K, V, TURNED, WORDS, LEVELS, TABLE, HELD, ANCHORS, STEPS, EXACT_K, EXACT_V, SIGNS, COUNTERS, LO, HI, BITS, OUT,
    LSE,
    first, base_, columns, T, qscale, q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    bound_row, bound_token, bits_row, bits_token, H, NS, NP,
    G: constexpr, D: constexpr, KBITS: constexpr, VBITS: constexpr, KSTEPS: constexpr, VSTEPS: constexpr,
    SPAN: constexpr, SINK: constexpr, RING: constexpr, KEPT: constexpr, TWIN: constexpr,
    CAUSAL: constexpr, BOUNDED: constexpr, MASKED: constexpr, PRECISION: constexpr,
    ROWS: constexpr, BLOCK: constexpr, STAGES: constexpr, SPLIT: constexpr,
):  # fmt: skip
    """ROWS query rows of one row of the batch and kv head, over a part of its pages; the last part takes what is exact.

    Grid: (ceil(T * G / ROWS), B * H, parts).

    Args:
        first: position of the first new token; base_: of column 0.
        KBITS, VBITS, KSTEPS, VSTEPS: of each tier, narrowest first; there is one unless KEPT.

    Shapes: ``Q`` [B, H * G, T, D], ``K`` / ``V`` [B, H, T, D], ``TURNED`` float16[B * H, T * G, D], in units of
    1 / KSTEP unless KEPT, ``HELD`` int32[B, H, tiers], ``LO`` / ``HI`` int32[B or 1, T or 1], ``BITS`` int32[B or 1,
    T or 1, words] -> ``OUT`` [B, H * G, T, D], contiguous; if SPLIT float32[parts, B, H * G, T, D] and ``LSE``
    float32[parts, B, H * G, T].
    """
    TIERS: constexpr = len(KBITS)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see most: they begin first
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    d = tl.arange(0, D)
    i = tl.arange(0, BLOCK)
    t, g, inside = query_rows(block, T, G, ROWS)
    begin, spans, _, _, held = place(COUNTERS, COUNTERS, b, 0, False, False, False, SINK)
    base = base_.to(tl.int32)
    lo = t * 0
    hi = t * 0 + columns.to(tl.int32)
    if BOUNDED:
        lo = tl.load(LO + b * bound_row + t * bound_token)
        hi = tl.load(HI + b * bound_row + t * bound_token)
    if CAUSAL:
        hi = tl.minimum(hi, t + 1)
    bits = BITS + b * bits_row + t.to(tl.int64) * bits_token

    top = tl.full([ROWS], EMPTY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    low, stop = coded_range(begin, spans, first, base, NS, SPAN)
    shift = base - begin  # token = column + shift
    if KEPT:  # a page may hold any tokens: all are visited
        stop = tl.minimum(stop, columns.to(tl.int32) + shift)
        page = 0
        end = 0
        for tier in tl.static_range(TIERS):
            end += tl.load(HELD + bh * TIERS + tier)
        end = tl.where((low < stop) & (tl.min(lo, 0) + shift < stop) & (tl.max(hi, 0) + shift > low), end, 0)
    else:
        page = tl.maximum(low, tl.min(lo, 0) + shift) // 64
        end = (tl.maximum(tl.minimum(stop, tl.max(hi, 0) + shift), 0) + 63) // 64
    part = tl.program_id(2)
    last = part == tl.num_programs(2) - 1
    if SPLIT:
        share = (tl.maximum(end - page, 0) + tl.num_programs(2) - 1) // tl.num_programs(2)
        page += part * share
        end = tl.minimum(page + share, end)
    if page < end:
        q = tl.load(TURNED + (bh * T * G + (t * G + g))[:, None] * D + d[None, :])
        heads = TABLE + bh * NP
        anchors = ANCHORS + bh * NS * D
        steps = STEPS + bh * NS * 2
        if KEPT:
            edge = (tl.max(lo, 0) + shift > low) | (tl.min(hi, 0) + shift < stop)
            before = 0
            for tier in tl.static_range(TIERS):
                after = before + tl.load(HELD + bh * TIERS + TIERS - 1 - tier)
                top, total, acc = kept_pages(
                    q, top, total, acc, WORDS, LEVELS, heads, anchors, steps, bits, lo, hi, begin, base, low, stop,
                    tl.maximum(page, before), tl.minimum(end, after), edge, D, KBITS[tier], VBITS[tier], SPAN,
                    KSTEPS[tier], VSTEPS[tier] / VSTEPS[0], TWIN, MASKED, STAGES,
                )  # fmt: skip
                before = after
        else:
            # pages that every row sees whole need no comparisons
            whole = (tl.maximum(low, tl.max(lo, 0) + shift) + 63) // 64
            after = tl.maximum(tl.minimum(stop, tl.min(hi, 0) + shift), 0) // 64
            whole = tl.minimum(tl.maximum(whole, page), end)
            after = tl.maximum(tl.minimum(after, end), whole)
            if MASKED:
                after = whole
            top, total, acc = coded_pages(
                q, top, total, acc, WORDS, LEVELS, heads, anchors, steps, bits, lo, hi, begin, base, low, stop,
                page, end, whole, after - whole, NS, NP, D, KBITS[0], VBITS[0], SPAN, KSTEPS[0], TWIN,
                True, MASKED, STAGES,
            )  # fmt: skip
            if not MASKED:
                top, total, acc = coded_pages(
                    q, top, total, acc, WORDS, LEVELS, heads, anchors, steps, bits, lo, hi, begin, base, low, stop,
                    whole, after, after, 0, NS, NP, D, KBITS[0], VBITS[0], SPAN, KSTEPS[0], TWIN,
                    False, False, STAGES,
                )  # fmt: skip
        acc = hadamard(acc, ROWS, D) * (VSTEPS[0] * D**-0.5 * tl.load(SIGNS + d))[None, :]

    q = tl.load(Q + b * q_row + (bh % H * G + g)[:, None] * q_head + t.to(tl.int64)[:, None] * q_token + d[None, :])
    if held & last:
        after = begin + spans * SPAN
        sinks: constexpr = (SINK + BLOCK - 1) // BLOCK
        exact = bh * (SINK + RING) * D
        window = tl.maximum(first - after + BLOCK - 1, 0) // BLOCK
        for n in tl.range(0, sinks + window, num_stages=STAGES):
            from_ = tl.where(n < sinks, begin - SINK + n * BLOCK, after + (n - sinks) * BLOCK)
            position = from_ + i
            inner = position < tl.where(n < sinks, tl.minimum(begin, first), first)
            seen = visible(bits, lo, hi, from_ - base, BLOCK, MASKED) & inner[None, :]
            slot = tl.where(n < sinks, position - begin + SINK, SINK + position % RING)
            at = exact + slot[:, None] * D + d[None, :]
            k = tl.load(EXACT_K + at, mask=inner[:, None], other=0.0)
            v = tl.load(EXACT_V + at, mask=inner[:, None], other=0.0)
            top, total, acc = exact_tokens(q, k, v, top, total, acc, seen, qscale, PRECISION)

    own = (first - base).to(tl.int32)  # column of the first new token
    from_ = tl.maximum(tl.min(lo, 0) - own, 0) // BLOCK * BLOCK
    to = tl.where(last, tl.minimum(tl.max(hi, 0) - own, T), 0)
    new_k = K + b * k_row + bh % H * k_head
    new_v = V + b * v_row + bh % H * v_head
    for at in tl.range(from_, to, BLOCK, num_stages=STAGES):
        j = at + i
        seen = visible(bits, lo, hi, own + at, BLOCK, MASKED) & (j < T)[None, :]
        k = tl.load(new_k + j.to(tl.int64)[:, None] * k_token + d[None, :], mask=(j < T)[:, None], other=0.0)
        v = tl.load(new_v + j.to(tl.int64)[:, None] * v_token + d[None, :], mask=(j < T)[:, None], other=0.0)
        top, total, acc = exact_tokens(q, k, v, top, total, acc, seen, qscale, PRECISION)

    out = acc / tl.maximum(total, 1e-30)[:, None]
    fault = (tl.load(COUNTERS + b * WIDTH + FROZEN) == FAULT) & held & (first > begin - SINK)
    out = tl.where(fault, float("nan"), out)
    row = (bh * G + g) * T + t
    if SPLIT:
        row += part.to(tl.int64) * tl.num_programs(1) * G * T
        tl.store(LSE + row, top + tl.log2(tl.maximum(total, 1e-30)), mask=inside)
    tl.store(OUT + row[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=inside[:, None])
