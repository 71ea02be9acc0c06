"""Reading and writing pages: bytes of the arena to and from the fields of a tier."""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from sphkv_compile.codecs.keys import KeySpan, encode_keys, radius_value
from sphkv_compile.codecs.packing import pack, unpack
from sphkv_compile.codecs.values import encode_values
from sphkv_compile.spec import PASSTHROUGH, Tier
from sphkv_compile.storage import tiles
from sphkv_compile.storage.layout import UNIT, Layout, PageFields
from sphkv_compile.storage.state import SPANS, State


class Pages(NamedTuple):
    """Fields of some pages, still coded. Shapes: uint8[..., P, page, bytes of the field].

    ``statistics``, of kept tokens: the mean attention that the token got since it was coded, and the running one, two
    bfloat16; zero in a page that no plan has seen.
    """

    k: Tensor
    v: Tensor
    radius: Tensor
    v_scale: Tensor
    anchor: Tensor
    position: Tensor
    statistics: Tensor


def _units(offsets: Tensor, count: int) -> Tensor:
    return offsets.long().unsqueeze(-1) + torch.arange(count, device=offsets.device)


def _itemsize(state: State) -> tuple[int, int]:
    return state.exact_k.element_size(), state.exact_v.element_size()


def read_pages(state: State, layout: Layout, tier: Tier, offsets: Tensor) -> Pages:
    """Fields of the pages at ``offsets`` (int32[..., P]).

    Offsets of no page (-1) and of pages of another tier are read too, whatever bytes lie there: the caller leaves them
    out. Only bytes of the arena are read.
    """
    dims = state.exact_k.shape[-1], state.exact_v.shape[-1], _itemsize(state)
    fields, units = layout.fields(tier, *dims), layout.page_bytes(tier, *dims) // UNIT
    arena = state.arena.view(-1, UNIT)
    raw = arena[_units(offsets.clamp(min=0), units).clamp(max=arena.shape[0] - 1)].flatten(-2)
    if layout.tiled:
        return _from_tiles(raw, layout.page, tier, fields, *dims[:2])
    parts, at = [], 0
    for width in fields.widths:
        part = raw[..., at : at + width * layout.page]
        parts.append(part.reshape(*offsets.shape, layout.page, width))
        at += width * layout.page
    return Pages(*parts)


def write_pages(state: State, layout: Layout, tier: Tier, offsets: Tensor, pages: Pages) -> None:
    """Store ``pages`` at ``offsets`` (int32[..., P]).

    Raises:
        ValueError: a field is wider or narrower than the layout has it: what follows would lie in the wrong place.
    """
    dims = state.exact_k.shape[-1], state.exact_v.shape[-1], _itemsize(state)
    fields, units = layout.fields(tier, *dims), layout.page_bytes(tier, *dims) // UNIT
    widths = tuple(part.shape[-1] for part in pages)
    if widths != fields.widths:
        raise ValueError(f"a page of {tier}: fields of {widths} bytes a token; expected {fields.widths}")
    if layout.tiled:
        pages = _to_tiles(pages, tier, *dims[:2])
    raw = torch.cat([part.flatten(-2) for part in pages], dim=-1)
    raw = torch.nn.functional.pad(raw, (0, units * UNIT - raw.shape[-1]))
    state.arena.view(-1, UNIT)[_units(offsets, units)] = raw.unflatten(-1, (units, UNIT))


def _to_tiles(pages: Pages, tier: Tier, k_dim: int, v_dim: int) -> Pages:
    """The same fields with codes in tiles, and radius and value scale side by side."""
    k, v = pages.k, pages.v
    if tier.k_bits != PASSTHROUGH:
        k = tiles.pack_keys(unpack(k, k_dim, tier.k_bits), tier.k_bits).unsqueeze(-1)
    if tier.v_bits != PASSTHROUGH:
        v = tiles.pack_values(unpack(v, v_dim, tier.v_bits), tier.v_bits).unsqueeze(-1)
    both = torch.cat([pages.radius, pages.v_scale], -1)
    return pages._replace(k=k, v=v, radius=both, v_scale=both[..., :0])


