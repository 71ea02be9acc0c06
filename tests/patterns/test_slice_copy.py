"""``buf[:, :, start:end].copy_(new)``: what is taken, and every way in which it is almost that."""

import pytest
import torch
from toys import L, Toys, sdpa

toys = Toys()


@pytest.mark.parametrize("toy", toys, ids=str)
def test_verdict_numbers_and_contents(toy):
    toy.check()


def put(c, x):
    c.k[:, :, x.start : x.end].copy_(x.k)
    c.v[:, :, x.start : x.end].copy_(x.v)


def read(c, x, end, mask=None, **kwargs):
    return sdpa(x, c.k[:, :, :end], c.v[:, :, :end], mask if mask is None else mask[..., :end], **kwargs)


# ---- taken


@toys("slice_copy", (5, 1, 6))
def chunks_and_steps(c, x):
    put(c, x)
    return read(c, x, x.end, x.mask)


@toys("slice_copy", (20, 1), held=0)
def prefill_from_nothing(c, x):
    put(c, x)
    return read(c, x, x.end, x.mask)


@toys("slice_copy", (1, 1), batch=2)
def read_to_the_end_without_a_mask(c, x):
    put(c, x)
    return read(c, x, x.end)


@toys("slice_copy", (1,))
def item_assignment(c, x):
    c.k[:, :, x.start : x.end] = x.k
    c.v[:, :, x.start : x.end] = x.v
    return read(c, x, x.end)


@toys("slice_copy", (1,))
def narrow(c, x):
    c.k.narrow(2, x.start, 1).copy_(x.k)
    c.v.narrow(2, x.start, 1).copy_(x.v)
    return sdpa(x, c.k.narrow(2, 0, x.end), c.v.narrow(2, 0, x.end), None)


@toys("slice_copy", (1, 3))
def whole_buffer_under_a_mask(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("slice_copy", (1, 1))
def more_columns_than_written_under_a_mask(c, x):
    put(c, x)
    return read(c, x, x.end + 2, x.mask)


@toys("slice_copy", (3,))
def causal_from_the_left(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, None, is_causal=True)


@toys("slice_copy", (1,))
def a_key_broadcast_before_the_write(c, x):
    """The copy expands it first, so the written value is whole."""
    c.k[:, :, x.start : x.end] = x.k[:, :1]
    c.v[:, :, x.start : x.end] = x.v
    return read(c, x, x.end)


# ---- refused


@toys("unmasked_slots", (1, 1), detail="are written")
def whole_buffer_without_a_mask(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, None)


@toys("unmasked_slots", (1, 1), detail="are written")
def one_column_more_than_written(c, x):
    put(c, x)
    return read(c, x, x.end + 1)


@toys("unmasked_slots", (1,), detail="are written")
def one_column_less_than_written(c, x):
    put(c, x)
    return read(c, x, x.end - 1)


@toys("partial_read", (3, 1), held=1, detail="are written")
def causal_without_the_newest(c, x):
    put(c, x)
    return read(c, x, x.end - 1, is_causal=True)


@toys("partial_read", (3,), detail="are written")
def masked_without_the_newest(c, x):
    put(c, x)
    return read(c, x, x.end - 1, x.mask)


@toys("unknown_write", detail="slice.Tensor")
def columns_in_the_middle(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, 4 : x.end], c.v[:, :, 4 : x.end], None)


@toys("unknown_write", detail="slice.Tensor")
def every_second_column(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, : x.end : 2], c.v[:, :, : x.end : 2], None)


@toys("unknown_write", detail="slice_scatter")
def written_at_every_second_column(c, x):
    c.k[:, :, x.start : x.start + 2 : 2] = x.k
    c.v[:, :, x.start : x.start + 2 : 2] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("unknown_write", (1,), detail="slice_scatter")
def keys_and_values_at_different_columns(c, x):
    c.k[:, :, x.start : x.end] = x.k
    c.v[:, :, x.start - 1 : x.end - 1] = x.v
    return read(c, x, x.end)


@toys("unknown_write", detail="select_scatter")
def written_head_by_head(c, x):
    c.k[:, 0, x.start : x.end] = x.k[:, 0]
    c.k[:, 1, x.start : x.end] = x.k[:, 1]
    c.v[:, :, x.start : x.end] = x.v
    return read(c, x, x.end)


@toys("unknown_write", detail="slice_scatter")
def rewritten_with_itself(c, x):
    put(c, x)
    c.k[:, :, :1] = c.k[:, :, :1]
    return read(c, x, x.end)


@toys("unknown_write", detail="permute")
def tokens_before_heads(c, x):
    """The layout of Llama's first code, [B, L, H, D]."""
    k, v = c.k.transpose(1, 2), c.v.transpose(1, 2)
    k[:1, x.start : x.end] = x.k.transpose(1, 2)
    v[:1, x.start : x.end] = x.v.transpose(1, 2)
    return sdpa(x, k[:1, : x.end].transpose(1, 2), v[:1, : x.end].transpose(1, 2), None)


@toys("value_shape", detail="slots -1..")
def written_at_the_far_end(c, x):
    c.k[:, :, -1:] = x.k
    c.v[:, :, -1:] = x.v
    return sdpa(x, c.k, c.v, torch.ones(1, 1, 1, L, dtype=torch.bool))


@toys("value_shape", (1,), detail="4, 16]")
def one_token_in_four_columns(c, x):
    c.k[:, :, x.start : x.start + 4] = x.k
    c.v[:, :, x.start : x.start + 4] = x.v
    return read(c, x, x.start + 4)


@toys("other_readers", detail="slice")
def the_overwritten_slice_used_before(c, x):
    stale = c.k[:, :, x.start : x.end] * 1
    put(c, x)
    return read(c, x, x.end) + stale.sum()


@toys("other_readers", detail="slice")
def the_written_slice_used_after(c, x):
    written = c.k[:, :, x.start : x.end]
    written.copy_(x.k)
    c.v[:, :, x.start : x.end].copy_(x.v)
    return read(c, x, x.end), written + 1


@toys("other_readers", detail="slice")
def the_written_slice_returned(c, x):
    written = c.k[:, :, x.start : x.end].copy_(x.k)
    c.v[:, :, x.start : x.end].copy_(x.v)
    return read(c, x, x.end), written


@toys("other_readers", (1,), detail="slice")
def the_filled_part_used_too(c, x):
    put(c, x)
    return read(c, x, x.end) + c.k[:, :, : x.end].sum()


@toys("not_stored")
def written_again_after(c, x):
    put(c, x)
    y = read(c, x, x.end)
    c.k[:, :, :2] = 0
    return y
