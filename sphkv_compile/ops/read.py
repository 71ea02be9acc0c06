"""Reading a state back as dense keys and values: what export, crop and the reference need."""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_compile.codecs.keys import KeySpan, decode_keys
from sphkv_compile.codecs.values import decode_values
from sphkv_compile.ops.pages import Pages, read_pages, span_slots, with_positions
from sphkv_compile.spec import PASSTHROUGH, Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, LENGTH, SPANS, START, State


def decode_pages(
    state: State, layout: Layout, tier: Tier, pages: Pages, slots: Tensor, pair_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Dense keys and values of pages.

    Shapes: fields uint8[..., P, page, bytes], ``slots`` int64[..., P, page] of anchors already gathered by the caller's
    leading index; here ``slots`` are [B, H, P, page] and ``pair_scale`` [B, H, D] -> float32[B, H, P, page, D / Dv].
    """
    k_dim, v_dim = state.exact_k.shape[-1], state.exact_v.shape[-1]
    if tier.k_bits == PASSTHROUGH:
        k = pages.k.contiguous().view(state.exact_k.dtype).float()
    else:
        flat = slots.flatten(2)
        anchor = state.anchors.gather(2, flat.unsqueeze(-1).expand(*flat.shape, k_dim)).view(*slots.shape, k_dim)
        scales = state.span_scales.gather(2, flat.unsqueeze(-1).expand(*flat.shape, 2)).view(*slots.shape, 2).float()
        # One token is a span of one here: each carries its own anchor row and radius maximum.
        token = KeySpan(pages.k.unsqueeze(-2), pages.radius.unsqueeze(-2), scales[..., 1], anchor, scales[..., 0])
        rot = layout.rotation(k_dim, state.exact_k.device)
        scale = pair_scale[:, :, None, None]
        k = decode_keys(token, k_dim, scale, rot, layout.code, tier.k_bits).squeeze(-2)
    if tier.v_bits == PASSTHROUGH:
        v = pages.v.contiguous().view(state.exact_v.dtype).float()
    else:
        v_scale = pages.v_scale.contiguous().view(torch.float16).squeeze(-1)
        v = decode_values(pages.v, v_scale, v_dim, layout.rotation(v_dim, state.exact_v.device), tier.v_bits)
    return k, v


def decode_span(state: State, layout: Layout, row: int, span: int) -> tuple[Tensor, Tensor]:
    """Dense keys and values of one coded span of one row. Shapes: -> float32[H, span, D], float32[H, span, Dv]."""
    slot = span % state.anchors.shape[2]
    pages = slice(slot * layout.pages_per_span, (slot + 1) * layout.pages_per_span)
    one = slice(row, row + 1)
    k, v = _decode(_narrow(state, one, pages), layout, state.rows[one, START])
    return k[0].flatten(1, 2), v[0].flatten(1, 2)


def _narrow(state: State, rows: slice, pages: slice) -> State:
    batch = {name: getattr(state, name)[rows] for name in State._fields if name != "arena"}
    for name in ("table", "tiers", "positions"):
        batch[name] = batch[name][:, :, pages]
    return State(arena=state.arena, **batch)


def _decode(state: State, layout: Layout, starts: Tensor) -> tuple[Tensor, Tensor]:
    """All of a (narrowed) state's pages. Shapes: -> float32[B, H, P, page, D / Dv]."""
    slots = span_slots(state, layout, state.positions, starts)
    shape, device = state.positions.shape, state.arena.device
    k, v = (torch.zeros(*shape, x.shape[-1], device=device) for x in (state.exact_k, state.exact_v))
    for index, tier in enumerate(layout.tiers):
        here = (state.tiers == index)[..., None, None]
        if bool(here.any()):
            pages = read_pages(state, layout, tier, state.table)
            k_tier, v_tier = decode_pages(state, layout, tier, pages, slots, state.pair_scale)
            k, v = torch.where(here, k_tier, k), torch.where(here, v_tier, v)
    return k, v


def dense(
    state: State, layout: Layout, columns: int, base: int | None = None, block: int = 16
) -> tuple[Tensor, Tensor]:
    """The cache as dense tensors: what the user's own buffers would hold, up to the codes' error.

    Args:
        columns: columns of the dense cache.
        base: position of column 0; the state's own by default.
        block: pages decoded at once.

    Shapes: -> model dtype [B, H, columns, D], [B, H, columns, Dv]; slots that hold no token are zero.
    """
    base = int(state.rows[0, BASE]) if base is None else base
    batch, heads = state.table.shape[:2]
    state = with_positions(state, layout)
    k_out = state.exact_k.new_zeros(batch, heads, columns, state.exact_k.shape[-1])
    v_out = state.exact_v.new_zeros(batch, heads, columns, state.exact_v.shape[-1])
    for row, (start, length, spans, *_) in enumerate(state.rows.tolist()):
        if start < 0:
            continue
        one = slice(row, row + 1)
        for at in range(0, state.table.shape[2] if spans else 0, block):
            part = _narrow(state, one, slice(at, at + block))
            k, v = _decode(part, layout, state.rows[one, START])
            column = part.positions.long() - base
            held = (part.positions >= 0) & (part.positions < length) & (column >= 0) & (column < columns)
            h, p, t = held[0].nonzero(as_tuple=True)
            k_out[row, h, column[0, h, p, t]] = k[0, h, p, t].to(k_out.dtype)
            v_out[row, h, column[0, h, p, t]] = v[0, h, p, t].to(v_out.dtype)
        positions, slots = exact_positions(layout, start, length, spans, start + layout.sink)
        held = (positions >= base) & (positions < base + columns)
        k_out[row][:, positions[held] - base] = state.exact_k[row][:, slots[held]]
        v_out[row][:, positions[held] - base] = state.exact_v[row][:, slots[held]]
    return k_out, v_out


def exact_slots(state: State, layout: Layout, end: int | None = None) -> Tensor:
    """The position that each exact slot of each row holds, -1 where none; positions from ``end`` on count as none.

    Shapes: -> int64[B, sink + R], on the state's device.
    """
    out = torch.full((state.rows.shape[0], state.exact_k.shape[2]), -1, dtype=torch.int64)
    for b, row in enumerate(state.rows.tolist()):
        if row[START] >= 0:
            length = row[LENGTH] if end is None else min(row[LENGTH], end)
            at, slot = exact_positions(layout, row[START], length, row[SPANS], row[START] + layout.sink)
            out[b, slot] = at
    return out.to(state.exact_k.device)


def exact_positions(layout: Layout, start: int, length: int, spans: int, begin: int) -> tuple[Tensor, Tensor]:
    """Positions that a row holds exactly, and the slots where they lie: the sinks, then the window."""
    sinks = torch.arange(start, max(start, min(begin, length)))
    window = torch.arange(begin + spans * layout.span, max(begin + spans * layout.span, length))
    return torch.cat([sinks, window]), torch.cat([sinks - start, layout.sink + window % layout.ring])
