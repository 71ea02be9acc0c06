"""``buf[:, :, pos] = new``: what is taken, and every way in which it is almost that."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from toys import HQ, OPTIONS, Cache, L, Shape, Toys, put, sdpa, steps

import sphkv_compile
from sphkv_compile.passes.match import match
from sphkv_compile.passes.text import capture
from sphkv_compile.runtime import log

toys = Toys()
aten = torch.ops.aten


@pytest.mark.parametrize("toy", toys, ids=str)
def test_verdict_numbers_and_contents(toy):
    toy.check()


# ---- taken


@toys("static_index", (5, 1, 6))
def chunks_and_steps(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("static_index", (20, 1), held=0)
def prefill_from_nothing(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("static_index", (3,), batch=2)
def a_batch(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("static_index")
def index_copy(c, x):
    c.k.index_copy_(2, x.pos, x.k)
    c.v.index_copy_(2, x.pos, x.v)
    return sdpa(x, c.k, c.v, x.mask)


@toys("static_index", (3,))
def only_causal(c, x):
    """Aligned at the top left, as torch defines it: query i sees columns 0..i of the whole buffer."""
    put(c, x)
    return sdpa(x, c.k, c.v, None, is_causal=True)


@toys("static_index", (3,))
def own_scale(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask, scale=0.7)


@toys("static_index", (3,))
def mask_of_two_dimensions(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask[0, 0])


@toys("static_index", (3,))
def mask_of_three_dimensions(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask[0].expand(HQ, -1, -1))


@toys("static_index", (3,))
def additive_mask(c, x):
    """With a slope over the columns, so that what it adds counts."""
    put(c, x)
    return sdpa(x, c.k, c.v, torch.where(x.mask, 0.05 * torch.arange(float(L)), -torch.inf))


@toys("static_index", batch=2)
def additive_mask_of_each_head(c, x):
    put(c, x)
    slope = torch.arange(float(HQ)).view(1, HQ, 1, 1) * torch.linspace(0, 1, L)
    return sdpa(x, c.k, c.v, torch.where(x.mask, slope, torch.finfo(torch.float32).min))


@toys("static_index", batch=2, padding=3)
def mask_of_each_row(c, x):
    put(c, x)
    padding = torch.arange(L) >= torch.tensor([0, 3]).view(2, 1, 1, 1)
    return sdpa(x, c.k, c.v, x.mask & padding)


@toys("static_index", (3,))
def first_columns_under_a_mask(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, :32], c.v[:, :, :32], x.mask[..., :32])


@toys("static_index")
def columns_counted_from_the_end(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, :-2], c.v[:, :, :-2], x.mask[..., :-2])


@toys("static_index")
def more_columns_than_there_are(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, : 2 * L], c.v[:, :, : 2 * L], x.mask)


@toys("static_index")
def heads_repeated_by_hand(c, x):
    put(c, x)
    k, v = c.k.repeat_interleave(2, 1), c.v.repeat_interleave(2, 1)
    return sdpa(x, k, v, x.mask, enable_gqa=False)


@toys("static_index")
def one_query_head_for_each(c, x):
    put(c, x)
    return scaled_dot_product_attention(x.q[:, :2], c.k, c.v, x.mask)


@toys("static_index")
def permuted_and_back(c, x):
    put(c, x)
    return sdpa(x, c.k.permute(0, 1, 3, 2).permute(0, 1, 3, 2), c.v, x.mask)


@toys("static_index")
def keys_as_values_and_values_as_keys(c, x):
    put(c, x)
    return sdpa(x, c.v, c.k, x.mask)


@toys("static_index")
def cache_returned_whole(c, x):
    """AOTAutograd hands the user's own tensor back; reading it decodes it."""
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask), c.k


# ---- refused: the write


@toys("unknown_write", detail="index_put")
def keys_and_values_at_different_positions(c, x):
    c.k[:, :, x.pos] = x.k
    c.v[:, :, x.pos - 1] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("unknown_write", detail="index_put")
def accumulated(c, x):
    aten.index_put_(c.k, [None, None, x.pos], x.k, True)
    c.v[:, :, x.pos] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("unknown_write", detail="scatter")
def scattered_by_element(c, x):
    index = x.pos.view(1, 1, -1, 1).expand_as(x.k)
    c.k.scatter_(2, index, x.k)
    c.v.scatter_(2, index, x.v)
    return sdpa(x, c.k, c.v, x.mask)


@toys("unknown_write", detail="index_put", batch=2)
def positions_of_each_row(c, x):
    row = torch.arange(2)[:, None]
    c.k[row, :, x.pos.expand(2, -1)] = x.k.transpose(1, 2)
    c.v[row, :, x.pos.expand(2, -1)] = x.v.transpose(1, 2)
    return sdpa(x, c.k, c.v, x.mask)


