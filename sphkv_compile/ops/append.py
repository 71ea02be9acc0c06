"""Append: new tokens enter the window exactly; a span that leaves it is encoded, once, from its exact values."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from sphkv_compile.codecs.scales import pair_scale
from sphkv_compile.ops.device import gpu
from sphkv_compile.ops.pages import as_bytes, encode_span, write_pages
from sphkv_compile.ops.read import decode_span
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, FROZEN, HIDDEN, LENGTH, SPANS, START, State

Encoder = Callable[[Layout, Tensor], ModuleType | None]
"""Says which module encodes many spans of keys such as these, or None for the portable path."""


def first_position(state: State, pos: Tensor | None, start: int | None, count: int) -> tuple[int, int]:
    """Absolute position of the first of ``count`` new tokens, and of column 0.

    Raises:
        ValueError: the positions are not consecutive, or leave a gap behind the newest token; nothing has been written.
    """
    counters = state.rows[0].tolist()  # read once: each read costs microseconds, at every step of every layer
    base, length = counters[BASE], counters[LENGTH]
    first = length if start is None else base + start
    if pos is not None:
        values = pos.tolist()
        first = base + values[0]
        if values[0] < 0 or values != list(range(values[0], values[0] + count)):
            raise ValueError(
                f"sphkv: the cache was written at positions {values[:8]}...; expected consecutive ones from 0 or more. "
                "Write scattered positions in eager code, or compile that step with another backend."
            )
    if first > length:
        raise ValueError(
            f"sphkv: the cache was written at position {first - base} while it holds {length - base} tokens; expected "
            f"{length - base} or less. Fill the gap first, or write it in eager code."
        )
    return first, base


def visible(mask: Tensor) -> Tensor:
    """Where a mask lets a query look."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def real_starts(mask: Tensor | None, first: int, base: int, count: int, batch: int) -> list[int]:
    """Position of each row's first real token among ``count`` new ones; -1 where all are padding.

    A token is real when it may see itself. Shapes: ``mask`` [B or 1, heads or 1, T or 1, n or 1].
    """
    if mask is None:
        return [first] * batch
    columns = torch.arange(first - base, first - base + count, device=mask.device).clamp(max=mask.shape[3] - 1)
    rows = mask.expand(-1, -1, count, -1) if mask.shape[2] == 1 else mask
    own = visible(rows.gather(-1, columns.view(1, 1, -1, 1).expand(*rows.shape[:2], -1, 1)).squeeze(-1)).any(1)
    at = torch.where(own.any(-1), first + own.int().argmax(-1), -1)
    return at.expand(batch).tolist() if at.shape[0] == 1 else at.tolist()


def append(
    state: State,
    layout: Layout,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    first: int,
    starts: list[int],
    encoder: Encoder | None = None,
) -> None:
    """Write tokens at positions ``first``..; what a row held at or after ``first`` is dropped.

    Args:
        q: queries of the new tokens, for the pair scale; None when only keys are known.
        starts: each row's first real position, used where the row holds none yet.
        encoder: which code encodes spans; :func:`device_encoder` by default.

    Shapes: ``q`` [B, HQ, T, D], ``k`` [B, H, T, D], ``v`` [B, H, T, Dv].
    """
    rows = state.rows.tolist()
    groups: dict[tuple[int, int, int], list[int]] = {}
    for b, row in enumerate(rows):
        if row[START] < 0 or first <= row[START]:
            row[START], row[SPANS], row[FROZEN] = starts[b], 0, 0
            state.moments[b].zero_()
            state.energy[b].zero_()
            state.positions[b].fill_(-1)
            state.held[b].zero_()
        groups.setdefault((row[START], row[SPANS], row[FROZEN]), []).append(b)
    end = first + k.shape[2]
    for (start, spans, frozen), members in groups.items():
        if start >= 0:
            spans, frozen = _append_rows(
                state, layout, _Rows(members, start, spans, frozen), q, k, v, first, encoder or device_encoder
            )
        for b in members:
            rows[b][START], rows[b][SPANS], rows[b][FROZEN] = start, spans, frozen
            rows[b][LENGTH] = end
    state.rows.copy_(torch.tensor(rows))
    if q is not None:
        remember(state, q, end)


def remember(state: State, q: Tensor, end: int) -> None:
    """The queries of the positions before ``end``, for the statistics. Shapes: ``q`` [B, HQ, T, D]."""
    if count := state.queries.shape[2]:
        q = q[:, :, -count:]
        slots = torch.arange(end - q.shape[2], end, device=q.device) % count
        state.queries[:, :, slots] = q.to(state.queries.dtype)


class _Rows:
    """Rows of a batch that share a start and a number of coded spans, so that they move in one step."""

    def __init__(self, members: list[int], start: int, spans: int, frozen: int):
        self.members, self.start, self.spans, self.frozen = members, start, spans, frozen
        self.index = torch.tensor(members)

    def of(self, x: Tensor) -> Tensor:
        """Their part of a batched tensor; a view when it is the whole batch."""
        return x if len(self.members) == x.shape[0] else x[self.index.to(x.device)]


