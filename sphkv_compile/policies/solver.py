"""The allocation: a tier for every token, or none, so that the expected loss is least under a budget of bytes.

Every head is a problem of its own. All its tokens share one curve of loss against bytes, scaled by what the token is
worth, y: a Lagrange multiplier lambda then gives tier t or a wider one to the tokens with y s_t >= lambda, where s_t
are the slopes of the curve's lower hull. A histogram of log y says how many those are for every lambda at once, so the
bytes of each lambda are known without a sort, a search or a question to the device.

Source: SPHERICAL KV (arXiv 2605.18856), retention under a rate constraint; Lagrangian bit allocation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 4096
PER_OCTAVE = 128
"""Bins of a factor of two: tokens of one bin differ by half a per cent."""
SHIFTS = 2048
"""Bins by which a slope may lie below the head's steepest: a factor of 65536."""
NEAR = 16
"""Bins below the threshold among which the last bytes are spent: a twelfth of its value."""
RUNS = 4096
"""Runs of tokens at the threshold, one token each where there are so few, that are served whole or not at all."""


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
    T], ``budget`` int64[H] -> int64[H, N].
    """
    heads, device = worth.shape[0], worth.device
    kinds, choices = loss.shape[1:]
    if not worth.shape[1]:
        return kind.clone()
    each = torch.tensor([b / prices.page for b in prices.bytes], device=device)
    target, shift = _hull(loss.float(), each)
    bins = _bins(worth)

    # how many tokens of each kind lie in each bin or above: int64[H, C, BINS + 1]; -1 is what is not there
    index = (bins + 1).long() if kinds == 1 else kind * (BINS + 1) + bins + 1
    counts = torch.zeros(heads, kinds * (BINS + 1), dtype=torch.int64, device=device)
    counts.scatter_add_(1, index, torch.ones((), dtype=torch.int64, device=device).expand_as(index))
    above = torch.zeros(heads, kinds, BINS + 1, dtype=torch.int64, device=device)
    above[..., :BINS] = counts.view(heads, kinds, BINS + 1)[..., 1:].flip(-1).cumsum(-1).flip(-1)

    # for every lambda, from the greatest down: tokens at each choice, and their bytes
    span = BINS + 2 * SHIFTS
    levels = torch.arange(span, -1, -1, device=device) - SHIFTS  # the bin that a slope of one would need
    held = torch.zeros(heads, choices, span + 1, dtype=torch.int64, device=device)
    for edge in range(choices - 1):
        need = (levels - shift[..., edge : edge + 1]).clamp(0, BINS)  # [H, C, levels]
        passed = above.gather(-1, need) * (target[..., edge : edge + 1] > 0)
        before = target[..., edge - 1] if edge else torch.zeros_like(target[..., 0])
        for choice in range(choices):
            held[:, choice] += (passed * (target[..., edge] == choice).unsqueeze(-1)).sum(1)
            if choice:
                held[:, choice] -= (passed * (before == choice).unsqueeze(-1)).sum(1)
    fits = _bytes(held, prices) <= budget.unsqueeze(-1)
    # the least lambda that fits; a greater one may not, where more pages are partly filled
    best = (fits * torch.arange(1, span + 2, device=device)).amax(-1) - 1
    level = levels[best.clamp(min=0)]

    chosen = _choice(bins, kind, target, shift, level)
    # what is left goes to tokens that a smaller lambda would serve too: those of the next bin, then any near it
    counts = held.gather(-1, best.clamp(min=0).view(-1, 1, 1).expand(-1, choices, -1)).squeeze(-1)
    for lower in (1, NEAR):
        more = _choice(bins, kind, target, shift, level - lower)
        chosen, counts = _fill(chosen, more, counts, prices, budget)
    if prices.page > 1:
        chosen = _top_up(chosen, bins, kind, loss.float(), counts, prices.page)
    return chosen.long()


def _bins(worth: Tensor) -> Tensor:
    """Bin of log2 y: the head's greatest lies in the last, what is 32 octaves below it in the first; -1 for what is not
    there. Shapes: float32[H, N] -> int32[H, N]."""
    worth = worth.nan_to_num(nan=0.0)  # infinity becomes the largest number
    top = worth.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    bins = ((worth / top).log2() * PER_OCTAVE + BINS - 1).clamp(min=0)  # of zero: -inf
    return torch.where(worth >= 0, bins, -1).to(torch.int32)


def _hull(loss: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
    """The lower hull of loss against bytes, from the drop on: each edge's end, and its slope as a number of bins.

    Shapes: ``loss`` [H, C, T], ``each`` [T] -> int64[H, C, T - 1], 0 where there is no further edge, twice.
    """
    choices = each.shape[0]
    at = torch.zeros(loss.shape[:2], dtype=torch.int64, device=loss.device)
    ends, shifts = [], []
    for _ in range(choices - 1):
        here = loss.gather(-1, at.unsqueeze(-1))
        wider = torch.arange(choices, device=loss.device) > at.unsqueeze(-1)
        slope = (here - loss) / (each - each[at].unsqueeze(-1)).clamp(min=1e-9)
        slope = slope.masked_fill(~wider | (slope <= 0) | slope.isnan(), 0)
        steepest, end = slope.max(-1)
        end = torch.where(steepest > 0, end, 0)
        shift = (steepest.clamp(min=1e-30).log2() * PER_OCTAVE).round().long()
        ends.append(end)
        shifts.append(shift)
        at = torch.where(end > 0, end, at)
        loss = torch.where((end > 0).unsqueeze(-1), loss, torch.inf)  # where the hull has ended, nothing follows
    target, shift = torch.stack(ends, -1), torch.stack(shifts, -1)
    # slopes are relative to the steepest of the head, so that levels are the same few thousand for all
    reference = shift.masked_fill(target == 0, -(1 << 40)).flatten(1).amax(-1).view(-1, 1, 1)
    return target, (shift - reference).clamp(-SHIFTS, 0)


def _choice(bins: Tensor, kind: Tensor, target: Tensor, shift: Tensor, level: Tensor) -> Tensor:
    """What each token gets at a level of lambda. Shapes: ``level`` int64[H] -> int64[H, N]."""
    chosen = torch.zeros_like(bins)
    needs = (level.view(-1, 1, 1) - shift).clamp(0, BINS).to(bins.dtype)
    needs = needs.masked_fill(target == 0, BINS + 1)
    target = target.to(bins.dtype)
    single = target.shape[1] == 1
    for edge in range(target.shape[-1]):
        need, end = (x[..., edge] if single else x[..., edge].gather(1, kind) for x in (needs, target))
        chosen = torch.where(bins >= need, end, chosen)
    return chosen


def _bytes(held: Tensor, prices: Prices) -> Tensor:
    """Bytes of the pages that so many tokens take. Shapes: int64[H, T, ...] -> int64[H, ...]."""
    pages = -(-held // prices.page)
    each = torch.tensor(prices.bytes, device=held.device)
    return (pages * each.view(-1, *[1] * (held.dim() - 2))).sum(1)


def _fill(chosen: Tensor, more: Tensor, counts: Tensor, prices: Prices, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``more`` instead of ``chosen`` to the first tokens for which the bytes suffice, and count.

    Shapes: int32[H, N] twice, ``counts`` int64[H, T] of what each choice has.
    """
    choices, heads = len(prices.bytes), chosen.shape[0]
    each = torch.tensor(prices.bytes, device=chosen.device) / prices.page
    differ = chosen != more
    rank = differ.cumsum(-1, dtype=torch.int32)
    width = (rank[:, -1:] + RUNS - 1) // RUNS  # tokens of a run
    run = torch.where(differ, (rank - 1) // width.clamp(min=1), RUNS)
    grown = torch.zeros(heads, choices * choices * (RUNS + 1), dtype=torch.int32, device=chosen.device)
    index = ((chosen * choices + more) * (RUNS + 1) + run).long()
    grown.scatter_add_(1, index, torch.ones((), dtype=torch.int32, device=chosen.device).expand_as(index))
    grown = grown.view(heads, choices, choices, RUNS + 1)
    grown = (grown.sum(1) - grown.sum(2)).masked_fill(torch.arange(RUNS + 1, device=chosen.device) == RUNS, 0)
    # one that alone is too dear is passed over, for those behind it
    left = budget.unsqueeze(-1) - (counts * each).sum(-1, keepdim=True)
    cheap = ((grown * each.view(-1, 1)).sum(1) <= left) & (grown != 0).any(1)
    total = counts.unsqueeze(-1) + (grown * cheap.unsqueeze(1)).cumsum(-1)
    fits = (_bytes(total, prices) <= budget.unsqueeze(-1)) & cheap
    number = torch.arange(RUNS + 1, device=chosen.device)
    served = cheap & (number <= (fits * number).amax(-1, keepdim=True)) & fits.any(-1, keepdim=True)
    counts = counts + (grown * served.unsqueeze(1)).sum(-1)
    return torch.where(served.gather(1, run.long()), more, chosen), counts


def _top_up(chosen: Tensor, bins: Tensor, kind: Tensor, loss: Tensor, counts: Tensor, page: int) -> Tensor:
    """Fill the last page of each choice, the widest first, by the best of the tokens that have less; it costs nothing.
    They are sought among as many as a page has.

    Shapes: ``chosen``, ``bins`` int32[H, N], ``kind`` int64[H, N], ``loss`` float32[H, C, T], ``counts`` int64[H, T] of
    what each choice has -> int32[H, N].
    """
    choices = loss.shape[-1]
    loss = loss.flatten(1)
    # a token's place in the order: by its bin, of one bin the first first
    order = (bins.long() << 32) - torch.arange(bins.shape[1], device=bins.device)
    number = torch.arange(min(page, bins.shape[1]), device=bins.device)
    for choice in range(choices - 1, 0, -1):
        free = -counts[:, choice] % page
        best, at = torch.where(chosen < choice, order, -1).topk(len(number), -1)
        own, row = chosen.gather(1, at), kind.gather(1, at) * choices
        gains = (best >= 0) & (loss.gather(1, row + choice) < loss.gather(1, row + own))
        taken = gains & (gains.cumsum(-1) <= free.unsqueeze(-1))
        counts = counts.scatter_add(1, own.long(), -taken.long())
        counts[:, choice] += taken.sum(-1)
        chosen = chosen.scatter(1, at, torch.where(taken, choice, own))
    return chosen
