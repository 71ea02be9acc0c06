"""Attention that coded tokens got, and what is remembered of it: :mod:`sphkv_compile.ops.statistics`, on a GPU.

A program has one page and decodes its keys once, for all queries. The first launch gives each page's share of every
query's softmax, the second, which knows the whole, sums the weights; another one moves what is remembered.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import constexpr

from sphkv_compile.kernels.gpu import words
from sphkv_compile.kernels.gpu.decode import EMPTY, HIDDEN, START, WIDTH, high_half, low_half
from sphkv_compile.kernels.gpu.launch import converts
from sphkv_compile.kernels.gpu.prefill import tile
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import State

ROWS = 64
"""Query rows that one product takes: as many as four warps of Hopper share."""


def mean_attention(
    state: State, layout: Layout, turned: Tensor, exact: Tensor, at: Tensor, parts: tuple[int, ...]
) -> list[Tensor]:
    """The kernels' part of :func:`sphkv_compile.ops.statistics.mean_attention`.

    Args:
        at: positions of the queries, whose R = G * T rows are head by head.
        parts: one or two.

    Shapes: ``turned`` float32[B, H, R, D]; ``exact`` float32[B, H, R], the log-sum-exp of what is exact, in units of
    log 2; ``at`` int64[T] -> float32[B, H, P, 64] for each part.
    """
    b, h, r, d = turned.shape
    pages, device = state.table.shape[2], turned.device
    used = int(state.held.sum(-1).max())  # the host plans; no step waits for it
    out = [torch.zeros(b, h, pages, 64, dtype=torch.float32, device=device) for _ in parts]
    if not used:
        return out
    queries = turned.half()
    lse = torch.empty(used, b, h, r, dtype=torch.float32, device=device)
    flags = {
        "D": d, "KBITS": tuple(tier.k_bits for tier in layout.tiers),
        "BESIDE": code_words(layout, d),
        "KSTEPS": tuple(words.step(tier.k_bits) for tier in layout.tiers),
        "SPAN": layout.span, "SINK": layout.sink, "ROWS": ROWS,
        "TALL": triton.next_power_of_2(len(at)), "TWO": len(parts) == 2, "TWIN": not converts(device),
        "num_warps": 4,
    }  # fmt: skip
    for whole in (False, True):
        page_attention[(used, b * h)](
            queries, state.anchors, state.span_scales, exact, state.arena.view(torch.int32), words.level_table(device),
            state.table, state.tiers, state.held, state.rows, lse, out[0], out[-1], at.int(),
            len(at), parts[0], r, h, state.anchors.shape[2], pages, SUMS=whole, **flags,
        )  # fmt: skip
        if not whole:
            exact = torch.logaddexp2(exact, torch.logsumexp(lse * math.log(2), 0) / math.log(2))
    return out


def code_words(layout: Layout, d: int) -> tuple[int, ...]:
    """Of a page of each tier, the words that are codes: what is beside them lies behind. Units: 4 bytes."""
    return tuple(2 * (tier.k_bits + tier.v_bits) * d for tier in layout.tiers)


def remember(
    state: State, layout: Layout, new: Tensor, first: int, end: int, half_life: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel's part of :func:`sphkv_compile.ops.statistics.observe`: statistics in the pages move by what queries
    of ``first``..``end`` paid.

    Shapes: ``new`` float32[B, H, P, 64] -> positions, fresh, mean, recent, and lengths of values, each the same.
    """
    b, h, pages, page = new.shape
    positions = torch.empty(new.shape, dtype=torch.int32, device=new.device)
    fresh = torch.empty(new.shape, dtype=torch.bool, device=new.device)
    mean, recent, lengths = (torch.empty_like(new) for _ in range(3))
    d, v_dim = state.exact_k.shape[-1], state.exact_v.shape[-1]
    page_statistics[(pages, b * h)](
        new, state.arena.view(torch.int32), state.table, state.tiers, state.held,
        positions, fresh.view(torch.uint8), mean, recent, lengths, first, end, pages, v_dim**0.5,
        BESIDE=code_words(layout, d), HALF_LIFE=half_life, num_warps=2,
    )  # fmt: skip
    return positions, fresh, mean, recent, lengths


