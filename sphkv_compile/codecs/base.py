"""The interface that every key codec implements: a direction becomes angle codes, and logits come back from them.

A codec sees only the *direction* of a residual that the pipeline has already centred, scaled and rotated
(:mod:`sphkv_compile.codecs.keys`); the radius is the pipeline's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Codec(ABC):
    """Angle codes of a direction on the sphere.

    Shapes: D is head_dim; leading dimensions are free and kept.
    Units: ``bits`` is the width per element; stored bytes per token are ``code_bytes(D, bits)``.
    """

    name: ClassVar[str]
    nested: ClassVar[bool] = False
    """Whether a lower width's codes are the high bits of a higher width's, so that demotion is exact."""
    identity: ClassVar[str]
    """The exact logit identity, as one line of mathematics; tests prove it with sympy."""

    bound: ClassVar[str]
    """The bound on the logit error dl that goes with the identity; see :mod:`sphkv_compile.codecs.bounds`."""

    @abstractmethod
    def code_bytes(self, dim: int, bits: int) -> int:
        """Bytes that one token's codes occupy."""

    @abstractmethod
    def encode(self, x: Tensor, bits: int) -> Tensor:
        """Codes of the direction of ``x``.

        Shapes: ``x`` float[..., D] -> uint8[..., code_bytes(D, bits)]. The norm of ``x`` is ignored; zero is legal.
        """

    @abstractmethod
    def decode(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        """The code vector c, whose norm is near sqrt(D); the key residual is radius * c.

        Shapes: uint8[..., code_bytes] -> float32[..., D].
        """

    @abstractmethod
    def logits(self, q: Tensor, codes: Tensor, bits: int) -> Tensor:
        """q . c through this codec's own angle identity, without building c: the paper's literal form.

        Shapes: ``q`` float32[..., T, D], ``codes`` uint8[..., N, code_bytes] -> float32[..., T, N].
        """

    def demote(self, codes: Tensor, dim: int, from_bits: int, to_bits: int) -> Tensor:
        """Codes at a lower width, taken from the codes alone and equal to those of direct encoding.

        Raises:
            ValueError: this codec does not nest, or the width would rise.
        """
        raise ValueError(f"codec {self.name!r} does not nest; expected 'axis_cosine' where codes are demoted")
