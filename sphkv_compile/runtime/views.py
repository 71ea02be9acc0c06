"""Views: what stands for all keys or values of a cache of codes between a layer's update and its attention.

A scaled-dot-product attention over two of them runs straight from the codes; anything else works on decoded values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphkv_compile.ops import schema
from sphkv_compile.ops.append import append

if TYPE_CHECKING:
    from sphkv_compile.runtime.direct import CodedLayer

GRADIENT = "sphkv: autograd is on, and codes are for inference; expected torch.no_grad() or torch.inference_mode()"
_plain = torch._C.DisableTorchFunctionSubclass


class NewTokens:
    """Tokens between a layer's update and its attention: exact there, and taken in right after.

    Shapes: ``k`` [B, H, T, D], ``v`` [B, H, T, Dv], from position ``first`` on.
    """

    def __init__(self, layer: CodedLayer, k: Tensor, v: Tensor, first: int):
        self.layer, self.k, self.v, self.first = layer, k, v, first
        self.columns = first + k.shape[2]

    def views(self) -> tuple[Tensor, Tensor]:
        """Shapes: -> [B, H, columns, D], [B, H, columns, Dv]."""
        return tuple(  # type: ignore[return-value]
            View.of(self, side, (*x.shape[:2], self.columns, x.shape[3])) for side, x in (("k", self.k), ("v", self.v))
        )

    def attend(self, q: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor | None:
        """Attention from the codes; None where it is none that they serve.

        Shapes: ``q`` [B, HQ, T, D], or [B, H, HQ / H, D] of one token; ``mask`` as torch broadcasts it -> as ``q``, of
        Dv.
        """
        h, tokens = self.k.shape[1:3]
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        packed = tokens == 1 and q.shape[1] == h and q.shape[2] > 1 and not is_causal
        shape = q.shape
        if packed:  # a query head for each token
            q = q.reshape(q.shape[0], -1, 1, q.shape[3])
            if mask is not None and max(mask.shape[1:3]) > 1:
                mask = mask.expand(-1, *shape[1:3], -1).reshape(mask.shape[0], -1, 1, mask.shape[3])
        if q.dim() != 4 or q.shape[2] != tokens or q.shape[1] % h:
            return None
        out = self._attend(q, mask, is_causal, scale)
        self.enter(q, mask)
        return out.reshape(*shape[:3], out.shape[3])

    def _attend(self, q: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
        owner = self.layer.owner
        if owner.scale is None:
            owner.scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        with _plain():
            return schema.attend(
                *owner.state, q, self.k, self.v, None, self.first, self.columns, mask, is_causal, scale,
                str(owner.layout), False,
            )  # fmt: skip

    def enter(self, q: Tensor | None, mask: Tensor | None) -> None:
        """Into the window, once; what leaves it is encoded."""
        layer = self.layer
        if layer.new is not self:
            return
        layer.new = None
        owner = layer.owner
        with _plain(), torch.no_grad():
            if q is None:
                append(owner.state, owner.layout, None, self.k, self.v, self.first, [self.first] * self.k.shape[0])
            else:
                schema.append(*owner.state, q, self.k, self.v, None, self.first, mask, str(owner.layout), False)
        layer.length.fill_(self.columns)
        layer.cache.end()

    def decoded(self, side: str) -> Tensor:
        """All keys or values, the new ones exact. Shapes: -> [B, H, columns, D or Dv]."""
        self.enter(None, None)
        k, v = self.layer.decoded(self.columns)
        out, new = (k, self.k) if side == "k" else (v, self.v)
        out[:, :, self.first :] = new
        return out


class View(Tensor):
    """All keys or values of a layer, as a model's attention is given them: a shape, and where the codes are.

    What transformers' dispatch does to keys and values before attention, to repeat heads, gives a view again; any other
    use decodes.
    """

    tokens: NewTokens
    side: str

    @staticmethod
    @torch.inference_mode(False)
    def of(new: NewTokens, side: str, shape: tuple[int, ...]) -> View:
        """A view of such a shape."""
        x = new.k if side == "k" else new.v
        nothing = torch.full((), math.nan, dtype=x.dtype, device=x.device)  # to code that looks past the subclass
        view = nothing.expand(shape).as_subclass(View)
        view.tokens, view.side = new, side
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            out = _attention(*args, **kwargs)
            if out is not None:
                return out
        elif args and isinstance(args[0], View) and (out := _viewed(func, *args, **kwargs)) is not None:
            return out
        args, kwargs = (torch.utils._pytree.tree_map_only(View, _decoded, x) for x in (args, kwargs))
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if not isinstance(key, View) or not isinstance(value, View) or key.tokens is not value.tokens or dropout_p:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key.tokens.k, value.tokens.v)):
        raise RuntimeError(GRADIENT)
    return key.tokens.attend(query, attn_mask, is_causal, scale) if (key.side, value.side) == ("k", "v") else None


_ALL = slice(None)
_SAME = {Tensor.contiguous, Tensor.detach}
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "layout", "ndim", "requires_grad")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__,
}  # fmt: skip


def _viewed(func: Any, x: View, *args: Any, **kwargs: Any) -> Any:
    """What ``func`` makes of a view without its data; None if it needs them."""
    with _plain():
        if func in _METADATA:
            return func(x, *args, **kwargs)
        shape = x.shape
    if func in _SAME and not args and not kwargs:
        return x
    if func is Tensor.__getitem__ and len(shape) == 4 and args[0] == (_ALL, _ALL, None, _ALL, _ALL):
        return View.of(x.tokens, x.side, (*shape[:2], 1, *shape[2:]))
    heads = x.tokens.k.shape[1]
    if func is Tensor.expand and len(shape) == 5 and tuple(args[:2]) == shape[:2] and tuple(args[3:]) == shape[3:]:
        return View.of(x.tokens, x.side, args)
    if func is Tensor.reshape and len(shape) == 5 and args == (shape[0], heads * shape[2], *shape[3:]):
        return View.of(x.tokens, x.side, args)
    return None


def _decoded(x: View) -> Tensor:
    """What a view stands for."""
    with _plain():
        shape = x.shape
    out = x.tokens.decoded(x.side)
    if len(shape) == 5:
        return out.unsqueeze(2).expand(shape)
    group = shape[1] // out.shape[1]
    return out if group == 1 else out.repeat_interleave(group, 1)
