"""A method codes whole spans of keys and values; the evaluation sees only what comes back, and what it cost.

Each compared method is one small file (:mod:`kivi`, :mod:`turboquant`, :mod:`quanto`). None sees which tokens are kept
exact: sinks and window are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerMoments:
    """What a layer has shown before its first span is coded.

    Shapes: float64[HKV, D] each; D is head_dim.
    """

    q: Tensor
    """E of the squared query per dimension (after RoPE) over the first sink + span + window tokens and the group."""
    k: Tensor
    """E of the squared key residual per dimension: first coded span, less its own mean."""


class Method(ABC):
    """Encode and decode in one go.

    Shapes: spans float32[HKV, N, T, D]: N spans of T consecutive tokens.
    """

    name: str
    k_bits: int
    v_bits: int

    @abstractmethod
    def keys(self, spans: Tensor, seen: LayerMoments) -> Tensor:
        """The decoded keys. Shapes: as given."""

    @abstractmethod
    def values(self, spans: Tensor) -> Tensor:
        """The decoded values. Shapes: as given."""

    @abstractmethod
    def stored_bits(self, dim: int, span: int) -> tuple[float, float]:
        """Everything that is stored per key element and per value element: codes, scales, zeros, norms, anchors.

        Units: bits per element.
        """

    def total_bits(self, dim: int, span: int) -> float:
        """Mean over keys and values. Units: bits per element."""
        return sum(self.stored_bits(dim, span)) / 2


class Passthrough(Method):
    """Stores everything as it is: the reference that every other method is held against."""

    name, k_bits, v_bits = "dense", 32, 32

    def keys(self, spans: Tensor, seen: LayerMoments) -> Tensor:
        return spans

    def values(self, spans: Tensor) -> Tensor:
        return spans

    def stored_bits(self, dim: int, span: int) -> tuple[float, float]:
        return 32.0, 32.0
