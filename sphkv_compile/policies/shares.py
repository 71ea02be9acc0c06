"""Shares: how many bytes each head gets of what they all have, by what recent queries would have lost with fewer.

Heads differ far more than tokens of one head do: a few of them read their past widely, and every token that such a head
drops costs the model, while most heads lose nothing with a tenth of theirs. Less uneven shares, a mean of these and
equal ones or a root of these, lose a tenth to a half more with SmolLM2, and within 7 % the same with Gemma3 (geometric
mean of KL on four documents that are not reported: examples/eval/shares.json).

Source: SPHERICAL KV (arXiv 2605.18856), retention under a rate constraint; Lagrangian bit allocation.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = (*(x / 20 for x in range(4, 20)), *(x / 10 for x in range(10, 20)), 2.0, 2.2, 2.5, 3.0, 3.5, 4.0)
"""The shares that are tried, from a fifth of an equal one to four times that."""
EQUAL = GRID.index(1.0)
BISECTIONS = 60


def shares(losses: Tensor, weights: Tensor, mean: float = 1.0) -> Tensor:
    """The share of each head, 1 for an equal one, so that the losses add up to the least: one Lagrange multiplier for
    all heads. Of shares that cost the same the smallest is taken, and what is then left over serves all alike.

    Args:
        losses: of each head at each share of ``GRID``.
        weights: bytes of an equal share.
        mean: of the shares, weighted; below 1 where other heads have more than theirs.

    Shapes: ``losses`` float32[N, len(GRID)], ``weights`` float32[N] -> float32[N].
    """
    grid, weight = torch.tensor(GRID, device=losses.device), (weights / weights.mean()).unsqueeze(-1)
    low, high = torch.full((), 1e-12), torch.full((), 1e6)
    for _ in range(BISECTIONS):  # on a logarithmic scale
        middle = (low * high).sqrt()
        over = (_best(losses, grid, weight, middle) * weight.squeeze(-1)).mean() > mean
        low, high = (middle, high) if over else (low, middle)
    found = _best(losses, grid, weight, high)
    return found / (found * weight.squeeze(-1)).mean() * mean


def _best(losses: Tensor, grid: Tensor, weight: Tensor, price: Tensor) -> Tensor:
    return grid[(losses + price.to(losses.device) * weight * grid).argmin(-1)]


def keepers(losses: Tensor, needs: Tensor, least: Tensor, room: float, wanted: int) -> Tensor:
    """The heads that are to keep all their tokens: ``wanted`` of them, or as many as the bytes are for. Those that lose
    most with an equal share come first, of equal ones the first.

    Args:
        losses: as for :func:`shares`.
        needs: with which a head keeps all its tokens.
        least: what any head must have.
        room: of all heads.

    Units: bytes.

    Shapes: ``losses`` float32[N, len(GRID)], ``needs``, ``least`` float64[N] -> bool[N].

    Source: the idea of retrieval heads, which need all their past (DuoAttention, arXiv 2410.10819).
    """
    order = losses[:, EQUAL].argsort(descending=True, stable=True)
    fits = (needs - least).clamp(min=0)[order].cumsum(0) <= room - least.sum()
    return torch.zeros_like(fits).index_fill_(0, order[: min(wanted, int(fits.sum()))], True)


def whole(wanted: Tensor, unit: int) -> Tensor:
    """Bytes of each head in whole units, no more in all: what rounding down leaves goes to those that lose most by it.

    Shapes: float[N] -> int64[N].
    """
    units = wanted.double() / unit
    down = units.floor()
    rest = units - down
    order = rest.argsort(descending=True, stable=True)
    one_more = torch.arange(len(order), device=order.device) < rest.sum().floor()
    return ((down + torch.empty_like(rest).scatter_(0, order, one_more.double())) * unit).long()
