"""Fused code is entrusted with a cache only where it has agreed with the portable path, on this machine and device."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from sphkv_compile.kernels.cpu import binding
from sphkv_compile.ops import attend as blockwise
from sphkv_compile.ops.append import append
from sphkv_compile.ops.moves import move
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.moves import Moves
from sphkv_compile.storage.state import Geometry, State, empty_state

_SAME = 1e-4
"""float32 rounding is a hundred times less, a wrong level or a wrong token a hundred times more."""
_CLOSE = 2e-2
"""The model's dtype and float16 products round by a few thousandths; one wrong token or plane gives over a tenth."""


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
        with torch.cuda.device(device):  # Triton launches on the current one
            check_device(layout, g.k_dim, heads // g.heads, g.k_dtype, device)


@lru_cache(None)
def checked_library() -> binding.Library | None:
    """The fused kernel once it has agreed with the block-wise path on this machine; None, with one warning, if not."""
    library = binding.library()
    if library is None:
        return None
    worst = max(_disagreement(library, *menu) for menu in ((Tier(4, 8),), (Tier(3, 2),), (Tier(8, 4), Tier(3, 2))))
    if worst < _SAME:
        return library
    warnings.warn(
        f"sphkv: the fused CPU decode kernel differs from the block-wise path by {worst:.3g} of the largest output, "
        f"expected less than {_SAME}: it was built wrongly on this machine, and the slower path serves. Try another "
        "C++ compiler (CXX).",
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
    from sphkv_compile.kernels.gpu import bulk, launch  # Triton is loaded where there is something to launch

    group = min(group, launch.PASSES * launch.HEADS)
    count = layout.sink + layout.window + 2 * layout.span - 1  # the next token completes the second span
    columns = count + 1
    shape = Geometry(2, 1, columns, dim, dim, dtype, dtype, False, group)
    q, k, v = _tokens(shape, device)
    ours, portable = _empty(layout, shape, device), _empty(layout, shape, device)
    past = q[:, :, :count], k[:, :, :count], v[:, :, :count]
    append(ours, layout, *past, 0, [0, 0], lambda *_: bulk)
    append(portable, layout, *past, 0, [0, 0], lambda *_: None)
    differ = _difference(ours, portable)

    mask = torch.ones(1, 1, columns, columns, dtype=torch.bool, device=device).tril()
    where = torch.tensor([count], device=device)

    def gap(found: Tensor, first: int) -> float:
        new = q[:, :, first:].float(), k[:, :, first:].float(), v[:, :, first:].float()
        expected = blockwise.attend(portable, layout, *new, first, 0, columns, mask[:, :, first:], False, None)
        return float((found.float() - expected).norm() / expected.norm())

    few = q[:, :, -3:], k[:, :, -3:], v[:, :, -3:]
    prefill = gap(bulk.attend(ours, layout, *few, columns - 3, 0, columns, mask[:, :, -3:], False, None), columns - 3)
    last = q[:, :, count:], k[:, :, count:], v[:, :, count:]
    step = gap(launch.attend(ours, layout, *last, where, None, columns, mask[:, :, count:], None, False), count)
    launch.append(ours, layout, *last, where, None, None, False)
    append(portable, layout, *last, count, [0, 0], lambda *_: None)
    differ = max(differ, _difference(ours, portable))
    if not (step < _CLOSE and prefill < _CLOSE and differ < _SAME):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
        raise RuntimeError(
            f"sphkv: on {device} ({name}) the fused kernels for {layout.summary} differ from the portable path: "
            f"attention by {step:.2g} of the output at one token and by {prefill:.2g} at several (expected less than "
            f"{_CLOSE}), {differ:.2g} of the codes (expected less than {_SAME}). They would give wrong answers, so "
            "nothing is compiled. Update Triton and the driver, or choose a codec that runs without them: "
            "options={'codec': 'pair_polar'}."
        )


def _disagreement(library: binding.Library, *menu: Tier) -> float:
    """Largest difference of the two paths on a small coded cache, relative to the largest output; at several tiers, on
    one that dropped tokens."""
    layout = Layout("axis_cosine", menu, sink=4, window=8, span=64, page=32, seed=0, kept=len(menu) > 1)
    shape = Geometry(1, 1, 160, 64, 64, torch.float32, torch.float32, False, 2)
    cpu = torch.device("cpu")
    state, (q, k, v) = _empty(layout, shape, cpu), _tokens(shape, cpu)
    append(state, layout, q[:, :, :150], k[:, :, :150], v[:, :, :150], 0, [0])
    if layout.kept:
        _demote(state, layout)
    new = q[:, :, 150:152], k[:, :, 150:152], v[:, :, 150:152]
    expected = blockwise.attend(state, layout, *new, 150, 0, 160, None, False, None)
    found = binding.attend(library, state, layout, *new, 150, 0, 160, None, False, None)
    if found is None:
        raise AssertionError("the fused kernel refused its own self-check")
    return float((found - expected).abs().max() / expected.abs().max())


def _demote(state: State, layout: Layout) -> None:
    """Of a cache's four pages at the widest tier, which are of two spans, two become one at the narrowest: it takes the
    even tokens of the second and the odd ones of the fourth, and is filled in part."""
    first, second, third, fourth, fresh = state.table[0, 0, :5].clone()
    slots = torch.arange(layout.page, dtype=torch.uint8).unsqueeze(0)
    sources = torch.where(slots % 2 == 0, second, fourth)
    sources[:, -8:] = -1
    tier = len(layout.tiers) - 1
    counts = (*[0] * tier, 1)
    one = torch.zeros(1, 2, dtype=torch.int32)
    move(state, layout, Moves(counts, fresh.view(1), one, sources, torch.zeros_like(slots), slots))
    state.table[0, 0, :3] = torch.stack([fresh, first, third])
    state.tiers[0, 0, 0] = tier
    state.held[0, 0, 0], state.held[0, 0, tier] = 2, 1


def _empty(layout: Layout, shape: Geometry, device: torch.device) -> State:
    """A state that has a page for every slot."""
    size = layout.page_bytes(layout.tiers[0], shape.k_dim, shape.v_dim, shape.itemsize)
    pages = empty_state(layout, shape, torch.empty(0, dtype=torch.uint8, device="meta")).table.numel()
    state = empty_state(layout, shape, torch.zeros(pages * size, dtype=torch.uint8, device=device))
    state.table.copy_((torch.arange(pages, dtype=torch.int32) * (size // UNIT)).view(state.table.shape))
    return state


def _tokens(shape: Geometry, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values without a random number. Shapes: [B, group, L, D], [B, 1, L, D] twice, for one head."""
    size = shape.batch, shape.group + 2, shape.capacity, shape.k_dim
    wave = torch.arange(torch.Size(size).numel(), device=device).double().mul(0.7).sin().mul(3)
    q, k, v = wave.to(shape.k_dtype).view(size).split([shape.group, 1, 1], 1)
    return q, k, v


def _difference(a: State, b: State) -> float:
    """Largest share of any field that is not equal; the queries' sums, added in another order, are left out."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in State._fields if name not in ("moments", "energy")]
    return max(float((x != y).double().mean()) for x, y in pairs if x.numel())
