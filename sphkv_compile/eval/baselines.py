"""What others make of a cache: exact keys and values of the tokens that a score picks, or coarse ones of all tokens.

Sinks, window and the span that waits in it are exact and free for these too. Every head holds the same number of
tokens, each at 16 bits an element, whatever the model's dtype, and 4 bytes for its position; the statistics by which a
method picks tokens are not charged, nor are page tables. Where tokens go on coming, the choice is made anew whenever a
span has left the window.

Symbols: B rows; H kv heads, G query heads of one; C cached tokens, S new ones; D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.eval.attention import weights
from sphkv_compile.eval.methods import LayerMoments, Method
from sphkv_compile.eval.retention import SPEC, Cache, Prompt, coded_end

Angles = Callable[[range], tuple[Tensor, Tensor]]
POSITION = 4
"""Bytes that say which token it is."""
BLOCK = 256
"""Queries whose attention is computed at once."""


@dataclass(frozen=True)
class Seen:
    """What a layer shows a score: the queries since the last choice, and all that is held.

    Args:
        angles: cosine and sine of the layer's rotary embedding.

    Shapes: ``q`` [B, H, G, S, D], of the newest positions; ``k``, ``v`` [B, H, C, D]; ``held`` bool[B, H, C].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    held: Tensor
    scale: float
    angles: Angles

    @property
    def length(self) -> int:
        """C."""
        return self.k.shape[2]

    def attention(self, newest: int) -> Iterator[Tensor]:
        """Softmax weights of the newest queries, as many as there are, over what is held; some queries at a time.

        Shapes: -> float32[B, H, G, T, C] each.
        """
        newest = min(newest, self.q.shape[3])
        at = torch.arange(self.length - newest, self.length, device=self.k.device)
        for rows, q in zip(at.split(BLOCK), self.q[..., -newest:, :].split(BLOCK, 3)):
            yield weights(q.flatten(1, 2), self.k, self.held, rows, self.scale)


class Score(ABC):
    """What the tokens of one layer are worth; it may remember what it was shown before."""

    @abstractmethod
    def worth(self, seen: Seen) -> Tensor:
        """Called once for each choice. Shapes: -> float32[B, H, C]; what it says of dropped tokens does not matter."""


class Recency(Score):
    """The newest tokens beside the sinks: StreamingLLM (arXiv 2309.17453), at the positions where they were."""

    def worth(self, seen: Seen) -> Tensor:
        return torch.arange(seen.length, device=seen.k.device).float().expand(seen.held.shape)


class HeavyHitter(Score):
    """The mean attention that a token got over its life: H2O (arXiv 2306.14048), its sums divided by the queries that
    saw the token, without which the oldest win."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def worth(self, seen: Seen) -> Tensor:
        new = sum((p.sum((2, 3)) for p in seen.attention(seen.q.shape[3])), torch.zeros(()))
        self.sums = new if self.sums is None else new + F.pad(self.sums, (0, seen.q.shape[3]))
        return self.sums / torch.arange(seen.length, 0, -1, device=new.device)


class SnapKV(Score):
    """What the newest queries look at, and its neighbours: SnapKV (arXiv 2404.14469)."""

    QUERIES, KERNEL = 64, 7

    def worth(self, seen: Seen) -> Tensor:
        paid = torch.cat([p.mean(2) for p in seen.attention(self.QUERIES)], 2).mean(2)
        return F.avg_pool1d(paid, self.KERNEL, stride=1, padding=self.KERNEL // 2)


class ExpectedAttention(Score):
    """Attention that queries to come would pay, were they drawn from a Gaussian with the mean and covariance of those
    seen, before they turn, and turned by the mean rotation of the next positions; times the length of the value.

    Source: Expected Attention (arXiv 2510.00636), as kvpress has it.
    """

    FUTURE = 512

    def __init__(self) -> None:
        self.count, self.sum, self.outer = 0, torch.zeros(()), torch.zeros(())

    def worth(self, seen: Seen) -> Tensor:
        self._learn(seen)
        cos, sin = (x.mean(0).double() for x in seen.angles(range(seen.length, seen.length + self.FUTURE)))
        turn = turned(torch.eye(seen.q.shape[-1], dtype=torch.float64, device=cos.device), cos, sin)
        mean = self.sum / self.count
        spread = self.outer / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        mean, spread = (mean @ turn).float(), (turn.T @ spread @ turn).float()
        keys = seen.k.float().unsqueeze(2)
        logits = (keys @ mean.unsqueeze(-1)).squeeze(-1) * seen.scale
        logits += ((keys @ spread) * keys).sum(-1) * seen.scale**2 / 2
        logits.masked_fill_(~seen.held.unsqueeze(2), -torch.inf)
        logits[..., : SPEC.sink] = -torch.inf
        return logits.softmax(-1).mean(2) * seen.v.float().norm(dim=-1)

    def _learn(self, seen: Seen) -> None:
        """The sums of the queries behind the sinks, and of their outer products, before the rotary embedding."""
        first = max(SPEC.sink, seen.length - seen.q.shape[3])
        q = seen.q[..., first - seen.length :, :].double()
        cos, sin = (x.double() for x in seen.angles(range(first, seen.length)))
        q = turned(q, cos, -sin)
        self.count += q.shape[3]
        self.sum, self.outer = self.sum.to(q) + q.sum(3), self.outer.to(q) + q.mT @ q


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding, in halves, of the first dimensions. Shapes: [..., D], cos and sin [..., rotary]."""
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    low, high = x.chunk(2, -1)
    return torch.cat([x * cos + torch.cat([-high, low], -1) * sin, rest], -1)