def _from_tiles(raw: Tensor, page: int, tier: Tier, fields: PageFields, k_dim: int, v_dim: int) -> Pages:
    """The inverse, from whole pages. Shapes: ``raw`` uint8[..., bytes of a page]."""
    beside = fields.radius + fields.v_scale
    widths = fields.k, fields.v, beside, fields.position, fields.statistics
    k, v, both, position, statistics = raw[..., : fields.total * page].split([width * page for width in widths], -1)
    if tier.k_bits == PASSTHROUGH:
        k = k.unflatten(-1, (page, -1))
    else:
        k = pack(tiles.unpack_keys(k, k_dim, tier.k_bits), tier.k_bits)
    if tier.v_bits == PASSTHROUGH:
        v = v.unflatten(-1, (page, -1))
    else:
        v = pack(tiles.unpack_values(v, v_dim, tier.v_bits), tier.v_bits)
    both = both.reshape(*both.shape[:-1], page, beside)
    radius, v_scale = both.split([fields.radius, fields.v_scale], -1)
    position, statistics = (x.unflatten(-1, (page, -1)) for x in (position, statistics))
    return Pages(k, v, radius, v_scale, radius[..., :0], position, statistics)


def as_bytes(x: Tensor) -> Tensor:
    """``x``[..., D] as uint8[..., D * itemsize]."""
    return x.contiguous().view(torch.uint8)


def with_positions(state: State, layout: Layout) -> State:
    """The state with every slot's position in ``positions``, also where pages hold them: what the portable code reads.

    The copy is scratch: it takes four bytes for each slot of the tables. A state that has them already is itself.
    """
    if not layout.kept or state.positions.shape[2]:
        return state
    found = state.arena.view(torch.int32)[_where(state, layout, "position", 4)]
    return state._replace(positions=torch.where(pages_in_use(state).unsqueeze(-1), found, -1))


def trimmed(state: State, places: int | None = None) -> State:
    """The state with copies of its tables up to ``places``, or to the last that is in use, for which the host waits."""
    if places is None:
        places = int(state.held.sum(-1).max())
    table, tiers = (x[:, :, :places].contiguous() for x in (state.table, state.tiers))
    return state._replace(table=table, tiers=tiers)


def pages_in_use(state: State) -> Tensor:
    """Which places of the tables hold pages of kept tokens. Shapes: -> bool[B, H, P]."""
    return torch.arange(state.table.shape[2], device=state.table.device) < state.held.sum(-1, keepdim=True)


def holding(state: State, layout: Layout) -> Tensor:
    """Which places of the tables hold tokens; the others are empty, or reserved. Shapes: -> bool[B, H, P]."""
    if layout.kept:
        return pages_in_use(state)
    count = state.rows[:, SPANS] * layout.pages_per_span
    here = torch.arange(state.table.shape[2], device=state.table.device) < count.view(-1, 1, 1)
    return here.expand_as(state.table)


