"""Guarded: the class of a user's cache tensor while codes hold its data, and what eager code makes of such tensors.

Metadata is free; any use of the data goes to the tensor's owner first (:mod:`sphkv_compile.runtime.ownership`), which
decodes it. What eager code derives from it (chosen rows, a longer or shorter tensor) is remembered, since the codes may
serve on.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from sphkv_compile.lowering import compat
from sphkv_compile.ops import schema

if TYPE_CHECKING:
    from sphkv_compile.runtime.ownership import Owner

_plain = torch._C.DisableTorchFunctionSubclass
_T = torch.Tensor
_METADATA = {
    *(getattr(_T, name).__get__ for name in
      ("shape", "device", "dtype", "layout", "ndim", "requires_grad", "is_cpu", "is_cuda", "is_sparse", "is_meta",
       "is_quantized", "is_nested", "is_mkldnn", "is_mps", "is_xpu", "grad", "grad_fn", "is_leaf", "_version",
       "itemsize", "nbytes")),
    _T.size, _T.dim, _T.stride, _T.numel, _T.element_size, _T.is_inference, _T.is_contiguous, _T.storage_offset,
    _T.is_floating_point, _T.is_complex, _T.get_device, _T.ndimension, _T.nelement, _T.__len__,
    _T._is_view,  # Dynamo of torch 2.11 asks, at each compile
    _T.is_conj, _T.is_neg, _T.is_signed,
}  # fmt: skip


_GROWS_OR_CROPS = {torch.cat, _T.__getitem__, _T.narrow}
_CHOOSES_ROWS = {torch.index_select, _T.index_select, torch.repeat_interleave, _T.repeat_interleave, _T.__getitem__}
HEIRS = WeakTensorKeyDictionary()
"""What eager code made of a cache's tensor, to the owner of that tensor, whose codes may serve on, and the rows that
were chosen, or None for all as they were."""


def _inherits(func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Remember whose codes ``out`` may go on with, if its content is that of a cache's tensor in other rows, or of a
    growing cache's tensor that is longer or shorter now. An import compares, so a wrong guess costs time only."""
    cache = next((leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Guarded)), None)
    owner = owner_of(cache)
    if cache is None or owner is None or not isinstance(out, Tensor) or out.dim() != 4:
        return
    if func in _CHOOSES_ROWS and out.shape[1:] == cache.shape[1:] and args and args[0] is cache:
        numbers = torch.arange(cache.shape[0], device=cache.device).view(-1, 1, 1, 1)
        with contextlib.suppress(IndexError, RuntimeError):  # rows were not what it chose from
            rows = func(numbers, *args[1:], **kwargs)
            if rows.shape == (out.shape[0], 1, 1, 1) and _may_choose(owner, len(rows)):
                HEIRS[out] = owner, rows.flatten()
    elif func in _GROWS_OR_CROPS and owner.handles:
        HEIRS[out] = owner, None


def _may_choose(owner: Owner, rows: int) -> bool:
    """A budget is for a number of rows; caches of another one begin anew with theirs."""
    return rows == owner.geometry.batch or owner.pool.retention is None


class Guarded(torch.Tensor):
    """A user's cache tensor that has an owner. Metadata is free; any use of the data decodes it first."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            if func not in _METADATA:
                with _plain():
                    args = [schema.owned(a) if isinstance(a, Guarded) else a for a in args]
                    return func(*args, **kwargs)
        elif not compat.compiling() and func not in _METADATA:
            leaves = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Guarded)]
            for leaf in leaves:
                restore(leaf, getattr(func, "__name__", str(func)))
            with _plain():
                out = func(*args, **kwargs)
                _inherits(func, args, kwargs, out)
            return out
        with _plain():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        restore(self, "deepcopy")
        owner = self.__dict__.get("_sphkv")
        with _plain():
            twin = self.detach().clone()
        memo[id(self)] = twin
        if owner is not None and (self is owner.k_ref() or self is owner.v_ref()):
            other = copy.deepcopy(owner, memo)
            twin.__dict__["_sphkv"], twin.__class__ = other, Guarded
            if self is owner.k_ref():
                other.k_ref = weakref.ref(twin)
            else:
                other.v_ref = weakref.ref(twin)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        restore(self, "pickle")
        with _plain():
            return self.detach().clone().as_subclass(torch.Tensor).__reduce_ex__(protocol)


def owner_of(t: Any) -> Owner | None:
    """The owner of a user's tensor, if it has one."""
    return t.__dict__.get("_sphkv") if type(t) is Guarded else None


def restore(t: Tensor, why: str) -> None:
    """Make ``t`` dense and true, if codes hold its data."""
    owner = t.__dict__.get("_sphkv")
    if owner is not None:
        owner.materialize(t, why)


def exclusive(k: Tensor, v: Tensor) -> bool:
    """Whether ``k`` and ``v`` are plain tensors whose storages belong to them alone, so that these may be released."""
    with _plain():
        storages = k.untyped_storage(), v.untyped_storage()
        if storages[0].data_ptr() == storages[1].data_ptr() and storages[0].nbytes():
            return False
        for t, storage in zip((k, v), storages):
            if type(t) not in (Tensor, Guarded) or t._base is not None or not t.is_contiguous():
                return False
            if t.storage_offset() or storage.nbytes() != t.numel() * t.element_size():
                return False
            # A storage that numpy or a file shares cannot be resized, and is not counted.
            if not storage.resizable() or torch._C._storage_Use_Count(storage._cdata) > _OWN_USES:
                return False
    return True


def _own_uses() -> int:
    t = torch.empty(1)
    storage = t.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


_OWN_USES = _own_uses()
