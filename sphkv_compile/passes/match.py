"""Match: each attention marker is held against every idiom; it becomes a site, or a reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.pattern_matcher import Match
from torch.fx import GraphModule, Node

from sphkv_compile.ops import schema
from sphkv_compile.passes.normalize import K, V, markers
from sphkv_compile.passes.rope import angles_of, rope_of
from sphkv_compile.patterns import IDIOMS, Refusal, Site

aten = torch.ops.aten


@dataclass
class Verdict:
    """What became of one attention: exactly one of ``site`` and ``refusal`` is set.

    Args:
        node: name of the attention's node in the graph.
        source: the user's line, from Dynamo's stack trace.
    """

    node: str
    source: str
    site: Site | None = None
    refusal: Refusal | None = None

    @property
    def idiom(self) -> str | None:
        return self.site.idiom if self.site else None


def match(gm: GraphModule) -> list[Verdict]:
    """A verdict for every attention of a normalised graph, in graph order, but for those that read the first tokens of
    a cache which takes them in itself: there is nothing to decode yet."""
    verdicts = [_verdict(marker) for marker in markers(gm.graph) if marker.args[K].target is not schema.opens]
    return verdicts + [Verdict(n.name, source_line(n), refusal=r) for n, r in _plain_softmax(gm)]


def _verdict(marker: Node) -> Verdict:
    verdict = Verdict(marker.name, source_line(marker))
    for idiom in IDIOMS.values():
        found = idiom.PATTERN.match(marker)
        if not isinstance(found, Match) or not found:
            continue
        verdict.refusal = _keywords(found) or idiom.check(found)
        if verdict.refusal is None:
            key = found.kwargs["k"]
            rope = {"rope": rope_of(key), "angles": angles_of(key)}
            verdict.site = replace(idiom.site(found), stored=key.meta.get("stored"), **rope)
        return verdict
    verdict.refusal = _why(marker)
    return verdict


def _keywords(found: Match) -> Refusal | None:
    """torch's matcher ignores arguments given by keyword, such as ``accumulate=True``; none belongs to an idiom."""
    for node in found.nodes:
        if node.kwargs:
            return Refusal("unknown_write", f"{node.target}({', '.join(node.kwargs)}=...)")
    return None


_LAYOUT_ONLY = (aten.permute.default, aten.view.default, aten.clone.default, aten.reshape.default)
_WRITES = (
    aten.index_put.default,
    aten.slice_scatter.default,
    aten.scatter.src,
    aten.cat.default,
    aten.index.Tensor,
    aten.where.self,
)


def _why(marker: Node) -> Refusal:
    """No idiom describes the write: say what stands there instead."""
    producers = [marker.args[K], marker.args[V]]
    names = ", ".join(sorted({str(p.target) if p.op == "call_function" else p.op for p in producers}))
    if any(_reaches(p, _WRITES) for p in producers):
        return Refusal("unknown_write", names)
    return Refusal("no_cache_write", names)


def _reaches(node: Node, targets: tuple, depth: int = 12) -> bool:
    """Whether a write to a graph input lies a few steps behind ``node``."""
    if depth == 0 or node.op != "call_function":
        return False
    if node.target in targets and any(_is_input(a) for a in node.all_input_nodes):
        return True
    return any(_reaches(a, targets, depth - 1) for a in node.all_input_nodes[:3])


def _is_input(node: Any) -> bool:
    while node.op == "call_function" and node.target in (*_LAYOUT_ONLY, aten.slice.Tensor, aten.index.Tensor):
        node = node.args[0]
    return node.op == "placeholder" and getattr(node.meta.get("val"), "ndim", 0) >= 3


_MATMUL = (aten.bmm.default, aten.mm.default, aten.baddbmm.default)


def _plain_softmax(gm: GraphModule) -> list[tuple[Node, Refusal]]:
    """Attention spelled as matmul and softmax, so that ``explain`` can say why it was not touched."""
    found = []
    for node in gm.graph.nodes:
        logits = _softmax_of(node)
        if logits is None or not _feeds_matmul(node):
            continue
        between = _back_to_matmul(logits)
        if between is not None:
            kind = "soft cap" if any(n.target is aten.tanh.default for n in between) else "matmul and softmax"
            kind = "learned sinks" if any(n.target is aten.cat.default for n in between) else kind
            found.append((node, Refusal("not_sdpa", kind)))
    return found


def _softmax_of(node: Node) -> Node | None:
    """The argument of a softmax, whole or as Inductor's decomposition writes it: e / sum(e), e = exp(x - max(x))."""
    if node.op == "call_function" and node.target is aten._softmax.default:
        return node.args[0]
    if node.op != "call_function" or node.target is not aten.div.Tensor:
        return None
    top, total = node.args
    if (
        getattr(top, "target", None) is not aten.exp.default
        or getattr(total, "target", None) is not aten.sum.dim_IntList
    ):
        return None
    shifted = top.args[0]
    return shifted.args[0] if total.args[0] is top and shifted.target is aten.sub.Tensor else None


def _feeds_matmul(node: Node, depth: int = 8) -> bool:
    return depth > 0 and any(u.target in _MATMUL or _feeds_matmul(u, depth - 1) for u in node.users)


def _back_to_matmul(node: object, depth: int = 12) -> list[Node] | None:
    """The nodes from ``node`` back to the matmul that it stems from, if there is one; the shortest such way."""
    if not isinstance(node, Node) or node.op != "call_function" or depth == 0:
        return None
    if node.target in _MATMUL:
        return []
    ways = [way for a in node.all_input_nodes if (way := _back_to_matmul(a, depth - 1)) is not None]
    return [node, *min(ways, key=len)] if ways else None


_SHARED_CODE = (str(Path(torch.__file__).parent), str(Path("transformers", "integrations")))


def source_line(node: Node) -> str:
    """``file:line`` of the user's code that a node stems from: the innermost frame that is neither torch's nor the
    attention dispatch of transformers, which all its models share."""
    frames = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    frames = [f for f in frames if not any(part in f for part in _SHARED_CODE)] or frames
    if not frames:
        return ""
    path, line, *_ = frames[-1].removeprefix("File ").split(",")
    return f"{path.strip(chr(34))}:{line.replace('line', '').strip()}"