def _append_rows(
    state: State, layout: Layout, rows: _Rows, q: Tensor | None, k: Tensor, v: Tensor, first: int, encoder: Encoder
) -> tuple[int, int]:
    begin = rows.start + layout.sink  # where span 0 begins
    end, ring = first + k.shape[2], layout.ring
    skip = max(0, rows.start - first)  # padding in this chunk
    k_new, v_new, from_ = rows.of(k)[:, :, skip:], rows.of(v)[:, :, skip:], first + skip
    if q is not None:
        _observe(state, layout, rows, rows.of(q)[:, :, skip:], from_)
    _store(state, rows, k_new, v_new, torch.arange(from_, max(from_, min(begin, end))) - rows.start)

    spans = rows.spans
    if spans and first < begin + spans * layout.span:
        spans = _reopen(state, layout, rows, first)
    coded = layout.coded_spans(end - rows.start)
    if coded > spans:
        _encode(state, layout, rows, k, v, first, range(spans, coded), encoder)
    spans, frozen = max(spans, coded), 1 if coded > spans else rows.frozen
    keep = min(end, max(from_, begin + spans * layout.span, end - ring))
    slots = layout.sink + torch.arange(keep, end) % ring
    _store(state, rows, k_new[:, :, keep - from_ :], v_new[:, :, keep - from_ :], slots)
    return spans, frozen


