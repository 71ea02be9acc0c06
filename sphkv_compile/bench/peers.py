"""What else serves a decode step over a KV cache: one function per peer, timed in the same run as ours.

The last two need no package: they are what a user writes who quantises a cache and leaves the rest to Inductor.
A peer that is not installed, or refuses the shape, raises, and the record says so.

Shapes: B rows, L cached tokens, H kv heads, G query heads each, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.testing import clock

GROUP = 64
"""Values that share a scale and an offset in the int4 cache."""
PAGE = 16
"""Tokens of a page of FlashInfer's cache."""


@dataclass
class Peer:
    """Calls over different copies of a cache.

    Args:
        bytes: that one call has to read.
        error: against float64 over what the cache decodes to, where the cache is ours to decode.
    """

    tier: str
    calls: Sequence[Callable[[], Any]]
    bytes: int
    error: float | None = None


def flex(b: int, length: int, h: int, g: int, d: int) -> Peer:
    """torch's FlexAttention, compiled, on a dense cache."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    q, caches = _query(b, h * g, 1, d), _caches(b, h, length, d)
    return _peer("bf16", caches, lambda k, v: attend(q, k, v, enable_gqa=True))


def flash3(b: int, length: int, h: int, g: int, d: int) -> Peer:
    """FlashAttention 3."""
    from flash_attn_interface import flash_attn_with_kvcache

    return _flash(flash_attn_with_kvcache, b, length, h, g, d)


def flash2(b: int, length: int, h: int, g: int, d: int) -> Peer:
    """FlashAttention 2."""
    from flash_attn import flash_attn_with_kvcache

    return _flash(flash_attn_with_kvcache, b, length, h, g, d)


def _flash(attend: Callable, b: int, length: int, h: int, g: int, d: int) -> Peer:
    q, held = _query(b, 1, h * g, d), torch.full((b,), length, dtype=torch.int32, device="cuda")
    return _peer("bf16", _caches(b, length, h, d), lambda k, v: attend(q, k, v, cache_seqlens=held))


def flashinfer_fp8(b: int, length: int, h: int, g: int, d: int) -> Peer:
    """FlashInfer over an fp8 cache in pages."""
    import flashinfer

    pages, dtype = length // PAGE, torch.float8_e4m3fn
    indices = torch.arange(b * pages, dtype=torch.int32, device="cuda")
    starts = torch.arange(b + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((b,), PAGE, dtype=torch.int32, device="cuda")
    room = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        room, "NHD", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=starts,
        paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    wrapper.plan(starts, indices, last, h * g, h, d, PAGE, q_data_type=torch.bfloat16, kv_data_type=dtype)
    caches = [tuple(x.to(dtype) for x in pair) for pair in _caches(b * pages, PAGE, h, d, scale=2)]
    q = _query(b, h * g, d)
    return _peer("fp8", caches, lambda k, v: wrapper.run(q, (k, v), k_scale=1.0, v_scale=1.0))


def bitdecoding(b: int, length: int, h: int, g: int, d: int) -> Peer:
    """BitDecoding at 4 bits, keys by channel."""
    from bit_decode import fwd_kvcache_int, kvcache_pack_int

    group, bits, per_word = 128, 4, 4
    ends = torch.arange(b + 1, dtype=torch.int32, device="cuda") * length
    q, packed = _query(b, 1, h * g, d).half(), []
    for k, v in _caches(b, length, h, d, scale=4):
        k_pack = torch.zeros(b, length // per_word, h, d, dtype=torch.uint16, device="cuda")
        k_params = torch.zeros(b, length // group, h, d, dtype=torch.float32, device="cuda")
        v_pack = torch.zeros(b, length, h, d // per_word, dtype=torch.uint16, device="cuda")
        v_params = torch.zeros(b, d // group, h, length, dtype=torch.float32, device="cuda")
        mode = None, ends, length, "k-channel", group, bits
        kvcache_pack_int(k.half(), k_pack, k_params, v.half(), v_pack, v_params, *mode)
        packed.append((k_pack, k_params, v_pack, v_params))
    return _peer("int4", packed, lambda *x: fwd_kvcache_int(q, *x, None, d**-0.5, "k-channel", group, bits))


# ---- no package: a quantised cache, and Inductor


def fp8_inductor(b: int, length: int, h: int, g: int, d: int) -> Peer:
    """An e4m3 cache with one scale a tensor, dequantised inside a compiled attention."""
    caches = [tuple(y for x in pair for y in fp8(x)) for pair in _caches(b, h, length, d, scale=2)]
    return _compiled("fp8", from_fp8, 2, _query(b, h * g, 1, d), caches)


def int4_inductor(b: int, length: int, h: int, g: int, d: int) -> Peer:
    """A 4-bit cache with a scale and an offset for 64 values, dequantised inside a compiled attention."""
    caches = [tuple(y for x in pair for y in int4(x)) for pair in _caches(b, h, length, d, scale=4)]
    return _compiled(f"int4 g{GROUP}", from_int4, 3, _query(b, h * g, 1, d), caches)


def fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and their scale. Shapes: [..., D] -> e4m3[..., D], float32[]."""
    scale = x.abs().amax().float() / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def from_fp8(code: Tensor, scale: Tensor) -> Tensor:
    """The inverse, in bfloat16."""
    return (code.float() * scale).bfloat16()


