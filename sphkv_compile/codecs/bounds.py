"""How far a logit, an attention row and an output can move when keys are coded: bounds that hold, and a law that fits.

l is the logit q'.x, e = x - x^ the error of a key's residual in the rotated frame, dl = q'.e. Frames do not matter to
B1 .. B4: H is orthonormal. THEORY.md gives the derivations and what was measured on real keys.

Units: logits are natural-log units after the model's scale if q' carries it; distances are in the value's units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphkv_compile.codecs.arith import bf16_up, norm


def phase_bound(q_amplitude: Tensor, rho: Tensor, rho_hat: Tensor, turn: Tensor) -> Tensor:
    """B1: |dl| <= sum_p |q_p| sqrt((rho - rho^)^2 + 4 rho rho^ sin^2(turn / 2)).

    The root is the exact distance of a pair's point from its code; a codec of P phase bits has |turn| <= pi / 2^P.

    Shapes: float[..., P] each, ``turn`` in radians -> float[...].
    Source: law of cosines per pair, Cauchy-Schwarz per pair.
    """
    distance = ((rho - rho_hat) ** 2 + 4 * rho * rho_hat * (turn / 2).sin() ** 2).sqrt()
    return (q_amplitude * distance).sum(-1)


def norm_bound(q: Tensor, error: Tensor) -> Tensor:
    """B2: |dl| <= |q'| |e|. Attained when e is parallel to q'. Shapes: float[..., D] each -> float[...]."""
    return q.norm(dim=-1) * error.norm(dim=-1)


def logit_std(q: Tensor, error: Tensor) -> Tensor:
    """B3, a law and not a bound: dl is close to normal with std |q'| |e| / sqrt(D), for e in a random direction.

    Shapes: float[..., D] each -> float[...].
    """
    return norm_bound(q, error) / math.sqrt(q.shape[-1])


def certificate(error: Tensor) -> Tensor:
    """The longest error of a page, rounded up to bfloat16: with |q'| it certifies every logit of the page by B2.

    Shapes: float32[..., T, D] -> float32[...], two bytes when stored.
    """
    return bf16_up(norm(error).amax(-1))


def variation_bound(width: Tensor) -> Tensor:
    """B4: total variation of two softmax rows whose logits differ by dl is <= tanh(w / 4), w = max dl - min dl.

    Attained with two groups of tokens, dl = w on mass 1 / (1 + e^(w/2)) and 0 elsewhere.

    Shapes: float[...] -> float[...].
    """
    return torch.tanh(width / 4)


def output_bound(width: Tensor, diameter: Tensor) -> Tensor:
    """B4 for outputs: |o^ - o| <= tanh(w / 4) diam V, the diameter of the visible values. Shapes: broadcast."""
    return variation_bound(width) * diameter


def chain_bound(a: Tensor, b: Tensor, b_hat: Tensor) -> Tensor:
    """|dF_1| <= sum_i |b_i - b^_i| prod_{j<i} |sin a_j sin b^_j|, for the chain's recurrence I2.

    Times |q| |k| it bounds dl.

    Shapes: angles float[..., D - 1] each -> float[...].
    Source: |dF_i / db_i| <= 1 because |F| <= 1, and F_{i+1} enters F_i by sin a_i sin b^_i.
    """
    reach = (a.sin() * b_hat.sin()).abs().cumprod(-1)
    reach = torch.cat([torch.ones_like(reach[..., :1]), reach[..., :-1]], -1)
    return ((b - b_hat).abs() * reach).sum(-1)


def output_mse(p: Tensor, q_norm: Tensor, error_norm: Tensor, v: Tensor, v_hat: Tensor, dim: int) -> Tensor:
    """B6, a law: E |o^ - o|^2 = sum_j p_j^2 (|q'|^2 |e_j|^2 / D |v_j - o|^2 + |v_j - v^_j|^2).

    First order in dl, whose directions are taken as independent; it adds up over tokens, which is what lets a policy
    price them one by one.

    Args:
        dim: D of the keys.

    Shapes: ``p`` float[..., T, N], ``q_norm`` [..., T], ``error_norm`` [..., N], ``v`` and ``v_hat`` [..., N, DV]
        -> [..., T].
    """
    o = p @ v
    spread = (v**2).sum(-1)[..., None, :] - 2 * o @ v.mT + (o**2).sum(-1)[..., :, None]
    variance = (q_norm[..., :, None] * error_norm[..., None, :]) ** 2 / dim
    return (p**2 * (variance * spread + ((v - v_hat) ** 2).sum(-1)[..., None, :])).sum(-1)
