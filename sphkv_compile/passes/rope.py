"""RoPE: which dimensions of a key are rotated together, read off the graph that computes the key.

A scale that is equal within a RoPE pair commutes with the rotation, so it holds at every position; that is why the
codec needs the pairing. Where no rotary embedding is recognised the scales stay off, and the report says so.

Two spellings are known: x cos + turn(x) sin with turn(x) = (-x2, x1), and (x1 cos - x2 sin, x2 cos + x1 sin). In both,
x1 and x2 are either the halves of x or its even and odd elements, and the result is joined the way x was parted.

Source: RoFormer (arXiv 2104.09864, section 3.2.2); the half layout is that of GPT-NeoX.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch.fx import Node

aten = torch.ops.aten
NONE = ("none", 0)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_COPIES = (aten.unsqueeze.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.index.Tensor)
_CASTS = (aten.clone.default, torch.ops.prims.convert_element_type.default)


class Part(NamedTuple):
    """Every second element, or one half, of the last dimension of ``source``."""

    source: Node
    layout: str
    which: int


class Rotation(NamedTuple):
    """A rotary embedding that was recognised: how dimensions are paired, and the factor of the straight part."""

    layout: str
    cosine: Any


def rope_of(key: Node) -> tuple[str, int]:
    """Layout (``half``, ``interleaved`` or ``none``) and number of rotated dimensions of a key.

    Shapes: ``key`` [B, H, T, D] after the rotary embedding.
    """
    part, rotation = _rotated_part(key)
    return (rotation.layout, int(_shape(part)[-1])) if rotation else NONE


def angles_of(key: Node) -> Node | None:
    """What the cosines of a key's rotary embedding are taken of, if the graph computes them: an angle for each token
    and pair, or for each dimension of a pair.

    Shapes: -> [B or 1, T, R] or [B or 1, T, R / 2], R the rotated dimensions.
    """
    part, rotation = _rotated_part(key)
    at: Any = rotation and rotation.cosine
    while _is(at, *_CASTS, *_VIEWS, *_COPIES) or _scaled(at):
        at = at.args[0]
    if not _is(at, aten.cos.default):
        return None
    angles, rotary = at.args[0], _shape(part)[-1]
    return angles if len(_shape(angles)) == 3 and _shape(angles)[-1] in (rotary, rotary // 2) else None


def _rotated_part(key: Node) -> tuple[Node, Rotation | None]:
    """The part of a key that rotates, which may be all of it, and how."""
    node = _through(key)
    if rotation := _rotated(node):
        return key, rotation
    if _is(node, aten.cat.default) and _axis(node) == -1:  # partial: the rotated part, then what passes through
        turned = node.args[0][0]
        return turned, _rotated(_through(turned))
    return key, None


def _scaled(node: object) -> bool:
    """Whether ``node`` is something times a number, as YaRN scales cosines."""
    return _is(node, aten.mul.Tensor) and not isinstance(node.args[1], Node)


def _is(node: object, *targets: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _axis(node: Node) -> int:
    """The dimension argument of a cat, slice, select or unbind, counted from the end of its operand's dimensions."""
    operand = node.args[0] if isinstance(node.args[0], Node) else node.args[0][0]
    axis = node.args[1] if len(node.args) > 1 else 0
    return axis if axis < 0 else axis - len(_shape(operand))


def _through(node: Node) -> Node:
    """Past everything that leaves the last dimension as it is."""
    at: Any = node
    while _keeps_last(at):
        at = at.args[0]
    return at


def _keeps_last(node: Node) -> bool:
    if _is(node, *_CASTS):
        return True
    if _is(node, aten.permute.default):
        return node.args[1][-1] in (-1, len(node.args[1]) - 1)
    if _is(node, aten.unsqueeze.default):
        return node.args[1] not in (-1, len(_shape(node)) - 1)
    return _is(node, *_VIEWS, aten.squeeze.dim) and _shape(node)[-1] == _shape(node.args[0])[-1]


def _rotated(node: Node) -> Rotation | None:
    """The rotary embedding whose result ``node`` is."""
    return _sum_form(node) or _pair_form(node)


def _sum_form(node: Node) -> Rotation | None:
    """x cos + turn(x) sin."""
    for straight, crossed in _ordered(node, aten.add.Tensor):
        for x, cos in _ordered(straight, aten.mul.Tensor):
            for turn, _ in _ordered(crossed, aten.mul.Tensor):
                if layout := _turn(turn, x):
                    return Rotation(layout, cos)
    return None


