"""Caches that hold less than everything, read by an unmodified model without torch.compile.

A dense prefill is captured once (:class:`Prompt`), then any number of caches are filled from it, and the same tokens
are read over each: a cell of the evaluation costs one filling, one plan and one call of the model.

    prompt = Prompt(model, ids)
    dense = read(Cache(prompt), following)
    ours = read(Coded(prompt, capacity, limit), following)

:class:`Coded` is what the compiled product does, less the compiler: its owners, pool, plans and policies, and the
operators that its graphs call. While a prompt is read nothing has been dropped yet, so its attention is exact there
too, and filling from a dense prefill gives what the product holds after one call. ``tests/eval`` proves them alike.

Layers with a sliding window stay dense for every method, and are not counted: they do not grow.

Symbols: B rows; HQ query heads, H kv heads; C cached tokens, S new ones; D head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.eval.attention import install, visible
from sphkv_compile.ops import schema
from sphkv_compile.ops.decode import packing
from sphkv_compile.runtime.budget import may_drop, resolve
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool, arena_bytes, page_bytes
from sphkv_compile.runtime.retention import Retention
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import SPANS, Geometry

WINDOW = 64
"""Newest tokens that every method holds exactly, beside the sinks and on top of its bytes. Units: tokens."""
SPEC = CacheSpec(window=WINDOW)
"""Where sinks, window and spans lie, for every method: what has left the window in whole spans may be coded or
dropped."""


@dataclass(frozen=True)
class Site:
    """One attention layer of a prompt. Shapes: ``q`` [B, HQ, C, D], ``k``, ``v`` [B, H, C, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    sliding: int | None


class Prompt:
    """The dense prefill of a prompt, captured layer by layer.

    Args:
        ids: rows of equal length, without padding.

    Shapes: ``ids`` int64[B, C].
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor):
        install(model)
        self.model, self.length, self.sites = model, ids.shape[1], dict[int, Site]()
        model(ids, use_cache=False, logits_to_keep=1, sphkv_run=self)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> Tensor:
        """Causal attention that remembers what it was given."""
        self.sites[layer] = Site(q, k, v, scaling, sliding)
        mask = None if sliding is None else visible(q.shape[2], k.shape[2], sliding, q.device)
        # heads side by side: with enable_gqa no kernel of float32 would do without the logits of a long prompt
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling)

    @property
    def growing(self) -> dict[int, Site]:
        """The layers whose caches grow with the length, which is what a budget is for."""
        return {layer: site for layer, site in self.sites.items() if site.sliding is None}

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in bfloat16, over the rows, kv heads and layers of caches that grow."""
        return sum(2 * x[:, :, 0].numel() for site in self.growing.values() for x in (site.k, site.v))

    @property
    def heads(self) -> int:
        """Kv heads of caches that grow, over rows and layers."""
        return sum(site.k.shape[0] * site.k.shape[1] for site in self.growing.values())

    def angles(self, positions: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary embedding of layers that see everything.

        Shapes: -> float32[n, rotary] twice.
        """
        rotary = next(module for name, module in self.model.named_modules() if name.endswith("rotary_emb"))
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        at = torch.tensor(list(positions), device=self.model.device)[None]
        blank = torch.zeros(1, device=self.model.device)
        cos, sin = rotary(blank, at, *(["full_attention"] if typed else []))
        return cos[0], sin[0]


class Cache:
    """Keys and values as tensors, all of which every query may look at: the reference.

    Shapes: by layer, ``k``, ``v`` [B, H, C, D]; ``held`` bool[B, H, C], absent where nothing was dropped.
    """

    def __init__(self, prompt: Prompt):
        self.prompt, self.length = prompt, prompt.length
        self.k = {layer: site.k for layer, site in prompt.sites.items()}
        self.v = {layer: site.v for layer, site in prompt.sites.items()}
        self.held: dict[int, Tensor] = {}

    def begin(self, tokens: int) -> None:
        """Before a call of the model."""

    def end(self, tokens: int) -> None:
        """After it."""
        self.length += tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> Tensor:
        """New queries over what is held, and the new tokens, which join it."""
        self.k[layer] = keys = torch.cat([self.k[layer], k], 2)
        self.v[layer] = values = torch.cat([self.v[layer], v], 2)
        mask = visible(q.shape[2], keys.shape[2], sliding, q.device)
        if layer in self.held:
            self.held[layer] = held = F.pad(self.held[layer], (0, k.shape[2]), value=True)
            mask = (mask & held.unsqueeze(2)).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)

    @property
    def counted_bytes(self) -> float:
        """What is stored beside sinks, window and the span that waits in it, were the model's dtype bfloat16."""
        return (coded_end(self.length) - SPEC.sink) * self.prompt.token_bytes

    @property
    def aside_bytes(self) -> float:
        """What is allocated on top of that for tokens to come, until a plan has seen them."""
        return 0


def coded_end(length: int, spec: CacheSpec = SPEC) -> int:
    """End of the tokens that have left the window in whole spans, of a cache of ``length`` tokens; they begin at the
    sinks. Units: tokens."""
    return spec.sink + max(0, (length - spec.window - spec.sink) // spec.span) * spec.span


class Coded(Cache):
    """The product's cache: spherical codes, and retention where a budget does not hold all tokens.

    Args:
        capacity: tokens that there will be; tables are laid out for so many.
        limit: budget over all rows, heads and layers that grow; None where ``options`` say the bits.
        options: of the backend (:class:`~sphkv_compile.spec.CacheSpec`).

    Units: ``limit`` in bytes.

    Raises:
        ValueError: a budget that is too small, with the least possible.
    """

    @torch.no_grad()
    def __init__(self, prompt: Prompt, capacity: int, limit: int | None = None, **options: Any):
        super().__init__(prompt)
        for layer in prompt.growing:
            del self.k[layer], self.v[layer]
        spec = CacheSpec.from_options({"window": WINDOW, "budget": limit, **options})
        shapes = {layer: geometry(site, capacity) for layer, site in prompt.growing.items()}
        self.spec = resolve(spec, list(shapes.values()))
        self.owners = self._owners(shapes)
        self.pool = next(iter(self.owners.values())).pool
        self.length = 0
        self.begin(prompt.length)
        for layer, site in prompt.growing.items():
            self._append(layer, site.q, site.k, site.v)
        self.end(prompt.length)

    def _owners(self, shapes: dict[int, Geometry]) -> dict[int, Owner]:
        """As the runner makes them when it meets a cache for the first time."""
        kept = may_drop(self.spec, list(shapes.values()))
        layouts = {layer: self._layout(shapes[layer], own) for layer, own in zip(shapes, kept)}
        pool = self._pool(sum(arena_bytes(layouts[layer], g) for layer, g in shapes.items()))
        cos, sin = self.prompt.angles(range(2))
        owners = {}
        for layer, g in shapes.items():
            owners[layer] = owner = Owner(layouts[layer], g, pool, scale=self.prompt.sites[layer].scale)
            owner.holds_codes = True
            if owner.layout.kept:
                owner.learn_frequencies(torch.atan2(sin, cos)[None], 1)
        return owners

    def _pool(self, nbytes: int) -> Pool:
        """Of so many bytes, or under the budget."""
        spec, device = self.spec, self.prompt.model.device
        if not spec.chooses:
            return Pool(nbytes, spec.plan_every, device)
        return Pool(UNIT, spec.plan_every, device, Retention.of(spec))

    def _layout(self, g: Geometry, kept: bool) -> Layout:
        device, rotary = self.prompt.model.device, self.prompt.angles([0])[0].shape[-1]
        return Layout.of(self.spec, "half", rotary, packing(self.spec, g.k_dim, g.v_dim, device, kept), kept)

    def begin(self, tokens: int) -> None:
        """Plans, where the pages that were reserved may not suffice."""
        self.pool.step(tokens)

    def end(self, tokens: int) -> None:
        """Brings a long call's tokens within the budget.

        Raises:
            RuntimeError: more bytes are held than the budget allows.
        """
        super().end(tokens)
        self.pool.settle(tokens)
        retention = self.pool.retention
        if retention is not None and self.counted_bytes > retention.budget:
            raise RuntimeError(
                f"{self.counted_bytes:,} bytes are held; expected the budget's {retention.budget:,} or less"
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> Tensor:
        """What a compiled graph does at a site: attend, then append."""
        if layer not in self.owners:
            return super().attend(layer, q, k, v, scaling, sliding)
        owner, columns = self.owners[layer], self.length + k.shape[2]
        mask = None if q.shape[2] == 1 else visible(q.shape[2], columns, None, q.device)[None, None]
        place = (None, self.length, columns, mask, False, scaling, str(owner.layout), False)
        out = schema.attend(*owner.state, q, k, v, *place)
        self._append(layer, q, k, v)
        return out

    def _append(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        owner = self.owners[layer]
        schema.append(*owner.state, q, k, v, None, self.length, None, str(owner.layout), False)

    @property
    def counted_bytes(self) -> float:
        """Page tables, anchors and positions, and pages: those of the arena that may grow, as ``report()`` counts them
        under a budget; else those that hold tokens."""
        tables = sum(owner.state.table_bytes for owner in self.owners.values())
        if self.pool.retention is not None:
            return tables + self.pool.arena.nbytes - self.aside_bytes
        return tables + sum(map(_coded_bytes, self.owners.values()))

    @property
    def aside_bytes(self) -> float:
        retention = self.pool.retention
        return 0 if retention is None else retention.aside(self.pool)


def geometry(site: Site, capacity: int) -> Geometry:
    """Of the cache that a layer would have. Units: ``capacity`` in tokens."""
    b, h, _, d = site.k.shape
    group = site.q.shape[1] // h
    return Geometry(b, h, capacity, d, site.v.shape[-1], site.k.dtype, site.v.dtype, False, group)


def _coded_bytes(owner: Owner) -> int:
    pages = int(owner.state.rows[:, SPANS].sum()) * owner.layout.pages_per_span * owner.geometry.heads
    return pages * page_bytes(owner.layout, owner.geometry)


@torch.no_grad()
def read(cache: Cache, ids: Tensor, chunk: int | None = None, keep: int = 0) -> Tensor:
    """Reads tokens over a cache, which then holds them: the logits after each.

    Args:
        chunk: tokens of one call; all by default.
        keep: of each call, how many of the last logits; 0 for all.

    Shapes: ``ids`` int64[B, S] -> float32[B, S, vocabulary].
    """
    logits = []
    for part in ids.split(chunk or ids.shape[1], 1):
        count = part.shape[1]
        positions = torch.arange(cache.length, cache.length + count, device=ids.device).expand_as(part)
        cache.begin(count)
        out = cache.prompt.model(part, position_ids=positions, use_cache=False, logits_to_keep=keep, sphkv_run=cache)
        cache.end(count)
        logits.append(out.logits.float())
    return torch.cat(logits, 1)


def continue_greedily(cache: Cache, ids: Tensor, count: int) -> Tensor:
    """Reads ``ids``, then the likeliest token ``count`` times, a call for each.

    Shapes: ``ids`` int64[B, S] -> int64[B, count].
    """
    tokens = [read(cache, ids, keep=1).argmax(-1)]
    while len(tokens) < count:
        tokens.append(read(cache, tokens[-1], keep=1).argmax(-1))
    return torch.cat(tokens, 1)
