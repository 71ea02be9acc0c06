"""Decodes greedily and compares two decodings: what the examples, the evaluation and the tests all need.

Shapes: N tokens decoded, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """One decoding. ``tokens[i]`` was chosen from ``logits[i]``, the first from the prefill's logits.

    Shapes: logits [N, V] float32 on the CPU.
    Units: seconds of each of the N - 1 steps; the first ones pay for compiling.
    """

    tokens: list[int]
    logits: Tensor
    seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        """From the median step, so that a step that compiled does not count; nan without steps."""
        return 1 / statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def extra_seconds(self) -> float:
        """What all steps took beyond the median step each: compiling, if anything compiled."""
        return sum(self.seconds) - len(self.seconds) * statistics.median(self.seconds or [0.0])


@torch.no_grad()
def decode(
    step: Callable[[Tensor, int], Tensor],
    prefill_logits: Tensor,
    start: int,
    count: int,
    *,
    feed: Sequence[int] | None = None,
    stop: Collection[int] = (),
    on_token: Callable[[int], object] = lambda token: None,
) -> Run:
    """Greedy decoding of one sequence, or teacher forcing when ``feed`` names the tokens to continue with.

    Args:
        step: (token [1, 1] int64, position) -> logits of the next token, any shape that ends in V.
        prefill_logits: at the prompt's last token, any shape that ends in V.
        start: position of the first decoded token.
        count: most tokens; a token in ``stop`` ends the decoding and is kept.

    Raises:
        ValueError: a count below 1, or a feed shorter than count.
    """
    if count < 1 or (feed is not None and len(feed) < count):
        raise ValueError(f"count={count}: expected at least 1 and at most the length of feed")
    device, logits = prefill_logits.device, [_row(prefill_logits)]
    tokens: list[int] = []
    seconds: list[float] = []
    for i in range(count):
        tokens.append(int(logits[-1].argmax()) if feed is None else feed[i])
        on_token(tokens[-1])
        if len(tokens) == count or (feed is None and tokens[-1] in stop):
            break
        began = time.perf_counter()
        logits.append(_row(step(torch.tensor([[tokens[-1]]], device=device), start + i)))  # the copy waits for a GPU
        seconds.append(time.perf_counter() - began)
    return Run(tokens, torch.stack(logits), seconds)


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which the two differ, or None. A continuation of the other differs at its end."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def token_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) of each token's distribution.

    Shapes: p_logits, q_logits [N, V] -> [N] float64.
    Units: nats.
    """
    log_p, log_q = (x.double().log_softmax(-1) for x in (p_logits, q_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _row(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])[-1].float().cpu()
