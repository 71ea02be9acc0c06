"""Whether a model still writes sense: its likeliest continuation under a budget, beside that of the dense cache.

A model that has lost its context repeats itself, or says what the dense model would not. The documents are the rows of
one cache, under one budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.eval import contenders
from sphkv_compile.eval.contenders import Cell
from sphkv_compile.eval.retention import Cache, Prompt, continue_greedily, read

TOKENS, GRAM = 128, 4
"""Tokens that are written, and of the runs that are looked for."""


def repeated(tokens: list[int], size: int = GRAM) -> float:
    """Share of the runs of ``size`` tokens that have stood there before."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs)


def _judge(prompt: Prompt, last: Tensor, written: Tensor) -> dict[str, float]:
    """Means over documents. Shapes: ``last`` int64[B, 1], ``written`` int64[B, n]."""
    logits = read(Cache(prompt), torch.cat([last, written[:, :-1]], 1))
    log_probs = logits.log_softmax(-1).gather(-1, written.unsqueeze(-1))
    repeats = [repeated(row) for row in written.tolist()]
    return {"repeated": sum(repeats) / len(repeats), "nll": -float(log_probs.mean())}


def rows(model: Any, ids: Tensor, todo: list[Cell], tokens: int) -> Iterator[dict[str, Any]]:
    """A row for each cell: the share of repeated runs, and the continuation's loss under the dense model.

    Shapes: ``ids`` int64[B, C]. Units: nats per token.
    """
    prompt, last = Prompt(model, ids[:, :-1]), ids[:, -1:]
    dense = _judge(prompt, last, continue_greedily(Cache(prompt), last, tokens))
    dense_too = {f"dense_{name}": value for name, value in dense.items()}

    def measure(cell: Cell, cache: Cache) -> dict[str, float]:
        return _judge(prompt, last, continue_greedily(cache, last, tokens)) | dense_too

    yield from contenders.rows(todo, prompt, prompt.length, tokens, measure)
