"""From what tokens are worth to tiers: the part that policies share."""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_compile.policies.base import DROP, Held
from sphkv_compile.policies.solver import Prices, allocate


def choose(held: Held, worth: Tensor, kinds: Tensor, losses: Tensor, budget: Tensor | None, name: str) -> Tensor:
    """The tier of each token, or the drop, so that the loss is least under every head's budget. Of equal tokens those
    stay that come first in the tables.

    Args:
        worth: of each coded token, 0 or more.
        kinds: which row of ``losses`` a token goes by.
        losses: of each choice, the drop and then the narrowest tier first, in units of a token's worth.
        name: of the policy, for the message.

    Shapes: ``worth`` float32[B, H, P, page], ``kinds`` int64[B, H, P, 1 or page], ``losses`` float32[B, H, kinds, tiers
    + 1], ``budget`` int64[B, H] -> uint8[B, H, P, page].

    Raises:
        ValueError: no budget, or no prices.
    """
    if budget is None or len(held.prices) != len(held.menu):
        have = "no budget" if budget is None else f"{len(held.prices)} prices"
        raise ValueError(f"policy {name!r}: {have}; expected a budget, and a price for each of {len(held.menu)} tiers")
    b, h, _, page = held.positions.shape
    choices, there = len(held.menu), held.positions >= 0
    worth, kinds = torch.where(there, worth, -1.0), kinds.expand_as(held.positions)
    prices = Prices((0, *reversed(held.prices)), page)
    losses = losses.flatten(0, 1)
    chosen = allocate(worth.reshape(b * h, -1), kinds.reshape(b * h, -1), losses, prices, budget.flatten())
    return torch.where(chosen == 0, DROP, choices - chosen).to(torch.uint8).view(held.positions.shape)


def by_position(held: Held) -> Tensor:
    """Which slot holds each token, the oldest first, empty slots last. Shapes: -> int64[B, H, P * page]."""
    none = torch.iinfo(torch.int32).max
    return torch.where(held.positions >= 0, held.positions, none).flatten(2).argsort(-1)


def at_one_tier(held: Held, budget: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of a head at the widest tier at which its bytes hold them all, and whether there is such a tier.

    Shapes: ``budget`` int64[B, H] -> uint8[B, H, P, page], bool[B, H, 1, 1].
    """
    pages = -(-(held.positions >= 0).sum((2, 3)) // held.positions.shape[-1])
    fits = pages.unsqueeze(-1) * torch.tensor(held.prices, device=pages.device) <= budget.unsqueeze(-1)
    widest = fits.int().argmax(-1).to(torch.uint8)
    plan = torch.maximum(widest[..., None, None], held.tiers.unsqueeze(-1)).expand_as(held.positions)
    return plan, fits.any(-1)[..., None, None]


def evict(held: Held, worth: Tensor, budget: Tensor | None, name: str) -> Tensor:
    """The most worthy tokens as they are coded, nothing of the others: shapes and errors as for :func:`choose`."""
    choices = len(held.menu)
    losses = torch.full((choices, choices + 1), torch.inf, device=worth.device)
    losses[:, 0] = 1
    own = torch.arange(choices, device=worth.device)
    losses[own, choices - own] = 0
    losses = losses.expand(*held.tiers.shape[:2], -1, -1)
    return choose(held, worth, held.tiers.long().unsqueeze(-1), losses, budget, name)
