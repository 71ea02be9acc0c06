"""Keep every token at the tier at which it was encoded."""

from __future__ import annotations

from torch import Tensor

from sphkv_compile.policies.base import Held, Policy


class KeepAll(Policy):
    """What holds without a budget, where nobody is asked. Under one, an object of this class drops nothing."""

    name = "keep_all"

    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """Shapes: -> uint8[B, H, P, page]."""
        return held.tiers.unsqueeze(-1).expand_as(held.positions)