@toys("scattered", detail="bool")
def written_where_a_mask_is_true(c, x):
    where = torch.zeros(L, dtype=torch.bool).index_fill(0, x.pos, True)
    c.k[:, :, where] = x.k
    c.v[:, :, where] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("scattered", (1,), detail="[2]")
def one_token_at_two_positions(c, x):
    pos = torch.cat([x.pos, x.pos + 1])
    c.k[:, :, pos] = x.k.expand(-1, -1, 2, -1)[:, :, :1]
    c.v[:, :, pos] = x.v.expand(-1, -1, 2, -1)[:, :, :1]
    return sdpa(x, c.k, c.v, x.mask)


@toys("scattered", heads=1, detail="[1, 1]")
def positions_in_a_table(c, x):
    table = x.pos[None]
    c.k[:, :, table] = x.k[:, :, None]
    c.v[:, :, table] = x.v[:, :, None]
    return sdpa(x, c.k, c.v, x.mask)


@toys("value_shape", (3,), batch=2, detail="for 3 tokens")
def one_key_for_several_tokens(c, x):
    c.k[:, :, x.pos] = x.k[:, :, :1]
    c.v[:, :, x.pos] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("value_shape")
def one_key_for_all_heads(c, x):
    c.k[:, :, x.pos] = x.k[:, :1]
    c.v[:, :, x.pos] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("value_shape", (2,), batch=2)
def one_key_for_all_rows(c, x):
    c.k[:, :, x.pos] = x.k[:1]
    c.v[:, :, x.pos] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("value_shape", detail="[]")
def one_number_for_a_key(c, x):
    c.k[:, :, x.pos] = 0.5
    c.v[:, :, x.pos] = x.v
    return sdpa(x, c.k, c.v, x.mask)


@toys("value_shape", (2,), batch=2, detail="for 1 tokens")
def fewer_queries_than_keys(c, x):
    """A prefill that asks for the last token's logits only."""
    put(c, x)
    return scaled_dot_product_attention(x.q[:, :, -1:], c.k, c.v, x.mask[:, :, -1:], enable_gqa=True)


@toys("value_shape", (2,), batch=2, detail="for 4 tokens")
def more_queries_than_keys(c, x):
    put(c, x)
    twice = x.mask.repeat(1, 1, 2, 1)
    return scaled_dot_product_attention(x.q.repeat(1, 1, 2, 1), c.k, c.v, twice, enable_gqa=True)


# ---- refused: the buffer


@toys("shared_buffer")
def values_are_the_keys(c, x):
    c.k[:, :, x.pos] = x.k
    return sdpa(x, c.k, c.k, x.mask)


@toys("not_an_input", detail="index_put")
def written_twice_before(c, x):
    c.k[:, :, x.pos] = 2 * x.k
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("not_an_input", detail="full")
def emptied_first(c, x):
    c.k.zero_()
    c.v.zero_()
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


@toys("not_stored")
def written_again_after(c, x):
    put(c, x)
    y = sdpa(x, c.k, c.v, x.mask)
    c.k[:, :, x.pos] = 2 * x.k
    return y


@toys("not_stored")
def written_to_a_copy(c, x):
    k = aten.index_put(c.k, [None, None, x.pos], x.k)
    c.v[:, :, x.pos] = x.v
    return sdpa(x, k, c.v, x.mask)


@toys("other_readers", detail="sum")
def read_after_the_write(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask), c.k.sum()


@toys("other_readers", detail="sum")
def read_before_the_write(c, x):
    before = c.k.sum()
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask) + before


@toys("other_readers", detail="select")
def stale_part_returned(c, x):
    stale = c.k[:, :, 0].clone()
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask), stale


@toys("other_readers", detail="slice")
def view_of_the_cache_returned(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask), c.k[:, :, :4]


@toys("other_readers", detail="sdpa")
def two_attentions_over_one_cache(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask) + scaled_dot_product_attention(2 * x.q, c.k, c.v, x.mask, enable_gqa=True)


@toys("other_readers", detail="abs")
def mask_made_from_the_cache(c, x):
    mask = x.mask & (c.k.abs().sum((0, 1, 3)) >= 0)
    put(c, x)
    return sdpa(x, c.k, c.v, mask)


# ---- refused: what is read


@toys("unmasked_slots", detail="48 columns")
def no_mask(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, None)


@toys("unmasked_slots", detail="32 columns")
def first_columns_without_a_mask(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, :32], c.v[:, :, :32], None)


@toys("unmasked_slots", detail="the same of every column")
def mask_over_queries_only(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask[..., :1])


@toys("partial_read", (3,), held=0, detail="2 columns")
def causal_over_fewer_columns_than_tokens(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, :2], c.v[:, :, :2], None, is_causal=True)


@toys("unknown_write", detail="slice")
def columns_in_the_middle(c, x):
    put(c, x)
    return sdpa(x, c.k[:, :, 4:32], c.v[:, :, 4:32], x.mask[..., 4:32])


