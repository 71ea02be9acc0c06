"""Statistics: how much attention recent queries paid to each token that is held as codes.

Off the read path: a plan asks for them once in many steps. Keys are not rebuilt, and what queries paid to exact tokens
counts in their softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sphkv_compile.ops.attend import turned_keys, turned_queries
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
"""Of the remembered queries, one in so many is asked: a mean is wanted, and each costs as much. Measured on four
documents that are not reported (2,048 tokens, 256 after), geometric mean of KL at 12.5 and 6.25 % of bfloat16's bytes,
all queries first: SmolLM2 .0143, .0526 and .0139, .0481; Gemma3 .0295, .1280 and .0335, .1282:
examples/eval/every.json."""


FEW, MANY = 1 << 20, 1 << 25
"""Logits that are worked out at once: on a CPU as many as its cache holds, elsewhere so many that launches are few."""


def mean_attention(
    state: State,
    layout: Layout,
    queries: Tensor,
    at: Tensor,
    scale: float | None = None,
    parts: tuple[int, ...] | None = None,
    fused: bool = True,
) -> list[Tensor]:
    """The mean softmax weight of each coded token, over the queries that see it and the query heads of its kv head.

    Args:
        queries: whose own tokens the state holds already, or that are still to come.
        at: their positions; a query sees what is not after it. Those of a part ascend.
        parts: so many queries at a time have a mean of their own; by default all have one.
        fused: whether a GPU's kernels may do it.

    Shapes: ``queries`` [B, HQ, T, D], ``at`` int64[T] -> float32[B, H, P, page] for each part; 0 in slots that hold no
    token.

    Raises:
        ValueError: the layout holds no kept tokens.
    """
    if not layout.kept:
        raise ValueError("statistics are of kept tokens; expected a layout with kept=True")
    h, d = state.exact_k.shape[1], queries.shape[-1]
    scale = d**-0.5 if scale is None else scale
    parts = (len(at),) if parts is None else parts
    q = (queries.float() * (scale / math.log(2))).unflatten(1, (h, -1))  # logits in units of log 2
    turned, exact = turned_queries(q, state, layout), _exact_lse(state, layout, q, at)
    if fused and (kernels := gpu("statistics", layout, state.arena.device)) is not None:
        return kernels.mean_attention(state, layout, turned, exact, at, parts)
    lse, state = exact, with_positions(state, layout)
    for _, logits in _blocks(state, layout, turned, at):
        lse = torch.logaddexp2(lse, _lse(logits))
    out = [torch.zeros(*state.table.shape, layout.page, device=queries.device) for _ in parts]
    for pages, logits in _blocks(state, layout, turned, at):
        paid = logits.sub_(lse.unsqueeze(-1)).exp2_().unflatten(2, q.shape[2:4])
        for mean, weights in zip(out, paid.split(parts, 3)):
            mean[:, :, pages] += weights.sum((2, 3)).unflatten(2, (-1, layout.page))
    for mean, asked in zip(out, at.split(parts)):  # as many queries see a token as are not before it
        looks = len(asked) - torch.searchsorted(asked, state.positions.long())
        mean /= (looks * q.shape[2]).clamp(min=1)
    return out


class Seen(NamedTuple):
    """What is known of each slot of the tables.

    Args:
        positions: of its token; -1 where there is none, and then the rest says nothing.
        fresh: whether nothing was known before.
        mean, recent: softmax weight that the token got from a query head, over its life and lately.
        lengths: of the token's value, to the few per cent in which codes differ in theirs.
        expected: softmax weight that it would get next; None where that was not asked.

    Shapes: int32, bool, and float32, all [B, H, P, page].
    """

    positions: Tensor
    fresh: Tensor
    mean: Tensor
    recent: Tensor
    lengths: Tensor
    expected: Tensor | None = None


def observe(
    state: State,
    layout: Layout,
    count: int,
    scale: float | None = None,
    frequencies: Tensor | None = None,
    fused: bool = True,
    attention: Callable[..., list[Tensor]] = mean_attention,
) -> Seen:
    """Bring every coded token's statistics up to the newest ``count`` queries, of which one in ``EVERY`` is asked.

    The mean over a token's life moves by the share of its life that these are; the running mean forgets half of it in
    ``HALF_LIFE`` queries. A token that no plan has seen begins with what these queries paid.

    Args:
        frequencies: of each row's rotary embedding, for the attention to be expected: what the same queries would pay,
            were they turned on to positions to come, the first of them by ``count`` tokens, the last by twice as many.
        attention: whoever says what queries paid, called as :func:`mean_attention` is.

    Units: ``count`` in tokens, at most the queries that the state remembers; ``frequencies`` in radians a token.

    Shapes: ``frequencies`` float32[B, rotary_dim / 2].

    Source: of the expected attention, the idea of arXiv 2510.00636, with newest queries for its normal distribution.
    """
    end = int(state.rows[:, LENGTH].max())
    first, skip = end - count, (count - 1) % EVERY  # the newest of those that are asked looks at all
    queries = newest_queries(state, first, end)[:, :, skip::EVERY]
    at = torch.arange(first + skip, end, EVERY, device=queries.device)
    parts: tuple[int, ...] = (len(at),)
    if frequencies is not None:
        ahead = at - first + count
        angles = (ahead.unsqueeze(-1) * frequencies.unsqueeze(1)).unsqueeze(1)
        queries = torch.cat([queries.float(), turned(queries.float(), angles, layout.rope)], 2)
        at, parts = torch.cat([at, at + ahead]), parts * 2
    new, *more = attention(state, layout, queries, at, scale, parts, fused)
    expected = more[0] if more else None
    remember = _remember
    if fused and (kernels := gpu("statistics", layout, state.arena.device)) is not None:
        remember = kernels.remember
    return Seen(*remember(state, layout, new, first, end, HALF_LIFE))._replace(expected=expected)


def _remember(
    state: State, layout: Layout, new: Tensor, first: int, end: int, half_life: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics move by what queries of ``first``..``end`` paid; the fields of :class:`Seen` but for the last."""
    (mean, recent), positions = read_statistics(state, layout), with_positions(state, layout).positions
    looks = (end - positions.clamp(min=first)).clamp(min=0).float()
    life = (end - positions).clamp(min=1).float()
    fresh, forgotten = recent == 0, 0.5 ** (looks / half_life)
    mean = torch.where(fresh, new, mean + (new - mean) * looks / life)
    recent = torch.where(fresh, new, recent * forgotten + new * (1 - forgotten))
    write_statistics(state, layout, mean, recent)
    return positions, fresh & (positions >= 0), mean, recent, value_lengths(state, layout)


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
    turned = turned_queries(q, state, layout)
    at = first + torch.arange(q.shape[3], device=q.device)
    lse, state = _exact_lse(state, layout, q, at), with_positions(state, layout)
    for _, logits in _blocks(state, layout, turned, at):
        lse = torch.logaddexp2(lse, _lse(logits))
    there = worth >= 0
    length = torch.where(there, value_lengths(state, layout), 0.0)
    length = length / (length.sum((2, 3)) / there.sum((2, 3)).clamp(min=1)).clamp(min=1e-30)[..., None, None]
    rank = worth.flatten(2).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    lost = torch.searchsorted(keep, rank, right=True).view(worth.shape)  # of the numbers, how many do not keep it
    sums = torch.zeros(*lse.shape, keep.shape[-1] + 1, device=lse.device)
    for pages, logits in _blocks(state, layout, turned, at):
        paid = (logits - lse.unsqueeze(-1)).exp2() * length[:, :, pages].flatten(2).unsqueeze(2)
        sums.scatter_add_(-1, lost[:, :, pages].flatten(2).unsqueeze(2).expand_as(paid), paid)
    return sums[..., 1:].flip(-1).cumsum(-1).flip(-1).square().mean(2)