def _store(state: State, rows: _Rows, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Exact tokens into their slots."""
    count = slots.numel()
    if not count:
        return
    slots = slots.to(k.device)
    if len(rows.members) == state.exact_k.shape[0]:
        state.exact_k[:, :, slots] = k[:, :, :count]
        state.exact_v[:, :, slots] = v[:, :, :count]
    else:
        index = rows.index.to(k.device).view(-1, 1, 1), torch.arange(k.shape[1], device=k.device).view(1, -1, 1), slots
        state.exact_k[index] = k[:, :, :count]
        state.exact_v[index] = v[:, :, :count]


def _exact_run(
    state: State, layout: Layout, rows: _Rows, k: Tensor, v: Tensor, first: int, spans: range
) -> tuple[Tensor, Tensor]:
    """Exact keys and values of spans: from the ring up to position ``first``, then from the new tokens.

    Shapes: ``k`` [B, H, T, D] -> [rows, H, spans, span, D].
    """
    begin, count = rows.start + layout.sink, len(spans) * layout.span
    at = begin + spans.start * layout.span
    held = layout.sink + torch.arange(at, max(at, min(first, at + count))) % layout.ring
    new = slice(max(0, at - first), max(0, at - first) + count - held.numel())
    pairs = ((state.exact_k, k), (state.exact_v, v))
    k, v = (torch.cat([rows.of(ring)[:, :, held.to(ring.device)], rows.of(x)[:, :, new]], 2) for ring, x in pairs)
    return k.unflatten(2, (-1, layout.span)), v.unflatten(2, (-1, layout.span))


def _observe(state: State, layout: Layout, rows: _Rows, q: Tensor, first: int) -> None:
    """Add the queries up to the one that completes the first span to the running second moment.

    Later queries are left out, so that one-shot, chunked and token-by-token prefill learn the same scale. Once it is
    fixed, the scaled queries' energy is counted instead.
    """
    if rows.frozen:
        b, hq, t, _ = q.shape
        h = state.energy.shape[1]
        scaled = q.float().unflatten(1, (h, hq // h)) * rows.of(state.pair_scale)[:, :, None, None]
        total = scaled.square().sum((2, 3, 4)).double()
        count = torch.full_like(total, t * hq // h)
        state.energy[rows.index.to(q.device)] += torch.stack([total, count], -1)
        return
    upto = rows.start + layout.sink + layout.window + layout.span - first
    q = q[:, :, : max(0, upto)]
    if q.shape[2]:
        b, hq, t, d = q.shape
        h = state.moments.shape[1]
        square = q.double().square().view(b, h, hq // h, t, d).sum((2, 3))
        total = torch.cat([square, torch.full((b, h, 1), float(t * hq // h), dtype=torch.float64, device=q.device)], -1)
        state.moments[rows.index.to(q.device)] += total


def _encode(
    state: State, layout: Layout, rows: _Rows, k: Tensor, v: Tensor, first: int, spans: range, encoder: Encoder
) -> None:
    """Encode spans from their exact values: what the window holds before position ``first``, the new tokens from it on.

    Shapes: ``k`` [B, H, T, D], ``v`` [B, H, T, Dv].
    """
    if not rows.frozen and spans.start == 0:
        learnt, _ = _exact_run(state, layout, rows, k, v, first, spans[:1])
        state.pair_scale[rows.index.to(k.device)] = _learn(state, layout, rows, learnt[:, :, 0])
    total = state.anchors.shape[2]
    spans = spans[-total:]  # a rolling window longer than one lap: the older spans are out of sight
    slots = torch.arange(spans.start, spans.stop, device=k.device) % total
    members, heads = rows.index.to(k.device).view(-1, 1, 1), torch.arange(k.shape[1], device=k.device).view(1, -1, 1)
    at = members, heads, _pages_of(state, layout, rows, slots)
    if bool((state.table[at] < 0).any()) or (layout.kept and bool((state.tiers[at] > 0).any())):
        raise RuntimeError(
            "sphkv: no page is reserved for a span that leaves the window; expected a plan before this step. This is a "
            "fault of sphkv_compile: report it with what `sphkv doctor` prints, and begin anew (cache.reset())."
        )
    if (fused := encoder(layout, k)) is not None:
        fused.encode(state, layout, rows.index, k, v, rows.start + layout.sink, spans, first)
    else:
        _write(state, layout, rows, *_exact_run(state, layout, rows, k, v, first, spans), spans, at, slots)
    if layout.kept:
        state.held[rows.index.to(k.device), :, 0] += slots.numel() * layout.pages_per_span


def device_encoder(layout: Layout, k: Tensor) -> ModuleType | None:
    """The GPU's encoder of many spans, if it serves this layout; else None."""
    return gpu("bulk", layout, k.device)


def _write(
    state: State, layout: Layout, rows: _Rows, k: Tensor, v: Tensor, spans: range, at: tuple[Tensor, ...], slots: Tensor
) -> None:
    """Encode whole spans into the pages ``at`` and the anchors' ``slots``: the portable path.

    Shapes: ``k`` [rows, H, spans, span, D], ``v`` [rows, H, spans, span, Dv].
    """
    b, h, new, _, d = k.shape
    scale = rows.of(state.pair_scale).unsqueeze(2)
    tier = layout.tiers[0]
    pages, keys = encode_span(k, v, scale.expand(b, h, new, d), layout, tier)
    pages = type(pages)(*(part.flatten(2, 3) for part in pages))
    origin = rows.start + layout.sink
    tokens = torch.arange(
        origin + spans.start * layout.span, origin + spans.stop * layout.span, dtype=torch.int32, device=k.device
    ).view(-1, layout.page)
    if layout.kept:
        position = as_bytes(tokens.unsqueeze(-1)).expand(b, h, -1, -1, -1)
        pages = pages._replace(position=position, statistics=torch.zeros_like(position))
    else:
        state.positions[at] = tokens
    write_pages(state, layout, tier, state.table[at], pages)
    state.tiers[at] = 0
    if keys is not None:
        at = *at[:2], slots
        state.anchors[at] = keys.anchor
        state.span_scales[at] = torch.stack([keys.anchor_scale, keys.top], -1).to(torch.bfloat16)


def _pages_of(state: State, layout: Layout, rows: _Rows, slots: Tensor) -> Tensor:
    """Places in the table for the pages of new spans: a span's own, or behind all that a row and head keeps.

    Shapes: ``slots`` int64[n] of the spans -> int64[1 or rows, 1 or H, n * pages_per_span].
    """
    each = torch.arange(layout.pages_per_span, device=slots.device)
    if layout.kept:
        count = torch.arange(slots.numel() * layout.pages_per_span, device=slots.device)
        return rows.of(state.held).sum(-1, keepdim=True) + count
    return (slots.unsqueeze(-1) * layout.pages_per_span + each).view(1, 1, -1)


def _learn(state: State, layout: Layout, rows: _Rows, k: Tensor) -> Tensor:
    """The pair scale, from the first span's keys and the queries seen so far. Shapes: ``k`` [B, H, span, D]."""
    k = k.double()
    k_moment = (k - k.mean(2, keepdim=True)).square().mean(2)
    seen = rows.of(state.moments)
    count = seen[..., -1:]
    q_moment = seen[..., :-1] / count if bool((count > 0).all()) else None
    rope = None if layout.rope == "none" else layout.rope
    return pair_scale(k_moment, q_moment, rope, layout.rotary_dim)


def _reopen(state: State, layout: Layout, rows: _Rows, first: int) -> int:
    """A write at ``first`` reached into coded spans: the spans before it stay, and of the one it cuts the older part
    returns to the window, decoded. This is the one place where a code can be made from a decoded value."""
    begin = rows.start + layout.sink
    if layout.kept:
        raise RuntimeError(
            f"sphkv: a write at position {first} reaches behind the window, which begins at "
            f"{begin + rows.spans * layout.span}, of a cache that drops tokens: they cannot come back. Crop within the "
            "window, or begin the row anew."
        )
    spans = max(0, (first - begin) // layout.span)
    at = begin + spans * layout.span
    if first > at:
        for b in rows.members:
            k, v = decode_span(state, layout, b, spans)
            slots = layout.sink + torch.arange(at, first) % layout.ring
            state.exact_k[b][:, slots] = k[:, : first - at].to(state.exact_k.dtype)
            state.exact_v[b][:, slots] = v[:, : first - at].to(state.exact_v.dtype)
    positions = rows.of(state.positions)
    state.positions[rows.index.to(positions.device)] = torch.where(positions >= at, -1, positions)
    return spans
