"""The product's cache, whose plans see exact logits: what approximate ones cost, and nothing else.

The dense keys stand beside the codes. Which queries are asked, what is remembered of them, lengths of values, noise of
heads, and everything that a policy makes of it, are the product's own.

Symbols: B rows; HQ query heads, H kv heads, G query heads of one; T queries; C cached tokens; P pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sphkv_compile.eval.attention import weights
from sphkv_compile.eval.retention import SPEC, Coded, coded_end
from sphkv_compile.ops.pages import value_lengths, with_positions
from sphkv_compile.ops.statistics import Seen, newest_queries, observe
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool
from sphkv_compile.runtime.retention import Retention
from sphkv_compile.runtime.sites import Sites
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import LENGTH, State


@dataclass
class FromKeys(Retention):
    """Retention by softmax over dense keys.

    Shapes: ``keys`` of each owner, all tokens so far: [B, H, C, D].
    """

    keys: dict[Owner, Tensor] = field(default_factory=dict)

    def _look(self, sites: Sites, count: int) -> Seen:
        state, layout, frequencies = sites.state, sites.layout, self._frequencies(sites)
        return observe(state, layout, count, sites.scale, frequencies, attention=partial(self._mean, sites.owners))

    def _losses(self, sites: Sites, keep: Tensor, count: int) -> Tensor:
        state, half, end = sites.state, count // 2, int(sites.state.rows[:, LENGTH].max())
        at = torch.arange(end - count, end, device=keep.device)
        earlier, later = (newest_queries(state, begin, begin + half) for begin in (end - count, end - half))
        there = with_positions(state, sites.layout).positions >= 0
        length = torch.where(there, value_lengths(state, sites.layout), 0.0)
        (mean,) = self._mean(sites.owners, state, sites.layout, earlier, at[:half])
        length /= (length.sum((2, 3)) / there.sum((2, 3)))[..., None, None]
        rank = torch.where(there, mean * length, -1.0).flatten(2).argsort(dim=-1, descending=True, stable=True)
        dropped = (rank.argsort(-1).unsqueeze(-1) >= keep.unsqueeze(2)) * length.flatten(2).unsqueeze(-1)
        paid = self._paid(sites.owners, state, sites.layout, later, at[half:])
        losses = [(p.flatten(2, 3) @ own).square().mean(2) for (p, _), own in zip(paid, dropped.split(sites.rows))]
        return torch.cat(losses)

    def _mean(
        self,
        owners: list[Owner],
        state: State,
        layout: Layout,
        queries: Tensor,
        at: Tensor,
        scale: float | None = None,
        parts: tuple[int, ...] | None = None,
        fused: bool = False,
    ) -> list[Tensor]:
        """What :func:`~sphkv_compile.ops.statistics.mean_attention` says, of the owners' dense keys."""
        sizes, means = list(parts or (len(at),)), []
        for paid, seen in self._paid(owners, state, layout, queries, at):
            pairs = zip(paid.split(sizes, 3), seen.split(sizes, 3))
            means.append([p.sum((2, 3)) / s.sum((2, 3)).clamp(min=1) for p, s in pairs])
        return [torch.cat(part).unflatten(-1, (-1, layout.page)) for part in zip(*means)]

    def _paid(
        self, owners: list[Owner], state: State, layout: Layout, queries: Tensor, at: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Softmax weights in the order of the pages, owner by owner, and whether the query sees the token.

        Shapes: ``queries`` [B, HQ, T, D], ``at`` int64[T] -> float32[B, H, G, T, P * page], bool of the same.
        """
        rows = [owner.geometry.batch for owner in owners]
        slots = with_positions(state, layout).positions.flatten(2).long()
        for owner, q, slot in zip(owners, queries.split(rows), slots.split(rows)):
            keys, slot = self.keys[owner], slot[:, :, None, None]
            paid = weights(q, keys, _held(slot[:, :, 0, 0], keys.shape[2]), at, owner.scale or q.shape[-1] ** -0.5)
            seen = ((slot >= 0) & (slot <= at.unsqueeze(-1))).expand(*paid.shape[:-1], -1)
            yield paid.gather(-1, slot.clamp(min=0).expand_as(seen)) * seen, seen


def _held(slots: Tensor, length: int) -> Tensor:
    """Which tokens of a cache are there: those that the pages hold, sinks, and what no span holds yet.

    Shapes: ``slots`` int64[B, H, N], -1 where there is none -> bool[B, H, length].
    """
    held = torch.zeros(*slots.shape[:2], length + 1, dtype=torch.bool, device=slots.device)
    held.scatter_(-1, torch.where(slots < 0, length, slots), True)
    held[..., : SPEC.sink] = held[..., coded_end(length) :] = True
    return held[..., :length]


class Exact(Coded):
    """The product's cache, under a budget that drops tokens, with :class:`FromKeys` to decide which."""

    def _pool(self, nbytes: int) -> Pool:
        pool = super()._pool(nbytes)
        if pool.retention is not None:
            pool.retention = FromKeys(pool.retention.policy, pool.retention.budget)
        return pool

    def _append(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super()._append(layer, q, k, v)
        if isinstance(self.pool.retention, FromKeys):
            keys, owner = self.pool.retention.keys, self.owners[layer]
            keys[owner] = torch.cat([keys.get(owner, k[:, :, :0]), k], 2)
