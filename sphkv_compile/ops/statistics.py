"""Statistics: how much attention recent queries paid to each token that is held as codes.

Off the read path: a plan asks for them once in many steps. Keys are not rebuilt, and what queries paid to exact tokens
counts in their softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sphkv_compile.ops.attend import PAGES, key_logits, turned_queries
from sphkv_compile.ops.device import gpu
from sphkv_compile.ops.pages import (
    read_pages,
    read_statistics,
    span_slots,
    value_lengths,
    with_positions,
    write_statistics,
)
from sphkv_compile.ops.read import exact_slots
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import LENGTH, START, State

HALF_LIFE = 128
"""Queries in which the running mean forgets half of what it knew."""
EVERY = 4
"""Of the remembered queries, one of so many stands for those to come: a mean is wanted, and each costs as much."""


def mean_attention(
    state: State,
    layout: Layout,
    queries: Tensor,
    first: int,
    scale: float | None = None,
    every: int = 1,
    fused: bool = True,
) -> Tensor:
    """The mean softmax weight of each coded token, over the queries that see it and the query heads of its kv head.

    Args:
        queries: whose own tokens the state holds already; a query sees what is not after it.
        first: position of the first of them.
        every: tokens from one of them to the next.
        fused: whether a GPU's kernels may do it.

    Shapes: ``queries`` [B, HQ, T, D] -> float32[B, H, P, page]; 0 in slots that hold no token.

    Raises:
        ValueError: the layout holds no kept tokens.
    """
    if not layout.kept:
        raise ValueError("statistics are of kept tokens; expected a layout with kept=True")
    h, d = state.exact_k.shape[1], queries.shape[-1]
    scale = d**-0.5 if scale is None else scale
    q = (queries.float() * (scale / math.log(2))).unflatten(1, (h, -1))  # logits in units of log 2
    turned, bias = turned_queries(q, state, layout)
    at = first + every * torch.arange(q.shape[3], device=q.device)
    exact = _exact_lse(state, layout, q, at)
    if fused and (kernels := gpu("statistics", layout, state.arena.device)) is not None:
        return kernels.mean_attention(state, layout, turned, bias, exact, at)
    lse, state = exact, with_positions(state, layout)
    for _, logits, _ in _blocks(state, layout, q, turned, bias, at):
        lse = torch.logaddexp2(lse, _lse(logits))
    out = torch.zeros(*state.table.shape, layout.page, device=queries.device)
    for pages, logits, count in _blocks(state, layout, q, turned, bias, at):
        sums = (logits - lse.unsqueeze(-1)).exp2().sum(2) / count.clamp(min=1)
        out[:, :, pages] += sums.unflatten(2, (-1, layout.page))
    return out


class Seen(NamedTuple):
    """What is known of each slot of the tables.

    Args:
        positions: of its token; -1 where there is none, and then the rest says nothing.
        fresh: whether nothing was known before.
        mean, recent: softmax weight that the token got from a query head, over its life and lately.
        lengths: of the token's value, to the few per cent in which codes differ in theirs.

    Shapes: int32, bool, and float32 thrice, all [B, H, P, page].
    """

    positions: Tensor
    fresh: Tensor
    mean: Tensor
    recent: Tensor
    lengths: Tensor


def observe(state: State, layout: Layout, count: int, scale: float | None = None, fused: bool = True) -> Seen:
    """Bring every coded token's statistics up to the newest ``count`` queries.

    The mean over a token's life moves by the share of its life that these are; the running mean forgets half of it in
    ``HALF_LIFE`` queries. A token that no plan has seen begins with what these queries paid.

    Units: ``count`` in tokens, at most the queries that the state remembers.
    """
    end = int(state.rows[:, LENGTH].max())
    first, skip = end - count, (count - 1) % EVERY  # the newest of those that are asked looks at all
    queries = newest_queries(state, first, end)[:, :, skip::EVERY]
    new = mean_attention(state, layout, queries, first + skip, scale, EVERY, fused)
    if fused and (kernels := gpu("statistics", layout, state.arena.device)) is not None:
        return Seen(*kernels.remember(state, layout, new, first, end, HALF_LIFE))
    (mean, recent), positions = read_statistics(state, layout), with_positions(state, layout).positions
    looks = (end - positions.clamp(min=first)).clamp(min=0).float()
    life = (end - positions).clamp(min=1).float()
    fresh, forgotten = recent == 0, 0.5 ** (looks / HALF_LIFE)
    mean = torch.where(fresh, new, mean + (new - mean) * looks / life)
    recent = torch.where(fresh, new, recent * forgotten + new * (1 - forgotten))
    write_statistics(state, layout, mean, recent)
    return Seen(positions, fresh & (positions >= 0), mean, recent, value_lengths(state, layout))


def expected_attention(
    state: State, layout: Layout, count: int, frequencies: Tensor, scale: float | None = None
) -> Tensor:
    """The mean attention that each coded token would get, were the newest ``count`` queries asked again at positions to
    come: their rotary pairs are turned on, by ``count`` tokens for the first of them up to twice that for the last. One
    of ``EVERY`` is.

    Source: the idea of Expected Attention (arXiv 2510.00636), with the newest queries for its normal distribution.

    Units: ``count`` in tokens, ``frequencies`` in radians a token.

    Shapes: ``frequencies`` float32[B, rotary_dim / 2] -> float32[B, H, P, page].
    """
    end = int(state.rows[:, LENGTH].max())
    ahead = torch.arange(count, 2 * count, EVERY, device=frequencies.device)
    angles = (ahead.unsqueeze(-1) * frequencies.unsqueeze(1)).unsqueeze(1)
    queries = turned(newest_queries(state, end - count, end)[:, :, ::EVERY].float(), angles, layout.rope)
    return mean_attention(state, layout, queries, end, scale)


def turned(x: Tensor, angles: Tensor, rope: str) -> Tensor:
    """Rotary pairs turned by angles; dimensions behind them stay.

    Shapes: ``x`` [..., T, D], ``angles`` [..., T, R / 2] -> [..., T, D].
    """
    rotary, rest = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], -1)
    a, b = rotary.chunk(2, -1) if rope == "half" else (rotary[..., ::2], rotary[..., 1::2])
    cos, sin = angles.cos(), angles.sin()
    parts = a * cos - b * sin, b * cos + a * sin
    both = torch.cat(parts, -1) if rope == "half" else torch.stack(parts, -1).flatten(-2)
    return torch.cat([both, rest], -1)


def newest_queries(state: State, first: int, end: int) -> Tensor:
    """The remembered queries of consecutive positions. Shapes: -> [B, HQ, end - first, D]."""
    return state.queries[:, :, torch.arange(first, end, device=state.queries.device) % state.queries.shape[2]]


def realised_losses(
    state: State, layout: Layout, worth: Tensor, keep: Tensor, queries: Tensor, first: int, scale: float | None = None
) -> Tensor:
    """What queries would have lost, had each head kept only so many of its most worthy tokens: the mean square, over
    queries and query heads, of the attention on the others, times the length of their values over the mean length.

    Args:
        worth: of each coded token; what is not there is negative.
        keep: numbers of tokens, ascending.
        queries, first: as for :func:`mean_attention`.

    Shapes: ``worth`` float32[B, H, P, page], ``keep`` int64[B, H, S] -> float32[B, H, S].
    """
    h, d = state.exact_k.shape[1], queries.shape[-1]
    scale = d**-0.5 if scale is None else scale
    q = (queries.float() * (scale / math.log(2))).unflatten(1, (h, -1))
    turned, bias = turned_queries(q, state, layout)
    at = first + torch.arange(q.shape[3], device=q.device)
    lse, state = _exact_lse(state, layout, q, at), with_positions(state, layout)
    for _, logits, _ in _blocks(state, layout, q, turned, bias, at):
        lse = torch.logaddexp2(lse, _lse(logits))
    there = worth >= 0
    length = torch.where(there, value_lengths(state, layout), 0.0)
    length = length / (length.sum((2, 3)) / there.sum((2, 3)).clamp(min=1)).clamp(min=1e-30)[..., None, None]
    rank = worth.flatten(2).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    lost = torch.searchsorted(keep, rank, right=True).view(worth.shape)  # of the numbers, how many do not keep it
    sums = torch.zeros(*lse.shape, keep.shape[-1] + 1, device=lse.device)
    for pages, logits, _ in _blocks(state, layout, q, turned, bias, at):
        paid = (logits - lse.unsqueeze(-1)).exp2() * length[:, :, pages].flatten(2).unsqueeze(2)
        sums.scatter_add_(-1, lost[:, :, pages].flatten(2).unsqueeze(2).expand_as(paid), paid)
    return sums[..., 1:].flip(-1).cumsum(-1).flip(-1).square().mean(2)


def _lse(logits: Tensor) -> Tensor:
    """Log of the sum of the powers of 2; very low where nothing is seen. Shapes: [..., n] -> [...]."""
    return torch.logsumexp(logits * math.log(2), -1).clamp(min=-1e30) / math.log(2)


def _blocks(
    state: State, layout: Layout, q: Tensor, turned: Tensor, bias: Tensor, at: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some pages at one tier: which, their logits, and how many query rows see each token; positions are in the state.

    Shapes: ``at`` int64[T], the queries' positions -> float32[B, H, G * T, P * page], -inf where a query may not look;
    int64[B, H, P * page].
    """
    at = at.repeat(q.shape[2])  # rows are head by head
    used = int(state.held.sum(-1).max())
    for begin in range(0, used, PAGES):
        pages = slice(begin, min(used, begin + PAGES))
        positions = state.positions[:, :, pages]
        slots = span_slots(state, layout, positions, state.rows[:, START])
        for index, tier in enumerate(layout.tiers):
            here = ((positions >= 0) & (state.tiers[:, :, pages] == index).unsqueeze(-1)).flatten(2)
            if not bool(here.any()):
                continue
            fields = read_pages(state, layout, tier, state.table[:, :, pages])
            logits = key_logits(q, state, layout, tier, fields, slots, turned, bias)
            seen = (positions.flatten(2).unsqueeze(2) <= at.unsqueeze(-1)) & here.unsqueeze(2)
            yield pages, logits.masked_fill(~seen, -math.inf), seen.sum(2)


def _exact_lse(state: State, layout: Layout, q: Tensor, at: Tensor) -> Tensor:
    """Of the sinks and the window. Shapes: ``at`` int64[T], the queries' positions -> float32[B, H, G * T]."""
    position = exact_slots(state, layout)
    seen = (position >= 0).unsqueeze(1) & (position.unsqueeze(1) <= at.unsqueeze(-1))
    logits = q @ state.exact_k.float().mT.unsqueeze(2)
    return _lse(logits.masked_fill(~seen[:, None, None], -math.inf)).flatten(2)
