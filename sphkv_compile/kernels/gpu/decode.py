"""One decode step over tiled pages: decode in parts, combine.

``decode`` reads the codes once: codes are the larger operand of every product, the query heads of one kv head the
smaller, and no decoded value goes through memory. A part turns the queries into the keys' frame and takes their product
with the anchors of its spans; only where pages hold kept tokens, of any span, ``prepare`` takes all products before.
Parts are cut at run time, from the counters on the device, so a captured graph stays right while the cache grows.
``combine`` merges the parts and the new token by their log-sum-exp. It is launched while ``decode`` still runs, the
step's ``append`` while ``combine`` does, and ``decode`` only once ``prepare`` has ended, since parts are placed evenly
on an empty device alone.

All logits are in units of log 2: ``exp2`` is the native instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.core import constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sphkv_compile.kernels.gpu.words import gather, gather_byte, integers, planes
from sphkv_compile.storage import state

LOG2E = 1.4426950408889634
HEADS = 8
"""Query heads of a kv head that one product holds; fewer are padded."""

# A hidden logit lies below the running maximum's start: its weight is zero even where nothing else was seen.
EMPTY = constexpr(-1e29)
HIDDEN = constexpr(-1e30)
FAULT = constexpr(state.FAULT)
WIDTH = constexpr(state.WIDTH)  # of a row of counters
START, LENGTH, SPANS = constexpr(state.START), constexpr(state.LENGTH), constexpr(state.SPANS)
BASE, FROZEN = constexpr(state.BASE), constexpr(state.FROZEN)


@triton.jit
def hadamard(x, ROWS: constexpr, D: constexpr):
    """Sylvester's matrix times each row, by butterflies. Shapes: float32[ROWS, D] -> float32[ROWS, D]."""
    LEVELS: constexpr = tl.constexpr(D.bit_length() - 1)
    for _ in tl.static_range(LEVELS):
        a, b = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, D))
    return x


@triton.jit
def place(ROWS, POS, b, start, HAS_POS: constexpr, HAS_START: constexpr, ROLLING: constexpr, SINK: constexpr):
    """Where row ``b`` stands: position of its span 0, coded spans, first new position, position of column 0; whether it
    holds a token."""
    row = ROWS + b * WIDTH
    begin = tl.load(row + START).to(tl.int32)
    spans = tl.load(row + SPANS).to(tl.int32)
    base = tl.load(row + BASE).to(tl.int32)
    first = tl.load(row + LENGTH).to(tl.int32)
    if HAS_POS:
        first = base + tl.load(POS).to(tl.int32)
    elif HAS_START:
        first = base + start
    if ROLLING:
        base += 1
    return begin + SINK, tl.where(begin < 0, 0, spans), first, base, begin >= 0


@triton.jit
def coded_range(begin, spans, first, base, NS, SPAN: constexpr):
    """Coded tokens that may be seen, counted from span 0: from, to. A rolling window keeps its last NS spans."""
    stop = tl.minimum(spans * SPAN, tl.maximum(first - begin, 0))
    lowest = tl.maximum(tl.maximum(base - begin, (spans - NS) * SPAN), 0)
    return tl.minimum(lowest, stop), stop


