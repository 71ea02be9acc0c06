"""Mean next-token KL(dense || coded) of one document: a dense prefill, then teacher-forced tokens over a coded cache.

The dense side runs through the same attention with nothing coded, so a method that loses nothing scores exactly 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.eval.attention import CodedRun, Prefill
from sphkv_compile.eval.attention import install
from sphkv_compile.eval.divergence import expected_log_probs
from sphkv_compile.eval.methods import Method, Passthrough
from sphkv_compile.spec import CacheSpec

PREFILL, STEPS = 2048, 448
"""Tokens of dense prefill, and teacher-forced tokens after it."""


@dataclass(frozen=True)
class Score:
    """Units: ``kl`` in nats per token; perplexities of the next token."""

    kl: float
    ppl: float
    dense_ppl: float


class Document:
    """A document after its dense prefill, ready for any number of methods.

    Args:
        ids: one token more than ``prefill + steps``, the last one only as a target.

    Shapes: ``ids`` int64[1, prefill + steps + 1].
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor, spec: CacheSpec, prefill: int = PREFILL) -> None:
        install(model)
        self.model, self.prefill = model, Prefill(spec)
        ids = ids.to(model.device)
        self.steps, self.targets = ids[:, prefill:-1], ids[0, prefill + 1 :]
        self.positions = torch.arange(prefill, ids.shape[1] - 1, device=model.device)[None]
        model(ids[:, :prefill], use_cache=False, logits_to_keep=1, sphkv_run=self.prefill)
        logits = self._logits(Passthrough())
        self.dense = logits.softmax(-1)
        self.log_dense, self.dense_targets = expected_log_probs(self.dense, logits, self.targets)

    @torch.no_grad()
    def score(self, method: Method) -> Score:
        """How far ``method`` moves the next-token distributions."""
        log_coded, targets = expected_log_probs(self.dense, self._logits(method), self.targets)
        kl = (self.log_dense - log_coded).mean().item()
        return Score(kl, *(math.exp(-x.mean().item()) for x in (targets, self.dense_targets)))

    def _logits(self, method: Method) -> Tensor:
        run = CodedRun(self.prefill, method)
        return self.model(self.steps, position_ids=self.positions, use_cache=False, sphkv_run=run).logits[0]