@toys("unknown_write", detail="permute")
def values_laid_out_the_other_way(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v.mT.contiguous().mT, x.mask)


@toys("unknown_write", detail="permute", columns=16, held=8)
def keys_read_with_tokens_and_dimensions_exchanged(c, x):
    """(0, 1, 3, 2) for (0, 1, 2, 3), where both are of one shape."""
    put(c, x)
    return sdpa(x, c.k.permute(0, 1, 3, 2), c.v, x.mask[..., :16])


@toys("unknown_write", detail="permute", heads=HQ, columns=HQ, held=2)
def keys_read_with_heads_and_tokens_exchanged(c, x):
    """(0, 2, 1, 3) for (0, 1, 2, 3), where both are of one shape."""
    put(c, x)
    return sdpa(x, c.k.permute(0, 2, 1, 3), c.v, x.mask[..., :HQ])


@toys("unknown_write", detail="permute", heads=HQ, columns=HQ, held=2)
def both_read_with_heads_and_tokens_exchanged(c, x):
    put(c, x)
    return sdpa(x, c.k.transpose(1, 2), c.v.transpose(1, 2), x.mask[..., :HQ])


@toys("unknown_write", detail="mul")
def keys_scaled_at_reading(c, x):
    put(c, x)
    return sdpa(x, 2 * c.k, c.v, x.mask)


@toys("unknown_write", detail="convert_element_type")
def read_in_another_dtype(c, x):
    put(c, x)
    return scaled_dot_product_attention(x.q.double(), c.k.double(), c.v.double(), x.mask, enable_gqa=True).float()


@toys("unknown_write", detail="view")
def latents(c, x):
    """Multi-head latent attention: what is cached is turned into keys at each reading."""
    put(c, x)
    return sdpa(x, c.k @ torch.linspace(-1, 1, 256).view(16, 16), c.v, x.mask)


@toys("unknown_write", detail="repeat")
def heads_tiled_instead_of_repeated(c, x):
    put(c, x)
    return sdpa(x, c.k.repeat(1, 2, 1, 1), c.v.repeat(1, 2, 1, 1), x.mask, enable_gqa=False)


@torch.no_grad()
def test_bfloat16_cache_and_mask():
    """Sums are in float32, so the output is the exact one rounded once: half a unit in the last of 8 bits."""

    def sloped(c, x):
        put(c, x)
        return sdpa(x, c.k, c.v, torch.where(x.mask, torch.arange(L) / 16, -torch.inf).to(x.q.dtype))

    shape, seen = Shape(dtype=torch.bfloat16), []
    eager = Cache(sloped, shape)
    ours, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    compiled = torch.compile(ours, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True)
    with log.listening(seen.append):
        for x in steps((3, 1), shape):
            eager(x)
            expected = exact(x._replace(q=x.q.double(), k=x.k.double(), v=x.v.double()))
            torch.testing.assert_close(compiled(x).double(), expected, rtol=2**-8, atol=1e-6)
    assert {v.idiom for graph in seen for v in graph.verdicts} == {"static_index"}
    assert torch.equal(ours.k + 0, eager.k) and torch.equal(ours.v + 0, eager.v)


# ---- graphs that no frontend of today writes


def test_accumulate_by_keyword_is_refused():
    """torch's matcher ignores a keyword that a node has and its pattern lacks."""

    def attention(q, k_buf, v_buf, k, v, pos, mask):
        k_buf[:, :, pos] = k
        v_buf[:, :, pos] = v
        return scaled_dot_product_attention(q, k_buf, v_buf, mask)

    t = torch.randn(2, 2, 8, 16)
    gm, _ = capture(
        attention, t[:, :, :1], t.clone(), t.clone(), *2 * [t[:, :, :1]], torch.tensor([3]), t[:1, :1, :1, :8]
    )
    (before,) = match(gm)
    assert before.idiom == "static_index"
    write = before.site.node.args[1]
    write.kwargs = {"accumulate": True}
    (after,) = match(gm)
    assert after.refusal.code == "unknown_write" and "accumulate" in after.refusal.detail


def test_a_size_that_agrees_by_chance_is_guarded():
    """Queries and keys are counted by separate symbols: a graph made where they agree serves only there."""
    shape, seen = Shape(batch=2), []
    eager = Cache(chunks_and_steps, shape)
    ours = copy.deepcopy(eager)
    compiled = torch.compile(ours, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True, dynamic=True)
    with torch.no_grad(), log.listening(seen.append):
        for x, queries in zip(steps((3, 4, 5, 5), shape), (3, 4, 2, 5)):
            x = x._replace(q=x.q[:, :, -queries:], mask=x.mask[:, :, -queries:])
            torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=2e-6)
    verdicts = [v.idiom or v.refusal.code for graph in seen for v in graph.verdicts]
    assert set(verdicts) == {"static_index", "value_shape"}
