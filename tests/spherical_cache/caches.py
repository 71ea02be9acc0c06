"""A tiny model with dense and with spherical caches, eager and compiled; at 16 bits both must say the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import sphkv_compile
from sphkv_compile import SphericalCache
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.tiny import tiny

SPEC = {"window": 8, "span": 16, "page": 8}
"""Small enough that a few dozen tokens fill several spans."""
BATCH, CAPACITY = 2, 128
TOLERANCE = 2e-5
"""Logits of size 10 after two layers in float32: the order of a sum changes them by 1e-6, a wrong token by 1e-1."""


@pytest.fixture(autouse=True)
def _fresh():
    """Instead of the suite's: graphs are kept from test to test."""
    torch.manual_seed(0)
    with torch._dynamo.config.patch(recompile_limit=512), torch.no_grad():
        yield


@lru_cache(None)
def model(family: str = "llama") -> Any:
    return tiny(family)


@lru_cache(None)
def compiled(family: str = "llama") -> Callable:
    return torch.compile(
        model(family).forward, backend=sphkv_compile.backend, options={"inductor": False}, fullgraph=True
    )


def spherical(family: str = "llama", capacity: int | None = CAPACITY, **spec: Any) -> SphericalCache:
    """At 16 bits unless ``spec`` says otherwise."""
    spec = spec if {"bits", "budget"} & set(spec) else {"bits": 16, **spec}
    return SphericalCache(model(family).config, max_cache_len=capacity, **{**SPEC, **spec})


def dense(family: str = "llama") -> DynamicCache:
    return DynamicCache(config=model(family).config)


def prompt(count: int, seed: int = 0, batch: int = BATCH) -> Tensor:
    """Shapes: -> int64[batch, count]."""
    return torch.randint(5, 100, (batch, count), generator=torch.Generator().manual_seed(seed))


class Run:
    """Calls of a model on one cache, and the last logits of each.

    Args:
        step: the model's forward, eager or compiled. The first call of a cache is eager, as prefill mostly is.
    """

    def __init__(self, cache: Any, step: Callable, family: str = "llama"):
        self.cache, self.step, self.family = cache, step, family
        self.logits: list[Tensor] = []
        self.said: list[Any] = []

    def call(self, ids: Tensor, step: Callable | None = None, **kwargs: Any) -> Tensor:
        """Shapes: ``ids`` int64[B, T] -> int64[B, 1], the next token."""
        step = step or (self.step if int(self.cache.get_seq_length()) else model(self.family).forward)
        kwargs[cache_keyword(model(self.family))] = self.cache
        logits = step(ids, use_cache=True, **kwargs).logits[:, -1:]
        self.logits.append(logits.clone())
        return logits.argmax(-1)

    def decode(self, token: Tensor, count: int) -> Tensor:
        """``count`` greedy steps from ``token``."""
        for _ in range(count):
            token = self.call(token)
        return token


def filled(tokens: int = 60, step: Callable | None = None, **spec: Any) -> Run:
    """A cache that holds a prompt."""
    run = Run(spherical(**spec), step or model().forward)
    run.call(prompt(tokens))
    return run


def assert_same(got: Run, expected: Run, tolerance: float = TOLERANCE) -> None:
    assert got.said == expected.said
    assert [x.shape for x in got.logits] == [x.shape for x in expected.logits]
    worst = max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits))
    assert worst < tolerance, f"logits differ by {worst:.3g}"
