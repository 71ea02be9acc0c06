"""The six operators that appear in graphs, their fake kernels, and the dispatch from arguments to code.

* ``sphkv::sdpa``    a scaled-dot-product attention as it stood in the model, every argument positional
* ``sphkv::attend``  attention over the coded cache and the new tokens; reads the state
* ``sphkv::append``  the new tokens enter the state; follows its attend
* ``sphkv::stored``  new keys of a cache that says itself how it is stored; only our backend removes it
* ``sphkv::opens``   the first tokens of a cache: they pass, and it takes them in
* ``sphkv::owned``   a use of a cache tensor whose data is held as codes; only our backend removes it
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.ops import decode
from sphkv_compile.ops.append import append as append_state
from sphkv_compile.ops.append import first_position, real_starts
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, STATE_FIELDS, State

_LIB = torch.library.Library("sphkv", "DEF")
_STATE = ", ".join(f"Tensor {name}" for name in STATE_FIELDS)
_MUTATED = ", ".join(f"Tensor({chr(97 + i)}!) {name}" for i, name in enumerate(STATE_FIELDS))

_LIB.define(
    "sdpa(Tensor q, Tensor k, Tensor v, Tensor? mask, float dropout_p, bool is_causal, float? scale, bool enable_gqa,"
    " SymInt? columns=None) -> Tensor"
)
_LIB.define(
    f"attend({_STATE}, Tensor q, Tensor k, Tensor v, Tensor? pos, SymInt? start, SymInt columns, Tensor? mask,"
    " bool is_causal, float? scale, str layout, bool rolling) -> Tensor"
)
_LIB.define(
    f"append({_MUTATED}, Tensor q, Tensor k, Tensor v, Tensor? pos, SymInt? start, Tensor? mask, str layout,"
    " bool rolling) -> ()"
)
_LIB.define("stored(Tensor k, str layout) -> Tensor")
_LIB.define("opens(Tensor k, Tensor v, Tensor ticket) -> Tensor", tags=torch.Tag.cudagraph_unsafe)
_LIB.define("owned(Tensor x) -> Tensor")

sdpa = torch.ops.sphkv.sdpa.default
attend = torch.ops.sphkv.attend.default
append = torch.ops.sphkv.append.default
stored = torch.ops.sphkv.stored.default
opens = torch.ops.sphkv.opens.default
owned = torch.ops.sphkv.owned.default

TICKETS: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Layers that hold no token, by the number in the tensor that a graph knows them by: what is opened is allocated while
the graph runs, for the sizes that arrive."""

_N = len(STATE_FIELDS)


def _sdpa(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, columns=None):
    k, v = k[:, :, :columns], v[:, :, :columns]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.contiguous()


def _place(state: State, pos, start, count: int, columns: int | None, rolling: bool) -> tuple[int, int]:
    """Position of the first new token, and of column 0 once it is written.

    Raises:
        IndexError: a write past the last column; RuntimeError: a rolling window whose newest column is not where the
        dense buffer has it.
    """
    first, base = first_position(state, pos, start, count)
    if rolling:
        if columns is not None and first - base != columns:
            raise RuntimeError(
                f"sphkv: a full sliding window of {columns} columns was written after {first - base} tokens; expected "
                f"{columns}. Fill the window in order first, or begin anew (cache.reset())."
            )
        return first, base + 1
    if columns is not None and first - base + count > columns:
        raise IndexError(
            f"sphkv: a write at {first - base}..{first - base + count - 1} into a cache of {columns} columns; expected "
            f"{max(0, columns - count)} or less for the first of {count} tokens. Give the cache more room "
            "(max_cache_len), or begin anew (cache.reset())."
        )
    return first, base


def _attend(*args):
    state = State(*args[:_N])
    q, k, v, pos, start, columns, mask, is_causal, scale, layout, rolling = args[_N:]
    form = Layout.parse(layout)
    if mask is not None and mask.shape[3] == 1 < columns:
        mask = mask.expand(-1, -1, -1, columns)
    if (fused := decode.on_device(form, q, k, v, mask, is_causal)) is not None:
        return fused.attend(state, form, q, k, v, pos, start, columns, mask, scale, rolling)
    first, base = _place(state, pos, start, k.shape[2], columns, rolling)
    return decode.attend(state, form, q, k, v, first, base, columns, mask, is_causal, scale)


def _append(*args):
    state = State(*args[:_N])
    q, k, v, pos, start, mask, layout, rolling = args[_N:]
    form = Layout.parse(layout)
    if decode.append_in_window(state, form, q, k, v, pos, start, rolling):
        return
    if (fused := decode.on_device(form, q, k, v, mask)) is not None:
        return fused.append(state, form, q, k, v, pos, start, mask, rolling)
    first, base = _place(state, pos, start, k.shape[2], None, rolling)
    starts = real_starts(mask, first, base, k.shape[2], k.shape[0])
    append_state(state, form, q, k, v, first, starts)
    state.rows[:, BASE] = base


def _stored(k: Tensor, layout: str) -> Tensor:
    return k.clone()


def _opens(k: Tensor, v: Tensor, ticket: Tensor) -> Tensor:
    TICKETS[int(ticket)].open(k, v)
    return k.clone()


def _owned(x: Tensor) -> Tensor:
    raise RuntimeError(
        "sphkv: this KV cache is held as codes by sphkv_compile, and a graph of another backend reads it. Compile that "
        "model with backend='sphkv' too, or give it dense copies: layer.keys = layer.keys.clone(), and values likewise."
    )


def _there(kernel):
    """Runs on the device that holds the tensors: Triton launches on the current one."""

    def run(*args):
        with torch.cuda.device_of(args[0]):
            return kernel(*args)

    return run


for _name, _kernel in (
    ("sdpa", _sdpa), ("attend", _attend), ("append", _append), ("stored", _stored), ("opens", _opens), ("owned", _owned)
):  # fmt: skip
    _LIB.impl(_name, _kernel, "CPU")
    _LIB.impl(_name, _there(_kernel), "CUDA")


_LIB.impl("owned", _owned, "Functionalize")  # AOTAutograd of another backend; it would fail later, and say less


@torch.library.register_fake("sphkv::sdpa", lib=_LIB)
def _(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, columns=None):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.register_fake("sphkv::attend", lib=_LIB)
def _(*args):
    q, v = args[_N], args[_N + 2]
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.register_fake("sphkv::append", lib=_LIB)
def _(*args):
    return None


@torch.library.register_fake("sphkv::stored", lib=_LIB)
def _(k, layout):
    return torch.empty_like(k)


@torch.library.register_fake("sphkv::opens", lib=_LIB)
def _(k, v, ticket):
    return torch.empty_like(k)


@torch.library.register_fake("sphkv::owned", lib=_LIB)
def _(x):
    return torch.empty_like(x)
