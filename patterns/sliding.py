"""transformers' StaticSlidingWindowLayer once its window is full: shift by one, write the last column.

    r = index(buf, [None, None, fmod(iota(W) + 1, W)]);  w = index_put(r, [None, None, [-1]], new);  copy_(buf, w)

While the window fills, the layer writes as :mod:`.static_index` does.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch._inductor.pattern_matcher import KeywordArg, Match
from torch.fx import Node

from .site import (
    Refusal,
    Site,
    aten,
    attention,
    base_site,
    call,
    check_attention,
    check_stored,
    same,
    shape,
    size,
    stores,
)


def write(buf: str, new: str):
    """The roll and the write of the newest column, as Inductor's decompositions spell them."""
    shifted = call(aten.index.Tensor, KeywordArg(buf), [None, None, KeywordArg(f"{buf}_order")])
    return call(aten.index_put.default, shifted, [None, None, KeywordArg("column")], KeywordArg(new))


PATTERN = attention(write("k_buf", "k"), write("v_buf", "v"))


def _is(node: object, target: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.target is target


def _rolls_by_one(order: Node, columns: int) -> bool:
    """``order`` is (0, 1, .., W-1) + 1 modulo W."""
    if not (_is(order, aten.fmod.Scalar) or _is(order, aten.remainder.Scalar)):
        return False
    plus, modulus = order.args
    if not same(size(modulus), columns) or not _is(plus, aten.add.Tensor):
        return False
    if not same(size(plus.args[1]), 1):  # roll writes (W + 1) % W where W is a symbol
        return False
    iota = plus.args[0]
    return (
        _is(iota, torch.ops.prims.iota.default)
        and same(size(iota.args[0]), columns)
        and iota.kwargs["start"] == 0
        and iota.kwargs["step"] == 1
    )


def check(match: Match) -> Refusal | None:
    """What the shape alone does not say: None, or the reason to leave the site dense."""
    c, node = match.kwargs, match.output_node()
    shifted = {buf: (write.args[0],) for buf, write in zip((c["k_buf"], c["v_buf"]), node.args[1:3])}
    if refusal := check_attention(match) or check_stored(match, shifted):
        return refusal
    for name in ("k_buf", "v_buf"):
        columns = int(shape(c[name])[2])  # a symbolic size is fixed by a guard
        if not _rolls_by_one(c[f"{name}_order"], columns):
            return Refusal("unknown_write", f"{c[name].name} is permuted, but not rolled by one")
        if len(shifted[c[name]][0].users) != 1:
            return Refusal("other_readers", f"{shifted[c[name]][0].name}")
    last = c["column"]
    if not _is(last, aten.full.default) or list(last.args[0]) != [1] or last.args[1] not in (-1, columns - 1):
        return Refusal("unknown_write", "a full window is written elsewhere than in its last column")
    if c["columns"] is not None:
        return Refusal("partial_read", f"{c['columns']} columns of a sliding window are read")
    return None


def site(match: Match) -> Site:
    """Shapes: as :class:`Site`."""
    return base_site("sliding", match, rolling=True, stores=stores(match))
