"""Moves: pages of kept tokens are put together from tokens of other pages, code to code.

That is compaction where a token keeps its tier, demotion where it comes from a wider one. No key or value is decoded on
the way: low bits of a code are dropped, and a radius is rescaled by the codes' lengths (codecs: keys, values).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_compile.codecs.keys import KeySpan, demote_keys
from sphkv_compile.codecs.values import demote_values
from sphkv_compile.ops.device import gpu
from sphkv_compile.ops.pages import Pages, as_bytes, read_pages, span_slots, write_pages
from sphkv_compile.spec import PASSTHROUGH, Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.moves import Moves
from sphkv_compile.storage.state import START, State


def move(state: State, layout: Layout, moves: Moves, fused: bool = True) -> None:
    """Write the new pages; everything is read before anything is written. Tables are the caller's.

    Args:
        fused: whether a GPU's kernels may do it.

    Raises:
        ValueError: the layout holds no kept tokens, or its tiers do not nest.
    """
    check_moves(layout)
    if not moves.offsets.numel():
        return
    if fused and (kernels := gpu("moving", layout, state.arena.device)) is not None:
        kernels.move(state, layout, moves)
        return
    written, first = [], 0
    for index, (tier, count) in enumerate(zip(layout.tiers, moves.counts)):
        mine = slice(first, first + count)
        first += count
        if count:
            written.append((tier, moves.offsets[mine], _gathered(state, layout, moves, index, mine)))
    for tier, offsets, pages in written:
        write_pages(state, layout, tier, offsets, pages)


def check_moves(layout: Layout) -> None:
    """Raises: ValueError: the layout holds no kept tokens, or its tiers do not nest."""
    if not layout.kept:
        raise ValueError("moves are of kept tokens; expected a layout with kept=True")
    if len(layout.tiers) > 1 and not layout.code.nested:
        raise ValueError(f"codec {layout.codec!r} does not nest: with several tiers expected 'axis_cosine'")
    if len(layout.tiers) > 1 and any(PASSTHROUGH in (tier.k_bits, tier.v_bits) for tier in layout.tiers):
        raise ValueError(f"{'/'.join(map(str, layout.tiers))}: no code is made from 16 bits; expected 8 or less in all")


def _gathered(state: State, layout: Layout, moves: Moves, index: int, mine: slice) -> Pages:
    """The new pages of tier ``index``. Shapes: -> fields uint8[count, page, bytes]."""
    tier, sources, count = layout.tiers[index], moves.sources[mine], mine.stop - mine.start
    sizes = state.exact_k.shape[-1], state.exact_v.shape[-1]
    itemsize = state.exact_k.element_size(), state.exact_v.element_size()
    shape, device = (count, layout.page), state.arena.device
    widths = layout.fields(tier, *sizes, itemsize).widths
    out = Pages(*(torch.zeros(*shape, width, dtype=torch.uint8, device=device) for width in widths))
    out.position.fill_(255)  # -1: an empty slot
    for wider in range(index + 1):
        here = (sources >= 0) & (moves.tiers[mine] == wider)
        pages, which = sources[here].unique(return_inverse=True)
        read = read_pages(state, layout, layout.tiers[wider], pages)
        tokens = Pages(*(part[which, moves.slots[mine][here].long()] for part in read))
        owners = moves.owners[mine].unsqueeze(1).expand(*shape, 2)[here]
        tokens = _demoted(state, layout, layout.tiers[wider], tier, tokens, owners)
        for part, new in zip(out, tokens):
            part[here] = new
    return out


def _demoted(state: State, layout: Layout, wide: Tier, narrow: Tier, tokens: Pages, owners: Tensor) -> Pages:
    """Shapes: fields uint8[n, bytes], ``owners`` int32[n, 2]."""
    k_dim, v_dim = state.exact_k.shape[-1], state.exact_v.shape[-1]
    if wide == narrow:
        return tokens
    row, head = owners.long().unbind(1)
    position = tokens.position.contiguous().view(torch.int32).squeeze(-1)
    slot = span_slots(state, layout, position, state.rows[row, START])
    top = state.span_scales[row, head, slot, 1].float()  # 1 where radii are absolute
    none = torch.empty(0, device=top.device)
    token = KeySpan(tokens.k.unsqueeze(-2), tokens.radius.unsqueeze(-2), top, none, none)
    keys = demote_keys(token, k_dim, layout.code, wide.k_bits, narrow.k_bits, layout.tiled)
    scale = tokens.v_scale.contiguous().view(torch.float16).squeeze(-1)
    v, scale = demote_values(tokens.v, scale, v_dim, wide.v_bits, narrow.v_bits)
    return tokens._replace(
        k=keys.codes.squeeze(-2), radius=keys.radius.squeeze(-2), v=v, v_scale=as_bytes(scale.unsqueeze(-1))
    )
