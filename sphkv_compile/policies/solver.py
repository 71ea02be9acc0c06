"""The allocation: a tier for every token, or none, so that the expected loss is least under a budget of bytes.

Every head is a problem of its own. All its tokens share one curve of loss against bytes, scaled by what the token is
worth, y: a Lagrange multiplier lambda then gives tier t or a wider one to the tokens with y s_t >= lambda, where s_t
are the slopes of the curve's lower hull. A histogram of log y says how many those are for every lambda at once, so the
bytes of each lambda are known without a sort, a search or a question to the device. A token's kind and bin, its cell,
say all that matters of it but its place in the table: what depends on them is worked out once per cell and looked up.

Source: SPHERICAL KV (arXiv 2605.18856), retention under a rate constraint; Lagrangian bit allocation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 4096
PER_OCTAVE = 128
"""Bins of a factor of two: tokens of one bin differ by half a per cent."""
SHIFTS = 2048
"""Bins by which a slope may lie below the head's steepest: a factor of 65536."""
NEAR = 16
"""Bins below the threshold among which the last bytes are spent: a twelfth of its value."""
LEVELS = BINS + SHIFTS + 1
"""Levels of lambda: the least gives every token all that can be of use, the greatest nothing."""
RUNS = 4096
"""Runs of consecutive tokens, of one where there are so few, that get the last bytes whole or not at all."""


@dataclass(frozen=True)
class Prices:
    """What a page of each tier costs, drop first. Units: ``page`` tokens, ``bytes`` of a whole page, 0 for drop."""

    bytes: tuple[int, ...]
    page: int

    def __post_init__(self) -> None:
        if self.bytes[0] != 0 or sorted(set(self.bytes)) != list(self.bytes):
            raise ValueError(f"prices {self.bytes}: expected 0 for the drop, then ascending bytes, no two the same")


