"""Small companions of a graph, cut from it before the rewrite and run outside of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

from sphkv_compile.patterns import Site


def snapshot(gm: GraphModule) -> GraphModule:
    """The graph as it is now, for calls that must run dense."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return GraphModule(gm, graph)


def prologue_of(gm: GraphModule, sites: list[Site]) -> GraphModule:
    """Computes, for each site, its first written column (None for a rolling window), its mask, and the angles of its
    rotary embedding, from the graph's inputs. An import runs it once: before the graph runs, nothing else knows how
    full a cache is, which slots are padding, or how positions turn keys."""
    wanted = [x for s in sites for x in ((s.pos if s.pos is not None else s.start), s.mask, s.angles)]
    cone = _cone([x for x in wanted if isinstance(x, Node)])
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in cone:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[x] if isinstance(x, Node) else x for x in wanted))
    return GraphModule(gm, graph)


def _cone(nodes: list[Node]) -> set[Node]:
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes.extend(node.all_input_nodes)
    return seen


def token_counter(gm: GraphModule, site: Site) -> Callable[[list], int]:
    """How many new tokens a call brings, read off its inputs."""
    count = site.q.meta["val"].shape[2]
    if isinstance(count, int):
        return lambda args: count
    expr, inputs = count.node.expr, [n for n in gm.graph.nodes if n.op == "placeholder"]
    places: dict = {}
    for i, node in enumerate(inputs):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            places.setdefault(value.node.expr, (i, None))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    places.setdefault(size.node.expr, (i, dim))
    symbols = sorted(expr.free_symbols, key=str)
    getters = [places[s] for s in symbols]

    if [expr] == symbols:
        ((at, dim),) = getters
        return (lambda args: int(args[at])) if dim is None else (lambda args: args[at].shape[dim])

    def counted(args: list) -> int:
        values = [args[i] if dim is None else args[i].shape[dim] for i, dim in getters]
        return int(expr.xreplace(dict(zip(symbols, map(int, values)))))

    return counted
