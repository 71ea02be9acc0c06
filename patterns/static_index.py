"""transformers' StaticLayer and gpt-fast: ``buf[:, :, pos] = new``, then attention over the buffer.

    w = index_put(buf, [None, None, pos], new);  copy_(buf, w);  sdpa(q, w_k, w_v, mask)

A sliding layer that still fills its window writes the same way.
"""

from __future__ import annotations

import torch
from torch._inductor.pattern_matcher import KeywordArg, Match

from .site import Refusal, Site, aten, attention, base_site, call, check_attention, check_stored, same, shape, stores, tokens


def write(buf: str, new: str):
    """The repeated ``pos`` makes K and V agree on where they write."""
    return call(aten.index_put.default, KeywordArg(buf), [None, None, KeywordArg("pos")], KeywordArg(new))


PATTERN = attention(write("k_buf", "k"), write("v_buf", "v"))


def check(match: Match) -> Refusal | None:
    """What the shape alone does not say: None, or the reason to leave the site dense."""
    if refusal := check_attention(match) or check_stored(match):
        return refusal
    c = match.kwargs
    pos = c["pos"].meta["val"]
    if pos.dtype not in (torch.int64, torch.int32) or pos.dim() != 1 or not same(pos.shape[0], tokens(match)):
        return Refusal("scattered", f"{c['pos'].name}: {pos.dtype} {list(pos.shape)} for {tokens(match)} tokens")
    if c["mask"] is None and not c["is_causal"]:
        return Refusal("unmasked_slots", f"{c['columns'] or shape(c['k_buf'])[2]} columns are read")
    if c["mask"] is None and c["columns"] is not None:
        return Refusal("partial_read", f"{c['columns']} columns are read, and nothing says where the newest token is")
    return None


def site(match: Match) -> Site:
    """Shapes: as :class:`Site`."""
    return base_site("static_index", match, pos=match.kwargs["pos"], stores=stores(match))
