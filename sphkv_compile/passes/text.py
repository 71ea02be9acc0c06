"""Graphs as short, stable text: what snapshot tests compare, and what TORCH_LOGS shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from sphkv_compile.ops import schema
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import STATE_FIELDS

aten = torch.ops.aten
_SHORT = {
    **{"bfloat16": "bf16", "float64": "f64", "float32": "f32", "float16": "f16"},
    **{"int64": "i64", "int32": "i32", "uint8": "u8", "bool": "b8"},
}
_METHODS = ("unsqueeze", "expand", "clone", "view", "permute")
_WRITES = ("index_put", "slice_scatter", "copy", "cat", "index", "slice", "select_scatter", "scatter")
_TABLES = ("fmod", "remainder", "full")
_UNTOLD = ("dtype", "layout", "device", "pin_memory", "memory_format", "requires_grad")


def graph_text(gm: GraphModule) -> str:
    """The nodes that carry attention over a cache, renumbered.

    Results are ``%n``, values from elsewhere ``$n``, a site's state ``<state>``; a chain of views stands on one line,
    and so does the table by which a buffer is permuted; comments give dtype and shape, symbols numbered by the inputs.
    """
    return "\n".join(_Printer(gm).lines())


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".Tensor").removesuffix(".Scalar")


def _short_name(node: Node) -> str:
    return _name(node).removeprefix("aten.").removeprefix("prims.").split(".")[0]


def _told(node: Node) -> list[str]:
    return [f"{key}={value!r}" for key, value in node.kwargs.items() if key not in _UNTOLD]


class _Printer:
    def __init__(self, gm: GraphModule):
        self.graph = gm.graph
        self.inside: set[Node] = set()
        self.tables: set[Node] = set()
        self.names: dict[Node, str] = {}
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        for node in calls:
            if node.target is schema.sdpa:
                for arg in node.args[1:3]:
                    self._walk(arg, _METHODS + _WRITES)
            if node.target in (schema.sdpa, schema.attend, schema.append):
                self.inside.add(node)
        self.inside |= {n for n in calls if n.target is aten.copy_.default and n.args[1] in self.inside}

    def _walk(self, node: Any, shown: tuple[str, ...]) -> None:
        """Take in ``node``, what it was made from, and the tables by which it permutes."""
        if not isinstance(node, Node) or node.op != "call_function" or _short_name(node) not in shown:
            return
        if node in self.inside:
            return
        self.inside.add(node)
        first = node.args[0]
        self._walk(first[0] if isinstance(first, (list, tuple)) else first, shown)
        if _short_name(node) == "slice_scatter":
            self._walk(node.args[1], shown)
        if _short_name(node) in ("index", "index_put"):
            self.tables.update(a for a in node.args[1] if isinstance(a, Node) and _short_name(a) in _TABLES)

    def lines(self) -> Iterator[str]:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._number(node.meta.get("val"))
            if node in self.inside and not self._inlined(node):
                yield self._line(node)

    def _inlined(self, node: Node) -> bool:
        """A view that only the next view uses is written on that one's line."""
        users = list(node.users)
        return _short_name(node) in _METHODS and len(users) == 1 and self._chained(users[0])

    def _chained(self, node: Node) -> bool:
        return node in self.inside and _short_name(node) in _METHODS

    def _line(self, node: Node) -> str:
        text = self._call(node)
        if node.target in (aten.copy_.default, schema.append):
            return text
        self.names[node] = f"%{sum(n.startswith('%') for n in self.names.values())}"
        return f"{self.names[node]} = {text}  # {self._type(node.meta.get('val'))}"

    def _call(self, node: Node) -> str:
        args = list(node.args)
        if self._chained(node):
            before = self._call(args[0]) if args[0] in self.inside and self._inlined(args[0]) else self._ref(args[0])
            return f"{before}.{_short_name(node)}({', '.join(map(self._ref, args[1:]))})"
        if node.target in (schema.attend, schema.append):
            args = ["<state>", *args[len(STATE_FIELDS) :]]
            args[-2] = f"<{Layout.parse(args[-2]).summary}>"
        return f"{_name(node)}({', '.join([*map(self._ref, args), *_told(node)])})"

    def _table(self, arg: Any) -> str:
        """A few integers, such as fmod(add(iota(16), 1), 16), written out."""
        if not isinstance(arg, Node) or arg.op != "call_function":
            return self._ref(arg)
        return f"{_short_name(arg)}({', '.join([*map(self._table, arg.args), *_told(arg)])})"

    def _ref(self, arg: Any) -> str:
        if isinstance(arg, Node):
            if arg in self.tables:
                return self._table(arg)
            if arg not in self.names:
                self.names[arg] = f"${sum(n.startswith('$') for n in self.names.values())}"
            return self.names[arg]
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(self._ref, arg))}]"
        if isinstance(arg, float):
            return f"{arg:.6g}" if arg else "0.0"
        return arg if isinstance(arg, str) and arg.startswith("<") else repr(arg)

    def _number(self, value: Any) -> None:
        """Name the symbols of an input in the order of their first appearance; Dynamo's own numbers vary."""
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            for symbol in sorted(size.node.expr.free_symbols, key=str) if isinstance(size, torch.SymInt) else ():
                self.symbols.setdefault(symbol, sympy.Symbol(f"s{len(self.symbols)}", integer=True))

    def _type(self, value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return self._size(value)
        name = str(value.dtype).removeprefix("torch.")
        return f"{_SHORT.get(name, name)}[{', '.join(map(self._size, value.shape))}]"

    def _size(self, size: Any) -> str:
        self._number(size)
        return str(size.node.expr.xreplace(self.symbols)) if isinstance(size, torch.SymInt) else str(size)


def capture(function: Callable, *args: Any, dynamic: bool | None = False, **kwargs: Any) -> tuple[GraphModule, Any]:
    """The functional graph in which the patterns look for caches, and what the call returns, run dense.

    Args:
        dynamic: as for ``torch.compile``.

    Raises:
        ValueError: the call compiles no graph, or breaks into several.
    """
    from sphkv_compile.lowering import compat  # here, since the backend's own log prints with this module
    from sphkv_compile.passes.lift import lift
    from sphkv_compile.passes.normalize import normalize

    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, inputs: list, **_: Any) -> Callable:
        normalize(gm)
        graphs.append(gm)
        return compat.interpret(gm, inputs)

    def backend(gm: GraphModule, inputs: list) -> Callable:
        lift(gm)
        return compat.compile_fx(gm, inputs, inner_compile=inner)

    with torch.no_grad(), compat.functorch_patches():
        out = torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    if len(graphs) != 1:
        raise ValueError(f"the call compiled {len(graphs)} graphs; expected one, without breaks")
    return graphs[0], out
