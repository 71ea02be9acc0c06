"""A slice of the buffer is overwritten: ``buf[:, :, start:end].copy_(new)``, or ``narrow(...).copy_``.

    s = slice(buf, 2, start, end);  c = copy(s, new);  w = slice_scatter(buf, c, 2, start, end);  copy_(buf, w)

The attention reads ``w`` or its first columns. Reading ``s`` is harmless: ``copy`` takes only its shape.
"""

from __future__ import annotations

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
    check_shown,
    check_stored,
    size,
    stores,
    tokens,
    writes,
)


def write(buf: str, new: str):
    """The repeated ``start`` and ``end`` make K and V agree on where they write."""
    start, end = KeywordArg("start"), KeywordArg("end")
    old = call(aten.slice.Tensor, KeywordArg(buf), 2, start, end)
    return call(
        aten.slice_scatter.default, KeywordArg(buf), call(aten.copy.default, old, KeywordArg(new)), 2, start, end
    )


PATTERN = attention(write("k_buf", "k"), write("v_buf", "v"))


def check(match: Match) -> Refusal | None:
    """What the shape alone does not say: None, or the reason to leave the site dense."""
    c = match.kwargs
    allowed = {buf: _only_shapes(buf, writes(match)) for buf in (c["k_buf"], c["v_buf"])}
    if refusal := check_attention(match) or check_stored(match, allowed):
        return refusal
    start, end = size(c["start"]), size(c["end"])
    if start < 0 or end - start != tokens(match):
        return Refusal("value_shape", f"slots {start}..{end} for {tokens(match)} tokens")
    return check_shown(match, end)


def _only_shapes(buf: Node, writes: tuple[Node, Node]) -> tuple[Node, ...]:
    """Slices of the buffer of which only the shape is used: each user is a ``copy`` over them, for a write."""

    def overwritten(s: Node, user: Node) -> bool:
        return user.target is aten.copy.default and user.args[0] is s and set(user.users) <= set(writes)

    return tuple(s for s in buf.users if s.target is aten.slice.Tensor and all(overwritten(s, u) for u in s.users))


def site(match: Match) -> Site:
    """Shapes: as :class:`Site`."""
    return base_site("slice_copy", match, start=match.kwargs["start"], stores=stores(match))
