"""The one place that knows what differs between torch 2.11 and 2.14, and every private name that we import from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx import GraphModule

__all__ = ["PATCHES", "compile_fx", "compile_fx_inner", "functorch_patches", "interpret", "mode_patches"]

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


def interpret(gm: GraphModule, example_inputs: list, **kwargs: Any) -> Callable:
    """Run the graph node by node instead of compiling it."""

    def run(args: list) -> Any:
        inputs = list(args)
        args.clear()
        return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
