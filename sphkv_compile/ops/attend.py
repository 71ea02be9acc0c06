"""Attend: new queries over codes, sinks, window and the new tokens, block by block, with one running softmax.

Keys are never rebuilt: a logit is q'.a' + r (q'.c) in the rotated frame (identity I5), and values are summed there
and turned back once per query. This is the portable path, one block of pages at a time; the decode step on a CPU has
a fused kernel besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_compile.codecs.axis_cosine import AxisCosine
from sphkv_compile.codecs.keys import rotate_query
from sphkv_compile.codecs.rotation import unrotate
from sphkv_compile.ops.append import visible
from sphkv_compile.ops.pages import Pages, radii, read_pages, span_slots, with_positions
from sphkv_compile.ops.read import exact_slots
from sphkv_compile.spec import PASSTHROUGH, Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import SPANS, START, State

QUERIES = 256
"""Query tokens handled at once: bounds the scratch of a long prefill."""
PAGES = 16
"""Pages decoded at once."""


@dataclass
class Call:
    """One attention over the cache, reduced to what every segment needs.

    Shapes: ``q`` float32[B, H, G, T, D], times the softmax scale; ``mask`` as given; its rows begin at ``offset``.
    """

    q: Tensor
    base: int
    columns: int
    mask: Tensor | None
    is_causal: bool
    offset: int

    def logits_bias(self, column: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What may be seen (bool) and what is added (float) at ``column``.

        Shapes: ``column`` int64[N] or [B, H, N], inside 0..columns -> broadcastable to [B, H, G, T, N].
        """
        _, h, g, t, _ = self.q.shape
        seen = added = None
        if self.is_causal:
            rows = torch.arange(self.offset, self.offset + t, device=column.device).unsqueeze(-1)
            seen = column[..., None, None, :] <= rows
        if self.mask is not None:
            mask = _gather(
                self.mask[:, :, self.offset : self.offset + t] if self.mask.shape[2] > 1 else self.mask, column, h, g
            )
            if mask.dtype != torch.bool:
                added = mask.float()
            else:
                seen = mask if seen is None else seen & mask
        return seen, added


def _gather(mask: Tensor, column: Tensor, heads: int, group: int) -> Tensor:
    """The mask's columns, per kv head and group member. Shapes: -> [B or 1, H or 1, G or 1, T or 1, N]."""
    split = (heads, group) if mask.shape[1] > 1 else (1, 1)
    mask = mask.unflatten(1, split)
    if column.dim() == 1:
        return mask.index_select(-1, column)
    index = column[:, :, None, None]
    shape = torch.broadcast_shapes(mask.shape[:-1], index.shape[:-1])
    return mask.expand(*shape, mask.shape[-1]).gather(-1, index.expand(*shape, -1))


class Softmax:
    """Running softmax-weighted sums; exact values and rotated coded values are kept apart until the end."""

    def __init__(self, q: Tensor, v_dim: int):
        lead = q.shape[:-1]
        self.top = q.new_full(lead, -math.inf)
        self.total = q.new_zeros(lead)
        self.plain = q.new_zeros(*lead, v_dim)
        self.turned: Tensor | None = None

    def add(self, logits: Tensor, values: Tensor, rotated: bool, weight: Tensor | None = None) -> None:
        """Fold in a segment.

        Shapes: ``logits`` [B, H, G, T, N], ``values`` [B, H, N, Dv], ``weight`` [B, H, N]: a factor of each value.
        """
        top = torch.maximum(self.top, logits.amax(-1))
        shift = torch.where(top == -math.inf, 0.0, top)
        decay, p = (self.top - shift).exp(), (logits - shift.unsqueeze(-1)).exp()
        self.top, self.total = top, self.total * decay + p.sum(-1)
        self.plain = self.plain * decay.unsqueeze(-1)
        if self.turned is not None:
            self.turned = self.turned * decay.unsqueeze(-1)
        p = p if weight is None else p * weight[:, :, None, None]
        b, h, g, t, n = p.shape
        out = (p.reshape(b, h, g * t, n) @ values).view(b, h, g, t, -1)
        if rotated:
            self.turned = out if self.turned is None else self.turned + out
        else:
            self.plain = self.plain + out

    def result(self, rot: Tensor) -> Tensor:
        """Shapes: -> float32[B, H, G, T, Dv]; a query that sees nothing gets zeros."""
        out = self.plain if self.turned is None else self.plain + unrotate(self.turned, rot)
        return out / self.total.clamp(min=torch.finfo(out.dtype).tiny).unsqueeze(-1)


