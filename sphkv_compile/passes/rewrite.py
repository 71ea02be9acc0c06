"""Rewrite: a site's dense write and attention become ``attend``, then ``append``, on state that enters as inputs."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import Graph, GraphModule, Node

from sphkv_compile.ops import schema
from sphkv_compile.ops.decode import packing
from sphkv_compile.passes.match import source_line
from sphkv_compile.patterns import Site
from sphkv_compile.runtime.budget import may_drop
from sphkv_compile.runtime.convention import Binding, Rewritten
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import STATE_FIELDS, Geometry, empty_state

aten = torch.ops.aten


def rewrite(gm: GraphModule, sites: list[Site], spec: CacheSpec) -> Rewritten:
    """Rewrite ``sites`` in place."""
    graph = gm.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    index = {node: i for i, node in enumerate(inputs)}
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    result, last = Rewritten(), inputs[-1]
    for number, (site, layout) in enumerate(zip(sites, _layouts(sites, spec))):
        fakes = _fake_state(layout, site)
        state = []
        for name, fake in zip(STATE_FIELDS, fakes):
            with graph.inserting_after(last):
                last = graph.placeholder(f"sphkv{number}_{name}")
            last.meta["val"] = fake
            state.append(last)
        result.bindings.append(_bind(site, layout, index, output))
        result.state_inputs.extend(fakes)
        attend = _replace(graph, site, state, layout)
        for later in sites[number + 1 :]:
            _renew(later, site.node, attend)
        _drop_outputs(output, site)
    graph.eliminate_dead_code()
    dense = {b for binding in result.bindings for b in (binding.k_input, binding.v_input)}
    dead = {i for i in dense if not inputs[i].users}
    for i in dead:
        graph.erase_node(inputs[i])
    result.kept = [i for i in range(len(inputs)) if i not in dead]
    graph.lint()
    gm.recompile()
    return result


def _layouts(sites: list[Site], spec: CacheSpec) -> list[Layout]:
    """How each site is stored: as its cache says, else as the options do."""
    free = [geometry(site) for site in sites if site.stored is None]
    kept = iter(may_drop(spec, free) if free else ())
    found = []
    for site in sites:
        rope, rotary_dim = site.rope
        if site.stored is not None:
            found.append(dataclasses.replace(Layout.parse(site.stored), rope=rope, rotary_dim=rotary_dim))
        else:
            drops = next(kept)
            found.append(Layout.of(spec, rope, rotary_dim, _packing(spec, site, drops), drops))
    return found


def _packing(spec: CacheSpec, site: Site, kept: bool) -> str:
    k, v = site.k_buf.meta["val"], site.v_buf.meta["val"]
    return packing(spec, int(k.shape[-1]), int(v.shape[-1]), k.device, kept)


def _bind(site: Site, layout: Layout, index: dict[Node, int], output: Node) -> Binding:
    returned = list(output.args[0])
    return Binding(
        idiom=site.idiom,
        k_input=index[site.k_buf],
        v_input=index[site.v_buf],
        layout=layout,
        rolling=site.rolling,
        outputs=tuple(returned.index(w) for w in site.outputs),
        scale=site.scale,
        source=source_line(site.node) or site.node.name,
        group=geometry(site).group,
    )


def _fake_state(layout: Layout, site: Site) -> list[torch.Tensor]:
    """Stand-ins for the state, of the right dtypes. Their sizes are a hint only: a plan may lay the state out anew
    between steps (a growing cache), so Inductor's size assertions are off for our graphs."""
    k = site.k_buf.meta["val"]
    with k.fake_mode:
        arena = torch.zeros(1 << 16, dtype=torch.uint8, device=k.device)
        return list(empty_state(layout, geometry(site)._replace(capacity=_hint(k.shape[2])), arena))


def geometry(site: Site) -> Geometry:
    """Shape of a site's dense cache; a cache that grows has capacity 0."""
    k, v = site.k_buf.meta["val"], site.v_buf.meta["val"]
    b, h, capacity, d = (_hint(n) for n in k.shape)
    group = _hint(site.q.meta["val"].shape[1]) // h
    return Geometry(b, h, 0 if site.outputs else capacity, d, _hint(v.shape[-1]), k.dtype, v.dtype, site.rolling, group)


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else size.node.hint or 1


def _replace(graph: Graph, site: Site, state: list[Node], layout: Layout) -> Node:
    q, columns, value = site.q, site.columns, site.node.meta["val"]
    with graph.inserting_before(site.node):
        k, v = (_whole(graph, *pair) for pair in ((site.k, site.k_buf), (site.v, site.v_buf)))
        if columns is None:
            columns = _columns(graph, site)
        new, tail = (*state, q, k, v, site.pos, site.start), (str(layout), site.rolling)
        attend = graph.call_function(schema.attend, (*new, columns, site.mask, site.is_causal, site.scale, *tail))
        append = graph.call_function(schema.append, (*new, site.mask, *tail))
    attend.meta = {"val": value, "stack_trace": site.node.meta.get("stack_trace")}
    append.meta = {"val": None}
    site.node.replace_all_uses_with(attend)
    graph.erase_node(site.node)
    for store in site.stores:
        graph.erase_node(store)
    return attend


def _renew(site: Site, old: Node, new: Node) -> None:
    """An attention may take an earlier one's output as it is."""
    for name in ("q", "k", "v", "mask"):
        if getattr(site, name) is old:
            setattr(site, name, new)


def _whole(graph: Graph, value: Node, buf: Node) -> Node:
    """The written value as [B, H, T, D]: item assignment squeezes leading ones away."""
    have, (b, h, _, d) = value.meta["val"], buf.meta["val"].shape
    if have.dim() == 4:
        return value
    whole = [int(b), int(h), -1, int(d)]  # symbolic sizes are fixed by guards: a graph takes nodes and numbers only
    node = graph.call_function(aten.reshape.default, (value, whole))
    node.meta["val"] = have.reshape(whole)
    return node


def _columns(graph: Graph, site: Site) -> Node | int:
    """How many columns the attention reads when it reads all: the buffer's, or past and new."""
    length = site.node.args[1].meta["val"].shape[2]
    if isinstance(length, int):
        return length
    node = graph.call_function(aten.sym_size.int, (site.node.args[1], 2))
    if not site.outputs:
        node.args = (site.k_buf, 2)
        node.meta["val"] = site.k_buf.meta["val"].shape[2]
        return _same_symbol(graph, node)
    graph.erase_node(node)
    past, new = site.start, site.q.meta["val"].shape[2]
    count = new
    if not isinstance(new, int):
        count = graph.call_function(aten.sym_size.int, (site.q, 2))
        count.meta["val"] = new
    node = graph.call_function(operator.add, (past, count))
    node.meta["val"] = length
    return node


def _same_symbol(graph: Graph, size: Node) -> Node:
    """Reuse the symbol's own input, if there is one: a size of the buffer would keep the dense buffer alive."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "placeholder"
            and isinstance(value, torch.SymInt)
            and value.node.expr == size.meta["val"].node.expr
        ):
            graph.erase_node(size)
            return node
    return size


def _drop_outputs(output: Node, site: Site) -> None:
    """A grown buffer that was an output is replaced at run time by a handle; the graph returns nothing there."""
    if site.outputs:
        gone = {i for i, x in enumerate(output.args[0]) if x in site.outputs}
        output.args = (tuple(None if i in gone else x for i, x in enumerate(output.args[0])),)
        if shown := output.meta.get("user_visible_output_idxs"):  # Inductor asks for the strides of each of these
            output.meta["user_visible_output_idxs"] = [i for i in shown if i not in gone]
