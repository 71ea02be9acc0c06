"""Graphs as short, stable text: what snapshot tests compare, and what TORCH_LOGS shows."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from sphkv_compile.ops import schema
from sphkv_compile.runtime.layout import Layout
from sphkv_compile.runtime.state import STATE_FIELDS

aten = torch.ops.aten
_SHORT = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "uint8": "u8", "bool": "b8"}
_SHOWN = ("index_put", "slice", "cat", "copy", "index", "fmod", "remainder", "unsqueeze", "expand", "clone", "view", "full")
_OURS = (schema.sdpa, schema.attend, schema.append)


def graph_text(gm: GraphModule) -> str:
    """The nodes that carry attention over a cache, renumbered.

    Results are ``%n``, values from outside the slice ``$n``, a site's state ``<state>``; comments give dtype and shape.
    """
    return "\n".join(_Printer(gm).lines())


class _Printer:
    def __init__(self, gm: GraphModule):
        self.graph = gm.graph
        self.inside: set[Node] = set()
        self.names: dict[Node, str] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in _OURS:
                self.inside.add(node)
                if node.target is schema.sdpa:
                    for arg in node.args[1:3]:
                        self._walk(arg)
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is aten.copy_.default and node.args[1] in self.inside:
                self.inside.add(node)

    def _walk(self, node: Any) -> None:
        if not isinstance(node, Node) or node in self.inside or node.op != "call_function":
            return
        if str(node.target).removeprefix("aten.").split(".")[0] not in _SHOWN:
            return
        self.inside.add(node)
        first = node.args[0]
        for arg in first if isinstance(first, (list, tuple)) else (first,):
            if not (node.target is aten.cat.default and arg is not first[0]):
                self._walk(arg)

    def lines(self) -> list[str]:
        return [self._line(node) for node in self.graph.nodes if node in self.inside]

    def _line(self, node: Node) -> str:
        target = str(node.target).replace(".default", "").replace(".Tensor", "")
        args = list(node.args)
        if node.target in (schema.attend, schema.append):
            args = ["<state>", *args[len(STATE_FIELDS) :]]
            args[-2] = f"<{Layout.parse(args[-2]).summary}>"
        text = f"{target}({', '.join(self._ref(a) for a in args)})"
        value = node.meta.get("val")
        if node.target in (aten.copy_.default, schema.append):
            return text
        self.names[node] = f"%{sum(n.startswith('%') for n in self.names.values())}"
        return f"{self.names[node]} = {text}  # {_type(value)}"

    def _ref(self, arg: Any) -> str:
        if isinstance(arg, Node):
            if arg not in self.names:
                self.names[arg] = f"${sum(n.startswith('$') for n in self.names.values())}"
            return self.names[arg]
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(self._ref, arg))}]"
        return arg if isinstance(arg, str) and arg.startswith("<") else repr(arg)


def _type(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    name = str(value.dtype).removeprefix("torch.")
    return f"{_SHORT.get(name, name)}{list(value.shape)}"
