"""A cache that kept some tokens at each of several tiers, put together from caches that hold them all at one.

The runtime gets there by planning; a test of what reads such a cache should not depend on that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sphkv_compile.ops.pages import Pages, as_bytes, read_pages, write_pages
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import SPANS, START, State


def retained(uniform: list[tuple[State, Layout]], choice: Tensor, seed: int = 0) -> tuple[State, Layout]:
    """A state of pages of kept tokens, in random order within a tier and at random places of the arena.

    Args:
        uniform: the same tokens once at each tier of the menu, widest first.

    Shapes: ``choice`` int[B, H, spans * span]: each coded token's tier, or -1 where it was dropped.
    """
    (first, form), tiers = uniform[0], tuple(layout.tiers[0] for _, layout in uniform)
    layout = replace(form, tiers=tiers, kept=True)
    generator = torch.Generator().manual_seed(seed)
    batch, heads, slots = first.table.shape
    device = first.table.device
    sizes = first.exact_k.shape[-1], first.exact_v.shape[-1], (first.exact_k.element_size(),) * 2
    units = [layout.page_bytes(tier, *sizes) // UNIT for tier in tiers]
    place = torch.randperm(batch * heads * slots, generator=generator) * max(units)
    state = first._replace(
        arena=torch.zeros(batch * heads * slots * max(units) * UNIT, dtype=torch.uint8, device=device),
        table=torch.full_like(first.table, -1),
        tiers=torch.zeros_like(first.tiers),
        positions=first.positions[:, :, :0],
        held=torch.zeros(batch, heads, len(tiers), dtype=torch.int32, device=device),
    )
    fields = [read_pages(s, own, own.tiers[0], s.table) for s, own in uniform]
    taken = 0
    for b in range(batch):
        begin = int(first.rows[b, START]) + form.sink
        coded = int(first.rows[b, SPANS]) * form.span
        for h in range(heads):
            slot = 0
            for index in reversed(range(len(tiers))):
                chosen = (choice[b, h, :coded].cpu() == index).nonzero().flatten()
                chosen = chosen[torch.randperm(len(chosen), generator=generator)]
                count = -(-len(chosen) // form.page)
                if not count:
                    continue
                at = torch.zeros(count * form.page, dtype=torch.int64)
                at[: len(chosen)] = chosen
                position = torch.full((count * form.page,), -1, dtype=torch.int32)
                position[: len(chosen)] = (chosen + begin).int()
                offsets = place[taken : taken + count].int().to(device)
                held = Pages(*(x[b, h].flatten(0, 1)[at.to(device)] for x in fields[index]))
                position = as_bytes(position.unsqueeze(-1).to(device))
                none = held.anchor[:, :0]  # a position says which it is
                held = held._replace(anchor=none, position=position, statistics=torch.zeros_like(position))
                write_pages(state, layout, tiers[index], offsets, Pages(*(x.unflatten(0, (count, -1)) for x in held)))
                state.table[b, h, slot : slot + count] = offsets
                state.tiers[b, h, slot : slot + count] = index
                state.held[b, h, index] = count
                slot, taken = slot + count, taken + count
    return state, layout
