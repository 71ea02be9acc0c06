"""Our codec, exactly as the cache applies it: the package's own functions, no second implementation."""

from __future__ import annotations

from torch import Tensor

from sphkv_compile.codecs import get_codec
from sphkv_compile.codecs.keys import decode_keys, encode_keys, radius_bytes
from sphkv_compile.codecs.rotation import rotation
from sphkv_compile.codecs.scales import pair_scale
from sphkv_compile.codecs.values import decode_values, encode_values
from sphkv_compile.eval.methods import LayerMoments, Method
from sphkv_compile.spec import CacheSpec


class Ours(Method):
    """Spherical codes with span anchors and online pair scales.

    Args:
        k_bits, v_bits: code widths.
        rope: the model's RoPE layout, for :func:`~sphkv_compile.codecs.scales.pair_scale`.
        codec: how a key's direction is coded.
    """

    name = "sphkv"

    def __init__(self, k_bits: int, v_bits: int, rope: str | None = "half", codec: str = "axis_cosine") -> None:
        self.k_bits, self.v_bits, self.rope, self.codec = k_bits, v_bits, rope, get_codec(codec)

    def keys(self, spans: Tensor, seen: LayerMoments) -> Tensor:
        dim = spans.shape[-1]
        rot = rotation(dim).to(spans.device)
        scale = pair_scale(seen.k, seen.q, self.rope, dim).to(spans.device)[:, None]
        coded = encode_keys(spans, scale, rot, self.codec, self.k_bits)
        return decode_keys(coded, dim, scale, rot, self.codec, self.k_bits)

    def values(self, spans: Tensor) -> Tensor:
        rot = rotation(spans.shape[-1]).to(spans.device)
        codes, scale = encode_values(spans, rot, self.v_bits)
        return decode_values(codes, scale, spans.shape[-1], rot, self.v_bits)

    def stored_bits(self, dim: int, span: int) -> tuple[float, float]:
        radius, index = 8 * radius_bytes(self.k_bits), 8  # per token; the index names the token's anchor
        row = 8 * dim + 32  # per span: int8 anchor, its bf16 step, the bf16 radius unit
        place = 32 + 40 / CacheSpec().page  # a position per token, offset and tier per page; keys and values share them
        keys = 8 * self.codec.code_bytes(dim, self.k_bits) + radius + index + row / span + place
        values = 8 * self.codec.code_bytes(dim, self.v_bits) + 16
        return keys / dim, values / dim
