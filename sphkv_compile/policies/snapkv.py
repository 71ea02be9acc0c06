"""The tokens that recent queries look at, and their neighbours: SnapKV (arXiv 2404.14469), at every plan anew."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.policies.base import Held, Policy
from sphkv_compile.policies.choice import by_position, evict

KERNEL = 5
"""Tokens over which attention is averaged."""


class SnapKV(Policy):
    """Needs a budget and what recent queries have paid."""

    name: ClassVar[str] = "snapkv"

    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """Shapes: -> uint8[B, H, P, page]. Raises: ValueError: no budget, no prices, or no statistics."""
        if held.recent is None:
            raise ValueError(f"policy {self.name!r} needs the recent attention of each token; expected Held.recent")
        order = by_position(held)
        paid = torch.where(held.positions >= 0, held.recent, 0.0).flatten(2).gather(-1, order)
        paid = F.avg_pool1d(paid, KERNEL, stride=1, padding=KERNEL // 2)
        worth = torch.empty_like(paid).scatter_(-1, order, paid)
        return evict(held, worth.view(held.positions.shape), budget, self.name)
