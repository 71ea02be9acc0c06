"""Verify: what must hold after the rewrite, checked on every graph. A failure is our bug, never the user's."""

from __future__ import annotations

from torch.fx import GraphModule

from sphkv_compile.ops import schema
from sphkv_compile.runtime.convention import Rewritten
from sphkv_compile.storage.state import STATE_FIELDS


def verify(gm: GraphModule, rewritten: Rewritten) -> None:
    """Each site has one attend, then one append, on its own state, whole and in order, which nothing else touches.

    Raises:
        AssertionError: a rewritten graph is not what the runtime will feed.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    width = len(STATE_FIELDS)
    if len(inputs) != len(rewritten.kept) + width * len(rewritten.bindings):
        raise AssertionError("sphkv: inputs and calling convention disagree")
    for number in range(len(rewritten.bindings)):
        begin = len(rewritten.kept) + number * width
        state = tuple(inputs[begin : begin + width])
        found = sorted({user for node in state for user in node.users}, key=order.__getitem__)
        if [n.target for n in found] != [schema.attend, schema.append]:
            raise AssertionError(f"sphkv: site {number} is touched by {[str(n.target) for n in found]}")
        if any(n.args[:width] != state for n in found):
            raise AssertionError(f"sphkv: site {number} takes its state in another order, or another site's")
        if found[0].args[width : width + 5] != found[1].args[width : width + 5]:
            raise AssertionError(f"sphkv: site {number} attends to other new tokens than it appends")