def _lse(logits: Tensor) -> Tensor:
    """Log of the sum of the powers of 2; very low where nothing is seen. Shapes: [..., n] -> [...]."""
    top = logits.amax(-1, keepdim=True).clamp(min=-1e30)
    return ((logits - top).exp2_().sum(-1).log2() + top.squeeze(-1)).clamp(min=-1e30)


def _blocks(state: State, layout: Layout, turned: Tensor, at: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some pages at one tier: which, and their logits, which are the caller's; positions are in the state.

    Shapes: ``at`` int64[T], the queries' positions -> float32[B, H, G * T, P * page], -inf where a query may not look.
    """
    rows = at.repeat(turned.shape[2] // len(at)).unsqueeze(-1)  # they are head by head
    used, first = int(state.held.sum(-1).max()), int(at.min())
    step = max(1, (FEW if turned.is_cpu else MANY) // (turned[..., 0].numel() * layout.page))
    for begin in range(0, used, step):
        pages = slice(begin, min(used, begin + step))
        positions = state.positions[:, :, pages]
        slots = span_slots(state, layout, positions, state.rows[:, START])
        late = int(positions.max()) > first
        for index, tier in enumerate(layout.tiers):
            here = ((positions >= 0) & (state.tiers[:, :, pages] == index).unsqueeze(-1)).flatten(2).unsqueeze(2)
            if not bool(here.any()):
                continue
            fields = read_pages(state, layout, tier, state.table[:, :, pages])
            logits = turned @ turned_keys(state, layout, tier, fields, slots).mT
            if late:  # some queries are before some tokens
                here = here & (positions.flatten(2).unsqueeze(2) <= rows)
            yield pages, logits.masked_fill_(~here, -math.inf)


def _exact_lse(state: State, layout: Layout, q: Tensor, at: Tensor) -> Tensor:
    """Of the sinks and the window. Shapes: ``at`` int64[T], the queries' positions -> float32[B, H, G * T]."""
    position = exact_slots(state, layout)
    seen = (position >= 0).unsqueeze(1) & (position.unsqueeze(1) <= at.unsqueeze(-1))
    logits = q @ state.exact_k.float().mT.unsqueeze(2)
    return _lse(logits.masked_fill(~seen[:, None, None], -math.inf)).flatten(2)
