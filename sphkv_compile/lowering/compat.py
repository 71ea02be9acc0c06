"""The one place that knows what differs between torch 2.11 and 2.14, and every private name that we import from it."""

from __future__ import annotations

import contextlib
import difflib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx import GraphModule

__all__ = [
    "PATCHES", "compile_fx", "compile_fx_inner", "compiling", "functorch_patches", "inductor_cache", "inductor_options",
    "interpret", "mode_patches", "recorded_graphs", "refuse", "trace_afresh",
]  # fmt: skip

PATCHES: dict[str, Any] = {"size_asserts": False}
"""Inductor's settings for our graphs. The state may be laid out anew between steps, so its sizes are not asserted."""


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for ``torch.compile``'s ``mode``.

    Raises:
        RuntimeError: an unknown mode, as from torch.compile itself.
    """
    return dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}


def inductor_options(given: Any) -> dict[str, Any]:
    """Inductor's settings that a user gave; None and False give none.

    Raises:
        TypeError: not a dict, or an unknown key, with the nearest valid one.
    """
    if given is None or given is False:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"inductor={given!r}: expected a dict of Inductor's options, or False to compile nothing")
    known = torch._inductor.config.get_config_copy()
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown option {key!r} of Inductor; did you mean {near!r}?")
    return given


@contextlib.contextmanager
def functorch_patches() -> Iterator[None]:
    """AOTAutograd's cache would skip our passes, and keep graphs in which nothing was matched."""
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@torch.compiler.assume_constant_result
def refuse(message: str) -> None:
    """An error, in traced code while the graph is made: a break, or an exception of traced code, would have Dynamo run
    that code eagerly from here on.

    Raises:
        RuntimeError: always.
    """
    raise (TorchRuntimeError if compiling() else RuntimeError)(message)


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


def trace_afresh(call: Callable, backend: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run ``call``, compiled with ``backend`` as if nothing had been compiled before, and leave what was as it is.

    Dynamo keeps its graphs, its failures and their count with the code of a function. Here that is a copy of a function
    into which the call is inlined, and with which all goes. What the call's graph breaks leave to run by itself keeps
    its own code, of which this trace shall count no recompilation.

    Raises:
        What the backend raised, and not what Dynamo makes of it.
    """

    def traced(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    code = traced.__code__.replace(co_name="explained")
    traced = types.FunctionType(code, traced.__globals__, code.co_name, None, traced.__closure__)
    unlimited = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    try:
        with torch._dynamo.config.patch(unlimited):
            return torch.compile(traced, backend=lambda gm, inputs: backend(gm, inputs), dynamic=False)(*args, **kwargs)
    except BackendCompilerFailed as failed:
        raise failed.inner_exception from None


def inductor_cache() -> str:
    """The folder in which Inductor keeps what it has compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


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
