"""From a budget of bytes to a tier, for the policy that keeps every token."""

from __future__ import annotations

import dataclasses

from sphkv_compile.runtime.pool import arena_bytes
from sphkv_compile.spec import CacheSpec, Tier, parse_bytes
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry

WIDEST_FIRST = tuple(map(Tier.parse, ("K16V16", "K8V8", "K8V4", "K4V4", "K4V3", "K4V2", "K3V2", "K2V2")))
"""Tiers that a budget may choose. Keys get the bits before values do (measured: CODEC)."""


def resolve(spec: CacheSpec, sites: list[Geometry]) -> CacheSpec:
    """A spec whose tier is fixed: ``bits`` as given, or the widest tier whose full cache fits the budget.

    Args:
        sites: the cache's geometry, site by site; a capacity of 0 means that it grows without limit.

    Raises:
        ValueError: no tier fits, with the least possible budget; or the cache has no capacity.
    """
    if spec.budget is None:
        return spec
    if any(g.capacity == 0 for g in sites):
        raise ValueError(
            f"budget={spec.budget!r}: this cache grows without limit, so no tier is known to fit; use a cache of fixed "
            "capacity (transformers' StaticCache), or give bits"
        )
    limit = parse_bytes(spec.budget, sum(g.dense_bytes for g in sites))
    for tier in WIDEST_FIRST:
        fixed = dataclasses.replace(spec, budget=None, bits=(tier.k_bits, tier.v_bits))
        need = full_bytes(fixed, sites)
        if need <= limit:
            return fixed
    raise ValueError(
        f"budget={spec.budget!r} is {limit:,} bytes; keeping every token of this cache takes at least {need:,} bytes "
        f"({WIDEST_FIRST[-1]}). Give at least that, or a shorter cache"
    )


def full_bytes(spec: CacheSpec, sites: list[Geometry]) -> int:
    """Bytes of pages, positions, tables and anchors when every site is full."""
    layout, longest = Layout.of(spec), max(g.capacity for g in sites)
    total = 0
    for g in sites:
        # A buffer shorter than the others is a sliding window, which will need one span more once it rolls.
        g = g._replace(rolling=g.rolling or g.capacity < longest)
        spans = layout.spans(g.capacity, g.rolling)
        beside = spans * (layout.pages_per_span * (4 + 1 + 4 * layout.page) + g.k_dim + 4)
        total += arena_bytes(layout, g) + g.batch * g.heads * beside
    return total
