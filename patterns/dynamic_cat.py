"""transformers' DynamicLayer: the cache grows by concatenation and is handed back as an output.

    w = cat([past, new], -2);  sdpa(q, w_k, w_v);  return w_k, w_v

The first prefill has no past and stays dense; its output is imported at the next step.
"""

from __future__ import annotations

from torch._inductor.pattern_matcher import KeywordArg, Match
from torch.fx import Node

from .site import Refusal, Site, aten, attention, base_site, call, check_attention, writes


def write(buf: str, new: str):
    """Concatenation along tokens; :mod:`sphkv_compile.passes.normalize` writes the dimension as -2."""
    return call(aten.cat.default, [KeywordArg(buf), KeywordArg(new)], -2)


PATTERN = attention(write("k_buf", "k"), write("v_buf", "v"))


def check(match: Match) -> Refusal | None:
    """What the shape alone does not say: None, or the reason to leave the site dense."""
    if refusal := check_attention(match):
        return refusal
    node = match.output_node()
    output = next(n for n in reversed(node.graph.nodes) if n.op == "output")
    returned = list(output.args[0])
    for buf, wrote in zip((match.kwargs["k_buf"], match.kwargs["v_buf"]), writes(match)):
        if returned.count(wrote) != 1:
            return Refusal("not_stored", f"{wrote.name} is no output of the graph")
        if others := {*buf.users, *wrote.users} - {wrote, node, output}:
            return Refusal("other_readers", f"{buf.name}: {', '.join(sorted(n.name for n in others))}")
        if buf in returned:
            return Refusal("other_readers", f"{buf.name} is returned as well")
    if match.kwargs["columns"] is not None:
        return Refusal("partial_read", f"{match.kwargs['columns']} columns of the grown cache are read")
    return None


def past_length(buf: Node) -> Node | int:
    """The tokens held before this step, as a node where it is symbolic."""
    length = buf.meta["val"].shape[2]
    if isinstance(length, int):
        return length
    for node in buf.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and hasattr(value, "node") and value.node.expr == length.node.expr:
            return node
    with buf.graph.inserting_after(buf):
        size = buf.graph.call_function(aten.sym_size.int, (buf, 2))
    size.meta["val"] = length
    return size


def site(match: Match) -> Site:
    """Shapes: as :class:`Site`."""
    return base_site("dynamic_cat", match, start=past_length(match.kwargs["k_buf"]), outputs=writes(match))
