"""Lift: in Dynamo's graph, each scaled-dot-product attention becomes a marker that survives until we match it.

AOTAutograd would otherwise decompose it per device before any pass of ours could see it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sphkv_compile.ops import schema

_SDPA = (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)
_DEFAULTS = {
    "query": inspect.Parameter.empty,
    "key": inspect.Parameter.empty,
    "value": inspect.Parameter.empty,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def _calls(gm: GraphModule, *targets: object) -> Iterator[tuple[GraphModule, Node]]:
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in list(module.graph.nodes):
                if node.op == "call_function" and any(node.target is t for t in targets):
                    yield module, node


def count(gm: GraphModule, mark: torch._ops.OpOverload) -> int:
    """How often a mark stands in the graph."""
    return sum(1 for _ in _calls(gm, mark))


def lift(gm: GraphModule) -> int:
    """Replace every SDPA by ``sphkv.sdpa`` with all arguments positional; returns how many there were.

    A call with an argument that we do not know stays as it is, since dropping one silently would change the result;
    so does one that broadcasts its batch or heads, since the marker has the shape of its queries.
    """
    count = 0
    for module, node in _calls(gm, *_SDPA):
        given = {**dict(zip(_DEFAULTS, node.args)), **node.kwargs}
        if set(given) - set(_DEFAULTS) or _broadcasts(node, given):
            continue
        full = {**_DEFAULTS, **given}
        with module.graph.inserting_before(node):
            marker = module.graph.call_function(schema.sdpa, tuple(full.values()))
        # Only these two: a copied `eager_input_vals` belongs to the other op and trips an assertion.
        marker.meta = {key: node.meta[key] for key in ("example_value", "stack_trace") if key in node.meta}
        node.replace_all_uses_with(_as_laid_out(module, marker))
        module.graph.erase_node(node)
        module.recompile()
        count += 1
    return count


def _value(node: object) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _broadcasts(node: Node, given: dict[str, Any]) -> bool:
    out, q = _value(node), _value(given.get("query"))
    return out is None or q is None or out.shape[:-1] != q.shape[:-1]


def _as_laid_out(module: GraphModule, marker: Node) -> Node:
    """The marker's output as torch's kernels lay it out for several tokens, [B, T, H, D] in memory.

    A model that joins the heads by ``transpose(1, 2).view(...)`` relies on it; one that copies then copies nothing.
    """
    out = _value(marker)
    if out.dim() != 4 or out.is_contiguous() or not out.transpose(1, 2).is_contiguous():
        return marker
    node = marker
    for method, *dims in (("transpose", 1, 2), ("contiguous",), ("transpose", 1, 2)):
        with module.graph.inserting_after(node):
            node = module.graph.call_method(method, (node, *dims))
    return node


def strip(gm: GraphModule, *marks: torch._ops.OpOverload) -> None:
    """Remove marks such as Dynamo left on each use of a cache tensor held as codes: this backend knows what to do."""
    for module, node in _calls(gm, *marks):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
        module.recompile()
