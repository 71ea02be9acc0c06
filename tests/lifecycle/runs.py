"""One compiled model per kind for all tests here: compiling costs, and many caches over one graph is the point.

Graphs run node by node (``"inductor": False``). At 16 bits the pages keep the model's dtype, so that a compiled run
must give the tokens of the eager one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.runtime.guarded import owner_of
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.testing.tiny import tiny

OPTIONS = {"inductor": False, "bits": 16, "window": 8, "span": 16, "page": 8}
BATCH, CAPACITY = 2, 96
CACHE = cache_keyword(tiny("llama"))
"""The name under which models take their cache."""


@pytest.fixture(autouse=True)
def _fresh():
    """Instead of the suite's: graphs are kept from test to test."""
    torch.manual_seed(0)
    with torch._dynamo.config.patch(recompile_limit=512), torch.no_grad():
        yield


class Compiled:
    """A tiny model, eager and compiled, and the caches that it takes."""

    def __init__(self, family: str = "llama", kind: str = "static", layers: int = 2, **options):
        self.model, self.kind = tiny(family, layers=layers), kind
        self.eager = self.model.forward
        options = {**OPTIONS, **options}
        self.step = torch.compile(
            self.model.forward, backend=sphkv_compile.backend, options=options, fullgraph=True, dynamic=None
        )

    def cache(self, capacity: int = CAPACITY):
        if self.kind == "static":
            return StaticCache(config=self.model.config, max_cache_len=capacity)
        return DynamicCache(config=self.model.config)


_MODELS: dict[tuple, Compiled] = {}


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Compiled]:
    """``compiled(family, kind, layers, **options)``: made at the first call."""

    def get(family: str = "llama", kind: str = "static", layers: int = 2, **options) -> Compiled:
        key = family, kind, layers, *sorted(options.items())
        if key not in _MODELS:
            _MODELS[key] = Compiled(family, kind, layers, **options)
        return _MODELS[key]

    return get


def prompt(count: int, seed: int = 0, batch: int = BATCH) -> Tensor:
    """Shapes: -> int64[batch, count]."""
    return torch.randint(5, 100, (batch, count), generator=torch.Generator().manual_seed(seed))


class Log:
    """What a scenario produced: one entry per call of the model."""

    def __init__(self):
        self.tokens: list[Tensor] = []
        self.logits: list[Tensor] = []

    def call(self, step: Callable, cache, ids: Tensor) -> Tensor:
        """Run ``ids`` through ``step``. Shapes: -> int64[B, 1], the next token."""
        logits = step(ids, use_cache=True, **{CACHE: cache}).logits[:, -1:]
        self.logits.append(logits.clone())
        self.tokens.append(logits.argmax(-1))
        return self.tokens[-1]

    def decode(self, step: Callable, cache, token: Tensor, count: int) -> Tensor:
        """``count`` greedy steps from ``token``."""
        for _ in range(count):
            token = self.call(step, cache, token)
        return token


def content(cache) -> list[tuple[Tensor, Tensor]]:
    """The filled part of every layer, read as eager code reads it."""
    out = []
    for layer in cache.layers:
        length = min(int(layer.get_seq_length()), layer.keys.shape[2])
        out.append((layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone()))
    return out


def owners(cache) -> list[Owner]:
    return [owner_of(layer.keys) for layer in cache.layers]


def codes(owner):
    """All that a cache holds, pages in the order of the tokens."""
    state, g = owner.state, owner.geometry
    size = owner.layout.page_bytes(owner.layout.tiers[0], g.k_dim, g.v_dim, g.itemsize) // 64
    held = (state.positions >= 0).any(-1)
    pages = state.arena.view(-1, 64)[state.table[held].long().unsqueeze(-1) + torch.arange(size)]
    names = ("positions", "anchors", "span_scales", "pair_scale", "rows")
    return [pages, *(getattr(state, name).clone() for name in names)]


def assert_codes_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def assert_same(got: Log, expected: Log, tolerance: float = 2e-5) -> None:
    """Tokens equal, logits to the rounding of two layers in float32.

    The graph that AOTAutograd makes of a model rounds otherwise than the model: 1e-6 of logits of size 10 is usual, and
    the wrong token in a cache changes them by 1e-1.
    """
    assert len(got.tokens) == len(expected.tokens)
    worst = max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits))
    assert worst < tolerance, f"logits differ by {worst:.3g}"
    assert all(torch.equal(a, b) for a, b in zip(got.tokens, expected.tokens))


def assert_same_content(got, expected, tolerance: float = 2e-5) -> None:
    """The two caches hold the same keys and values."""
    for a, b in zip(content(got), content(expected), strict=True):
        for x, y in zip(a, b):
            assert x.shape == y.shape
            assert float((x - y).abs().max()) < tolerance
