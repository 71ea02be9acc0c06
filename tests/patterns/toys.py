"""One-attention modules over a cache of their own, each a few lines: what a pattern must take, and what it must refuse.

A toy is a function ``(cache, x) -> output``. It runs twice on the same inputs, eagerly and compiled; outputs and cache
contents must agree whatever the verdict, since the passthrough tier stores every value as it is.

Shapes: B rows, HQ = 4 and H = 2 heads, T new tokens, D = 16, L = 48 columns, of which HELD = 24 are filled beforehand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sphkv_compile.patterns import IDIOMS
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sphkv_compile
from sphkv_compile.runtime import log

HQ, H, D, L, HELD = 4, 2, 16, 48, 24
OPTIONS = {"bits": 16, "sink": 2, "window": 4, "span": 8, "page": 8, "inductor": False}
"""Pages fill after 14 tokens, so HELD tokens lie in sinks, pages and window; nothing is compiled by Inductor."""


class Step(NamedTuple):
    """What one call brings. A tuple, so that Dynamo guards only the fields that a toy uses.

    Shapes: q [B, HQ, T, D], k and v [B, H, T, D], pos int64[T] = start.., mask bool[1, 1, T, L] (causal).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    start: int
    mask: Tensor

    @property
    def end(self) -> int:
        return self.start + self.k.shape[2]


@dataclass(frozen=True)
class Shape:
    """What a toy needs of its cache: ``held`` of ``columns`` are filled, but for the last row's first ``padding``;
    ``v_heads`` only where values have other heads than keys."""

    batch: int = 1
    heads: int = H
    columns: int = L
    held: int = HELD
    padding: int = 0
    dim: int = D
    v_dim: int = D
    v_heads: int | None = None
    dtype: torch.dtype = torch.float32


class Cache(nn.Module):
    """The buffers, and the function that is tried on them."""

    k: Tensor
    v: Tensor

    def __init__(self, function: Callable[[Cache, Step], Any], shape: Shape):
        super().__init__()
        self.function = function
        for name, heads, dim in (("k", shape.heads, shape.dim), ("v", shape.v_heads or shape.heads, shape.v_dim)):
            content = torch.zeros(shape.batch, heads, shape.columns, dim, dtype=shape.dtype)
            content[:, :, : shape.held] = torch.randn(shape.batch, heads, shape.held, dim)
            content[-1, :, : shape.padding] = 0
            self.register_buffer(name, content, persistent=False)

    def forward(self, x: Step) -> Any:
        return self.function(self, x)


def steps(chunks: Sequence[int], shape: Shape) -> Iterator[Step]:
    """Consecutive calls that bring ``chunks`` tokens each."""
    start = shape.held
    for t in chunks:
        sizes = ((HQ, shape.dim), (shape.heads, shape.dim), (shape.v_heads or shape.heads, shape.v_dim))
        q, k, v = (torch.randn(shape.batch, heads, t, dim, dtype=shape.dtype) for heads, dim in sizes)
        mask = torch.ones(t, shape.columns + sum(chunks), dtype=torch.bool).tril(start)[None, None, :, :L]
        yield Step(q, k, v, torch.arange(start, start + t), start, mask)
        start += t


@dataclass
class Toy:
    """A function to try, and the verdict that it must get: an idiom's name or a code of REFUSALS.

    Args:
        detail: part of the reason, which says that it was refused for the fault that it has.
    """

    function: Callable[[Cache, Step], Any]
    verdict: str
    chunks: Sequence[int]
    detail: str
    shape: Shape

    def __str__(self) -> str:
        return self.function.__name__

    def check(self) -> None:
        """Runs it eagerly and compiled: the two agree, and every attention gets the verdict."""
        eager = Cache(self.function, self.shape)
        ours, seen = copy.deepcopy(eager), []
        compiled = torch.compile(ours, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True)
        with torch.no_grad(), log.listening(seen.append):
            for x in steps(self.chunks, self.shape):
                expected, found = eager(x), compiled(x)
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        verdicts = [v for graph in seen for v in graph.verdicts]
        assert {v.idiom or v.refusal.code for v in verdicts} == {self.verdict}, [str(v.refusal) for v in verdicts]
        assert all(self.detail in str(v.refusal) for v in verdicts), [str(v.refusal) for v in verdicts]
        for name in ("k", "v"):
            assert torch.equal(getattr(ours, name) + 0, getattr(eager, name)), f"{name}: contents differ"


class Toys(list[Toy]):
    """A table of toys, and the decorator that fills it."""

    def __call__(self, verdict: str, chunks: Sequence[int] = (), detail: str = "", **shape: Any) -> Callable:
        """One decode step by default, and a second where the first has replaced the cache by codes."""
        chunks = chunks or ((1, 1) if verdict in IDIOMS else (1,))

        def add(function: Callable[[Cache, Step], Any]) -> Callable:
            self.append(Toy(function, verdict, chunks, detail, Shape(**shape)))
            return function

        return add


def sdpa(x: Step, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Grouped attention of the step's queries."""
    return scaled_dot_product_attention(x.q, k, v, mask, **{"enable_gqa": True, **kwargs})


def put(cache: Cache, x: Step) -> None:
    """Write the step's tokens at their positions."""
    cache.k[:, :, x.pos] = x.k
    cache.v[:, :, x.pos] = x.v
