"""Every argument of an attention survives the lift, and what the marker cannot say is left alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sphkv_compile.ops import schema
from sphkv_compile.passes.lift import lift
from sphkv_compile.passes.normalize import markers
from sphkv_compile.passes.text import capture

Q, KV = torch.randn(1, 4, 3, 8), torch.randn(2, 1, 2, 6, 8)
MASK = torch.ones(3, 6, dtype=torch.bool).tril(3)

CALLS = {
    "nothing": (lambda q, k, v: scaled_dot_product_attention(q[:, :2], k, v), (False, 0.0, False, None, False)),
    "positional": (
        lambda q, k, v: scaled_dot_product_attention(q[:, :2], k, v, MASK, 0.0, False),
        (True, 0.0, False, None, False),
    ),
    "by keyword": (
        lambda q, k, v: scaled_dot_product_attention(
            value=v, query=q, key=k, scale=0.5, enable_gqa=True, is_causal=True
        ),
        (False, 0.0, True, 0.5, True),
    ),
    "both": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=MASK, enable_gqa=True),
        (True, 0.0, False, None, True),
    ),
    "dropout": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.25, enable_gqa=True).isfinite(),
        (False, 0.25, False, None, True),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_positional(name):
    function, expected = CALLS[name]
    gm, out = capture(function, Q, *KV)
    (marker,) = markers(gm.graph)
    assert not marker.kwargs and (marker.args[3] is not None, *marker.args[4:8]) == expected
    torch.testing.assert_close(out, function(Q, *KV), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [(1, 2), (2, 1)], ids=["queries", "keys"])
def test_a_broadcast_batch(rows):
    """The marker has the shape of its queries: queries that are broadcast are left to torch, keys are not."""
    q, k, v = torch.randn(rows[0], 2, 3, 8), *torch.randn(2, rows[1], 2, 6, 8)
    gm, out = capture(scaled_dot_product_attention, q, k, v)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), rtol=0, atol=2e-6)
    assert len(markers(gm.graph)) == (rows[0] == 2)


def dynamo_graph(function, *args):
    graphs = []
    torch.compile(lambda *args: function(*args), backend=lambda gm, _: graphs.append(gm) or gm.forward)(*args)
    return graphs[0]


def test_an_unknown_argument_is_left_alone():
    gm = dynamo_graph(lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), Q, *KV)
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    node.kwargs = {**node.kwargs, "soft_cap": 30.0}  # of a torch to come
    assert lift(gm) == 0 and node in gm.graph.nodes


def test_lift_counts_and_repeats():
    gm = dynamo_graph(
        lambda q, k, v: scaled_dot_product_attention(scaled_dot_product_attention(q, k, v, enable_gqa=True), k, v,
                                                     enable_gqa=True), Q, *KV)  # fmt: skip
    assert lift(gm) == 2 and lift(gm) == 0
    assert sum(n.target is schema.sdpa for n in gm.graph.nodes) == 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_output_lies_in_memory_as_torch_lays_it(tokens):
    """[B, T, H, D] where the queries do: models then join the heads by a view."""

    def joined(q, k, v):
        return scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).view(1, tokens, -1)

    q = torch.randn(1, tokens, 2, 8)
    gm, out = capture(joined, q, *KV)
    assert len(markers(gm.graph)) == 1
    torch.testing.assert_close(out, joined(q, *KV), rtol=0, atol=2e-6)
    copies = sum(n.target is torch.ops.aten.clone.default for n in gm.graph.nodes)
    assert copies == (tokens > 1), "a decode step pays no copy"
