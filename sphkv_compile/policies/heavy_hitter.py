"""The tokens that got the most attention over their life: H2O (arXiv 2306.14048), its sums divided by the queries that
saw the token, without which the oldest win."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sphkv_compile.policies.base import Held, Policy
from sphkv_compile.policies.choice import evict


class HeavyHitter(Policy):
    """Needs a budget and what tokens have got."""

    name: ClassVar[str] = "heavy_hitter"

    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """Shapes: -> uint8[B, H, P, page]. Raises: ValueError: no budget, no prices, or no statistics."""
        if held.mean is None:
            raise ValueError(f"policy {self.name!r} needs the mean attention of each token; expected Held.mean")
        return evict(held, held.mean, budget, self.name)
