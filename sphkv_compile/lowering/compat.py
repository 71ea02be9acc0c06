"""The one place that knows what differs between torch 2.11 and 2.14, and every private name that we import from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx import GraphModule

__all__ = [
    "PATCHES", "compile_fx", "compile_fx_inner", "compiling", "functorch_patches", "interpret", "mode_patches",
    "recorded_graphs",
]  # fmt: skip

PATCHES: dict[str, Any] = {"size_asserts": False}
"""Inductor's settings for our graphs. The state may be laid out anew between steps, so its sizes are not asserted."""


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for ``torch.compile``'s ``mode``.

    Raises:
        RuntimeError: an unknown mode, as from torch.compile itself.
    """
    return dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}


@contextlib.contextmanager
def functorch_patches() -> Iterator[None]:
    """AOTAutograd's cache would skip our passes, and keep graphs in which nothing was matched."""
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def compiling() -> bool:
    """Whether this thread compiles: torch 2.11 raises its own flag later than Dynamo's first look at the inputs."""
    return torch.compiler.is_compiling() or CompileContext.try_get() is not None


def interpret(gm: GraphModule, example_inputs: list, **kwargs: Any) -> Callable:
    """Run the graph node by node instead of compiling it."""

    def run(args: list) -> Any:
        inputs = list(args)
        args.clear()
        return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def recorded_graphs(device: torch.device) -> dict[str, Any]:
    """What Inductor's CUDA graphs have done in this thread.

    ``recorded``: graphs in the trees of this device; ``replaying``: the last compiled call was a replay of one;
    ``skips``: compiled graphs that Inductor declined to capture.
    """
    found = {"recorded": 0, "replaying": False, "skips": counters["inductor"]["cudagraph_skips"]}
    if device.type != "cuda":
        return found
    from torch._inductor.cudagraph_trees import ExecutionState, get_manager

    index = torch.cuda.current_device() if device.index is None else device.index
    manager = get_manager(index, create_if_none_exists=False)
    if manager is not None:
        nodes = list(manager.get_roots())
        for node in nodes:  # which grows as it goes
            nodes += [child for children in node.children.values() for child in children]
        found |= {"recorded": len(nodes), "replaying": manager.path_state == ExecutionState.EXECUTION}
    return found
