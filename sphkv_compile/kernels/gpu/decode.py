"""One decode step over tiled pages: prepare, decode in parts, combine.

``prepare`` turns the queries into the keys' frame and takes their product with every span's anchor. ``decode`` reads
the codes once: codes are the larger operand of every product, the query heads of one kv head the smaller, and no
decoded value goes through memory. A row is cut into parts at run time, from the counters on the device, so a captured
graph stays right while the cache grows. ``combine`` merges the parts and the new token by their log-sum-exp and turns
the sum back.

All logits are in units of log 2: ``exp2`` is the native instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.core import constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sphkv_compile.kernels.gpu.words import planes
from sphkv_compile.storage import state

LOG2E = 1.4426950408889634
HEADS = 8
"""Query heads of a kv head that one product holds; fewer are padded."""

# A hidden logit lies below the running maximum's start: its weight is zero even where nothing else was seen.
EMPTY = constexpr(-1e29)
HIDDEN = constexpr(-1e30)
FAULT = constexpr(state.FAULT)
WIDTH = constexpr(5)  # of a row of counters
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
def prepare(
    Q, SCALE, SIGNS, ANCHORS, STEPS, ROWS, POS, MASK, TURNED, BIAS, SEEN,
    start, columns, qscale, q_row, q_head, mask_row, H, NS, NP,
    G: constexpr, D: constexpr, N: constexpr, SPAN: constexpr, SINK: constexpr,
    HAS_POS: constexpr, HAS_START: constexpr, ROLLING: constexpr, MASKED: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """q' = H(s q), its products with anchors, and a bit per coded token that the mask shows.

    Grid: (ceil(spans / CHUNK), B * H). Shapes: ``Q`` [B, H * G, 1, D], ``SCALE`` float32[B, H, D], ``SIGNS``
    float32[D], ``ANCHORS`` int8[B, H, NS, D], ``STEPS`` bfloat16[B, H, NS, 2], ``MASK`` uint8[B or 1, 1, 1, columns] ->
    ``TURNED`` float16[B * H, N, D], ``BIAS`` float32[B * H, NS, N], ``SEEN`` int32[B, NP, 2].
    """
    chunk = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    begin, spans, first, base, held = place(ROWS, POS, b, start, HAS_POS, HAS_START, ROLLING, SINK)
    if (chunk == 0) | (chunk * CHUNK < spans):
        d = tl.arange(0, D)
        g = tl.arange(0, N)
        q = tl.load(Q + b * q_row + (h * G + g)[:, None] * q_head + d[None, :], mask=(g < G)[:, None], other=0.0)
        x = q.to(tl.float32) * (tl.load(SCALE + bh * D + d) * tl.load(SIGNS + d))[None, :]
        turned = (hadamard(x, N, D) * (qscale * D**-0.5)).to(tl.float16)
        if chunk == 0:
            tl.store(TURNED + (bh * N + g)[:, None] * D + d[None, :], turned)
        s = chunk * CHUNK + tl.arange(0, CHUNK)
        within = s < NS
        anchors = tl.load(ANCHORS + (bh * NS + s)[:, None].to(tl.int64) * D + d[None, :], mask=within[:, None], other=0)
        steps = tl.load(STEPS + (bh * NS + s) * 2, mask=within, other=0.0).to(tl.float32)
        bias = tl.dot(anchors.to(tl.float16), tl.trans(turned)) * steps[:, None]
        tl.store(BIAS + (bh * NS + s)[:, None] * N + g[None, :], bias, mask=within[:, None])
        if MASKED:
            if h == 0:
                PAGES: constexpr = CHUNK * SPAN // 64
                low, stop = coded_range(begin, spans, first, base, NS, SPAN)
                word = tl.arange(0, 2 * PAGES)
                bit = tl.arange(0, 32)
                slot = chunk * PAGES + word // 2
                page = slot
                if ROLLING:  # the last page before the end that lies in this slot
                    page = slot + NP * ((stop - 1) // 64 // NP - tl.where(slot > (stop - 1) // 64 % NP, 1, 0))
                token = (page * 64 + word % 2 * 32)[:, None] + bit[None, :]
                column = begin + token - base
                inside = (slot < NP)[:, None] & (token >= low) & (token < stop) & (column >= 0) & (column < columns)
                seen = tl.load(MASK + b * mask_row + column, mask=inside, other=0).to(tl.int32)
                bits = tl.sum(seen << bit[None, :], 1)
                tl.store(SEEN + (b * NP + slot) * 2 + word % 2, bits, mask=slot < NP)


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
def coded_part(
    TURNED, BYTES, WORDS, TABLE, BIAS, SEEN, part, parts, begin, spans, first, base, NS, NP,
    D: constexpr, N: constexpr, KB: constexpr, VB: constexpr, SPAN: constexpr,
    KSTEP: constexpr, KASM: constexpr, VASM: constexpr, KTABLE: constexpr, VTABLE: constexpr,
    ROLLING: constexpr, MASKED: constexpr, STAGES: constexpr,
):  # fmt: skip
    """A run of coded pages; values in units of their width's step."""
    DQ: constexpr = D // 32
    KBYTES: constexpr = 8 * KB * D
    VBYTES: constexpr = 8 * VB * D
    PER_SPAN: constexpr = SPAN // 64
    i = tl.arange(0, 32)
    g = tl.arange(0, N)
    q = ()
    for j in tl.static_range(DQ):
        q = q + (tl.load(TURNED + g[None, :] * D + (j * 32 + i)[:, None]),)
    top = tl.full([N], EMPTY, tl.float32)
    total = tl.zeros([32, N], tl.float32)
    acc = ()
    for _ in tl.static_range(DQ):
        acc = acc + (tl.zeros([32, N], tl.float32),)
    low, stop = coded_range(begin, spans, first, base, NS, SPAN)
    begin_page = low // 64
    end_page = (stop + 63) // 64
    share = (end_page - begin_page + parts - 1) // parts
    page = begin_page + part * share
    end = tl.minimum(page + share, end_page)
    if page < end:
        slot = page
        if ROLLING:
            slot = page % NP
        unit = tl.load(TABLE + slot)
        bias = tl.load(BIAS + slot // PER_SPAN * N + g)
        if MASKED:
            bits0 = tl.load(SEEN + slot * 2)
            bits1 = tl.load(SEEN + slot * 2 + 1)
        for t in tl.range(page, end, num_stages=STAGES):
            # what the next page needs is fetched one page ahead: its address must not wait for memory
            ahead = tl.minimum(t + 1, end - 1)
            if ROLLING:
                ahead = ahead % NP
            unit_ahead = tl.load(TABLE + ahead)
            bias_ahead = tl.load(BIAS + ahead // PER_SPAN * N + g)
            at = BYTES + unit.to(tl.int64) * 64
            word = WORDS + unit.to(tl.int64) * 16
            k = planes(at, word, KB, 2 * DQ, KASM, KTABLE)
            meta = word + (KBYTES + VBYTES) // 4
            meta0 = tl.load(meta + i)
            meta1 = tl.load(meta + 32 + i)
            x0 = tl.zeros([32, N], tl.float32)
            x1 = tl.zeros([32, N], tl.float32)
            for j in tl.static_range(DQ):
                x0 = tl.dot(k[j], q[j], x0)
            for j in tl.static_range(DQ):
                x1 = tl.dot(k[DQ + j], q[j], x1)
            token = t * 64 + i
            if MASKED:
                seen0 = ((bits0 >> i) & 1) == 1
                seen1 = ((bits1 >> i) & 1) == 1
                bits0 = tl.load(SEEN + ahead * 2)
                bits1 = tl.load(SEEN + ahead * 2 + 1)
            else:
                seen0 = (token >= low) & (token < stop)
                seen1 = (token + 32 >= low) & (token + 32 < stop)
            x0 = x0 * (low_half(meta0) * KSTEP)[:, None] + bias[None, :]
            x1 = x1 * (low_half(meta1) * KSTEP)[:, None] + bias[None, :]
            x0 = tl.where(seen0[:, None], x0, HIDDEN)
            x1 = tl.where(seen1[:, None], x1, HIDDEN)
            new = tl.maximum(top, tl.max(tl.maximum(x0, x1), 0))
            shrink = tl.exp2(top - new)
            top = new
            x0 = tl.exp2(x0 - new[None, :])
            x1 = tl.exp2(x1 - new[None, :])
            total = total * shrink[None, :] + (x0 + x1)
            p0 = (x0 * high_half(meta0)[:, None]).to(tl.float16)
            p1 = (x1 * high_half(meta1)[:, None]).to(tl.float16)
            v = planes(at + KBYTES, word + KBYTES // 4, VB, 2 * DQ, VASM, VTABLE)
            grown = ()
            for j in tl.static_range(DQ):
                grown = grown + (tl.dot(v[DQ + j], p1, tl.dot(v[j], p0, acc[j] * shrink[None, :])),)
            acc = grown
            unit = unit_ahead
            bias = bias_ahead
    return top, total, acc


@triton.jit
def decode(
    Q, TURNED, BYTES, WORDS, TABLE, BIAS, SEEN, MASK, ROWS, POS, EXACT_K, EXACT_V, OUT, LSE,
    start, columns, qscale, q_row, q_head, mask_row, H, NS, NP, PARTS, ROWS_HEADS,
    G: constexpr, D: constexpr, N: constexpr, KB: constexpr, VB: constexpr,
    SPAN: constexpr, SINK: constexpr, RING: constexpr, EXACT: constexpr,
    KSTEP: constexpr, VSTEP: constexpr, KASM: constexpr, VASM: constexpr, KTABLE: constexpr, VTABLE: constexpr,
    HAS_POS: constexpr, HAS_START: constexpr, ROLLING: constexpr, MASKED: constexpr, STAGES: constexpr,
    IEEE: constexpr, PDL: constexpr,
):  # fmt: skip
    """One part of one row and kv head: a run of coded pages, or exact tokens.

    Grid: (B * H * (PARTS + EXACT),). Shapes: ``TABLE`` int32[B, H, NP], ``EXACT_K`` / ``EXACT_V`` [B, H, SINK + RING,
    D] -> ``OUT`` float16[B * H, EXACT + PARTS, N, D], normalised, coded parts still turned; ``LSE`` float32[B * H,
    EXACT + PARTS, N].
    """
    if PDL:
        gdc_launch_dependents()
    # coded parts first: they are long, and the first to be placed are spread evenly over the device
    program = tl.program_id(0)
    coded = ROWS_HEADS * PARTS
    if program < coded:
        bh = program // PARTS
        part = program % PARTS
    else:
        bh = (program - coded) // EXACT
        part = PARTS + (program - coded) % EXACT
    b = bh // H
    DQ: constexpr = D // 32
    i = tl.arange(0, 32)
    g = tl.arange(0, N)
    begin, spans, first, base, held = place(ROWS, POS, b, start, HAS_POS, HAS_START, ROLLING, SINK)
    if part < PARTS:
        top, total, acc = coded_part(
            TURNED + bh * N * D, BYTES, WORDS, TABLE + bh * NP, BIAS + bh * NS * N, SEEN + b * NP * 2, part, PARTS,
            begin, spans, first, base, NS, NP, D, N, KB, VB, SPAN, KSTEP, KASM, VASM, KTABLE, VTABLE, ROLLING, MASKED,
            STAGES,
        )  # fmt: skip
    else:
        slots = bh * (SINK + RING) * D
        top, total, acc = exact_part(
            Q + b * q_row + bh % H * G * q_head, MASK + b * mask_row, EXACT_K + slots, EXACT_V + slots, part - PARTS,
            begin, spans, first, base, held, columns, qscale, q_head, G, D, N, SPAN, SINK, RING, MASKED, IEEE,
        )  # fmt: skip
    weight = tl.sum(total, 0)
    inverse = tl.where(part < PARTS, VSTEP, 1.0) / tl.maximum(weight, 1e-30)
    at = (bh * (EXACT + PARTS) + part) * N + g
    for j in tl.static_range(DQ):
        tl.store(OUT + at[None, :] * D + (j * 32 + i)[:, None], (acc[j] * inverse[None, :]).to(tl.float16))
    tl.store(LSE + at, top + tl.log2(tl.maximum(weight, 1e-30)))


@triton.jit
def combine(
    PARTIAL, LSE, Q, K, V, SIGNS, ROWS, POS, MASK, OUT,
    start, columns, qscale, q_row, q_head, k_row, k_head, v_row, v_head, mask_row, H, PARTS,
    G: constexpr, D: constexpr, N: constexpr, SINK: constexpr, EXACT: constexpr, BLOCK: constexpr,
    HAS_POS: constexpr, HAS_START: constexpr, ROLLING: constexpr, MASKED: constexpr, PDL: constexpr,
):  # fmt: skip
    """Parts and the new token into the output of one query head.

    Grid: (G, B * H). Shapes: ``K`` / ``V`` [B, H, 1, D] -> ``OUT`` [B, H * G, 1, D], contiguous.
    """
    g = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    d = tl.arange(0, D)
    p = tl.arange(0, BLOCK)
    _, _, first, base, _ = place(ROWS, POS, b, start, HAS_POS, HAS_START, ROLLING, SINK)
    q = tl.load(Q + b * q_row + (h * G + g) * q_head + d).to(tl.float32)
    k = tl.load(K + b * k_row + h * k_head + d).to(tl.float32)
    v = tl.load(V + b * v_row + h * v_head + d).to(tl.float32)
    own = tl.sum(q * k, 0) * qscale
    if MASKED:
        own = tl.where(tl.load(MASK + b * mask_row + first - base) != 0, own, HIDDEN)
    if PDL:
        gdc_wait()
    at = (bh * (PARTS + EXACT) + p) * N + g
    there = p < PARTS + EXACT
    lse = tl.load(LSE + at, mask=there, other=HIDDEN)
    part = tl.load(PARTIAL + at[:, None] * D + d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    top = tl.maximum(tl.maximum(tl.max(lse, 0), own), EMPTY)
    weight = tl.exp2(lse - top)
    own = tl.exp2(own - top)
    coded = tl.sum(tl.where(p < PARTS, weight, 0.0)[:, None] * part, 0)
    exact = tl.sum(tl.where(p < PARTS, 0.0, weight)[:, None] * part, 0) + own * v
    turned = tl.reshape(hadamard(tl.reshape(coded, (1, D)), 1, D), (D,)) * (D**-0.5) * tl.load(SIGNS + d)
    out = (exact + turned) / tl.maximum(tl.sum(weight, 0) + own, 1e-30)
    out = tl.where(tl.load(ROWS + b * WIDTH + FROZEN) == FAULT, float("nan"), out)
    tl.store(OUT + (bh * G + g) * D + d, out.to(OUT.dtype.element_ty))
