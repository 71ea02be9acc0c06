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
    """What a policy may look at: the coded tokens of one site. What a site does not know is None.

    Args:
        positions: of each token, -1 where a slot is empty.
        tiers: of each page, an index into ``menu``, which is widest first.
        length: one past the newest position of each row.
        prices: bytes of a page of each tier.
        fresh: tokens that no plan has seen: they are at the widest tier because they were coded there, not because it
            was chosen.
        mean, recent: softmax weight that the token got from a query head, over its life and lately.
        expected: the same, as the head's queries promise it for the next steps.
        value_norm: length of the token's value.
        kappa: variance of the head's logits at unit relative key error (:mod:`sphkv_compile.runtime.certificate`).

    Shapes: int32[B, H, P, page], uint8[B, H, P], int64[B], then ``fresh`` bool[B, H, P, page], float32[B, H, P, page]
    each, and ``kappa`` float32[B, H].
    """

    positions: Tensor
    tiers: Tensor
    length: Tensor
    menu: tuple[Tier, ...]
    prices: tuple[int, ...] = ()
    fresh: Tensor | None = None
    mean: Tensor | None = None
    recent: Tensor | None = None
    expected: Tensor | None = None
    value_norm: Tensor | None = None
    kappa: Tensor | None = None


class Policy(ABC):
    """Decides between steps; the compiled graph never sees it."""

    name: ClassVar[str]
    shares: ClassVar[bool] = False
    """Whether heads get bytes by what they would lose (:mod:`sphkv_compile.policies.shares`), or all the same."""
    expects: ClassVar[bool] = False
    """Whether it asks for ``Held.expected``, which costs as much as all that is observed."""

    @abstractmethod
    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """The tier of each coded token, an index into the menu not smaller than its own, or :data:`DROP`.

        Args:
            budget: bytes that the pages of each row and kv head may occupy; None: no limit.

        Shapes: int64[B, H] -> uint8[B, H, P, page]; ties are broken by position, so that every rank decides alike.
        """