def _turn(turn: object, x: object) -> str | None:
    """turn = (-x2, x1)."""
    if (joined := _joined(turn)) is None or not isinstance(x, Node):
        return None
    layout, first, second = joined
    first = _through(first)
    found = _is(first, aten.neg.default) and (_part(first.args[0]), _part(second))
    return layout if found == (Part(_through(x), layout, 1), Part(_through(x), layout, 0)) else None


def _pair_form(node: Node) -> Rotation | None:
    """(x1 cos - x2 sin, x2 cos + x1 sin)."""
    if (joined := _joined(node)) is None:
        return None
    layout, first, second = joined
    for left, right in _ordered(_through(first), aten.sub.Tensor)[:1]:  # a difference has one order
        for one, cos in _parts(left):
            two = one._replace(which=1)
            sines = [sin for part, sin in _parts(right) if part == two]
            for third, fourth in _ordered(_through(second), aten.add.Tensor):
                crossed = (two, cos) in _parts(third) and any((one, sin) in _parts(fourth) for sin in sines)
                if one.which == 0 and one.layout == layout and crossed:
                    return Rotation(layout, cos)
    return None


def _ordered(node: object, target: object) -> list[tuple[Node, Node]]:
    """The operands of a two-operand node, both ways round."""
    if not _is(node, target) or node.kwargs:
        return []
    a, b = cast(tuple[Node, Node], node.args)
    return [(a, b), (b, a)]


def _parts(product: object) -> list[tuple[Part, object]]:
    """Those factors of a product that are parts of something, each with the other factor."""
    factors = _ordered(product, aten.mul.Tensor)
    return [(part, other) for x, other in factors if isinstance(x, Node) and (part := _part(x))]


def _joined(node: object) -> tuple[str, Node, Node] | None:
    """The two tensors that make up the last dimension: side by side, or in turn."""
    node = _through(node) if isinstance(node, Node) else node
    if _is(node, aten.cat.default):
        return ("half", *cast(list, node.args[0])) if _axis(node) == -1 and _two(node) else None
    if not _is(node, *_VIEWS):
        return None
    stacked: Any = node.args[0]
    while _is(stacked, *_CASTS):
        stacked = stacked.args[0]
    if not (_is(stacked, aten.cat.default) and _two(stacked) and _axis(stacked) in (-1, -2)):
        return None
    axis, last = _axis(stacked), _shape(stacked)[-2:]
    if last[axis] != 2 or _shape(node)[-1] != last[0] * last[1]:
        return None
    first, second = (x.args[0] if _is(x, aten.unsqueeze.default) else x for x in stacked.args[0])
    return "interleaved" if axis == -1 else "half", first, second


def _two(cat: Node) -> bool:
    parts = cat.args[0]
    return len(parts) == 2 and _shape(parts[0]) == _shape(parts[1])


def _part(node: object) -> Part | None:
    """What ``node`` is a part of: by slicing, splitting, or selecting after a view that parts the last dimension."""
    node = _through(node) if isinstance(node, Node) else node
    if _is(node, aten.slice.Tensor) and _axis(node) == -1:
        return _sliced(node)
    if _is(node, aten.select.int):
        return _selected(node, node.args[2])
    if not _is(node, operator.getitem):
        return None
    parted, which = node.args
    if _is(parted, aten.unbind.int):
        return _selected(parted, which)
    whole = parted.args[0]
    if _is(parted, aten.split.Tensor, aten.split_with_sizes.default) and len(parted.args) > 2:
        last = parted.args[2] in (-1, len(_shape(whole)) - 1)
        return Part(_through(whole), "half", which) if last and 2 * _shape(node)[-1] == _shape(whole)[-1] else None
    return None


def _selected(node: Node, which: int) -> Part | None:
    """One of two along a dimension into which a view has parted the last one."""
    view = node.args[0]
    axis = _axis(node)
    if not _is(view, *_VIEWS) or axis not in (-1, -2):
        return None
    whole, last = view.args[0], _shape(view)[-2:]
    if last[axis] != 2 or last[0] * last[1] != _shape(whole)[-1]:
        return None
    return Part(_through(whole), "interleaved" if axis == -1 else "half", which)


def _sliced(node: Node) -> Part | None:
    args: Any = node.args
    whole, dim = args[0], _shape(args[0])[-1]
    start, end, step = list(args[2:]) + [0, dim, 1][len(args) - 2 :]
    found = (start or 0, min(end or dim, dim), step)
    known = {
        (0, dim // 2, 1): ("half", 0),
        (dim // 2, dim, 1): ("half", 1),
        (0, dim, 2): ("interleaved", 0),
        (1, dim, 2): ("interleaved", 1),
    }
    return Part(_through(whole), *known[found]) if found in known else None
