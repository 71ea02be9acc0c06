"""A slice of the buffer is overwritten: ``buf[:, :, start:end].copy_(new)``, or ``narrow(...).copy_``.

    s = slice(buf, 2, start, end);  c = copy(s, new);  w = slice_scatter(buf, c, 2, start, end);  copy_(buf, w)

The attention reads ``w`` or its first columns. Reading ``s`` is harmless: ``copy`` takes only its shape.
"""

from __future__ import annotations

from torch._inductor.pattern_matcher import KeywordArg, Match
from torch.fx import Node

from .site import Refusal, Site, aten, attention, base_site, call, check_attention, check_stored, shape, stores, tokens


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
    bufs = c["k_buf"], c["v_buf"]
    if refusal := check_attention(match) or check_stored(match, {buf: _only_shapes(buf) for buf in bufs}):
        return refusal
    if c["mask"] is None and not c["is_causal"] and c["columns"] is not c["end"] and c["columns"] != c["end"]:
        return Refusal(
            "unmasked_slots", f"{c['columns'] or shape(c['k_buf'])[2]} columns are read, {c['end']} are written"
        )
    start, end = (x.meta["val"] if isinstance(x, Node) else x for x in (c["start"], c["end"]))
    if start < 0 or end - start != tokens(match):
        return Refusal("value_shape", f"{end - start} slots for {tokens(match)} tokens")
    return None


def _only_shapes(buf: Node) -> tuple[Node, ...]:
    """Slices of the buffer of which only the shape is used: each user is a ``copy`` that overwrites them."""
    return tuple(
        s
        for s in buf.users
        if s.target is aten.slice.Tensor and all(u.target is aten.copy.default and u.args[0] is s for u in s.users)
    )


def site(match: Match) -> Site:
    """Shapes: as :class:`Site`."""
    return base_site("slice_copy", match, start=match.kwargs["start"], stores=stores(match))