class Evicted(Cache):
    """Exact keys and values of the tokens that are worth most, as many in every head.

    Args:
        limit: bytes over all rows, heads and layers that grow.
    """

    @torch.no_grad()
    def __init__(self, prompt: Prompt, limit: int, score: type[Score]):
        super().__init__(prompt)
        self.scores = {layer: score() for layer in prompt.growing}
        self.held = {
            layer: site.k.new_ones(site.k.shape[:3], dtype=torch.bool) for layer, site in prompt.growing.items()
        }
        self.queries = {layer: site.q for layer, site in prompt.growing.items()}
        self.each = int(limit // (prompt.token_bytes + POSITION * prompt.heads))
        self.chosen = SPEC.sink
        self._evict()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> Tensor:
        """As dense, over what is held; the queries are remembered until the next choice."""
        if layer in self.scores:
            self.queries[layer] = torch.cat([self.queries[layer], q], 2)
        return super().attend(layer, q, k, v, scaling, sliding)

    def end(self, tokens: int) -> None:
        """Chooses anew, where a span has left the window."""
        super().end(tokens)
        self._evict()

    @torch.no_grad()
    def _evict(self) -> None:
        before, self.chosen = self.chosen, coded_end(self.length)
        for layer, score in self.scores.items() if self.chosen > before else ():
            k, held, scale = self.k[layer], self.held[layer], self.prompt.sites[layer].scale
            q = self.queries[layer].unflatten(1, (k.shape[1], -1))
            worth = score.worth(Seen(q, k, self.v[layer], held, scale, self.prompt.angles))
            worth = worth.masked_fill(~held, -torch.inf)[..., SPEC.sink : self.chosen]
            best = worth.topk(min(self.each, worth.shape[-1]), -1).indices
            held[..., SPEC.sink : self.chosen] &= torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)
            self.queries[layer] = self.queries[layer][:, :, :0]

    @property
    def counted_bytes(self) -> float:
        return min(self.each, self.chosen - SPEC.sink) * (self.prompt.token_bytes + POSITION * self.prompt.heads)


class Recoded(Cache):
    """All tokens, coarsely: spans are coded as they leave the window, by a method of the evaluation at equal bits."""

    @torch.no_grad()
    def __init__(self, prompt: Prompt, method: Method):
        super().__init__(prompt)
        self.method, self.coded = method, SPEC.sink
        self._code()

    def end(self, tokens: int) -> None:
        """Codes what has left the window."""
        super().end(tokens)
        self._code()

    @torch.no_grad()
    def _code(self) -> None:
        new = slice(self.coded, coded_end(self.length))
        self.coded = new.stop
        for layer in self.prompt.growing if new.stop > new.start else ():
            for cache, code in ((self.k, self._keys), (self.v, self.method.values)):
                x = cache[layer].clone()  # the prompt's own tensors serve other caches
                spans = x[:, :, new].float().flatten(0, 1).unflatten(1, (-1, SPEC.span))
                x[:, :, new] = code(spans).flatten(1, 2).view(x[:, :, new].shape).to(x.dtype)
                cache[layer] = x

    def _keys(self, spans: Tensor) -> Tensor:
        none = spans.new_zeros(spans.shape[0], spans.shape[-1])  # these methods ask nothing of queries
        return self.method.keys(spans, LayerMoments(none, none))

    @property
    def counted_bytes(self) -> float:
        sites = self.prompt.growing.values()
        bits = (self.method.stored_bits(s.k.shape[-1], SPEC.span) for s in sites)
        elements = ((s.k[:, :, 0].numel(), s.v[:, :, 0].numel()) for s in sites)
        return (self.coded - SPEC.sink) * sum(n * b / 8 for pair in zip(elements, bits) for n, b in zip(*pair))