def read_statistics(state: State, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and running attention of kept tokens, and whatever lies in slots that hold none.

    Shapes: -> float32[B, H, P, page] twice.
    """
    words = state.arena.view(torch.int32)[_where(state, layout, "statistics", 4)]
    mean, recent = words.unsqueeze(-1).view(torch.bfloat16).float().unbind(-1)
    return mean, recent


def write_statistics(state: State, layout: Layout, mean: Tensor, recent: Tensor) -> None:
    """The inverse, of pages in use. Shapes: float32[B, H, P, page] twice."""
    here = pages_in_use(state)
    words = torch.stack([mean, recent], -1).to(torch.bfloat16).view(torch.int32).squeeze(-1)
    state.arena.view(torch.int32)[_where(state, layout, "statistics", 4)[here]] = words[here]


def value_lengths(state: State, layout: Layout) -> Tensor:
    """Length of every value, to the few per cent in which codes differ in theirs. Shapes: -> float32[B, H, P, page]."""
    scale = state.arena.view(torch.float16)[_where(state, layout, "v_scale", 2)].float()
    return scale * state.exact_v.shape[-1] ** 0.5


def _where(state: State, layout: Layout, name: str, itemsize: int) -> Tensor:
    """Where a field of each slot lies in the arena, counted in items. Shapes: -> int64[B, H, P, page]."""
    dims = state.exact_k.shape[-1], state.exact_v.shape[-1], _itemsize(state)
    begin, step = _field(layout, dims, name, itemsize, state.table.device)
    at = begin[state.tiers.long()] + state.table.long().clamp(min=0) * UNIT
    at = at.unsqueeze(-1) + torch.arange(layout.page, device=at.device) * step
    return (at // itemsize).clamp(max=state.arena.numel() // itemsize - 1)  # of no page, any place there is


@lru_cache(64)
def _field(layout: Layout, dims: tuple, name: str, itemsize: int, device: torch.device) -> tuple[Tensor, int]:
    """Where a field begins in a page of each tier, and how far one token's is from the next's.

    Units: bytes. Shapes: -> int64[tiers].
    """
    beside = itemsize if name == "v_scale" and layout.tiled else 0  # of one token, the radius comes before it
    begin = []
    for tier in layout.tiers:
        widths = dict(zip(Pages._fields, layout.fields(tier, *dims).widths))
        before = sum(widths[field] for field in takewhile(name.__ne__, Pages._fields))
        begin.append((before - beside) * layout.page + beside)
    return torch.tensor(begin, device=device), itemsize + beside


def encode_span(k: Tensor, v: Tensor, pair_scale: Tensor, layout: Layout, tier: Tier) -> tuple[Pages, KeySpan | None]:
    """One span's exact keys and values as the fields of its pages.

    Shapes: ``k`` / ``v`` [..., span, D / Dv], ``pair_scale`` float32[..., D] -> fields uint8[..., pages, page, bytes].
    """
    lead, span = k.shape[:-2], k.shape[-2]
    none = torch.empty(*lead, span, 0, dtype=torch.uint8, device=k.device)
    coded = None
    if tier.k_bits == PASSTHROUGH:
        k_field, radius, anchor = as_bytes(k), none, none
    else:
        rot = layout.rotation(k.shape[-1], k.device)
        lowest = min(t.k_bits for t in layout.tiers)
        coded = encode_keys(
            k.float(), pair_scale, rot, layout.code, tier.k_bits, lowest_bits=lowest, absolute_radius=layout.tiled
        )
        k_field, radius = coded.codes, coded.radius
        # a page's tokens share its first span; none is needed where a page lies within one, as tiled ones do, or where
        # positions say it
        indexed = not (layout.tiled or layout.kept)
        anchor = torch.zeros(*lead, span, 1, dtype=torch.uint8, device=k.device) if indexed else none
    if tier.v_bits == PASSTHROUGH:
        v_field, v_scale = as_bytes(v), none
    else:
        v_field, scale = encode_values(v.float(), layout.rotation(v.shape[-1], v.device), tier.v_bits)
        v_scale = as_bytes(scale.unsqueeze(-1))
    parts = (
        part.unflatten(-2, (layout.pages_per_span, layout.page))
        for part in (k_field, v_field, radius, v_scale, anchor, none, none)
    )
    return Pages(*parts), coded


def span_slots(state: State, layout: Layout, positions: Tensor, starts: Tensor) -> Tensor:
    """Which row of ``anchors`` belongs to each position. Shapes: ``positions`` [B, H, ...], ``starts`` [B] -> int64."""
    starts = starts.view(-1, *[1] * (positions.dim() - 1))
    count = max(1, state.anchors.shape[2])
    return torch.div(positions - starts - layout.sink, layout.span, rounding_mode="floor").clamp(min=0) % count


def radii(pages: Pages, tops: Tensor) -> Tensor:
    """Radius of each token. Shapes: ``tops`` float32[..., P, page] -> float32[..., P, page]."""
    return radius_value(pages.radius, tops)
