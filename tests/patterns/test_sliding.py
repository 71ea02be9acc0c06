"""A full window that shifts by one: what is taken, and every way in which it is almost that."""

import pytest
import torch
from toys import L, Toys, sdpa

toys = Toys()
FULL = dict(held=L)


@pytest.mark.parametrize("toy", toys, ids=str)
def test_verdict_numbers_and_contents(toy):
    toy.check()


def shift(c, x, by=1, column=-1):
    """transformers' StaticSlidingWindowLayer.update for one token."""
    order = (torch.arange(L) + by) % L
    k, v = c.k[:, :, order], c.v[:, :, order]
    at = torch.tensor([column])
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return k, v


# ---- taken


@toys("sliding", (1,) * 12, **FULL)
def a_full_window(c, x):
    """Twelve steps: the span that was partly out of sight is reused."""
    return sdpa(x, *shift(c, x), None)


@toys("sliding", **FULL, batch=2)
def the_buffer_read_instead(c, x):
    shift(c, x)
    return sdpa(x, c.k, c.v, None)


@toys("sliding", **FULL)
def under_a_mask(c, x):
    """Only the newer half may be seen."""
    return sdpa(x, *shift(c, x), (torch.arange(L) >= L // 2).view(1, 1, 1, L))


@toys("sliding", **FULL)
def last_column_counted_from_the_left(c, x):
    return sdpa(x, *shift(c, x, column=L - 1), None)


# ---- refused


@toys("unknown_write", detail="not rolled by one", **FULL)
def rolled_by_two(c, x):
    return sdpa(x, *shift(c, x, by=2), None)


@toys("unknown_write", detail="not rolled by one", **FULL)
def rolled_backwards(c, x):
    return sdpa(x, *shift(c, x, by=L - 1), None)


@toys("unknown_write", detail="elsewhere", **FULL)
def written_in_another_column(c, x):
    return sdpa(x, *shift(c, x, column=-2), None)


@toys("unknown_write", detail="elsewhere", **FULL)
def written_where_the_caller_says(c, x):
    order = (torch.arange(L) + 1) % L
    k, v = c.k[:, :, order], c.v[:, :, order]
    at = x.pos - L
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return sdpa(x, k, v, None)


@toys("unknown_write", detail="permuted", **FULL)
def shuffled_by_a_table(c, x):
    order = torch.tensor([*range(1, L), 0])
    k, v = c.k[:, :, order], c.v[:, :, order]
    at = torch.tensor([-1])
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return sdpa(x, k, v, None)


@toys("partial_read", detail="24 columns", **FULL)
def a_part_of_the_window(c, x):
    k, v = shift(c, x)
    return sdpa(x, k[:, :, :24], v[:, :, :24], None)


@toys("other_readers", **FULL)
def the_shifted_window_read_before_the_write(c, x):
    order = (torch.arange(L) + 1) % L
    k, v = c.k[:, :, order], c.v[:, :, order]
    stale, at = k.sum(), torch.tensor([-1])
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return sdpa(x, k, v, None) + stale


@toys("not_stored", **FULL)
def shifted_but_not_kept(c, x):
    order, at = (torch.arange(L) + 1) % L, torch.tensor([-1])
    k, v = c.k[:, :, order], c.v[:, :, order]
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    return sdpa(x, k, v, None)
