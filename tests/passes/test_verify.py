"""The rewritten graph is what the runtime will feed, and a graph that is not is stopped."""

import operator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sphkv_compile.ops import schema
from sphkv_compile.passes.match import match
from sphkv_compile.passes.prologue import snapshot
from sphkv_compile.passes.rewrite import rewrite
from sphkv_compile.passes.text import capture
from sphkv_compile.passes.verify import verify
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.state import STATE_FIELDS

SPEC = CacheSpec(bits=16, sink=2, window=4, span=8, page=8)
WIDTH = len(STATE_FIELDS)


def two_layers(x, pos, mask, k0, v0, k1, v1):
    """The second's queries are the first's output itself."""
    for k, v in ((k0, v0), (k1, v1)):
        k[:, :, pos] = x
        v[:, :, pos] = x + 1
        x = scaled_dot_product_attention(x, k, v, mask)
    return x


@pytest.fixture(scope="module")
def once():
    x, pos, mask = torch.randn(1, 2, 1, 8), torch.tensor([3]), torch.ones(1, 1, 1, 32, dtype=torch.bool)
    gm, _ = capture(two_layers, x, pos, mask, *torch.zeros(4, 1, 2, 32, 8).unbind())
    convention = rewrite(gm, [verdict.site for verdict in match(gm)], SPEC)
    verify(gm, convention)
    return gm, convention


@pytest.fixture
def rewritten(once):
    """A copy to tamper with."""
    gm, convention = once
    return snapshot(gm), convention


def calls(gm, target):
    return [n for n in gm.graph.nodes if n.target is target]


def test_the_dense_cache_is_gone(rewritten):
    gm, convention = rewritten
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    assert len(convention.kept) == 3 and len(inputs) == 3 + 2 * WIDTH == 3 + len(convention.state_inputs)
    targets = {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}
    assert not targets & {"aten.index_put.default", "aten.copy_.default", "sphkv.sdpa.default"}
    assert [b.k_input for b in convention.bindings] != [b.v_input for b in convention.bindings]
    taken = {i for b in convention.bindings for i in (b.k_input, b.v_input)}
    assert len(taken) == 4 and not taken & set(convention.kept)


def append_before_attend(gm):
    attend, append = calls(gm, schema.attend)[0], calls(gm, schema.append)[0]
    attend.prepend(append)


def append_twice(gm):
    append = calls(gm, schema.append)[0]
    with gm.graph.inserting_after(append):
        gm.graph.call_function(schema.append, append.args)


def append_missing(gm):
    gm.graph.erase_node(calls(gm, schema.append)[1])


def attend_missing(gm):
    attend = calls(gm, schema.attend)[1]
    attend.replace_all_uses_with(attend.args[WIDTH])
    gm.graph.erase_node(attend)


def state_read_by_another(gm):
    attend = calls(gm, schema.attend)[0]
    with gm.graph.inserting_after(attend):
        gm.graph.call_function(torch.ops.aten.sum.default, (attend.args[3],))


def states_of_two_sites_mixed(gm):
    first, second = calls(gm, schema.append)
    first.args, second.args = ((*b.args[:WIDTH], *a.args[WIDTH:]) for a, b in ((first, second), (second, first)))


def keys_and_values_of_the_ring_exchanged(gm):
    append = calls(gm, schema.append)[0]
    k, v = STATE_FIELDS.index("exact_k"), STATE_FIELDS.index("exact_v")
    state = list(append.args)
    state[k], state[v] = state[v], state[k]
    append.args = tuple(state)


def other_tokens_appended(gm):
    append = calls(gm, schema.append)[0]
    q, k, v = append.args[WIDTH : WIDTH + 3]
    append.args = (*append.args[:WIDTH], q, v, k, *append.args[WIDTH + 3 :])


def an_input_more(gm):
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("stray")


def states_out_of_order(gm):
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs[3].append(inputs[4])  # the same nodes, so swapping two places exchanges what the runtime feeds
    inputs[4].append(inputs[3])


TAMPERINGS = {
    append_before_attend: "touched by",
    append_twice: "touched by",
    append_missing: "touched by",
    attend_missing: "touched by",
    state_read_by_another: "touched by",
    states_of_two_sites_mixed: "other new tokens",
    keys_and_values_of_the_ring_exchanged: "another order",
    states_out_of_order: "another order",
    other_tokens_appended: "other new tokens",
    an_input_more: "inputs and calling convention",
}


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=operator.attrgetter("__name__"))
def test_a_tampered_graph_is_stopped(rewritten, tamper):
    gm, convention = rewritten
    verify(gm, convention)
    tamper(gm)
    with pytest.raises(AssertionError, match=TAMPERINGS[tamper]):
        verify(gm, convention)
