"""Error certificates: how noisy a head's logits are, predicted from what the state knows.

The logit error of a coded key is q'.e with |e| = e_b^(1/2) |x|, and by B3 (codecs/THEORY.md) it is close to normal with
variance |q'|^2 |e|^2 / D. So per head

    sigma^2 = kappa e_b,    kappa = scale^2 E|q'|^2 E|x|^2 / D

with e_b the codec's relative squared error at b bits. Below .12 approximate logits rank tokens as exact ones do; above
1 they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_compile.codecs.codebook import mse
from sphkv_compile.ops.pages import radii, read_pages, span_slots, with_positions
from sphkv_compile.spec import BITS, PASSTHROUGH
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import START, State

LIMIT = 1.0
"""Logit noise variance above which a head is flagged. Units: nats squared."""


@dataclass(frozen=True)
class Certificate:
    """One (row, kv head).

    Args:
        kappa: logit variance at unit relative key error.
        logit_variance: sigma^2 at the head's key bits, the fewest that a page of it may have.
        bias: share of key energy that lies in the anchors, a constant that softmax does not see.

    Units: nats squared.
    """

    row: int
    head: int
    kappa: float
    logit_variance: float
    bias: float


def certificate(state: State, layout: Layout, scale: float | None) -> list[Certificate]:
    """One certificate per row and head whose keys are coded and whose queries were seen; else none."""
    bits, state = min(tier.k_bits for tier in layout.tiers), with_positions(state, layout)
    held, seen = state.positions >= 0, state.energy[..., 1]
    if bits == PASSTHROUGH or not bool(held.any()):
        return []
    x2, a2 = _key_energy(state, layout, held)
    kappa = _kappa(state, x2, scale)
    sigma2 = kappa * mse(bits)
    bias = a2 / (a2 + x2).clamp(min=1e-30)
    return [
        Certificate(b, h, float(kappa[b, h]), float(sigma2[b, h]), float(bias[b, h]))
        for b in range(held.shape[0])
        for h in range(held.shape[1])
        if bool(held[b, h].any()) and seen[b, h] > 0
    ]


def bits_within_limit(kappa: float) -> int:
    """The fewest key bits at which a head's logit noise is within the limit; 16 where no code is that fine."""
    return next((bits for bits in BITS if bits == PASSTHROUGH or kappa * mse(bits) <= LIMIT), PASSTHROUGH)


def kappa(state: State, layout: Layout, scale: float | None) -> Tensor:
    """Variance of each head's logits at unit relative key error. Shapes: -> float32[B, H].

    Units: nats squared.
    """
    state = with_positions(state, layout)
    return _kappa(state, _key_energy(state, layout, state.positions >= 0)[0], scale).float()


def _kappa(state: State, x2: Tensor, scale: float | None) -> Tensor:
    d, (total, seen) = state.exact_k.shape[-1], state.energy.unbind(-1)
    scale = 1 / math.sqrt(d) if scale is None else scale
    return scale**2 * total / seen.clamp(min=1) * x2 / d


def _key_energy(state: State, layout: Layout, held: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared length of the residuals and of the anchors, in the scaled frame. Shapes: -> float32[B, H] twice."""
    d, count = state.exact_k.shape[-1], held.sum((2, 3)).clamp(min=1)
    slots = span_slots(state, layout, state.positions, state.rows[:, START])
    top = state.span_scales[..., 1].float().gather(2, slots.flatten(2)).view(slots.shape)
    length2 = torch.zeros_like(top)
    for index, tier in enumerate(layout.tiers):
        pages = read_pages(state, layout, tier, state.table)
        radius = radii(pages._replace(radius=pages.radius.unsqueeze(-2)), top).squeeze(-1)
        code2 = layout.code.decode(pages.k, d, tier.k_bits).square().sum(-1)
        length2 = torch.where((state.tiers == index).unsqueeze(-1), radius.square() * code2, length2)
    x2 = torch.where(held, length2, 0.0).sum((2, 3)) / count
    rows = state.anchors.float() * state.span_scales[..., :1].float()
    a2 = rows.square().sum(-1).gather(2, slots.flatten(2)).view(slots.shape)
    return x2, torch.where(held, a2, 0.0).sum((2, 3)) / count
