"""The newest tokens beside the sinks, whatever they are worth: StreamingLLM (arXiv 2309.17453)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sphkv_compile.policies.base import Held, Policy
from sphkv_compile.policies.choice import evict


class Window(Policy):
    """Needs a budget and nothing else."""

    name: ClassVar[str] = "window"

    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """Shapes: -> uint8[B, H, P, page]. Raises: ValueError: no budget, or no prices."""
        age = (held.length.view(-1, 1, 1, 1) - held.positions).clamp(min=1)
        return evict(held, 1 / age.float(), budget, self.name)