@triton.jit
def page_keys(
    WORDS, LEVELS, unit, tier,
    D: constexpr, KBITS: constexpr, BESIDE: constexpr, KSTEPS: constexpr, TWIN: constexpr,
):  # fmt: skip
    """Keys of a page, in units of their radius, then radii and positions. Shapes: -> float16[64, D], float32[64],
    int32[64]."""
    at = WORDS + unit.to(tl.int64) * 16
    i = tl.arange(0, 64)
    keys = tl.zeros([64, D], tl.float16)
    beside = 0
    step = 0.0
    for t in tl.static_range(len(KBITS)):
        if tier == t:
            keys = tile(at, LEVELS, KBITS[t], D, False, TWIN)
            beside = BESIDE[t]
            step = KSTEPS[t]
    radius = low_half(tl.load(at + beside + i)) * step
    return keys, radius, tl.load(at + beside + 64 + i)


@triton.jit
def page_attention(
    TURNED, ANCHORS, STEPS, WHOLE, WORDS, LEVELS, TABLE, TIERS, HELD, COUNTERS, LSE, OUT, OTHER, AT,
    T, FIRST, R, H, NS, NP,
    D: constexpr, KBITS: constexpr, BESIDE: constexpr, KSTEPS: constexpr, SPAN: constexpr, SINK: constexpr,
    ROWS: constexpr, TALL: constexpr, TWO: constexpr, TWIN: constexpr, SUMS: constexpr,
):  # fmt: skip
    """Each query's log-sum-exp over one page, or the page's mean weights under the queries' whole one: those of the
    ``FIRST`` of the T queries, and those of the others.

    Grid: (pages, B * H). Shapes: ``TURNED`` float16[B * H, R, D], ``ANCHORS`` int8[B * H, N, D], ``STEPS`` bfloat16[B *
    H, N, 2], ``WHOLE`` float32[B * H, R], ``AT`` int32[T], of which ``TALL`` is a power of two not below -> ``LSE``
    float32[pages, B * H, R]; ``OUT`` and ``OTHER`` float32[B * H, NP, 64].
    """
    TIERCOUNT: constexpr = len(KBITS)
    page = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    used = 0
    for t in tl.static_range(TIERCOUNT):
        used += tl.load(HELD + bh * TIERCOUNT + t)
    d = tl.arange(0, D)
    i = tl.arange(0, 64)
    j = tl.arange(0, ROWS)
    lse = LSE + (page.to(tl.int64) * tl.num_programs(1) + bh) * R
    if page < used:
        unit = tl.load(TABLE + bh * NP + page)
        tier = tl.load(TIERS + bh * NP + page).to(tl.int32)
        keys, radius, position = page_keys(WORDS, LEVELS, unit, tier, D, KBITS, BESIDE, KSTEPS, TWIN)
        begin = tl.load(COUNTERS + bh // H * WIDTH + START).to(tl.int32) + SINK
        own = bh * NS + tl.maximum(position - begin, 0) // SPAN
        anchors = tl.load(ANCHORS + own[:, None] * D + d[None, :]).to(tl.float32)
        keys = keys.to(tl.float32) * radius[:, None] + anchors * tl.load(STEPS + own * 2).to(tl.float32)[:, None]
        keys = keys.to(tl.float16)
        early, late = tl.zeros([ROWS, 64], tl.float32), tl.zeros([ROWS, 64], tl.float32)
        for at in tl.range(0, R, ROWS, num_stages=1):
            row = at + j
            inside = row < R
            q = tl.load(TURNED + (bh * R + row)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            x = tl.dot(q, tl.trans(keys))
            seen = (position >= 0)[None, :] & (position[None, :] <= tl.load(AT + row % T)[:, None]) & inside[:, None]
            x = tl.where(seen, x, HIDDEN)
            if SUMS:
                paid = tl.exp2(x - tl.load(WHOLE + bh * R + row, mask=inside, other=0.0)[:, None])
                if TWO:
                    first = (row % T < FIRST)[:, None]
                    late += tl.where(first, 0.0, paid)
                    paid = tl.where(first, paid, 0.0)
                early += paid
            else:
                top = tl.maximum(tl.max(x, 1), EMPTY)
                tl.store(lse + row, top + tl.log2(tl.maximum(tl.sum(tl.exp2(x - top[:, None]), 1), 1e-30)), mask=inside)
        if SUMS:
            out = (bh * NP + page) * 64 + i
            query = tl.arange(0, TALL)
            sees = tl.load(AT + query, mask=query < T, other=-2)[:, None] >= position[None, :]
            looks = tl.sum((sees & (query < FIRST)[:, None]).to(tl.int32), 0) * (R // T)
            tl.store(OUT + out, tl.sum(early, 0) / tl.maximum(looks, 1).to(tl.float32))
            if TWO:
                looks = tl.sum((sees & (query >= FIRST)[:, None]).to(tl.int32), 0) * (R // T)
                tl.store(OTHER + out, tl.sum(late, 0) / tl.maximum(looks, 1).to(tl.float32))
    else:
        if not SUMS:
            for at in tl.range(0, R, ROWS, num_stages=1):
                tl.store(lse + at + j, tl.full([ROWS], EMPTY, tl.float32), mask=at + j < R)


@triton.jit(do_not_specialize=["first", "end"])
def page_statistics(
    NEW, WORDS, TABLE, TIERS, HELD, POSITIONS, FRESH, MEAN, RECENT, LENGTHS, first, end, NP, root,
    BESIDE: constexpr, HALF_LIFE: constexpr,
):  # fmt: skip
    """A page's statistics, and what else a policy asks. Grid: (places of the table, B * H). ``root`` is that of a
    value's dimensions. Shapes: all [B * H, NP, 64]."""
    page = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    used = 0
    for t in tl.static_range(len(BESIDE)):
        used += tl.load(HELD + bh * len(BESIDE) + t)
    i = tl.arange(0, 64)
    out = (bh * NP + page) * 64 + i
    if page < used:
        tier = tl.load(TIERS + bh * NP + page).to(tl.int32)
        beside = 0
        for t in tl.static_range(len(BESIDE)):
            beside = tl.where(tier == t, BESIDE[t], beside)
        at = WORDS + tl.load(TABLE + bh * NP + page).to(tl.int64) * 16 + beside + i
        position = tl.load(at + 64)
        both = tl.load(at + 128)
        mean, recent = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
        new = tl.load(NEW + out)
        looks = tl.maximum(end - tl.maximum(position, first), 0).to(tl.float32)
        life = tl.maximum(end - position, 1).to(tl.float32)
        fresh, kept = recent == 0, tl.exp2(-looks / HALF_LIFE)
        mean = tl.where(fresh, new, mean + (new - mean) * looks / life)
        recent = tl.where(fresh, new, recent * kept + new * (1 - kept))
        tl.store(at + 128, brain(mean) | (brain(recent) << 16))
        tl.store(POSITIONS + out, position)
        tl.store(FRESH + out, (fresh & (position >= 0)).to(tl.uint8))
        tl.store(MEAN + out, mean)
        tl.store(RECENT + out, recent)
        tl.store(LENGTHS + out, high_half(tl.load(at)) * root)
    else:
        tl.store(POSITIONS + out, tl.full([64], -1, tl.int32))
        tl.store(FRESH + out, tl.zeros([64], tl.uint8))
        tl.store(MEAN + out, tl.zeros([64], tl.float32))
        tl.store(RECENT + out, tl.zeros([64], tl.float32))
        tl.store(LENGTHS + out, tl.zeros([64], tl.float32))


@triton.jit
def brain(x):
    """The bits of the nearest bfloat16, in the lower half; written out, since the interpreter does not round."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
