"""The mean attention that coded tokens got: what :mod:`sphkv_compile.ops.statistics` does, on a GPU.

A program has one page and decodes its keys once, for all queries. The first launch gives each page's share of every
query's softmax, the second, which knows the whole, sums the weights.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import constexpr

from sphkv_compile.kernels.gpu import words
from sphkv_compile.kernels.gpu.decode import EMPTY, HIDDEN, START, WIDTH, low_half
from sphkv_compile.kernels.gpu.launch import converts
from sphkv_compile.kernels.gpu.prefill import tile
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import State

ROWS = 64
"""Query rows that one product takes: as many as four warps of Hopper share."""


def mean_attention(
    state: State, layout: Layout, turned: Tensor, bias: Tensor, exact: Tensor, at: Tensor
) -> Tensor:
    """The kernels' part of :func:`sphkv_compile.ops.statistics.mean_attention`.

    Args:
        at: positions of the queries, ascending. Their R = G * T rows are head by head.

    Shapes: ``turned`` float32[B, H, R, D], ``bias`` float32[B, H, R, N], ``exact`` float32[B, H, R], the log-sum-exp of
    what is exact, in units of log 2; ``at`` int64[T] -> float32[B, H, P, 64].
    """
    b, h, r, d = turned.shape
    pages, device = state.table.shape[2], turned.device
    used = int(state.held.sum(-1).max())  # the host plans; no step waits for it
    out = torch.zeros(b, h, pages, 64, dtype=torch.float32, device=device)
    if not used:
        return out
    queries, anchors = turned.half(), bias.transpose(2, 3).contiguous()
    lse = torch.empty(used, b, h, r, dtype=torch.float32, device=device)
    flags = {
        "D": d, "KBITS": tuple(tier.k_bits for tier in layout.tiers),
        "BESIDE": tuple(2 * (tier.k_bits + tier.v_bits) * d for tier in layout.tiers),
        "KSTEPS": tuple(words.step(tier.k_bits) for tier in layout.tiers),
        "SPAN": layout.span, "SINK": layout.sink, "ROWS": ROWS, "TWIN": not converts(device), "num_warps": 4,
    }  # fmt: skip
    for whole in (False, True):
        page_attention[(used, b * h)](
            queries, anchors, exact, state.arena.view(torch.int32), words.level_table(device), state.table, state.tiers,
            state.held, state.rows, lse, out, at.int(), len(at), r, h, state.anchors.shape[2], pages, SUMS=whole, **flags,
        )  # fmt: skip
        if not whole:
            exact = torch.logaddexp2(exact, torch.logsumexp(lse * math.log(2), 0) / math.log(2))
    return out


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
    TURNED, BIAS, WHOLE, WORDS, LEVELS, TABLE, TIERS, HELD, COUNTERS, LSE, OUT, AT, T, R, H, NS, NP,
    D: constexpr, KBITS: constexpr, BESIDE: constexpr, KSTEPS: constexpr, SPAN: constexpr, SINK: constexpr,
    ROWS: constexpr, TWIN: constexpr, SUMS: constexpr,
):  # fmt: skip
    """Each query's log-sum-exp over one page, or the page's mean weights under the queries' whole one.

    Grid: (pages, B * H). Shapes: ``TURNED`` float16[B * H, R, D], ``BIAS`` float32[B * H, N, R], ``WHOLE`` float32[B *
    H, R] -> ``LSE`` float32[pages, B * H, R]; ``OUT`` float32[B * H, NP, 64].
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
        own = tl.maximum(position - begin, 0) // SPAN
        bias = BIAS + (bh * NS + own)[None, :] * R
        total = tl.zeros([64], tl.float32)
        looks = tl.zeros([64], tl.int32)  # queries that see the token
        for at in tl.range(0, R, ROWS, num_stages=1):
            row = at + j
            inside = row < R
            q = tl.load(TURNED + (bh * R + row)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            x = tl.dot(q, tl.trans(keys)) * radius[None, :]
            x += tl.load(bias + row[:, None], mask=inside[:, None], other=0.0)
            seen = (position >= 0)[None, :] & (position[None, :] <= tl.load(AT + row % T)[:, None]) & inside[:, None]
            x = tl.where(seen, x, HIDDEN)
            if SUMS:
                whole = tl.load(WHOLE + bh * R + row, mask=inside, other=0.0)
                total += tl.sum(tl.exp2(x - whole[:, None]), 0)
                looks += tl.sum(seen.to(tl.int32), 0)
            else:
                top = tl.maximum(tl.max(x, 1), EMPTY)
                tl.store(lse + row, top + tl.log2(tl.maximum(tl.sum(tl.exp2(x - top[:, None]), 1), 1e-30)), mask=inside)
        if SUMS:
            mean = total / tl.maximum(looks, 1).to(tl.float32)
            tl.store(OUT + (bh * NP + page) * 64 + i, mean)
    else:
        if not SUMS:
            for at in tl.range(0, R, ROWS, num_stages=1):
                tl.store(lse + at + j, tl.full([ROWS], EMPTY, tl.float32), mask=at + j < R)
