"""Which code serves an ``attend`` or ``append``: a fused kernel where there is one, the block-wise path otherwise."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.kernels.cpu import binding
from sphkv_compile.ops import attend as blockwise
from sphkv_compile.ops.append import append as append_python
from sphkv_compile.spec import CacheSpec, Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import Geometry, State, empty_state

__all__ = ["append_in_window", "attend", "check_kernels", "checked_library", "on_device", "packing"]


def packing(spec: CacheSpec, k_dim: int, v_dim: int, device: torch.device) -> str:
    """How pages lie on ``device``: as its kernels read them, where they can."""
    if device.type != "cuda":
        return "rows"
    from sphkv_compile.kernels.gpu import launch  # Triton is loaded where there is something to launch

    return "tiles" if launch.layout_served(spec, k_dim, v_dim) else "rows"


def on_device(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False
) -> ModuleType | None:
    """The GPU's ``attend`` and ``append``, which never wait for the device, if they serve such a step; else None."""
    if not layout.tiled or q.device.type != "cuda":
        return None
    from sphkv_compile.kernels.gpu import launch

    return launch if launch.call_served(layout, q, k, v, mask, is_causal) else None


def many_on_device(layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> ModuleType | None:
    """The GPU's attention of any number of new tokens, if it serves such a call; else None. It reads counters."""
    if not layout.tiled or q.device.type != "cuda":
        return None
    from sphkv_compile.kernels.gpu import bulk

    return bulk if bulk.attend_served(layout, q, k, v, mask) else None


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
    return binding.append(library, state, layout, q, k, v, pos, start, rolling)


def _served(layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel is made for such a call; on a CPU it is the faster at any number of new tokens."""
    types = binding.TYPES
    return (
        q.device.type == "cpu"
        and layout.codec == "axis_cosine"
        and not layout.kept
        and layout.page % 16 == 0  # so that what a vector reads past a page's last code is the page's own metadata
        and q.shape[3] % 8 == v.shape[3] % 8 == 0
        and q.dtype in types
        and k.dtype in types
        and v.dtype in types
        and (mask is None or (mask.dim() == 4 and (mask.dtype == torch.bool or mask.dtype in types)))
    )


def check_kernels(layout: Layout, g: Geometry, heads: int, device: torch.device) -> None:
    """Build and check what will serve such a cache, while the graph is compiled and not in its first step.

    Args:
        heads: query heads.

    Raises:
        RuntimeError: a GPU's kernels give wrong results.
    """
    if device.type == "cpu":
        checked_library()
    elif layout.tiled:
        check_device(layout, g.k_dim, heads // g.heads, g.k_dtype, device)


@lru_cache(None)
def checked_library() -> binding.Library | None:
    """The fused kernel once it has agreed with the block-wise path on this machine; None, with one warning, if not."""
    library = binding.library()
    if library is None:
        return None
    worst = max(_disagreement(library, tier) for tier in (Tier(4, 8), Tier(3, 2)))
    if worst < _SAME:
        return library
    warnings.warn(
        f"sphkv: the fused CPU decode kernel differs from the block-wise path by {worst:.3g} of the largest output, "
        f"expected less than {_SAME}: it was built wrongly on this machine, and the slower path serves.",
        stacklevel=4,
    )
    return None


@lru_cache(None)
def check_device(layout: Layout, dim: int, group: int, dtype: torch.dtype, device: torch.device) -> None:
    """Let the GPU's kernels agree with the portable path on a small cache, once for each kind of cache and device.

    What they keep between steps is made here too, outside of any CUDA graph that may be recorded later.

    Raises:
        RuntimeError: they disagree.
    """
    from sphkv_compile.kernels.gpu import bulk, launch

    group = min(group, launch.PASSES * launch.HEADS)
    count = layout.sink + layout.window + 2 * layout.span - 1  # the next token completes the second span
    columns, batch = count + 1, 2
    shape = Geometry(batch, 1, columns, dim, dim, dtype, dtype, False)
    pages = layout.spans(columns, False) * layout.pages_per_span
    size = layout.page_bytes(layout.tiers[0], dim, dim, shape.itemsize)
    arenas = torch.zeros(2, batch * pages * size, dtype=torch.uint8, device=device)
    ours, portable = (empty_state(layout, shape, arena) for arena in arenas)
    wave = torch.arange(batch * (group + 2) * columns * dim, device=device).double().mul(0.7).sin().mul(3)
    q, k, v = wave.to(dtype).view(batch, group + 2, columns, dim).split([group, 1, 1], 1)
    for state, encoder in ((ours, lambda *_: bulk), (portable, lambda *_: None)):
        state.table.copy_(torch.arange(batch * pages, dtype=torch.int32).view(batch, 1, pages) * (size // UNIT))
        append_python(state, layout, q[:, :, :count], k[:, :, :count], v[:, :, :count], 0, [0] * batch, encoder)
    codes = [_share(a != b) for a, b in zip(ours, portable)]
    mask = torch.ones(1, 1, columns, columns, dtype=torch.bool, device=device).tril()
    gaps = []
    for first in (count, columns - 3):  # the decode step, then the last tokens as a prefill would bring them
        q_new, k_new, v_new = (x[:, :, first:] for x in (q, k, v))
        where, shown = torch.tensor([first], device=device), mask[:, :, first:]
        if first == count:
            found = launch.attend(ours, layout, q_new, k_new, v_new, where, None, columns, shown, None, False)
        else:
            found = bulk.attend(ours, layout, q_new, k_new, v_new, first, 0, columns, shown, False, None)
        wide = q_new.float(), k_new.float(), v_new.float()
        expected = blockwise.attend(portable, layout, *wide, first, 0, columns, shown, False, None)
        gaps.append(float((found.float() - expected).norm() / expected.norm()))
    q_new, k_new, v_new = (x[:, :, count:] for x in (q, k, v))
    launch.append(ours, layout, q_new, k_new, v_new, torch.tensor([count], device=device), None, None, False)
    append_python(portable, layout, q_new, k_new, v_new, count, [0] * batch, lambda *_: None)
    codes += [_share(a != b) for name, a, b in zip(State._fields, ours, portable) if name not in ("moments", "energy")]
    gap, differ = max(gaps, key=lambda x: math.inf if math.isnan(x) else x), max(codes)
    if not (gap < _CLOSE and differ < _SAME):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
        raise RuntimeError(
            f"sphkv: on {device} ({name}) the fused kernels for {layout.summary} differ from the portable path: "
            f"attention by {gap:.2g} of the output (expected less than {_CLOSE}), {differ:.2g} of the codes (expected "
            f"less than {_SAME}). They would give wrong answers, so nothing is compiled. Update Triton and the driver, "
            "or choose a codec that runs without them: options={'codec': 'pair_polar'}."
        )


def _share(wrong: Tensor) -> float:
    return float(wrong.double().mean()) if wrong.numel() else 0.0


_CLOSE = 2e-2
"""The model's dtype and float16 products round by a few thousandths; one wrong token or plane gives over a tenth."""

_SAME = 1e-4
"""float32 rounding is a hundred times less, a wrong level or a wrong token a hundred times more."""


def _disagreement(library: binding.Library, tier: Tier) -> float:
    """Largest difference of the two paths on a small coded cache, relative to the largest output."""
    layout = Layout("axis_cosine", (tier,), sink=4, window=8, span=64, page=32, seed=0)
    shape = Geometry(1, 1, 160, 64, 64, torch.float32, torch.float32, False)
    pages, size = layout.spans(160, False) * layout.pages_per_span, layout.page_bytes(tier, 64, 64, (4, 4))
    state = empty_state(layout, shape, torch.zeros(pages * size, dtype=torch.uint8))
    state.table.copy_(torch.arange(pages, dtype=torch.int32) * (size // UNIT))
    wave = torch.arange(4 * 160 * 64).double().mul(0.7).sin().mul(3).float().view(4, 1, 160, 64)
    q, k, v = wave[:2].transpose(0, 1), wave[2:3], wave[3:4]
    append_python(state, layout, q[:, :, :150], k[:, :, :150], v[:, :, :150], 0, [0])
    new = (x[:, :, 150:152] for x in (q, k, v))
    arguments: Any = (state, layout, *new, 150, 0, 160, None, False, None)
    expected, found = blockwise.attend(*arguments), binding.attend(library, *arguments)
    if found is None:
        raise AssertionError("the fused kernel refused its own self-check")
    return float((found - expected).abs().max() / expected.abs().max())
