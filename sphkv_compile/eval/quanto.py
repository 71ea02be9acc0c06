"""What transformers' QuantizedCache stores with its own backend, quanto: asymmetric integers in groups of neighbours.

Where ``optimum-quanto`` is not installed it is not there to measure (``pip install --no-deps optimum-quanto``).
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from sphkv_compile.eval.methods import LayerMoments, Method


def available() -> bool:
    """Whether quanto is installed."""
    return find_spec("optimum") is not None and find_spec("optimum.quanto") is not None


class Quanto(Method):
    """``bits`` per element, and a step and a zero of 16 bits for every ``group`` elements of a head's tokens, as that
    cache has it by default."""

    def __init__(self, bits: int, group: int = 64) -> None:
        self.name, self.k_bits, self.v_bits, self.group = "quanto", bits, bits, group

    def keys(self, spans: Tensor, seen: LayerMoments) -> Tensor:
        return self.values(spans)

    def values(self, spans: Tensor) -> Tensor:
        from transformers.cache_utils import QuantoQuantizedLayer

        layer = QuantoQuantizedLayer(nbits=self.k_bits, q_group_size=self.group)
        tensor = spans.flatten(1, 2).unsqueeze(0)  # [1, H, tokens, D], as a cache has it
        return layer._dequantize(layer._quantize(tensor.contiguous(), layer.axis_key)).view(spans.shape)

    def stored_bits(self, dim: int, span: int) -> tuple[float, float]:
        return self.k_bits + 32 / self.group, self.v_bits + 32 / self.group
