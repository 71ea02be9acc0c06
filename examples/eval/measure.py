"""Mean next-token KL(dense || coded) of one document: a dense prefill, then teacher-forced tokens over a coded cache.

The dense side runs through the same attention with nothing coded, so a method that loses nothing scores exactly 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.eval.attention import CodedRun, Prefill, install
from examples.eval.methods import Method, Passthrough
from sphkv_compile.spec import CacheSpec

PREFILL, STEPS = 2048, 448
"""Tokens of dense prefill, and teacher-forced tokens after it."""

_ROWS = 64  # positions whose distributions are widened to float64 at a time: 64 x 262144 x 8 bytes = 128 MiB


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


def expected_log_probs(p: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """E_p log q and log q of the targets, where q = softmax(logits); summed in float64.

    KL(p || q) = E_p log p - E_p log q, both from this function: equal logits then cancel to exactly 0.

    Shapes: ``p``, ``logits`` float32[N, vocabulary], ``targets`` int64[N] -> float64[N] twice.
    """
    expected, observed = [], []
    for chunk, p_chunk, target in zip(logits.split(_ROWS), p.split(_ROWS), targets.split(_ROWS)):
        wide = chunk.double()
        log_sum = wide.logsumexp(-1)
        expected.append((p_chunk * wide).sum(-1) - log_sum * p_chunk.double().sum(-1))
        observed.append(wide.gather(-1, target[:, None])[:, 0] - log_sum)
    return torch.cat(expected), torch.cat(observed)
