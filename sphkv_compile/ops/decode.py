"""Which code serves an ``attend`` or ``append``: a fused kernel where there is one, the block-wise path otherwise."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.kernels.cpu import binding
from sphkv_compile.ops import attend as blockwise
from sphkv_compile.ops.append import remember
from sphkv_compile.ops.check import checked_library
from sphkv_compile.ops.device import gpu
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import LENGTH, State


def packing(spec: CacheSpec, k_dim: int, v_dim: int, device: torch.device, kept: bool = False) -> str:
    """How pages lie on ``device``: as its kernels read them, where they can."""
    if device.type != "cuda":
        return "rows"
    from sphkv_compile.kernels.gpu import launch  # Triton is loaded where there is something to launch

    return "tiles" if launch.layout_served(spec, k_dim, v_dim, kept) else "rows"


def on_device(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False
) -> ModuleType | None:
    """The GPU's ``attend`` and ``append``, which never wait for the device, if they serve such a step; else None."""
    launch = gpu("launch", layout, q.device)
    return launch if launch and launch.call_served(layout, q, k, v, mask, is_causal) else None


def many_on_device(layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> ModuleType | None:
    """The GPU's attention of any number of new tokens, if it serves such a call; else None. It reads counters."""
    bulk = gpu("bulk", layout, q.device)
    return bulk if bulk and bulk.attend_served(layout, q, k, v, mask) else None


def attend(
    state: State,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    base: int,
    columns: int,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Same arguments, shapes and result as :func:`sphkv_compile.ops.reference.attend_reference`."""
    arguments: Any = (state, layout, q, k, v, first, base, columns, mask, is_causal, scale)
    if _served(layout, q, k, v, mask) and (library := checked_library()) is not None:
        out = binding.attend(library, *arguments)
        if out is not None:
            return out
    if (fused := many_on_device(layout, q, k, v, mask)) is not None:
        blockwise.refuse_dropped(state, first, base, k.shape[2], mask)
        return fused.attend(*arguments)
    return blockwise.attend(*arguments)  # which also refuses a mask that shows dropped slots


def append_in_window(
    state: State,
    layout: Layout,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    start: int | None,
    rolling: bool,
) -> bool:
    """The common append, in a few microseconds: tokens enter the sinks or the window, and no span leaves it.

    False, and nothing was written, for any other append: ``ops/append.py`` then does it.
    """
    served = (
        k.device.type == "cpu"
        and k.dtype == state.exact_k.dtype
        and v.dtype == state.exact_v.dtype
        and (q is None or q.dtype in binding.TYPES)
        and (pos is None or (pos.dtype == torch.int64 and pos.is_contiguous()))
    )
    if not served or (library := binding.library()) is None:
        return False
    done = binding.append(library, state, layout, q, k, v, pos, start, rolling)
    if done and q is not None and layout.kept:
        remember(state, q, int(state.rows[0, LENGTH]))
    return done


def _served(layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel is made for such a call; on a CPU it is the faster at any number of new tokens."""
    types = binding.TYPES
    return (
        q.device.type == "cpu"
        and layout.codec == "axis_cosine"
        and not layout.tiled
        and layout.page % 16 == 0  # so that what a vector reads past a page's last code is the page's own metadata
        and q.shape[3] % 8 == v.shape[3] % 8 == 0
        and q.dtype in types
        and k.dtype in types
        and v.dtype in types
        and (mask is None or (mask.dim() == 4 and (mask.dtype == torch.bool or mask.dtype in types)))
    )
