"""A random cache that kept a share of its tokens, at several tiers, for :mod:`sphkv_compile.bench.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import UNIT, Layout

SKEW = 0.5
"""Heads keep from 1 - SKEW to 1 + SKEW of the shares: retention never gives them equal ones."""


@dataclass(frozen=True)
class Menu:
    """Tiers, widest first, and the share of all coded tokens that each holds: ``K4V4:0.1/K4V2:0.4``."""

    tiers: tuple[Tier, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Menu:
        """Raises: ValueError: a share is missing, or they exceed one."""
        pairs = [part.partition(":") for part in text.split("/")]
        shares = tuple(float(share or "nan") for _, _, share in pairs)
        if not 0 < sum(shares) * (1 + SKEW) <= 1:
            raise ValueError(
                f"{text!r}: expected a share for each tier, {1 / (1 + SKEW):.2f} at most in all since heads keep "
                "unequal ones, as in 'K4V4:0.1/K4V2:0.4'"
            )
        return cls(tuple(Tier.parse(name) for name, _, _ in pairs), shares)

    def __str__(self) -> str:
        return "/".join(f"{tier}:{share:g}" for tier, share in zip(self.tiers, self.shares))


def random_pages(
    menu: Menu, layout: Layout, b: int, h: int, tokens: int, slots: int, d: int, origin: int,
    generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Fields of a state: random tokens of ``tokens``, in random places of the arena.

    Args:
        origin: position of the first coded token.

    Shapes: ``slots`` P of the tables.
    """
    device = generator.device
    draw = torch.rand(b, h, tokens, device=device, generator=generator)
    uneven = torch.linspace(1 - SKEW, 1 + SKEW, h, device=device).view(1, h, 1)
    table = torch.full((b, h, slots), -1, dtype=torch.int32, device=device)
    tiers = torch.zeros(b, h, slots, dtype=torch.uint8, device=device)
    held = torch.zeros(b, h, len(menu.tiers), dtype=torch.int32, device=device)
    blocks: list[Tensor] = []
    below, offset = 0.0, 0
    used = torch.zeros(b, h, dtype=torch.int64)
    for index in reversed(range(len(menu.tiers))):  # the narrowest first, as tables have it
        tier = menu.tiers[index]
        chosen = (draw >= below * uneven) & (draw < (below + menu.shares[index]) * uneven)
        below += menu.shares[index]
        pages = -(-chosen.sum(-1) // layout.page)
        count, size = int(pages.sum()), layout.page_bytes(tier, d, d, (2, 2))
        block = torch.randint(0, 256, (count, size), dtype=torch.uint8, device=device, generator=generator)
        codes, beside = layout.page * d * (tier.k_bits + tier.v_bits) // 8, 4 * layout.page
        scales = (torch.rand(count, layout.page, 2, device=device, generator=generator) + 0.5).half()
        block[:, codes : codes + beside] = scales.view(torch.uint8).view(count, -1)
        order, at = torch.randperm(count, device=device, generator=generator), 0
        for row, head in ((i, j) for i in range(b) for j in range(h)):
            n, slot = int(pages[row, head]), int(used[row, head])
            mine, at = order[at : at + n], at + n
            position = torch.full((n * layout.page,), -1, dtype=torch.int32, device=device)
            kept = chosen[row, head].nonzero().flatten().int() + origin
            position[: kept.numel()] = kept
            block[mine, codes + beside : codes + 2 * beside] = position.view(n, -1).view(torch.uint8)
            table[row, head, slot : slot + n] = (offset + mine * (size // UNIT)).int()
            tiers[row, head, slot : slot + n] = index
            used[row, head] += n
        held[..., index] = pages
        offset += block.numel() // UNIT
        blocks.append(block.flatten())
    return {"arena": torch.cat(blocks), "table": table, "tiers": tiers, "held": held}
