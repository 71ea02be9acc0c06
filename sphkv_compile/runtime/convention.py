"""The calling convention of a rewritten graph: what the passes tell the runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sphkv_compile.storage.layout import Layout


@dataclass
class Binding:
    """How the runtime feeds one rewritten site.

    Args:
        source: the user's line, for messages; the node's name where it is not known.
        k_input, v_input: positions of the dense buffers among the original inputs.
        outputs: positions of the grown buffers among the graph's outputs (``dynamic_cat``).
        group: query heads of a kv head.
    """

    idiom: str
    k_input: int
    v_input: int
    layout: Layout
    rolling: bool
    outputs: tuple[int, ...] = ()
    scale: float | None = None
    source: str = ""
    group: int = 1


@dataclass
class Rewritten:
    """A rewritten graph's calling convention.

    Args:
        kept: which of the original inputs the graph still takes, in order; state follows, site by site.
        state_inputs: fake state tensors, as many per site as :class:`State` has fields.
    """

    bindings: list[Binding] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    state_inputs: list[torch.Tensor] = field(default_factory=list)
