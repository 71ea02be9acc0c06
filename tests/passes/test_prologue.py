"""What is cut from a graph before its rewrite: how full a cache is, which slots a mask shows, how many tokens come."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sphkv_compile.passes.match import match
from sphkv_compile.passes.prologue import prologue_of, snapshot, token_counter
from sphkv_compile.passes.rewrite import rewrite
from sphkv_compile.passes.text import capture
from sphkv_compile.spec import CacheSpec

L = 32


def attention(x, length, padding, k_buf, v_buf):
    """Position and mask are computed inside, as transformers does; two queries for each token of x."""
    x = torch.cat([x, x + 1], 2)
    pos = torch.arange(x.shape[2]) + length
    k_buf.index_copy_(2, pos, x)
    v_buf.index_copy_(2, pos, 2 * x)
    column = torch.arange(L)
    mask = (column <= pos[:, None]) & (column >= padding)
    return scaled_dot_product_attention(x, k_buf, v_buf, mask)


def inputs(tokens, length=9, padding=2):
    return [torch.randn(1, 2, tokens, 8), torch.tensor(length), torch.tensor([padding]), *torch.randn(2, 1, 2, L, 8)]


def traced(dynamic):
    gm, _ = capture(attention, *inputs(3), dynamic=dynamic)
    (verdict,) = match(gm)
    assert verdict.site, str(verdict.refusal)
    return gm, verdict.site


def arguments(gm, given):
    """``given`` in the order of the graph's inputs; a size that is an input of its own is read off x."""
    x, length, padding, *buffers = given
    buffers, out = iter(buffers), []
    for value in (node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"):
        if isinstance(value, torch.SymInt):
            out.append(x.shape[2])
        elif value.ndim < 2:
            out.append((length, padding)[value.ndim])
        else:
            out.append(next(buffers) if value.shape[2] == L else x)
    return out


@pytest.mark.parametrize("dynamic, tokens", [(False, 3), (True, 3), (True, 5)])
def test_position_and_mask(dynamic, tokens):
    gm, site = traced(dynamic)
    prologue = prologue_of(gm, [site])
    rewrite(gm, [site], CacheSpec(bits=16, sink=2, window=4, span=8, page=8))  # the cut part is its own
    pos, mask, angles = prologue(*arguments(prologue, inputs(tokens, length=7, padding=4)))
    assert angles is None
    assert pos.tolist() == list(range(7, 7 + 2 * tokens))
    assert list(mask.shape) == [1, 1, 2 * tokens, L], "as the import reads it, whatever the model gave"
    assert mask[0, 0].nonzero()[:, 1].min() == 4 and mask[0, 0].sum(-1).tolist() == [i - 3 for i in pos.tolist()]


def test_the_prologue_reads_no_cache():
    gm, site = traced(False)
    prologue = prologue_of(gm, [site])
    pos, mask, _ = prologue(*arguments(gm, [*inputs(3)[:3], None, None]))
    assert pos[0] == 9 and mask.shape[-1] == L


@pytest.mark.parametrize("dynamic, tokens", [(False, 3), (True, 3), (True, 8)])
def test_tokens_are_counted(dynamic, tokens):
    """The queries are twice what comes in: a size that no input has."""
    gm, site = traced(dynamic)
    count = token_counter(gm, site)
    assert count(arguments(gm, inputs(tokens))) == 2 * tokens


def test_the_dense_graph_survives_the_rewrite():
    gm, site = traced(False)
    dense = snapshot(gm)
    rewrite(gm, [site], CacheSpec(bits=16, sink=2, window=4, span=8, page=8))
    ours = inputs(3)
    eager = [x.clone() for x in ours]
    (found,) = dense(*arguments(dense, ours))
    torch.testing.assert_close(found, attention(*eager), rtol=0, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager)), "and writes the caches"
