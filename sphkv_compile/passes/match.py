"""Match: each attention marker is held against every idiom; it becomes a site, or a reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._inductor.pattern_matcher import Match
from torch.fx import GraphModule, Node

from sphkv_compile.passes.normalize import K, V, markers
from sphkv_compile.passes.rope import rope_of
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
    """A verdict for every attention of a normalised graph, in graph order."""
    verdicts = [_verdict(marker) for marker in markers(gm.graph)]
    return verdicts + [Verdict(n.name, source_line(n), refusal=r) for n, r in _plain_softmax(gm)]


def _verdict(marker: Node) -> Verdict:
    verdict = Verdict(marker.name, source_line(marker))
    for idiom in IDIOMS.values():
        found = idiom.PATTERN.match(marker)
        if not isinstance(found, Match) or not found:
            continue
        verdict.refusal = idiom.check(found)
        if verdict.refusal is None:
            verdict.site = replace(idiom.site(found), rope=rope_of(found.kwargs["k"]))
        return verdict
    verdict.refusal = _why(marker)
    return verdict


_LAYOUT_ONLY = (aten.permute.default, aten.view.default, aten.clone.default, aten.reshape.default)
_WRITES = (aten.index_put.default, aten.slice_scatter.default, aten.cat.default, aten.index.Tensor, aten.where.self)


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


def _is_input(node: Node) -> bool:
    while node.op == "call_function" and node.target in (*_LAYOUT_ONLY, aten.slice.Tensor, aten.index.Tensor):
        node = node.args[0]
    return node.op == "placeholder" and getattr(node.meta.get("val"), "ndim", 0) >= 3


def _plain_softmax(gm: GraphModule) -> list[tuple[Node, Refusal]]:
    """Attention spelled as matmul and softmax, so that ``explain`` can say why it was not touched."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is aten._softmax.default:
            behind = _behind(node, 6)
            if any(n.target is aten.bmm.default for n in behind):
                kind = "soft cap" if any(n.target is aten.tanh.default for n in behind) else "matmul and softmax"
                kind = "learned sinks" if any(n.target is aten.cat.default for n in behind) else kind
                found.append((node, Refusal("not_sdpa", kind)))
    return found


def _behind(node: Node, depth: int) -> set[Node]:
    seen, edge = set(), [node]
    for _ in range(depth):
        edge = [a for n in edge for a in n.all_input_nodes if a.op == "call_function" and a not in seen]
        seen.update(edge)
    return seen


_SHARED_CODE = ("/torch/", "/transformers/integrations/")


def source_line(node: Node) -> str:
    """``file:line`` of the user's code that a node stems from: the innermost frame that is neither torch's nor the
    attention dispatch of transformers, which all its models share."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    frames = [f for f in frames if not any(part in f for part in _SHARED_CODE)] or frames
    if not frames:
        return ""
    path, line, *_ = frames[-1].removeprefix("File ").split(",")
    return f"{path.strip(chr(34))}:{line.replace('line', '').strip()}"
