"""Normalize: one spelling for each attention, so that a pattern describes only the cache write.

* ``repeat_kv`` (unsqueeze, expand, clone, view) folds into ``enable_gqa``
* a read of the first n columns folds into ``columns``
* a mask gets its leading dimensions
* what a cache says of how it is stored moves from its new keys' ``sphkv.stored`` into their meta, under "stored"
* default arguments are dropped, dimensions of ``cat`` and ``slice`` counted the same way
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.fx import Graph, GraphModule, Node

from sphkv_compile.ops import schema

aten = torch.ops.aten
Q, K, V, MASK, DROPOUT, CAUSAL, SCALE, GQA, COLUMNS = range(9)


def markers(graph: Graph) -> list[Node]:
    """The attention markers, in graph order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is schema.sdpa]


def normalize(gm: GraphModule) -> None:
    """Bring every marker and the writes around it into the form that the patterns describe."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.op == "call_function":
            _plain_arguments(node)
            if node.target is schema.stored:
                new = node.args[0]
                new.meta["stored"] = node.args[1]
                node.replace_all_uses_with(new)
                graph.erase_node(node)
    for marker in markers(graph):
        marker.args = (*marker.args, None)[: COLUMNS + 1]
        while _fold_repeat(marker) or _fold_columns(marker):
            pass
        _widen_mask(marker)
    graph.eliminate_dead_code()
    gm.recompile()


def settle(gm: GraphModule) -> None:
    """Markers that stay dense lose a ``columns`` that says nothing: Inductor drops a trailing default and miscounts."""
    for marker in markers(gm.graph):
        if marker.args[COLUMNS:] == (None,):
            marker.args = marker.args[:COLUMNS]
    gm.recompile()


def _plain_arguments(node: Node) -> None:
    if node.target is aten.index_put.default and len(node.args) == 4 and node.args[3] is False:
        node.args = node.args[:3]
    elif node.target is aten.cat.default and node.args[1:] == (2,) and node.meta["val"].dim() == 4:
        node.args = (node.args[0], -2)
    elif node.target is aten.index_put.default:
        node.args = (node.args[0], list(node.args[1]), *node.args[2:])


def _is(node: object, *targets: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _repeat_source(node: Node) -> tuple[Node, int] | None:
    """Undo a repetition of heads: what was repeated, and how often."""
    if not _is(node, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return None
    inner = node.args[0]
    if _is(inner, aten.clone.default):
        inner = inner.args[0]
    if not (_is(inner, aten.expand.default) and _is(inner.args[0], aten.unsqueeze.default)):
        return None
    unsqueeze = inner.args[0]
    source = unsqueeze.args[0]
    if unsqueeze.args[1] not in (2, -3) or _shape(source).__len__() != 4:
        return None
    b, h, n, d = _shape(source)
    group = _shape(inner)[2]
    if tuple(_shape(inner)) != (b, h, group, n, d) or tuple(_shape(node)) != (b, h * group, n, d):
        return None
    return source, group


def _fold_repeat(marker: Node) -> bool:
    found = _repeat_source(marker.args[K]), _repeat_source(marker.args[V])
    if None in found or found[0][1] != found[1][1]:
        return False
    args = list(marker.args)
    args[K], args[V], args[GQA] = found[0][0], found[1][0], True
    marker.args = tuple(args)
    return True


def _read_columns(node: Node) -> tuple[Node, Node | int] | None:
    """A read of the first columns: of what, and how many."""
    if not _is(node, aten.slice.Tensor) or len(node.args) != 4 or node.args[1] not in (2, -2) or node.args[2] != 0:
        return None
    if isinstance(node.args[3], int):
        return node.args[0], _shape(node)[2]  # a negative or too large end has become a count
    return node.args[0], node.args[3]


def _fold_columns(marker: Node) -> bool:
    if marker.args[COLUMNS] is not None:
        return False
    found = _read_columns(marker.args[K]), _read_columns(marker.args[V])
    if None in found or (found[0][1] is not found[1][1] and found[0][1] != found[1][1]):
        return False
    args = list(marker.args)
    args[K], args[V], args[COLUMNS] = found[0][0], found[1][0], found[0][1]
    marker.args = tuple(args)
    return True


def _widen_mask(marker: Node) -> None:
    """A mask of fewer dimensions than the queries: as [B or 1, heads or 1, T or 1, columns], which it stands for."""
    mask = marker.args[MASK]
    while mask is not None and mask.meta["val"].dim() < _shape(marker.args[Q]).__len__():
        with marker.graph.inserting_before(marker):
            wider = marker.graph.call_function(aten.unsqueeze.default, (mask, 0))
        wider.meta["val"] = mask.meta["val"].unsqueeze(0)
        mask = wider
    marker.update_arg(MASK, mask)
