"""Whether logits from codes rank tokens as exact ones do, and what the difference costs.

A plan reads what the newest queries paid to each token from the codes of its key, and never rebuilds the key. Here the
same is read from the dense keys: site by site, the two orders of the tokens are compared; then whole caches are, whose
plans go by the one or the other (:mod:`.exact`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.eval import contenders
from sphkv_compile.eval.attention import weights
from sphkv_compile.eval.contenders import WHOLE, Cell
from sphkv_compile.eval.divergence import STEPS, Document
from sphkv_compile.eval.retention import Cache, Coded, Prompt
from sphkv_compile.ops.pages import with_positions
from sphkv_compile.ops.statistics import mean_attention, newest_queries
from sphkv_compile.storage.layout import MEMORY

NAME, TIER = "utilities", "K4V4"
"""Of the rows that compare orders, and the codes that they are of."""
METHODS = ("rdr", "rdr, exact logits", "rdr, one tier", "rdr, one tier, exact logits")
"""Whose losses are compared. The first plan of the former two reads codes of 8 bits, the menu's widest, that of the
latter two codes of 4 bits."""
TOP = 0.1
"""Share of the tokens that is looked at by itself."""


class Unplanned(Coded):
    """The product's cache of a prompt as its first plan meets it: all tokens are coded, none is dropped."""

    def end(self, tokens: int) -> None:
        """Counts, and plans nothing."""
        Cache.end(self, tokens)


def cells(budgets: list[float]) -> list[Cell]:
    """The orders once, then the losses at every budget."""
    return [Cell(NAME, WHOLE), *contenders.cells(list(METHODS), budgets)]


def rows(model: Any, ids: Tensor, todo: list[Cell]) -> Iterator[dict[str, Any]]:
    """A row for each cell. Shapes: ``ids`` int64[1, C]: a prompt, ``STEPS`` tokens and a target."""
    length = ids.shape[1] - 1 - STEPS
    document = Document(model, ids, length)
    for cell in todo:
        if cell.method == NAME:
            yield {**cell._asdict(), "tier": TIER, **orders(document.prompt)}
        else:
            yield from contenders.rows([cell], document.prompt, length, STEPS, document.score)


@torch.no_grad()
def orders(prompt: Prompt) -> dict[str, float]:
    """How alike tokens are ranked, in the mean over sites and heads, and in the head where they are least alike."""
    cache = Unplanned(prompt, prompt.length, int(0.125 * prompt.length * prompt.token_bytes), tiers=TIER)
    found = [both(cache, layer) for layer in prompt.growing]
    alike = torch.cat([correlation(*pair).flatten() for pair in found])
    common = torch.cat([overlap(*pair).flatten() for pair in found])
    return {
        "correlation": float(alike.mean()),
        "lowest_correlation": float(alike.min()),
        "overlap": float(common.mean()),
        "lowest_overlap": float(common.min()),
    }


def both(cache: Coded, layer: int) -> tuple[Tensor, Tensor]:
    """The mean attention that the newest queries paid to each coded token, from codes and from dense keys.

    Shapes: -> float32[B, H, N] twice.
    """
    owner, site = cache.owners[layer], cache.prompt.sites[layer]
    first = max(0, cache.length - MEMORY)
    queries = newest_queries(owner.state, first, cache.length)
    at = torch.arange(first, cache.length, device=queries.device)
    (coded,) = mean_attention(owner.state, owner.layout, queries, at, owner.scale)
    slots = with_positions(owner.state, owner.layout).positions.flatten(2).long()
    there = slots[0, 0] >= 0  # as many in every row and head, and the same, before a plan
    exact = from_keys(site.q[:, :, first:], site.k, site.scale)
    return coded.flatten(2)[..., there], exact.gather(-1, slots[..., there])


def from_keys(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The mean softmax weight of each token, over the query heads of its kv head and the queries that see it.

    Shapes: ``q`` [B, HQ, T, D] of the newest tokens, ``k`` [B, H, C, D] -> float32[B, H, C].
    """
    column = torch.arange(k.shape[2], device=k.device)
    at = column[k.shape[2] - q.shape[2] :]
    paid = weights(q, k, torch.ones_like(k[..., 0], dtype=torch.bool), at, scale)
    return paid.mean(2).sum(2) / (column <= at.unsqueeze(-1)).sum(0)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, of the last dimension. Shapes: [..., N] twice -> float64[...]."""
    x, y = (ranks(z) - (z.shape[-1] + 1) / 2 for z in (a, b))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def ranks(x: Tensor) -> Tensor:
    """From 1; equal ones share their mean. Shapes: [..., N] -> float64[..., N]."""
    ascending = x.contiguous().sort(-1).values
    below, upto = (torch.searchsorted(ascending, x.contiguous(), right=right) for right in (False, True))
    return (below + upto + 1).double() / 2


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Of the ``TOP`` of tokens by the one, the share that is so by the other too.

    Shapes: [..., N] twice -> float32[...].
    """
    best = max(1, int(TOP * a.shape[-1]))
    chosen = [torch.zeros_like(x).scatter_(-1, x.topk(best, -1).indices, 1.0) for x in (a, b)]
    return (chosen[0] * chosen[1]).sum(-1) / best
