"""How far a cache moves the next-token distributions of a document, after its prompt or while it streams by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.eval import contenders
from sphkv_compile.eval.contenders import Cell, sizes
from sphkv_compile.eval.retention import Cache, Prompt, read

STEPS, CHUNK = 256, 128
"""Tokens that are read after a whole prompt, in one call; and of one call while a document streams by."""
STREAMED = 5 / 8
"""Share of a streamed document that comes after its first call."""

_ROWS = 64  # positions whose distributions are widened to float64 at a time: 64 x 262144 x 8 bytes = 128 MiB


class Document:
    """A prompt and what follows it, with what the dense cache says.

    Args:
        prompt: tokens of the first call.
        chunk: tokens of each later one; all by default.

    Shapes: ``ids`` int64[1, C], the last of which is a target only.
    """

    def __init__(self, model: Any, ids: Tensor, prompt: int, chunk: int | None = None):
        self.prompt, self.chunk = Prompt(model, ids[:, :prompt]), chunk
        self.following, self.targets = ids[:, prompt:-1], ids[0, prompt + 1 :]
        logits = read(Cache(self.prompt), self.following)[0]
        self.dense = logits.softmax(-1)
        self.entropy, self.log_probs = expected_log_probs(self.dense, logits, self.targets)

    def score(self, cell: Cell, cache: Cache) -> dict[str, float]:
        """Where there are several calls, the bytes are those after the last.

        Units: bytes per token and kv head; nats per token.
        """
        expected, log_probs = expected_log_probs(self.dense, read(cache, self.following, self.chunk)[0], self.targets)
        later = {} if self.chunk is None else sizes(cache)
        return later | {
            "kl": float((self.entropy - expected).mean()),
            "nll_delta": float((self.log_probs - log_probs).mean()),
            "perplexity": math.exp(-float(log_probs.mean())),
            "dense_perplexity": math.exp(-float(self.log_probs.mean())),
        }


def rows(model: Any, ids: Tensor, todo: list[Cell], streaming: bool) -> Iterator[dict[str, Any]]:
    """A row for each cell. A budget is a share of the prompt, or of the whole stream.

    Shapes: ``ids`` int64[1, C]: a prompt, ``STEPS`` tokens and a target; or a stream and a target.
    """
    length = ids.shape[1] - 1 - (0 if streaming else STEPS)
    first = round(length * (1 - STREAMED)) if streaming else length
    document = Document(model, ids, first, CHUNK if streaming else None)
    yield from contenders.rows(todo, document.prompt, length, document.following.shape[1], document.score)


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
