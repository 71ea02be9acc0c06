"""transformers' StaticLayer and gpt-fast: ``buf[:, :, pos] = new``, then attention over the buffer.

    w = index_put(buf, [None, None, pos], new);  copy_(buf, w);  sdpa(q, w_k, w_v, mask)

A sliding layer that still fills its window writes the same way.
"""

from __future__ import annotations

import torch
from torch._inductor.pattern_matcher import KeywordArg, Match

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
    stores,
    tokens,
)


def write(buf: str, new: str):
    """The repeated ``pos`` makes K and V agree on where they write."""
    return call(aten.index_put.default, KeywordArg(buf), [None, None, KeywordArg("pos")], KeywordArg(new))


PATTERN = attention(write("k_buf", "k"), write("v_buf", "v"))


def check(match: Match) -> Refusal | None:
    """What the shape alone does not say: None, or the reason to leave the site dense."""
    if refusal := check_attention(match) or check_stored(match):
        return refusal
    pos, count = match.kwargs["pos"], tokens(match)
    where = pos.meta["val"]
    if where.dtype not in (torch.int64, torch.int32) or where.dim() != 1 or where.shape[0] != count:
        return Refusal("scattered", f"{pos.name}: {where.dtype} {list(where.shape)} for {count} tokens")
    return check_shown(match)


def site(match: Match) -> Site:
    """Shapes: as :class:`Site`."""
    return base_site("static_index", match, pos=match.kwargs["pos"], stores=stores(match))
