"""transformers' StaticLayer and gpt-fast: ``buf[:, :, pos] = new``, then attention over the buffer.

    w = index_put(buf, [None, None, pos], new);  copy_(buf, w);  sdpa(q, w_k, w_v, mask)

A sliding layer that still fills its window writes the same way.
"""

from __future__ import annotations

from torch._inductor.pattern_matcher import KeywordArg, Match

from .site import Refusal, Site, aten, attention, base_site, call, check_attention, check_stored, shape, stores


def write(buf: str, new: str):
    """The repeated ``pos`` makes K and V agree on where they write."""
    return call(aten.index_put.default, KeywordArg(buf), [None, None, KeywordArg("pos")], KeywordArg(new))


PATTERN = attention(write("k_buf", "k"), write("v_buf", "v"))


def check(match: Match) -> Refusal | None:
    """What the shape alone does not say: None, or the reason to leave the site dense."""
    if refusal := check_attention(match) or check_stored(match):
        return refusal
    c = match.kwargs
    if c["mask"] is None and not c["is_causal"] and c["columns"] is None:
        return Refusal("unmasked_slots", f"all {shape(c['k_buf'])[2]} columns are read")
    return None


def site(match: Match) -> Site:
    """Shapes: as :class:`Site`."""
    return base_site("static_index", match, pos=match.kwargs["pos"], stores=stores(match))
