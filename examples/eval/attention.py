"""Attention over a cache that is part exact and part coded, for many queries at once.

A token's span is coded as soon as it is older than the newest ``window`` tokens of the cache, so which keys a query
sees coded depends on the query.

Symbols: S queries, the newest of C cached tokens; the first is at position C - S; G = HQ // HKV.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.eval.attention import visible
from sphkv_compile.eval.methods import LayerMoments, Method
from sphkv_compile.eval.retention import coded_end
from sphkv_compile.spec import CacheSpec


@dataclass
class Prefill:
    """What a dense prefill leaves behind; one entry per layer.

    Shapes: keys and values float32[HKV, C, D]; q_moments float64[HKV, D].
    """

    spec: CacheSpec
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    q_moments: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> Tensor:
        """Plain causal attention that remembers its keys, values and early queries.

        Raises:
            NotImplementedError: a batch above one.
        """
        if q.shape[0] != 1:
            raise NotImplementedError(f"{q.shape[0]} rows: these caches are of batch 1")
        early = q[0, :, : self.spec.sink + self.spec.span + self.spec.window].double().square().mean(1)
        self.keys[layer], self.values[layer] = k[0], v[0]
        self.q_moments[layer] = early.unflatten(0, (k.shape[1], -1)).mean(1)
        mask = None if sliding is None else visible(q.shape[2], k.shape[2], sliding, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )


@dataclass
class CodedRun:
    """Queries after a prefill, under one method; their own keys and values join the cache and are coded in turn."""

    prefill: Prefill
    method: Method

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> Tensor:
        """Each query sees exact sinks and window and decoded spans between."""
        spec, seen = self.prefill.spec, self.prefill.q_moments[layer]
        keys = torch.cat([self.prefill.keys[layer], k[0]], 1)
        values = torch.cat([self.prefill.values[layer], v[0]], 1)
        end = coded_end(keys.shape[1] - 1, spec)
        k_spans, v_spans = (x[:, spec.sink : end].unflatten(1, (-1, spec.span)) for x in (keys, values))
        first = k_spans[:, 0].double()
        moments = LayerMoments(seen, (first - first.mean(1, keepdim=True)).square().mean(1))
        k_hat = self.method.keys(k_spans, moments).flatten(1, 2)
        v_hat = self.method.values(v_spans).flatten(1, 2)
        return attend_mixed(q[0], keys, values, k_hat, v_hat, scaling, sliding, spec)[None]


def attend_mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_hat: Tensor,
    v_hat: Tensor,
    scaling: float,
    sliding: int | None,
    spec: CacheSpec,
) -> Tensor:
    """Attention in which query i sees token j decoded where sink <= j < coded_end(i), and exact elsewhere.

    Only tokens that are coded for some queries and exact for others need both products.

    Shapes: ``q`` [HQ, S, D], ``k``, ``v`` [HKV, C, D], ``k_hat``, ``v_hat`` [HKV, E, D] from token ``sink`` on
        -> [HQ, S, D].
    """
    heads, queries, length = k.shape[0], q.shape[1], k.shape[1]
    ends = torch.tensor([coded_end(i, spec) for i in range(length - queries, length)], device=q.device)
    turning = slice(int(ends[0]), int(ends[-1]))
    is_coded = torch.arange(turning.start, turning.stop, device=q.device) < ends[:, None]

    def overlay(exact: Tensor, decoded: Tensor) -> Tensor:
        return torch.cat([exact[:, : spec.sink], decoded, exact[:, turning.stop :]], 1)

    grouped = q.unflatten(0, (heads, -1)).flatten(1, 2) * scaling
    split = (q.shape[0] // heads, queries)
    logits = (grouped @ overlay(k, k_hat).mT).unflatten(1, split)
    exact = (grouped @ k[:, turning].mT).unflatten(1, split)
    logits[..., turning] = torch.where(is_coded, logits[..., turning], exact)
    logits.masked_fill_(~visible(queries, length, sliding, q.device), float("-inf"))
    p = logits.softmax(-1)
    v_any = overlay(v, v_hat)
    correction = (p[..., turning] * ~is_coded).flatten(1, 2) @ (v - v_any)[:, turning]
    return (p.flatten(1, 2) @ v_any + correction).unflatten(1, split).flatten(0, 1)
