"""KIVI-style reference: asymmetric integers, keys grouped along tokens per channel, values along channels per token.

Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_compile.eval.methods import LayerMoments, Method


class Kivi(Method):
    """``bits`` per element, one float16 step and one float16 zero per group of ``group`` elements.

    A value group never crosses a token, so it holds at most head_dim elements.

    Raises:
        ValueError: a group that is no divisor of a span's tokens or of head_dim (when coding).
    """

    def __init__(self, k_bits: int, v_bits: int, group: int) -> None:
        self.name, self.k_bits, self.v_bits, self.group = f"kivi-g{group}", k_bits, v_bits, group

    def keys(self, spans: Tensor, seen: LayerMoments) -> Tensor:
        return integers(spans.mT, self.k_bits, self.group).mT

    def values(self, spans: Tensor) -> Tensor:
        return integers(spans, self.v_bits, min(self.group, spans.shape[-1]))

    def stored_bits(self, dim: int, span: int) -> tuple[float, float]:
        return self.k_bits + 32 / self.group, self.v_bits + 32 / min(self.group, dim)


def integers(x: Tensor, bits: int, group: int) -> Tensor:
    """Round to ``2**bits`` equal steps between each group's minimum and maximum, and back.

    Shapes: float32[..., E] -> the same; a group is ``group`` neighbours of the last dimension.

    Raises:
        ValueError: the last dimension is no multiple of ``group``.
    """
    if x.shape[-1] % group:
        raise ValueError(f"group={group}: expected a divisor of {x.shape[-1]}")
    groups = x.unflatten(-1, (-1, group))
    zero = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - zero) / (2**bits - 1)
    zero, step = zero.half().float(), step.half().float().clamp(min=torch.finfo(torch.float16).smallest_normal)
    codes = ((groups - zero) / step).round().clamp(0, 2**bits - 1)
    return (codes * step + zero).flatten(-2)
