"""Builds the C++ of this folder with Inductor's own compiler and cache, and calls it on a state's memory.

A call passes one packed structure of addresses and numbers, which costs some ten microseconds. The library is built at
the first call on a machine, and found on disk afterwards.
"""

from __future__ import annotations

import ctypes
import math
import struct
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sphkv_compile.codecs.codebook import levels
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import HIDDEN, State

PARTS = ("numbers", "codes", "products", "decode", "append")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of keys, values, queries and additive masks, as the kernel numbers them."""
_BOOL, _NONE = 3, 4

FLAGS = ("-ffp-contract=fast",)
"""Inductor turns fused multiply-adds off for its own kernels, which shall round as eager does."""

_ATTEND = struct.Struct("=16q13q14q5q10q2d")
_APPEND = struct.Struct("=10q18q5q")


class Library(NamedTuple):
    """Entry points of the built library; each takes one packed structure and returns 0 when it did its work."""

    attend: Callable[[bytes], int]
    append: Callable[[bytes], int]


def source() -> str:
    """The library's source: its parts in order."""
    files = [Path(__file__).with_name(f"{part}.cpp") for part in PARTS]
    return "\n".join(f'#line 1 "{file.name}"\n{file.read_text()}' for file in files)


def build(flags: tuple[str, ...] = FLAGS) -> Library:
    """The library, compiled if it is not in Inductor's cache; about 5 seconds then.

    Raises:
        Exception: whatever Inductor raises without a compiler, a header or a writable cache.
    """
    from torch._inductor.codecache import CppCodeCache  # a second of imports: only who decodes on a CPU pays it

    built = CppCodeCache.load(source(), "cpu", extra_flags=flags)
    for entry in (built.sphkv_attend, built.sphkv_append):
        entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_int64
    return Library(built.sphkv_attend, built.sphkv_append)


@lru_cache(None)
def library() -> Library | None:
    """The library, built once in a process; None, after one warning, where it cannot be built."""
    try:
        return build()
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem).strip()[:500]}"
        warnings.warn(
            "sphkv: the fused CPU decode kernel was not built, and the slower path serves; expected a C++ compiler "
            f"that Inductor finds (CXX) and a cache folder it can write (TORCHINDUCTOR_CACHE_DIR). {reason}",
            stacklevel=3,
        )
        return None


@lru_cache(None)
def _levels() -> Tensor:
    """Values of the codes of 2, 3 and 4 bits, repeated to 16 each, and of 8 bits. Shapes: -> float32[3 * 16 + 256]."""
    return torch.cat([levels(bits).repeat(2 ** (4 - bits)) for bits in (2, 3, 4)] + [levels(8)])


@lru_cache(None)
def _constants(layout: Layout, k_dim: int, v_dim: int, k_dtype: torch.dtype, v_dtype: torch.dtype):
    """What ``Attend`` holds from ``cache_k_type`` on, and the tensors whose addresses it names."""
    menu = torch.tensor([(tier.k_bits, tier.v_bits) for tier in layout.tiers], dtype=torch.int64)
    cpu = torch.device("cpu")
    tables = (menu, layout.rotation(k_dim, cpu), layout.rotation(v_dim, cpu), _levels())
    sizes = (layout.sink, layout.window, layout.span, layout.page)
    return (TYPES[k_dtype], TYPES[v_dtype], *sizes, *(t.data_ptr() for t in tables)), tables


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _mask(mask: Tensor | None) -> tuple[int, ...]:
    """Type, strides (0 where it broadcasts) and columns of a mask."""
    if mask is None:
        return _NONE, 0, 0, 0, 0, 0
    kind = _BOOL if mask.dtype == torch.bool else TYPES[mask.dtype]
    steps = (step if size > 1 else 0 for size, step in zip(mask.shape, mask.stride()))
    return kind, *steps, mask.shape[3]


def attend(
    library: Library,
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
    hidden: float = HIDDEN,
) -> Tensor | None:
    """As :func:`sphkv_compile.ops.reference.attend_reference`; None: the mask shows slots after the newest token.

    Args:
        hidden: an additive mask hides at and below this.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    (b, hq, t, d), h, dv = q.shape, k.shape[1], v.shape[3]
    constants, _keep = _constants(layout, d, dv, state.exact_k.dtype, state.exact_v.dtype)
    out = torch.empty(b, hq, t, dv, dtype=q.dtype)
    mask_type, *mask_shape = _mask(mask)
    coded = state.arena, state.table, state.tiers, state.positions, state.held, state.anchors, state.span_scales
    held = state.exact_k, state.exact_v, state.pair_scale, state.rows
    memory = *coded, *held, q, k, v, q if mask is None else mask, out
    types = TYPES[q.dtype], TYPES[k.dtype], TYPES[v.dtype], mask_type
    packed = _ATTEND.pack(
        *[x.data_ptr() for x in memory],
        *(b, h, hq // h, t, d, dv, state.table.shape[2], state.anchors.shape[2], state.held.shape[2], *types),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_shape),
        *(first, base, columns, is_causal, torch.get_num_threads()),
        *constants,
        1 / math.sqrt(d) if scale is None else scale,
        hidden,
    )
    return None if library.attend(packed) else out


def append(
    library: Library,
    state: State,
    layout: Layout,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    start: int | None,
    rolling: bool,
) -> bool:
    """Append tokens that only enter the sinks or the window; False, and nothing was written, where they do more."""
    k, v, seen = _rows(k), _rows(v), q is not None
    q = k if q is None else _rows(q)
    (b, h, t, d), dv = k.shape, v.shape[3]
    memory = state.exact_k, state.exact_v, state.moments, state.energy, state.pair_scale, state.rows
    packed = _APPEND.pack(
        *[x.data_ptr() for x in memory],
        *(q.data_ptr() if seen else 0, k.data_ptr(), v.data_ptr(), 0 if pos is None else pos.data_ptr()),
        *(b, h, q.shape[1] // h, t, d, dv, TYPES.get(q.dtype, 0), k.element_size(), v.element_size()),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(-1 if start is None else start, rolling, layout.sink, layout.window, layout.span),
    )
    return not library.append(packed)
