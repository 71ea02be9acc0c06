"""The tokens that the queries of a head promise the most attention for the next steps, times the length of their value:
the idea of Expected Attention (arXiv 2510.00636)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sphkv_compile.policies.base import Held, Policy
from sphkv_compile.policies.choice import evict


class ExpectedAttention(Policy):
    """Needs a budget. Where a site's rotary embedding is not known, what queries paid lately stands for what they would
    pay."""

    name: ClassVar[str] = "expected_attention"
    expects: ClassVar[bool] = True

    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """Shapes: -> uint8[B, H, P, page]. Raises: ValueError: no budget, no prices, or no statistics."""
        share = held.recent if held.expected is None else held.expected
        if share is None:
            raise ValueError(
                f"policy {self.name!r} needs the attention of each token; expected Held.expected or Held.recent"
            )
        return evict(held, share if held.value_norm is None else share * held.value_norm, budget, self.name)
