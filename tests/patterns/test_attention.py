"""What is asked of an attention whatever its cache, and attentions that are no SDPA at all."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from toys import HQ, OPTIONS, Toys, put, sdpa

import sphkv_compile

toys = Toys()


@pytest.mark.parametrize("toy", toys, ids=str)
def test_verdict_numbers_and_contents(toy):
    toy.check()


@toys("dropout", detail="dropout_p=0.5")
def dropout(c, x):
    """Random, so only that it runs is compared."""
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask, dropout_p=0.5).isfinite()


@toys("static_index", (5, 1, 1), batch=2, heads=1)
def one_kv_head_broadcast_without_gqa(c, x):
    """Falcon's multi-query attention."""
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask, enable_gqa=False)


@toys("head_counts", heads=1, v_heads=HQ, detail="4 query heads, 1 and 4")
def one_key_head_for_many_of_values(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask, enable_gqa=False)


@toys("head_counts", v_heads=1, detail="4 query heads, 2 and 1")
def one_value_head_for_many_of_keys(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("head_dim", dim=104, detail="the nearest are 96 and 112")
def head_dim_without_a_rotation(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("head_dim", dim=12, detail="no multiple of 8")
def head_dim_of_half_bytes(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("static_index", dim=24)
def head_dim_of_three_times_eight(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("static_index", dim=24, v_dim=8)
def values_of_another_dim(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("head_dim", v_dim=12, detail="12 is no multiple of 8")
def values_of_an_unknown_dim(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("dtype", dtype=torch.float64, detail="float64")
def cache_in_double(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("rank", detail="[2, 4, 1, 16]")
def more_rows_of_queries_than_of_cache(c, x):
    put(c, x)
    return scaled_dot_product_attention(x.q.expand(2, -1, -1, -1), c.k, c.v, x.mask, enable_gqa=True)


@toys("no_cache_write", detail="placeholder")
def no_cache_at_all(c, x):
    return scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True)


@toys("no_cache_write", detail="placeholder")
def a_cache_that_is_only_read(c, x):
    """Cross-attention."""
    return sdpa(x, c.k, c.v, x.mask)


@torch.no_grad()
def test_an_attention_over_the_output_of_another():
    """Nothing lies between, so the second site's inputs are nodes that the rewrite of the first replaces."""

    def two(q, pos, mask, *buffers):
        for k, v in (buffers[:2], buffers[2:]):
            k[:, :, pos], v[:, :, pos] = q, q
            q = scaled_dot_product_attention(q, k, v, mask)
        return q

    mask, ours = torch.arange(24).view(1, 1, 1, 24) <= 20, [torch.randn(1, 2, 24, 16) for _ in range(4)]
    for buffer in ours:
        buffer[:, :, 20:] = 0
    eager = [buffer.clone() for buffer in ours]
    compiled = torch.compile(two, backend=sphkv_compile.backend, options={**OPTIONS, "strict": True}, fullgraph=True)
    q, pos = torch.randn(1, 2, 1, 16), torch.tensor([20])
    torch.testing.assert_close(compiled(q, pos, mask, *ours), two(q, pos, mask, *eager), rtol=0, atol=2e-6)
    for found, expected in zip(ours, eager):
        torch.testing.assert_close(found + 0, expected, rtol=0, atol=2e-6)


# ---- written out


def softmax_attention(c, x, cap=None, sinks=None):
    put(c, x)
    k, v = c.k.repeat_interleave(2, 1), c.v.repeat_interleave(2, 1)
    logits = x.q @ k.mT / 4
    if cap:
        logits = (logits / cap).tanh() * cap
    logits = logits.masked_fill(~x.mask, -torch.inf)
    if sinks is None:
        return logits.softmax(-1) @ v
    column = sinks.view(1, HQ, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v


@toys("not_sdpa", detail="matmul and softmax")
def by_hand(c, x):
    return softmax_attention(c, x)


@toys("not_sdpa", (3,), batch=2, detail="matmul and softmax")
def by_hand_with_a_batch(c, x):
    return softmax_attention(c, x)


@toys("not_sdpa", detail="soft cap")
def soft_cap(c, x):
    return softmax_attention(c, x, cap=5)


@toys("not_sdpa", detail="learned sinks")
def learned_sinks(c, x):
    return softmax_attention(c, x, sinks=torch.arange(float(HQ)))


@toys("not_sdpa", (2,), batch=2, detail="matmul and softmax")
def one_row_of_queries_for_all_of_the_cache(c, x):
    """SDPA broadcasts it; the marker has the shape of its queries, so this one is left to torch."""
    put(c, x)
    return scaled_dot_product_attention(x.q[:1], c.k, c.v, x.mask, enable_gqa=True)


@toys("static_index")
def a_softmax_that_is_no_attention(c, x):
    """A router's: no verdict on it."""
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask), (x.q.flatten(1) @ torch.linspace(-1, 1, 64 * 8).view(64, 8)).softmax(-1)
