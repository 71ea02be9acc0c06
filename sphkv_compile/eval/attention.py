"""A model's own code, with another attention: registered with transformers, told what to do by a keyword of the call.

Symbols: S queries, the newest of C cached tokens; the first is at position C - S.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

NAME = "sphkv_eval"


class Run(Protocol):
    """Whoever stands in for the model's attention, layer by layer."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> Tensor:
        """Shapes: ``q`` [B, HQ, S, D], ``k``, ``v`` [B, HKV, S, D] of the new tokens -> [B, HQ, S, D]."""


def visible(queries: int, length: int, sliding: int | None, device: torch.device) -> Tensor:
    """What a causal, possibly sliding, mask shows. Shapes: -> bool[S, C]."""
    age = torch.arange(length - queries, length, device=device)[:, None] - torch.arange(length, device=device)
    return (age >= 0) & (age < (sliding or length))


def weights(q: Tensor, k: Tensor, held: Tensor, at: Tensor, scale: float) -> Tensor:
    """Softmax weights over what is held and not after the query: plain attention, in float32.

    Args:
        at: positions of the queries.

    Shapes: ``q`` [B, HQ, T, D], ``k`` [B, H, C, D], ``held`` bool[B, H, C], ``at`` int64[T] -> float32[B, H, G, T, C].
    """
    logits = q.float().unflatten(1, (k.shape[1], -1)) @ k.float().mT.unsqueeze(2) * scale
    shown = held[:, :, None, None] & (torch.arange(k.shape[2], device=k.device) <= at.unsqueeze(-1))
    return logits.masked_fill(~shown, -torch.inf).softmax(-1)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sphkv_run: Run,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The transformers attention interface; the run comes in as a keyword of the model's forward.

    Raises:
        NotImplementedError: soft-capped logits or attention sinks.
    """
    if softcap or kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            "the evaluation knows no soft cap and no learned attention sinks; expected a model without them"
        )
    out = sphkv_run.attend(module.layer_idx, query, key, value, scaling, sliding_window)
    return out.transpose(1, 2), None


def install(model: Any) -> None:
    """Make ``model`` use :func:`attention`; from then on each forward needs ``sphkv_run=``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # positions are dense: no mask is needed
    model.set_attn_implementation(NAME)