def allocate(worth: Tensor, kind: Tensor, loss: Tensor, prices: Prices, budget: Tensor) -> Tensor:
    """The choice of each token: 0 drops it, t keeps it at the t-th choice of ``prices``, narrowest first.

    Pages are whole and partial ones cost as much. Of tokens worth the same the first ones win, so that every rank
    decides alike.

    Args:
        worth: y >= 0, not-a-number counts as 0; what is not there is marked by a negative one and gets 0.
        kind: which row of ``loss`` a token goes by: what it costs to change depends on what it is.
        loss: expected loss of each choice in units of y; inf where it is not allowed. 0, the drop, must be.
        prices: of each choice, ascending.
        budget: bytes of each head.

    Shapes: H heads, N tokens, C kinds, T choices: ``worth`` float32[H, N], ``kind`` int64[H, N], ``loss`` float32[H, C,
    T], ``budget`` int64[H] -> int64[H, N]. Below, cells are C * (BINS + 1), and N is RUNS or fewer times ``length``.
    """
    (heads, tokens), kinds = worth.shape, loss.shape[1]
    if not tokens:
        return kind.clone()
    length = -(-tokens // RUNS)
    if spare := -tokens % length:
        worth, kind = F.pad(worth, (0, spare), value=-1.0), F.pad(kind, (0, spare))
    loss, bins = loss.float(), _bins(worth)
    cell = _cell(bins, kind, kinds).view(heads, -1, length)
    reached = _reached(loss, prices)
    level = _level(cell, reached, prices, budget)

    # what is left goes to tokens that a smaller lambda would serve too: those of the next bin, then any near it
    levels = torch.stack([level, level - 1, level - NEAR]).clamp(min=1).int()
    passed = reached >= levels[..., None, None]
    chosen, counts = _fill(cell, passed, prices, budget)
    if prices.page > 1:
        chosen = _top_up(chosen, bins.view_as(cell), kind, loss, counts, prices.page)
    return chosen.flatten(1)[:, :tokens].long()


def _bins(worth: Tensor) -> Tensor:
    """Bin of log2 y: the head's greatest lies in the last, BINS, what is 32 octaves below it in the first, 1; what is
    not there in 0. Shapes: float32[H, N] -> int16[H, N]."""
    worth = worth.nan_to_num(nan=0.0)  # infinity becomes the largest number
    top = worth.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # the logarithm of zero is -inf, that of less is not a number
    return (worth / top).log2_().mul_(PER_OCTAVE).add_(BINS).clamp_(min=1).nan_to_num_(nan=0.0).short()


def _cell(bins: Tensor, kind: Tensor, kinds: int) -> Tensor:
    """The cell of each token, counted through all heads. Shapes: int16[H, N], int64[H, N] -> int32[H, N]."""
    heads = torch.arange(bins.shape[0], dtype=torch.int32, device=bins.device).unsqueeze(-1)
    cell = bins.int().add_(heads, alpha=kinds * (BINS + 1))
    return cell if kinds == 1 else cell.add_(kind.int(), alpha=BINS + 1)


def _slopes(loss: Tensor, prices: Prices) -> Tensor:
    """Slopes of the lower hull of loss against bytes over the step to each tier, by the min-max formula of isotonic
    regression: a tier above the hull shares its step with the next one on it.

    Shapes: float32[H, C, T] -> float32[H, T - 1, C], 0 or less where the hull has ended.
    """
    # without waiting for what the device has still to do
    each = torch.tensor([b / prices.page for b in prices.bytes]).to(loss.device, non_blocking=True)
    slopes = (loss.unsqueeze(-1) - loss.unsqueeze(-2)) / (each - each.unsqueeze(-1))  # [H, C, from, to]
    barred = ~(loss < torch.inf)
    slopes = slopes.masked_fill(barred.unsqueeze(-2), -torch.inf).masked_fill(barred.unsqueeze(-1), torch.inf)
    return torch.stack([slopes[..., :tier, tier:].amax(-1).amin(-1) for tier in range(1, len(each))], 1)


def _reached(loss: Tensor, prices: Prices) -> Tensor:
    """The greatest level, log2 of lambda = y s_t in bins, at which a cell's tokens get each tier or a wider one; 0 if
    they never do. Slopes are relative to the head's steepest, so that levels are the same few thousand for all.

    Shapes: ``loss`` float32[H, C, T] -> int32[H, T - 1, cells].
    """
    slopes = _slopes(loss, prices).unsqueeze(-1)
    shift = (slopes.clamp(min=1e-30).log2() * PER_OCTAVE).round()
    shift = (shift - shift.amax((1, 2), keepdim=True)).clamp(min=-SHIFTS)
    bins = torch.arange(BINS + 1, dtype=torch.int32, device=loss.device)
    return torch.where((slopes > 0) & (bins > 0), bins + SHIFTS + shift.int(), 0).flatten(2)


def _level(cell: Tensor, reached: Tensor, prices: Prices, budget: Tensor) -> Tensor:
    """The least level that fits; a greater one may not, where more pages are partly filled.

    Shapes: ``cell`` int32[H, RUNS, length], ``reached`` int32[H, T - 1, cells], ``budget`` int64[H] -> int64[H].
    """
    heads, tiers, cells = reached.shape
    one = torch.ones((), dtype=torch.int32, device=cell.device)
    counts = torch.zeros(heads * cells, dtype=torch.int32, device=cell.device)
    counts.index_add_(0, cell.flatten(), one.expand(cell.numel()))
    wider = torch.zeros(heads, tiers, LEVELS + 1, dtype=torch.int32, device=cell.device)
    wider.scatter_add_(2, reached.long(), counts.view(heads, 1, cells).expand_as(reached))
    held = _held(wider[..., 1:].flip(-1).cumsum(-1, dtype=torch.int32))  # from the greatest lambda down
    fits = _paid(held, prices) <= budget.unsqueeze(-1)
    return LEVELS - (fits * torch.arange(LEVELS, device=cell.device)).amax(-1)


def _held(wider: Tensor) -> Tensor:
    """Tokens of each tier from those of each tier or a wider one. Shapes: int32[H, T - 1, ...] -> the same."""
    return torch.cat([wider[:, :-1] - wider[:, 1:], wider[:, -1:]], 1)


def _bytes(pages: Tensor, prices: Prices) -> Tensor:
    """Bytes of so many pages of each tier. Shapes: int32[H, T - 1, ...] -> int64[H, ...]."""
    total = torch.zeros_like(pages[:, 0], dtype=torch.int64)
    for tier, price in enumerate(prices.bytes[1:]):
        total.add_(pages[:, tier], alpha=price)
    return total


def _paid(held: Tensor, prices: Prices) -> Tensor:
    """Bytes of the pages that so many tokens of each tier take. Shapes: int32[H, T - 1, ...] -> int64[H, ...]."""
    return _bytes(-(-held // prices.page), prices)


def _fill(cell: Tensor, passed: Tensor, prices: Prices, budget: Tensor) -> tuple[Tensor, Tensor]:
    """The choices of the first stage, those of a later one for the first runs for which the bytes suffice; and how many
    tokens have each tier.

    Shapes: ``cell`` int32[H, RUNS, length], ``passed`` bool[stages, H, T - 1, cells] whether a stage gives a cell's
    tokens a tier or a wider one, ``budget`` int64[H] -> int16[H, RUNS, length], int64[H, T - 1].
    """
    stages, heads, tiers, cells = passed.shape
    # a run is a bag of cells: one look at each token counts for all stages and tiers, exactly, as whole numbers
    table = passed.permute(1, 3, 0, 2).to(torch.float32, memory_format=torch.contiguous_format)
    wider = F.embedding_bag(cell.flatten(0, 1), table.view(heads * cells, -1), mode="sum").int()
    wider = wider.view(heads, -1, stages, tiers).permute(2, 0, 3, 1).contiguous()
    held, *later = (_held(each) for each in wider)
    stage = torch.zeros_like(cell[..., 0])  # of each run
    for number, more in enumerate(later, 1):
        served = _served(held, more, prices, budget)
        stage = torch.where(served, number, stage)
        held = torch.where(served.unsqueeze(1), more, held)
    choice = passed.sum(2, dtype=torch.int16).flatten()
    chosen = choice.index_select(0, (cell + (stage * (heads * cells)).unsqueeze(-1)).flatten())
    return chosen.view_as(cell), held.sum(-1)


def _served(held: Tensor, more: Tensor, prices: Prices, budget: Tensor) -> Tensor:
    """The first runs of tokens for which the bytes suffice to hold ``more``.

    Shapes: int32[H, T - 1, RUNS] twice, ``budget`` int64[H] -> bool[H, RUNS].
    """
    grown, counts, budget = more - held, held.sum(-1, keepdim=True, dtype=torch.int32), budget.unsqueeze(-1)
    # one that alone is too dear is passed over, for those behind it
    cheap = (grown != 0).any(1) & (_bytes(counts + grown, prices) <= budget * prices.page)
    total = counts + (grown * cheap.unsqueeze(1)).cumsum(-1, dtype=torch.int32)
    fits = cheap & (_paid(total, prices) <= budget)
    number = torch.arange(1, fits.shape[-1] + 1, device=fits.device)
    return cheap & (number <= (fits * number).amax(-1, keepdim=True))


def _top_up(chosen: Tensor, bins: Tensor, kind: Tensor, loss: Tensor, counts: Tensor, page: int) -> Tensor:
    """Fill the pages that are paid for, of the widest tier first, by the best of the tokens that have less; it costs
    nothing. A tier lacks less than a page, and as much again for each wider one that took tokens from it: the best are
    sought among as many.

    Shapes: ``chosen`` and ``bins`` int16[H, RUNS, length], ``kind`` int64[H, N], ``loss`` float32[H, C, T], ``counts``
    int64[H, T - 1] of tokens at each tier -> int16[H, RUNS, length].
    """
    choices, places = loss.shape[-1], chosen.shape
    loss, counts = loss.flatten(1), F.pad(counts, (1, 0))  # the drop has no pages to fill
    paid = -(-counts // page) * page
    for choice in range(choices - 1, 0, -1):
        less = (choice - chosen).clamp_(0, 1)  # as numbers: a CPU's select by a mask in no order is many times slower
        best, at = _best(less.mul_(bins), page * (choices - choice))
        own, row = chosen.flatten(1).gather(1, at).long(), kind.gather(1, at) * choices
        gains = (best > 0) & (loss.gather(1, row + choice) < loss.gather(1, row + own))
        taken = gains & (gains.cumsum(-1) <= (paid - counts)[:, choice, None])
        counts = counts.scatter_add(1, own, -taken.long())
        chosen = chosen.flatten(1).scatter(1, at, torch.where(taken, choice, own).to(chosen.dtype)).view(places)
    return chosen


def _best(bins: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Bins and places of the tokens of the greatest bins, of one bin the first first. They lie in as many runs, those
    whose best are the best: the others need not be looked through.

    Shapes: int16[H, RUNS, length] -> int16[H, count], int64[H, count].
    """
    _, runs, length = bins.shape
    place = torch.arange(max(runs, length), device=bins.device)
    order = (bins.amax(-1).long() << 32) - place[:runs]
    run = order.topk(min(count, runs), -1).indices
    at = (run.unsqueeze(-1) * length + place[:length]).flatten(1)
    best = bins.flatten(1).gather(1, at)
    order = (best.long() << 32) - at
    first = order.topk(min(count, order.shape[1]), -1).indices
    return best.gather(1, first), at.gather(1, first)