def attend(
    state: State,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    base: int,
    columns: int,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Same arguments, shapes and result as :func:`sphkv_compile.ops.reference.attend_reference`."""
    _, hq, count, d = q.shape
    h = k.shape[1]
    scale = 1 / math.sqrt(d) if scale is None else scale
    refuse_dropped(state, first, base, k.shape[2], mask)
    state = with_positions(state, layout)
    pieces = []
    for offset in range(0, count, QUERIES):
        part = q[:, :, offset : offset + QUERIES].float() * scale
        call = Call(part.unflatten(1, (h, hq // h)), base, columns, mask, is_causal, offset)
        softmax = Softmax(call.q, v.shape[-1])
        if bool((state.rows[:, SPANS] > 0).any()):
            _add_pages(softmax, call, state, layout, first)
        _add_exact(softmax, call, state, layout, first)
        _add_new(softmax, call, k, v, first)
        pieces.append(softmax.result(layout.rotation(v.shape[-1], v.device)).flatten(1, 2))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)).to(q.dtype)


def refuse_dropped(state: State, first: int, base: int, count: int, mask: Tensor | None) -> None:
    """A mask may show only what the cache still holds: slots after the newest token were dropped or never written.

    Raises:
        RuntimeError: it shows one of those.
    """
    if mask is None:
        return
    end = first - base + count
    if end < mask.shape[-1] and bool(visible(mask[..., end:]).any()):
        raise RuntimeError(
            f"sphkv: the attention mask shows cache slots from {end} on, after the newest token at {end - 1}; a cache "
            "of codes keeps nothing there. Mask them as a causal mask does, or compile this model with another backend."
        )


def _add_pages(softmax: Softmax, call: Call, state: State, layout: Layout, first: int) -> None:
    b, h, g, t, _ = call.q.shape
    turned = turned_queries(call.q, state, layout)
    bias = anchor_logits(turned, state)
    used = (
        int(state.held.sum(-1).max())
        if layout.kept
        else min(state.table.shape[2], int(state.rows[:, SPANS].max()) * layout.pages_per_span)
    )
    for at in range(0, used, PAGES):
        pages = slice(at, min(used, at + PAGES))
        positions = state.positions[:, :, pages]
        column = positions.long() - call.base
        held = (positions >= 0) & (positions < first) & (column >= 0) & (column < call.columns)
        seen, added = call.logits_bias(column.clamp(0, call.columns - 1).flatten(2))
        slots = span_slots(state, layout, positions, state.rows[:, START])
        for index, tier in enumerate(layout.tiers):
            here = held & (state.tiers[:, :, pages] == index).unsqueeze(-1)
            if not bool(here.any()):
                continue
            fields = read_pages(state, layout, tier, state.table[:, :, pages])
            logits = key_logits(call.q, state, layout, tier, fields, slots, turned, bias).view(b, h, g, t, -1)
            values, weight = _values(state, tier, fields)
            here = here.flatten(2)
            logits = logits.masked_fill(~here[:, :, None, None], -math.inf)
            values = values.masked_fill(~here.unsqueeze(-1), 0)  # another tier's bytes could read as not-a-number
            weight = weight if weight is None else weight.masked_fill(~here, 0)
            softmax.add(_masked(logits, seen, added), values, weight is not None, weight)


def turned_queries(q: Tensor, state: State, layout: Layout) -> Tensor:
    """Queries in the keys' frame. Shapes: ``q`` float32[B, H, G, T, D] -> [B, H, G * T, D]."""
    rot = layout.rotation(q.shape[-1], q.device)
    return rotate_query(q, state.pair_scale[:, :, None, None], rot).flatten(2, 3)


def anchor_logits(turned: Tensor, state: State) -> Tensor:
    """Products of turned queries with every span's anchor. Shapes: [B, H, G * T, D] -> [B, H, G * T, N]."""
    return turned @ (state.anchors.float() * state.span_scales[..., :1].float()).mT


def key_logits(
    q: Tensor, state: State, layout: Layout, tier: Tier, fields: Pages, slots: Tensor, turned: Tensor, bias: Tensor
) -> Tensor:
    """Logits of the tokens of some pages of one tier, empty slots too.

    Shapes: ``q`` [B, H, G, T, D], fields [B, H, P, page, bytes], ``slots`` int64[B, H, P, page], ``turned`` and
    ``bias`` as of :func:`turned_queries` and :func:`anchor_logits` -> float32[B, H, G * T, P * page].
    """
    if tier.k_bits == PASSTHROUGH:
        keys = fields.k.contiguous().view(state.exact_k.dtype).float().flatten(2, 3)
        return q.flatten(2, 3) @ keys.mT
    code = layout.code.decode(fields.k.flatten(2, 3), q.shape[-1], tier.k_bits)
    flat = slots.flatten(2)
    top = state.span_scales[..., 1].float().gather(2, flat).view(slots.shape)
    # One radius per token, each with its own span's maximum.
    radius = radii(fields._replace(radius=fields.radius.unsqueeze(-2)), top).squeeze(-1).flatten(2)
    anchor = bias.gather(-1, flat.unsqueeze(2).expand(*turned.shape[:3], -1))
    return (turned @ code.mT) * radius.unsqueeze(2) + anchor


def turned_keys(state: State, layout: Layout, tier: Tier, fields: Pages, slots: Tensor) -> Tensor:
    """Keys of some pages of one tier as turned queries meet them, for many queries at once.

    Shapes: as of :func:`key_logits` -> float32[B, H, P * page, D].
    """
    d, flat = state.exact_k.shape[-1], slots.flatten(2)
    code = layout.code.decode(fields.k.flatten(2, 3), d, tier.k_bits)
    scale, top = (state.span_scales[..., i].float().gather(2, flat) for i in range(2))
    radius = radii(fields._replace(radius=fields.radius.unsqueeze(-2)), top.view(slots.shape)).squeeze(-1).flatten(2)
    anchors = state.anchors.gather(2, flat.unsqueeze(-1).expand(-1, -1, -1, d)).float() * scale.unsqueeze(-1)
    return anchors.addcmul_(code, radius.unsqueeze(-1))


def _values(state: State, tier: Tier, fields: Pages) -> tuple[Tensor, Tensor | None]:
    """Values, and their weights where they are codes. Shapes: -> [B, H, P * page, Dv], [B, H, P * page]."""
    if tier.v_bits == PASSTHROUGH:
        return fields.v.contiguous().view(state.exact_v.dtype).float().flatten(2, 3), None
    values = AxisCosine().decode(fields.v.flatten(2, 3), state.exact_v.shape[-1], tier.v_bits)
    return values, fields.v_scale.contiguous().view(torch.float16).float().flatten(2)


def _masked(logits: Tensor, seen: Tensor | None, added: Tensor | None) -> Tensor:
    if added is not None:
        logits = logits + added
    return logits if seen is None else logits.masked_fill(~seen, -math.inf)


def _add_exact(softmax: Softmax, call: Call, state: State, layout: Layout, first: int) -> None:
    """Sinks and window. Rows that differ in where they start hold different positions, so each slot says its own."""
    position = exact_slots(state, layout, first)
    column = position - call.base
    held = (position >= 0) & (column >= 0) & (column < call.columns)
    if not bool(held.any()):
        return
    seen, added = call.logits_bias(column.clamp(0, call.columns - 1).unsqueeze(1))
    logits = call.q @ state.exact_k.float().mT.unsqueeze(2)
    logits = logits.masked_fill(~held[:, None, None, None], -math.inf)
    softmax.add(_masked(logits, seen, added), state.exact_v.float(), False)


def _add_new(softmax: Softmax, call: Call, k: Tensor, v: Tensor, first: int) -> None:
    column = torch.arange(first - call.base, first - call.base + k.shape[2], device=k.device)
    seen, added = call.logits_bias(column)
    softmax.add(_masked(call.q @ k.float().mT.unsqueeze(2), seen, added), v.float(), False)