@triton.jit
def first_programs(
    ROWS, HELD, H, NP, PROGRAMS, ROWS_HEADS,
    SPAN: constexpr, WEIGHTS: constexpr, ALL: constexpr, KEPT: constexpr,
):  # fmt: skip
    """Which programs a row and kv head has: as many as its share of all bytes, and one more.

    Args:
        WEIGHTS: of a page of each tier, narrowest first.

    Shapes: ``HELD`` int32[B * H, tiers] -> the first one's number int32[ALL], ascending; PROGRAMS behind the last row.
    """
    i = tl.arange(0, ALL)
    there = i < ROWS_HEADS
    work = tl.zeros([ALL], tl.int32)
    if KEPT:
        TIERS: constexpr = len(WEIGHTS)
        for t in tl.static_range(TIERS):
            work += tl.load(HELD + i * TIERS + TIERS - 1 - t, mask=there, other=0) * WEIGHTS[t]
    else:
        spans = tl.load(ROWS + i // H * WIDTH + SPANS, mask=there, other=0).to(tl.int32)
        work += tl.minimum(tl.maximum(spans, 0) * (SPAN // 64), NP)
    before = tl.cumsum(work, 0) - work
    total = tl.maximum(tl.sum(work, 0), 1)
    # float32 keeps the order, and one more for each row keeps equal numbers apart; decode and combine find the same.
    # The spare programs come as a tensor: what is 1 in a launch is a number of the compiler's.
    spare = total * 0 + (PROGRAMS - ROWS_HEADS)
    each = tl.div_rn(spare.to(tl.float32), total.to(tl.float32))
    return tl.where(there, (before.to(tl.float32) * each).to(tl.int32) + i, PROGRAMS)


@triton.jit
def prepare(
    Q, SCALE, SIGNS, ANCHORS, STEPS, ROWS, BIAS,
    qscale, q_row, q_head, H, NS,
    G: constexpr, D: constexpr, N: constexpr, CHUNK: constexpr, TWIN: constexpr,
):  # fmt: skip
    """Products of the turned queries with every anchor, of which a page of kept tokens may need any.

    Grid: (ceil(spans / CHUNK), B * H). Shapes: ``Q`` [B, H * G, 1, D], ``SCALE`` float32[B, H, D], ``SIGNS``
    float32[D], ``ANCHORS`` int8[B, H, NS, D], ``STEPS`` bfloat16[B, H, NS, 2] -> ``BIAS`` float32[B * H, NS, N].
    """
    chunk = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    if chunk * CHUNK < tl.load(ROWS + b * WIDTH + SPANS):
        d = tl.arange(0, D)
        g = tl.arange(0, N)
        s = chunk * CHUNK + tl.arange(0, CHUNK)
        within = s < NS
        # asked for before the queries are turned, so that one round trip to memory is enough
        anchors = tl.load(ANCHORS + (bh * NS + s)[:, None].to(tl.int64) * D + d[None, :], mask=within[:, None], other=0)
        steps = tl.load(STEPS + (bh * NS + s) * 2, mask=within, other=0.0).to(tl.float32)
        q = tl.load(Q + b * q_row + (h * G + g)[:, None] * q_head + d[None, :], mask=(g < G)[:, None], other=0.0)
        x = q.to(tl.float32) * (tl.load(SCALE + bh * D + d) * tl.load(SIGNS + d))[None, :]
        turned = (hadamard(x, N, D) * (qscale * D**-0.5)).to(tl.float16)
        bias = tl.dot(integers(anchors, TWIN), tl.trans(turned)) * steps[:, None]
        tl.store(BIAS + (bh * NS + s)[:, None] * N + g[None, :], bias, mask=within[:, None])


@triton.jit
def low_half(x):
    return (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(x):
    return (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def exact_part(
    Q, MASK, EXACT_K, EXACT_V, tile, begin, spans, first, base, held, columns, qscale, q_head,
    G: constexpr, D: constexpr, N: constexpr, SPAN: constexpr, SINK: constexpr, RING: constexpr, MASKED: constexpr,
    IEEE: constexpr,
):  # fmt: skip
    """32 slots of sinks and window. Everything is asked for before anything is used: one round trip to memory."""
    DQ: constexpr = D // 32
    i = tl.arange(0, 32)
    g = tl.arange(0, N)
    slot = tile * 32 + i
    ring = slot - SINK
    after = begin + spans * SPAN
    position = tl.where(ring < 0, begin + ring, after + (ring - after % RING + RING) % RING)
    column = position - base
    seen = held & (slot < SINK + RING) & (position < first) & (column >= 0) & (column < columns)
    if MASKED:
        seen = seen & (tl.load(MASK + column, mask=seen, other=0) != 0)
    rows = slot[:, None] * D + i[None, :]
    within = (slot < SINK + RING)[:, None]
    q = ()
    k = ()
    v = ()
    for j in tl.static_range(DQ):
        q = q + (tl.load(Q + g[None, :] * q_head + (j * 32 + i)[:, None], mask=(g < G)[None, :], other=0.0),)
        k = k + (tl.load(EXACT_K + rows + j * 32, mask=within, other=0.0),)
        v = v + (tl.load(EXACT_V + rows + j * 32, mask=within, other=0.0),)
    x = tl.zeros([32, N], tl.float32)
    for j in tl.static_range(DQ):
        x = tl.dot(k[j], q[j], x, input_precision="ieee" if IEEE else "tf32")
    x = tl.where(seen[:, None], x * qscale, HIDDEN)
    top = tl.maximum(tl.max(x, 0), EMPTY)
    total = tl.exp2(x - top[None, :])
    acc = ()
    for j in tl.static_range(DQ):
        if IEEE:
            acc = acc + (tl.dot(tl.trans(v[j]), total, input_precision="ieee"),)
        else:  # the weights keep eleven bits, which bfloat16 would not
            acc = acc + (tl.dot(tl.trans(v[j].to(tl.float16)), total.to(tl.float16)),)
    return top, total, acc


@triton.jit
def token_of(row):
    """The token of a page's half, or the dim, that row 0..31 stands for in what goes to :func:`turn_tiles`."""
    return (row & 16) | ((row & 6) << 1) | ((row & 8) >> 2) | (row & 1)


@triton.jit
def turn_tiles(p, TWIN: constexpr):
    """A product's result from where it lies to where the next product takes it, without shared memory.

    A product leaves a thread two heads of a token (or dim), the next takes four tokens of one head. Each tile of 8 x 8
    is transposed among the threads by one instruction, and rows are in the order of :func:`token_of`, so that what a
    thread then holds of its tiles are neighbouring tokens.

    Shapes: float16[32, 8], rows as :func:`token_of` -> float16[32, 8], rows in order.
    """
    if TWIN:
        p = tl.reshape(tl.permute(tl.reshape(p, (4, 8, 8)), (0, 2, 1)), (32, 8))
    else:
        p = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], dtype=tl.float16, is_pure=True, pack=2
        )
    return tl.reshape(tl.permute(tl.reshape(p, (2, 2, 8, 4, 2)), (0, 3, 1, 4, 2)), (32, 8))


@triton.jit
def across(x, DQ: constexpr):
    """Sylvester's matrix of ``DQ`` times a head's groups of 32 dims, by butterflies."""
    LEVELS: constexpr = tl.constexpr(DQ.bit_length() - 1)
    for level in tl.static_range(LEVELS):
        out = ()
        for j in tl.static_range(DQ):
            if j & (1 << level):
                out = out + (x[j ^ (1 << level)] - x[j],)
            else:
                out = out + (x[j] + x[j ^ (1 << level)],)
        x = out
    return x


@triton.jit
def groups(x, DQ: constexpr):
    """Shapes: [M, N, DQ] -> DQ times [M, N]."""
    if DQ == 2:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], DQ // 2, 2)))
        even, odd = groups(even, DQ // 2), groups(odd, DQ // 2)
        out = ()
        for j in tl.static_range(DQ // 2):
            out = out + (even[j], odd[j])
        return out


@triton.jit
def turned_queries(
    Q, SCALE, SIGNS, SYLVESTER, factor, q_head,
    G: constexpr, D: constexpr, N: constexpr, TWIN: constexpr,
):  # fmt: skip
    """The query heads of one kv head in the keys' frame, as the smaller operand of products.

    A product turns them, which also keeps them where the next ones take them: what comes from memory the compiler would
    move there anew for every page.

    Shapes: ``Q`` [G, D], ``SCALE`` float32[D] -> D / 32 times float16[32, N].
    """
    DQ: constexpr = D // 32
    i = tl.arange(0, 32)
    g = tl.arange(0, N)
    # all groups of 32 dims by one load: several would each wait for memory and for the one before
    d = i[:, None, None] + tl.arange(0, DQ)[None, None, :] * 32
    q = tl.load(Q + g[None, :, None] * q_head + d, mask=(g < G)[None, :, None], other=0.0)
    # the logits' factor first: nothing that is ever float16 exceeds what the turned queries are
    scale = tl.load(SCALE + d) * tl.load(SIGNS + d) * (factor * 4 * D**-0.5)
    x = groups(q.to(tl.float32) * scale, DQ)
    inner = tl.load(SYLVESTER + token_of(i)[:, None] * 32 + i[None, :])
    x = across(x, DQ)
    out = ()
    for j in tl.static_range(DQ):
        high = x[j].to(tl.float16)  # float16 and what it leaves: the turn itself loses nothing
        rest = (x[j] - high.to(tl.float32)).to(tl.float16)
        out = out + (turn_tiles(tl.dot(inner, rest, tl.dot(inner, high)).to(tl.float16), TWIN),)
    return out


@triton.jit
def anchor_products(
    q, ANCHORS, STEPS, BIAS, page, end, NS,
    D: constexpr, N: constexpr, SPAN: constexpr, ROLLING: constexpr, TWIN: constexpr,
):  # fmt: skip
    """Products of turned queries with the anchors of the spans of some pages, for this program to read.

    Other programs write the same to the spans that they share. Shapes: ``ANCHORS`` int8[NS, D], ``STEPS``
    bfloat16[NS, 2] -> ``BIAS`` float32[NS, N].
    """
    PER_SPAN: constexpr = SPAN // 64
    DQ: constexpr = D // 32
    i = tl.arange(0, 32)
    g = tl.arange(0, N)
    for at in tl.range(page // PER_SPAN, (end + PER_SPAN - 1) // PER_SPAN, 16, num_stages=1):
        s = at + tl.arange(0, 16)
        within = s < (end + PER_SPAN - 1) // PER_SPAN
        if ROLLING:
            s = s % NS
        steps = tl.load(STEPS + s * 2, mask=within, other=0.0).to(tl.float32)
        d = i[None, :, None] + tl.arange(0, DQ)[None, None, :] * 32
        anchors = groups(tl.load(ANCHORS + s[:, None, None] * D + d, mask=within[:, None, None], other=0), DQ)
        bias = tl.zeros([16, N], tl.float32)
        for j in tl.static_range(DQ):
            bias = tl.dot(integers(anchors[j], TWIN), q[j], bias)
        tl.store(BIAS + s[:, None] * N + g[None, :], bias * steps[:, None], mask=within[:, None])
    tl.debug_barrier()


@triton.jit
def pages(
    q, top, total, acc, BYTES, WORDS, LEVELS, TABLE, BIAS, MASK, page, end, low, stop, begin, base, NP,
    D: constexpr, N: constexpr, KB: constexpr, VB: constexpr, KSTEP: constexpr, RATIO: constexpr, SPAN: constexpr,
    TWIN: constexpr, ROLLING: constexpr, MASKED: constexpr, KEPT: constexpr, STAGES: constexpr,
):  # fmt: skip
    """A run of coded pages of one tier, folded into a softmax; values in units of their step over ``RATIO``."""
    DQ: constexpr = D // 32
    KBYTES: constexpr = 8 * KB * D
    VBYTES: constexpr = 8 * VB * D
    PER_SPAN: constexpr = SPAN // 64
    dim = tl.arange(0, 32)
    i = token_of(dim)
    g = tl.arange(0, N)
    if page < end:
        slot = page
        if ROLLING:
            slot = page % NP
        unit = tl.load(TABLE + slot)
        if not KEPT:
            bias = tl.load(BIAS + slot // PER_SPAN * N + g)
        for t in tl.range(page, end, num_stages=STAGES):
            # what the next page needs is fetched one page ahead: its address must not wait for memory
            ahead = tl.minimum(t + 1, end - 1)
            if ROLLING:
                ahead = ahead % NP
            unit_ahead = tl.load(TABLE + ahead)
            if not KEPT:
                bias_ahead = tl.load(BIAS + ahead // PER_SPAN * N + g)
            at = BYTES + unit.to(tl.int64) * 64
            word = WORDS + unit.to(tl.int64) * 16
            if MASKED and not KEPT:
                token = t * 64 + i
                shown0 = tl.load(MASK + token, mask=(token >= low) & (token < stop), other=0)
                token += 32
                shown1 = tl.load(MASK + token, mask=(token >= low) & (token < stop), other=0)
            k = planes(at, word, LEVELS, i, KB, 2 * DQ, TWIN)
            meta = word + (KBYTES + VBYTES) // 4
            x = ()
            weights = ()
            for half in tl.static_range(2):
                both = tl.load(meta + half * 32 + i)
                logits = tl.zeros([32, N], tl.float32)
                for j in tl.static_range(DQ):
                    logits = tl.dot(k[half * DQ + j], q[j], logits)
                if KEPT:  # any tokens in any order: each says where it stood, and so which anchor is its own
                    token = tl.load(meta + 64 + half * 32 + i) - begin
                    seen = (token >= low) & (token < stop)  # an empty slot has a negative position
                    stood = tl.where(seen, token, 0).to(tl.uint32)  # unsigned: its quotient is a shift
                    if MASKED:
                        seen = seen & (gather_byte(MASK + tl.where(seen, token, base - begin), TWIN) != 0)
                    own = gather(BIAS + (stood // SPAN * N)[:, None] + g[None, :], TWIN).to(tl.float32, bitcast=True)
                else:
                    own = bias[None, :]
                    if MASKED:
                        seen = (shown1 if half else shown0) != 0
                logits = logits * (low_half(both) * KSTEP)[:, None] + own
                if KEPT or MASKED:
                    logits = tl.where(seen[:, None], logits, HIDDEN)
                x = x + (logits,)
                if RATIO == 1.0:
                    weights = weights + (high_half(both),)
                else:
                    weights = weights + (high_half(both) * RATIO,)
            if not KEPT and not MASKED:
                if (t * 64 < low) | (t * 64 + 64 > stop):  # only the first and the last page are seen in part
                    token = t * 64 + i
                    x0 = tl.where(((token >= low) & (token < stop))[:, None], x[0], HIDDEN)
                    x1 = tl.where(((token + 32 >= low) & (token + 32 < stop))[:, None], x[1], HIDDEN)
                    x = (x0, x1)
            new = tl.maximum(top, tl.max(tl.maximum(x[0], x[1]), 0))
            shrink = tl.exp2(top - new)
            top = new
            x0 = tl.exp2(x[0] - new[None, :])
            x1 = tl.exp2(x[1] - new[None, :])
            total = total * shrink[None, :] + (x0 + x1)
            p0 = turn_tiles((x0 * weights[0][:, None]).to(tl.float16), TWIN)
            p1 = turn_tiles((x1 * weights[1][:, None]).to(tl.float16), TWIN)
            v = planes(at + KBYTES, word + KBYTES // 4, LEVELS, dim, VB, 2 * DQ, TWIN)
            grown = ()
            for j in tl.static_range(DQ):
                grown = grown + (tl.dot(v[DQ + j], p1, tl.dot(v[j], p0, acc[j] * shrink[None, :])),)
            acc = grown
            unit = unit_ahead
            if not KEPT:
                bias = bias_ahead
    return top, total, acc


@triton.jit
def pages_done(work, offset, count, weight):
    """The page at which ``work`` weights are done, among ``count`` pages that follow ``offset`` weights before them."""
    return tl.minimum(tl.maximum((work - offset + weight - 1) // weight, 0), count)


@triton.jit
def coded_part(
    q, ANCHORS, STEPS, BYTES, WORDS, LEVELS, TABLE, HELD, BIAS, MASK,
    part, parts, begin, spans, first, base, columns, NS, NP,
    D: constexpr, N: constexpr, KBITS: constexpr, VBITS: constexpr, KSTEPS: constexpr, VSTEPS: constexpr,
    WEIGHTS: constexpr, SPAN: constexpr, TWIN: constexpr, ROLLING: constexpr, MASKED: constexpr, KEPT: constexpr,
    STAGES: constexpr,
):  # fmt: skip
    """One of ``parts`` equal parts of a row's coded pages."""
    DQ: constexpr = D // 32
    top = tl.full([N], EMPTY, tl.float32)
    total = tl.zeros([32, N], tl.float32)
    acc = ()
    for _ in tl.static_range(DQ):
        acc = acc + (tl.zeros([32, N], tl.float32),)
    low, stop = coded_range(begin, spans, first, base, NS, SPAN)
    if MASKED:  # from here on it is a mask of tokens, from span 0 on
        MASK += begin - base
        stop = tl.maximum(low, tl.minimum(stop, columns + base - begin))
    if KEPT:  # pages by tier, the narrowest first, so that a new span's follow all others
        NT: constexpr = len(KBITS)
        work = 0
        for t in tl.static_range(NT):
            work += tl.load(HELD + NT - 1 - t) * WEIGHTS[t]
        mine = (work.to(tl.int64) * part // parts).to(tl.int32)
        after = (work.to(tl.int64) * (part + 1) // parts).to(tl.int32)
        offset = 0
        slot = 0
        for t in tl.static_range(NT):
            count = tl.load(HELD + NT - 1 - t)
            top, total, acc = pages(
                q, top, total, acc, BYTES, WORDS, LEVELS, TABLE, BIAS, MASK,
                slot + pages_done(mine, offset, count, WEIGHTS[t]), slot + pages_done(after, offset, count, WEIGHTS[t]),
                low, stop, begin, base, NP, D, N, KBITS[t], VBITS[t], KSTEPS[t], VSTEPS[t] / VSTEPS[0], SPAN,
                TWIN, ROLLING, MASKED, KEPT, STAGES,
            )  # fmt: skip
            offset += count * WEIGHTS[t]
            slot += count
    else:
        begin_page = low // 64
        end_page = (stop + 63) // 64
        each = (end_page - begin_page + parts - 1) // parts
        page = begin_page + part * each
        end = tl.minimum(page + each, end_page)
        anchor_products(q, ANCHORS, STEPS, BIAS, page, end, NS, D, N, SPAN, ROLLING, TWIN)
        top, total, acc = pages(
            q, top, total, acc, BYTES, WORDS, LEVELS, TABLE, BIAS, MASK, page, end,
            low, stop, begin, base, NP, D, N, KBITS[0], VBITS[0], KSTEPS[0], 1.0, SPAN,
            TWIN, ROLLING, MASKED, KEPT, STAGES,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def decode(
    Q, SCALE, SIGNS, SYLVESTER, ANCHORS, STEPS, BYTES, WORDS, LEVELS, TABLE, HELD, BIAS, MASK, ROWS, POS,
    EXACT_K, EXACT_V, OUT, LSE,
    start, columns, qscale, q_row, q_head, mask_row, H, NS, NP, PROGRAMS, ROWS_HEADS,
    G: constexpr, D: constexpr, N: constexpr, KBITS: constexpr, VBITS: constexpr, KSTEPS: constexpr, VSTEPS: constexpr,
    WEIGHTS: constexpr, TWIN: constexpr, ALL: constexpr,
    SPAN: constexpr, SINK: constexpr, RING: constexpr, EXACT: constexpr,
    HAS_POS: constexpr, HAS_START: constexpr, ROLLING: constexpr, MASKED: constexpr, LISTED: constexpr,
    KEPT: constexpr, STAGES: constexpr, IEEE: constexpr, PDL: constexpr,
):  # fmt: skip
    """One part of one row and kv head: a run of coded pages, or exact tokens.

    Grid: (PROGRAMS + B * H * EXACT,). Shapes: ``SYLVESTER`` float16[32, 32], a quarter of Sylvester's matrix, ``TABLE``
    int32[B, H, NP], ``EXACT_K`` / ``EXACT_V`` [B, H, SINK + RING, D] -> ``OUT`` float16[grid, N, D], normalised and
    turned back but for the signs, which exact parts are given; ``LSE`` float32[grid, N].
    """
    if PDL:
        gdc_launch_dependents()
    # coded parts first: they are long, and the first to be placed are spread evenly over the device
    program = tl.program_id(0)
    coded = program < PROGRAMS
    if coded:
        if LISTED:
            firsts = first_programs(ROWS, HELD, H, NP, PROGRAMS, ROWS_HEADS, SPAN, WEIGHTS, ALL, KEPT)
            before = firsts <= program
            bh = tl.sum(before.to(tl.int32), 0) - 1
            part = program - tl.max(tl.where(before, firsts, 0), 0)
            parts = part + tl.min(tl.where(before, PROGRAMS, firsts), 0) - program
        else:
            parts = PROGRAMS // ROWS_HEADS
            bh = program // parts
            part = program % parts
    else:
        bh = (program - PROGRAMS) // EXACT
        part = (program - PROGRAMS) % EXACT
        parts = EXACT
    b = bh // H
    DQ: constexpr = D // 32
    i = tl.arange(0, 32)
    g = tl.arange(0, N)
    at = program * N + g
    query = Q + b * q_row + bh % H * G * q_head
    mask = MASK + b.to(tl.int64) * mask_row
    begin, spans, first, base, held = place(ROWS, POS, b, start, HAS_POS, HAS_START, ROLLING, SINK)
    if coded:
        NT: constexpr = len(KBITS)
        turned = turned_queries(query, SCALE + bh * D, SIGNS, SYLVESTER, qscale, q_head, G, D, N, TWIN)
        own = bh.to(tl.int64) * NS
        top, total, acc = coded_part(
            turned, ANCHORS + own * D, STEPS + own * 2, BYTES, WORDS, LEVELS, TABLE + bh * NP, HELD + bh * NT,
            BIAS + own * N, mask, part, parts, begin, spans, first, base, columns, NS, NP, D, N,
            KBITS, VBITS, KSTEPS, VSTEPS, WEIGHTS, SPAN, TWIN, ROLLING, MASKED, KEPT, STAGES,
        )  # fmt: skip
        weight = tl.maximum(tl.sum(total, 0), 1e-30)
        tl.store(LSE + at, top + tl.log2(weight))  # here already, or the maximum takes registers while parts are turned
        normal = ()
        for j in tl.static_range(DQ):
            normal = normal + (acc[j] * (VSTEPS[0] * 4 * D**-0.5 / weight)[None, :],)
        normal = across(normal, DQ)
        # the sum's rows are in order, and turn_tiles puts them in another. That rows of the matrix are taken so too
        # makes up for it: token_of moves bits, and an entry is the parity of the bits that row and column share.
        inner = tl.load(SYLVESTER + token_of(i)[:, None] * 32 + i[None, :])
        acc = ()
        for j in tl.static_range(DQ):
            acc = acc + (tl.dot(inner, turn_tiles(normal[j].to(tl.float16), TWIN)),)
    else:
        slots = bh.to(tl.int64) * ((SINK + RING) * D)
        top, total, acc = exact_part(
            query, mask, EXACT_K + slots, EXACT_V + slots,
            part, begin, spans, first, base, held, columns, qscale, q_head, G, D, N, SPAN, SINK, RING, MASKED, IEEE,
        )  # fmt: skip
        weight = tl.maximum(tl.sum(total, 0), 1e-30)
        tl.store(LSE + at, top + tl.log2(weight))
        normal = ()
        for j in tl.static_range(DQ):
            normal = normal + (acc[j] * (1.0 / weight)[None, :] * tl.load(SIGNS + j * 32 + i)[:, None],)
        acc = normal
    for j in tl.static_range(DQ):
        tl.store(OUT + at[None, :] * D + (j * 32 + i)[:, None], acc[j].to(tl.float16))


@triton.jit
def combine(
    PARTIAL, LSE, HELD, Q, K, V, SIGNS, ROWS, POS, MASK, OUT,
    start, columns, qscale, q_row, q_head, k_row, k_head, v_row, v_head, mask_row, H, NP, PROGRAMS, ROWS_HEADS,
    G: constexpr, D: constexpr, N: constexpr, SPAN: constexpr, SINK: constexpr, EXACT: constexpr, BLOCK: constexpr,
    WEIGHTS: constexpr, ALL: constexpr, KEPT: constexpr,
    HAS_POS: constexpr, HAS_START: constexpr, ROLLING: constexpr, MASKED: constexpr, LISTED: constexpr, PDL: constexpr,
):  # fmt: skip
    """Parts and the new token into 32 dims of the output of one query head.

    Grid: (D / 32 * G, B * H), a warp for 64 parts, which are all asked for at once.
    Shapes: ``K`` / ``V`` [B, H, 1, D] -> ``OUT`` [B, H * G, 1, D], contiguous.
    """
    if PDL:
        gdc_launch_dependents()
    g = tl.program_id(0) // (D // 32)
    d = tl.program_id(0) % (D // 32) * 32 + tl.arange(0, 32)
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    all_dims = tl.arange(0, D)
    begin, _, first, base, _ = place(ROWS, POS, b, start, HAS_POS, HAS_START, ROLLING, SINK)
    q = tl.load(Q + b * q_row + (h * G + g) * q_head + all_dims).to(tl.float32)
    k = tl.load(K + b * k_row + h * k_head + all_dims).to(tl.float32)
    signs = tl.load(SIGNS + d)
    own = tl.sum(q * k, 0) * qscale
    if MASKED:
        own = tl.where(tl.load(MASK + b.to(tl.int64) * mask_row + first - base) != 0, own, HIDDEN)
    top = tl.maximum(own, EMPTY)
    weight = tl.exp2(own - top)
    out = weight * (tl.load(V + b * v_row + h * v_head + d).to(tl.float32) * signs)
    fault = (tl.load(ROWS + b * WIDTH + FROZEN) == FAULT) & (first > begin - SINK)  # unless it begins anew
    if LISTED:
        firsts = first_programs(ROWS, HELD, H, NP, PROGRAMS, ROWS_HEADS, SPAN, WEIGHTS, ALL, KEPT)
        after = tl.arange(0, ALL) > bh
        program = tl.max(tl.where(after, 0, firsts), 0)
        parts = tl.min(tl.where(after, firsts, PROGRAMS), 0) - program
    else:
        parts = PROGRAMS // ROWS_HEADS
        program = bh * parts
    tail = PROGRAMS + bh * EXACT - parts
    if PDL:  # what was read until here, decode does not write; and it began when all before it had ended
        gdc_wait()
    for begins in tl.range(0, parts + EXACT, BLOCK):  # once, but for a row that has most of the tokens
        i = begins + tl.arange(0, BLOCK)
        at = (tl.where(i < parts, program, tail) + i) * N + g
        lse = tl.load(LSE + at, mask=i < parts + EXACT, other=HIDDEN)
        part = tl.load(PARTIAL + at[:, None] * D + d[None, :], mask=(i < parts + EXACT)[:, None], other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        shrink = tl.exp2(top - new)
        scale = tl.exp2(lse - new)
        top = new
        weight = weight * shrink + tl.sum(scale, 0)
        out = out * shrink + tl.sum(scale[:, None] * part.to(tl.float32), 0)
    out = tl.where(fault, float("nan"), out * signs / tl.maximum(weight, 1e-30))
    tl.store(OUT + (bh * G + g) * D + d, out.to(OUT.dtype.element_ty))
