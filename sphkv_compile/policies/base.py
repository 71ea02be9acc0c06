"""The interface of a retention policy: which tokens stay, and at which tier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sphkv_compile.spec import Tier

DROP = 255
"""The tier index that means *do not keep*."""


@dataclass(frozen=True)
class Held:
    """What a policy may look at: the coded tokens of one site.

    Shapes: ``positions`` int32[B, H, P, page], -1 where a slot is empty; ``tiers`` uint8[B, H, P]; ``length`` int64[B],
    one past the newest position of each row.
    """

    positions: Tensor
    tiers: Tensor
    length: Tensor
    menu: tuple[Tier, ...]


class Policy(ABC):
    """Decides between steps; the compiled graph never sees it."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, held: Held, budget: int | None) -> Tensor:
        """The tier of each coded token, an index into the menu, or :data:`DROP`.

        Args:
            budget: bytes that the pages of this site may occupy; None: no limit.

        Shapes: -> uint8[B, H, P, page]; ties are broken by position, so that every rank decides alike.
        """
