"""``w = cat([past, new])``, kept for the next call: what is taken, and every way in which it is almost that."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from toys import HELD, OPTIONS, Toys, sdpa

import sphkv_compile
from sphkv_compile.passes.match import match
from sphkv_compile.passes.text import capture
from sphkv_compile.runtime import log

toys = Toys()
GROWN = dict(columns=HELD)
"""The buffers hold the past and nothing else."""


@pytest.mark.parametrize("toy", toys, ids=str)
def test_verdict_numbers_and_contents(toy):
    toy.check()


def grow(c, x):
    c.k, c.v = torch.cat([c.k, x.k], 2), torch.cat([c.v, x.v], -2)
    return c.k, c.v


# ---- taken


@toys("dynamic_cat", (5, 1, 6), **GROWN)
def chunks_and_steps(c, x):
    k, v = grow(c, x)
    return sdpa(x, k, v, x.mask[..., : k.shape[2]])


@toys("dynamic_cat", (1, 1), **GROWN, batch=2)
def without_a_mask(c, x):
    return sdpa(x, *grow(c, x), None)


@toys("dynamic_cat", (3,), **GROWN)
def causal_from_the_left(c, x):
    return sdpa(x, *grow(c, x), None, is_causal=True)


@toys("dynamic_cat", (3,), **GROWN, batch=2)
def heads_joined_by_a_view(c, x):
    """torch's kernels lay their output out as the queries are, and models view it without a copy."""
    k, v = (y.repeat_interleave(2, 1) for y in grow(c, x))
    q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).view(2, -1, 64)


@toys("dynamic_cat", (1, 1), **GROWN)
def returned_as_well(c, x):
    k, v = grow(c, x)
    return sdpa(x, k, v, None), k


@toys("dynamic_cat", (1, 1), **GROWN)
def the_past_returned_as_well(c, x):
    """AOTAutograd hands the user's own tensor back, so the graph does not read it."""
    past = c.k
    return sdpa(x, *grow(c, x), None), past


# ---- refused


@toys("other_readers", detail="sum", **GROWN)
def the_grown_cache_is_read(c, x):
    k, v = grow(c, x)
    return sdpa(x, k, v, None) + k.sum()


@toys("other_readers", detail="sum", **GROWN)
def the_past_is_read(c, x):
    before = c.k.sum()
    return sdpa(x, *grow(c, x), None) + before


@toys("not_stored", detail="cat", **GROWN)
def not_kept(c, x):
    return sdpa(x, torch.cat([c.k, x.k], 2), torch.cat([c.v, x.v], 2), None)


@toys("not_stored", detail="cat", **GROWN)
def cropped_before_it_is_kept(c, x):
    k, v = torch.cat([c.k, x.k], 2), torch.cat([c.v, x.v], 2)
    c.k, c.v = k[:, :, -20:], v[:, :, -20:]
    return sdpa(x, k, v, None)


@toys("partial_read", (1, 1), detail="columns", **GROWN)
def without_the_newest(c, x):
    k, v = grow(c, x)
    return sdpa(x, k[:, :, : x.end - 1], v[:, :, : x.end - 1], None)


@toys("not_an_input", detail="index", **GROWN)
def reordered_first(c, x):
    c.k = c.k.index_select(0, torch.zeros(1, dtype=torch.long))
    return sdpa(x, *grow(c, x), None)


@toys("not_an_input", detail="full", **GROWN)
def past_made_up(c, x):
    c.k = torch.zeros_like(c.k)
    return sdpa(x, *grow(c, x), None)


@toys("value_shape", (1, 1), detail="for 1 tokens", **GROWN)
def new_before_the_past(c, x):
    """The pattern sees two tensors; that the second is no single new token tells them apart."""
    c.k, c.v = torch.cat([x.k, c.k], 2), torch.cat([x.v, c.v], 2)
    return sdpa(x, c.k, c.v, None)


@toys("value_shape", (2,), detail="for 1 tokens", **GROWN)
def fewer_queries_than_keys(c, x):
    return scaled_dot_product_attention(x.q[:, :, -1:], *grow(c, x), enable_gqa=True)


@toys("unknown_write", detail="cat", **GROWN)
def a_token_dropped_from_the_middle(c, x):
    """What sink caches do."""
    c.k, c.v = (torch.cat([y[:, :, :4], y[:, :, 5:], new], 2) for y, new in ((c.k, x.k), (c.v, x.v)))
    return sdpa(x, c.k, c.v, None)


@toys("unknown_write", detail="view", **GROWN)
def latents(c, x):
    """Multi-head latent attention: what is cached is turned into keys at each reading."""
    k, v = grow(c, x)
    return sdpa(x, k @ torch.linspace(-1, 1, 256).view(16, 16), v, None)


@toys("shared_buffer", **GROWN)
def values_are_the_keys(c, x):
    c.k = torch.cat([c.k, x.k], 2)
    return sdpa(x, c.k, c.k, None)


@toys("no_cache_write", (5,), detail="placeholder", columns=0, held=0)
def the_first_prefill(c, x):
    """Nothing is concatenated yet; the output is imported at the next call."""
    c.k, c.v = x.k, x.v
    return sdpa(x, x.k, x.v, None, is_causal=True)


# ---- caches as values


def attention(q, k, v, past_k, past_v):
    k, v = torch.cat([past_k, k], -2), torch.cat([past_v, v], -2)
    return scaled_dot_product_attention(q, k, v), k, v


@torch.no_grad()
def test_two_continuations_of_one_past():
    """A grown cache is a new tensor, so its user may keep the old one and branch off it: a search tree does."""
    compiled = torch.compile(attention, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True)

    def branches(step):
        torch.manual_seed(0)
        a, b, c = (tuple(torch.randn(3, 1, 2, 1, 16)) for _ in range(3))
        root = step(*a, *torch.randn(2, 1, 2, 20, 16))
        left = step(*b, *root[1:])
        deeper = step(*c, *left[1:])
        right = step(*c, *root[1:])  # after the left branch has moved on
        again = step(*b, *deeper[1:])
        return [y + 0 for out in (left, deeper, right, again, root) for y in out]

    for found, expected in zip(branches(compiled), branches(attention)):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_a_past_among_the_outputs_is_refused():
    """No frontend of today writes such a graph: an input that is returned stays outside of it."""
    gm, _ = capture(attention, *torch.randn(3, 1, 2, 1, 16), *torch.randn(2, 1, 2, 5, 16))
    (before,) = match(gm)
    assert before.idiom == "dynamic_cat"
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], before.site.k_buf),)
    (after,) = match(gm)
    assert after.refusal.code == "other_readers" and "returned" in after.refusal.detail


@torch.no_grad()
@pytest.mark.parametrize("past", [1, 5])
def test_caches_without_a_batch_are_refused(past):
    """[heads, tokens, head_dim]: counted from the left its tokens would pass for heads, when there is one of them."""
    q, k, v = torch.randn(3, 2, 1, 16)
    inputs, seen = (q, k, v, *torch.randn(2, 2, past, 16)), []
    compiled = torch.compile(attention, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True)
    with log.listening(seen.append):
        found = compiled(*inputs)
    torch.testing.assert_close(found, attention(*inputs), rtol=0, atol=2e-6)
    assert [v.refusal.code for graph in seen for v in graph.verdicts] == ["rank"]
