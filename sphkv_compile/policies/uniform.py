"""All tokens of a head at one tier: the widest at which they fit, or the newest of them at the narrowest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sphkv_compile.policies.base import DROP, Held, Policy
from sphkv_compile.policies.choice import at_one_tier, choose


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

        whole, fits = at_one_tier(held, budget)  # type: ignore[arg-type]  # choose() asked for it
        return torch.where(fits & (newest != DROP), whole, newest)