def int4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale, offset. Shapes: [..., D] -> uint8[..., D / 2], bfloat16[..., D / GROUP, 1] twice.

    The first half of a row lies in the low nibbles, the second in the high ones.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).bfloat16(), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().clamp(min=1e-6)
    code = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    first, second = code.chunk(2, -1)
    return first | second << 4, scale, low


def from_int4(code: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The inverse, in bfloat16."""
    wide = torch.cat([code & 15, code >> 4], -1).unflatten(-1, (-1, GROUP))
    return (wide * scale + low).flatten(-2)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention. Shapes: q [B, H * G, 1, D], k / v [B, H, L, D]."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def by_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as sums of products, into which Inductor can fuse what makes k and v. Shapes: as :func:`by_sdpa`."""
    b, h, _, d = k.shape
    grouped = q.view(b, h, -1, 1, d).to(torch.promote_types(q.dtype, torch.float32)) * d**-0.5
    weight = (grouped * k.unsqueeze(2)).sum(-1).softmax(-1)
    return (weight.unsqueeze(-1) * v.unsqueeze(2)).sum(-2).view(q.shape).to(q.dtype)


def _compiled(tier: str, decode: Callable, parts: int, q: Tensor, caches: list[tuple[Tensor, ...]]) -> Peer:
    """The faster of the two ways to write it."""
    found = []
    for attend in (by_sdpa, by_sums):

        @torch.compile(dynamic=False)
        def step(q, *cache, attend=attend):
            return attend(q, decode(*cache[:parts]), decode(*cache[parts:]))

        peer = _peer(f"{tier}, {attend.__name__}", caches, lambda *cache, step=step: step(q, *cache))
        found.append((clock.timed(peer.calls[:1]), peer))
    peer = min(found, key=lambda pair: pair[0])[1]
    peer.error = _error(peer.calls[0](), q, decode, caches[0], parts)
    return peer


def _error(out: Tensor, q: Tensor, decode: Callable, cache: tuple[Tensor, ...], parts: int) -> float:
    """Of the first row's first kv head, against float64."""
    first = [x[:1, :1] if x.dim() else x for x in cache]
    k, v = decode(*first[:parts]).double(), decode(*first[parts:]).double()
    group = q.shape[1] // cache[0].shape[1]
    expected = by_sums(q[:1, :group].double(), k, v)
    return float((out[:1, :group].double() - expected).norm() / expected.norm())


def _query(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _caches(*shape: int, scale: int = 1) -> list[tuple[Tensor, ...]]:
    """Keys and values, as often as needed. Args: scale: how much smaller the cache becomes that is made of them."""
    nbytes = 4 * torch.Size(shape).numel() // scale
    return [tuple(_query(*shape) for _ in range(2)) for _ in range(clock.copies(nbytes))]


def _peer(tier: str, caches: Sequence[tuple[Tensor, ...]], call: Callable) -> Peer:
    return Peer(tier, [partial(call, *cache) for cache in caches], sum(x.nbytes for x in caches[0]))


PEERS: dict[str, Callable[[int, int, int, int, int], Peer]] = {
    "FlexAttention": flex,
    "FlashAttention 3": flash3,
    "FlashAttention 2": flash2,
    "FlashInfer fp8": flashinfer_fp8,
    "BitDecoding": bitdecoding,
    "fp8 cache, Inductor": fp8_inductor,
    "int4 cache, Inductor": int4_inductor,
}
"""Name -> what prepares its calls for a shape B, L, H, G, D."""
