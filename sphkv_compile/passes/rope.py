"""RoPE: which dimensions of a key are rotated together, read off the graph that computes the key.

A scale that is equal within a RoPE pair commutes with the rotation, so it holds at every position; that is why the
codec needs the pairing. Where no rotary embedding is recognised the scales stay off, and the report says so.

Source: RoFormer (arXiv 2104.09864, section 3.2.2); the half layout is that of GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

aten = torch.ops.aten
NONE = ("none", 0)
_STEPS = (
    aten.permute.default,
    aten.clone.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    torch.ops.prims.convert_element_type.default,
)


def _is(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _dim(node: Node) -> int:
    return node.meta["val"].shape[-1]


def rope_of(key: Node) -> tuple[str, int]:
    """Layout (``half``, ``interleaved`` or ``none``) and number of rotated dimensions of a key.

    Shapes: ``key`` [B, H, T, D] after the rotary embedding.
    """
    dim, node = _dim(key), _through(key)
    if layout := _rotation(node, dim):
        return layout, dim
    if _is(node, aten.cat.default) and node.args[1] in (-1, node.meta["val"].dim() - 1) and len(node.args[0]) == 2:
        turned, passed = node.args[0]  # partial: the rotated part, then what passes through
        rotary = _dim(turned)
        if layout := _rotation(_through(turned), rotary):
            return layout, rotary
    return NONE


def _through(node: Node) -> Node:
    """Past everything that moves numbers without mixing them: the last dimension may be split and joined again."""
    while _is(node, *_STEPS):
        node = node.args[0]
    return node


def _rotation(node: Node, dim: int) -> str | None:
    return _sum_form(node, dim) or _pair_form(node)


def _sum_form(node: Node, dim: int) -> str | None:
    """x * cos + turn(x) * sin, where turn(x) = (-x2, x1)."""
    if not _is(node, aten.add.Tensor):
        return None
    for straight, crossed in (node.args[:2], node.args[1::-1]):
        if not (_is(straight, aten.mul.Tensor) and _is(crossed, aten.mul.Tensor)):
            continue
        for turned in crossed.args:
            if (layout := _turn(turned, dim)) and _source_of_turn(turned) in set(_origins(straight)):
                return layout
    return None


def _turn(node: object, dim: int) -> str | None:
    """(-x2, x1): in halves, or by neighbours."""
    pair = _pair(node)
    if pair is None:
        return None
    first, second = pair
    if not _is(_through(first), aten.neg.default):
        return None
    low, high = _slice(_through(second)), _slice(_through(_through(first).args[0]))
    if low == (0, dim // 2, 1) and high == (dim // 2, dim, 1):
        return "half"
    if low == (0, dim, 2) and high == (1, dim, 2):
        return "interleaved"
    return None


def _source_of_turn(node: Node) -> Node:
    return _through(_through(_pair(node)[1]).args[0])


def _origins(mul: Node) -> Iterator[Node]:
    return (_through(a) for a in mul.args if isinstance(a, Node))


def _pair(node: object) -> tuple[Node, Node] | None:
    """The two tensors that are joined, side by side or interleaved, into ``node``."""
    node = _through(node) if isinstance(node, Node) else node
    if _is(node, aten.cat.default) and len(node.args[0]) == 2:
        return tuple(node.args[0])
    return None


def _slice(node: Node) -> tuple[int, int, int] | None:
    """Start, end and step of a slice of the last dimension."""
    if not _is(node, aten.slice.Tensor) or node.args[1] not in (-1, node.meta["val"].dim() - 1):
        return None
    start, end, step = (*node.args[2:], None, None, 1)[:3] if len(node.args) < 5 else node.args[2:5]
    return start, min(end, _dim(node.args[0])), step or 1


def _pair_form(node: Node) -> str | None:
    """(a cos - b sin, b cos + a sin), joined side by side (half) or as neighbours (interleaved)."""
    if not _is(node, aten.cat.default) or len(node.args[0]) != 2:
        return None
    real, imaginary = (_through(part) for part in node.args[0])
    if not (_is(real, aten.sub.Tensor) and _is(imaginary, aten.add.Tensor)):
        return None
    a, b = (_factor(real.args[i], imaginary.args) for i in (0, 1))
    if a is None or b is None or a is b:
        return None
    axis = node.args[1] if len(node.args) > 1 else 0
    rank, parts = node.meta["val"].dim(), {_dim(part) for part in node.args[0]}
    if axis in (-1, rank - 1):
        return "interleaved" if parts == {1} else "half"
    return "half" if axis in (-2, rank - 2) and node.meta["val"].shape[axis] == 2 else None


def _factor(product: object, others: tuple) -> Node | None:
    """The tensor of ``product`` that is a factor of one of ``others`` too: a part of the key, not cos or sin."""
    if not _is(product, aten.mul.Tensor):
        return None
    shared = [x for x in product.args if any(_is(o, aten.mul.Tensor) and x in o.args for o in others)]
    larger = [x for x in shared if isinstance(x, Node) and x.meta["val"].dim() >= product.meta["val"].dim()]
    return larger[0] if larger else None
