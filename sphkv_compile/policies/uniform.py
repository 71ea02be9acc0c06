"""All tokens of a head at one tier: the widest at which they fit, or the newest of them at the narrowest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sphkv_compile.policies.base import DROP, Held, Policy
from sphkv_compile.policies.choice import choose


class Uniform(Policy):
    """Needs a budget and nothing else."""

    name: ClassVar[str] = "uniform"

    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """Shapes: -> uint8[B, H, P, page]. Raises: ValueError: no budget, or no prices."""
        choices = len(held.menu)
        age = (held.length.view(-1, 1, 1, 1) - held.positions).clamp(min=1)
        losses = torch.full((1, choices + 1), torch.inf, device=age.device)
        losses[:, 0], losses[:, 1] = 1, 0  # the narrowest or none
        losses = losses.expand(*held.tiers.shape[:2], -1, -1)
        newest = choose(held, 1 / age.float(), torch.zeros_like(age, dtype=torch.int64), losses, budget, self.name)

        pages = -(-(held.positions >= 0).sum((2, 3)) // held.positions.shape[-1])
        prices = torch.tensor(held.prices, device=pages.device)
        fits = pages.unsqueeze(-1) * prices <= budget.unsqueeze(-1)  # type: ignore[union-attr]  # choose() asked for it
        widest = fits.int().argmax(-1).to(torch.uint8).view(*pages.shape, 1, 1)
        whole = torch.maximum(widest, held.tiers.unsqueeze(-1)).expand_as(held.positions)
        return torch.where(fits.any(-1).view(*pages.shape, 1, 1) & (newest != DROP), whole, newest)
