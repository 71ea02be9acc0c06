"""What is asked of :func:`sphkv_compile.ops.moves.move`: new pages, and where each of their tokens comes from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Moves(NamedTuple):
    """M new pages, by tier, the widest first, and where each of their tokens comes from.

    Shapes:

    * ``counts``: new pages of each tier of the menu.
    * ``offsets`` int32[M]: a new page's place in the arena, in units; it may be that of a page which is read.
    * ``owners`` int32[M, 2]: its row and kv head, which are those of all its tokens.
    * ``sources`` int32[M, page]: offset of the page that holds a token now, -1 for an empty slot.
    * ``tiers`` uint8[M, page]: that page's tier, not narrower than the new one's.
    * ``slots`` uint8[M, page]: the token's slot there.
    """

    counts: tuple[int, ...]
    offsets: Tensor
    owners: Tensor
    sources: Tensor
    tiers: Tensor
    slots: Tensor
