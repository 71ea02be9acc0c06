"""Which code serves an ``attend``: the fused decode kernel where it can, the block-wise path otherwise."""

from __future__ import annotations

from sphkv_compile.ops.attend import attend

__all__ = ["attend"]
