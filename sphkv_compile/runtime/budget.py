"""From a budget of bytes to what is stored: one tier for all tokens, or a policy that chooses token by token."""

from __future__ import annotations

import dataclasses

import torch

from sphkv_compile.runtime.pool import arena_bytes, page_bytes
from sphkv_compile.spec import CacheSpec, Tier, parse_bytes
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import Geometry, empty_state

SPARE = 64
"""One byte of so many is left free, for pages that change their size, so that holes are seldom closed."""
WIDEST_FIRST = tuple(map(Tier.parse, ("K16V16", "K8V8", "K8V4", "K4V4", "K4V3", "K4V2", "K3V2", "K2V2")))
"""Tiers that a budget may choose for all tokens. Keys get the bits before values do (measured: CODEC)."""


def resolve(spec: CacheSpec, sites: list[Geometry]) -> CacheSpec:
    """A spec that says what is stored: ``bits`` as given; the widest tier at which all tokens fit the budget; or, for a
    policy that chooses, the budget in bytes, where not even its widest tier fits as a whole.

    Args:
        sites: the cache's geometry, site by site; a capacity of 0 means that it grows without limit.

    Raises:
        ValueError: the budget is too small, with the least possible one; or the cache has no capacity.
    """
    if spec.budget is None:
        return spec
    if any(g.capacity == 0 for g in sites):
        raise ValueError(
            f"budget={spec.budget!r}: this cache grows without limit, so no tier is known to fit; use a cache of fixed "
            "capacity (transformers' StaticCache), or give bits"
        )
    if spec.chooses:  # sliding windows do not grow, and are not what a budget is for
        sites = [g for g, kept in zip(sites, may_drop(spec, sites)) if kept]
    limit = parse_bytes(spec.budget, sum(g.dense_bytes for g in sites), sum(g.tokens for g in sites))
    for tier in WIDEST_FIRST:
        if spec.chooses and tier < spec.menu[0]:
            break
        fixed = dataclasses.replace(spec, budget=None, policy=None, keep_all_heads=0, bits=(tier.k_bits, tier.v_bits))
        need = full_bytes(fixed, sites)
        if need <= limit:
            return fixed
    if spec.chooses and (need := least_bytes(spec, sites)) <= limit:
        return dataclasses.replace(spec, budget=limit)
    what = "a page of each tier for every head" if spec.chooses else f"keeping every token ({tier})"
    raise ValueError(
        f"budget={spec.budget!r} is {limit:,} bytes; {what} takes at least {need:,} bytes. Give at least that, or a "
        "shorter cache"
    )


def may_drop(spec: CacheSpec, sites: list[Geometry]) -> list[bool]:
    """Of each site, whether its tokens are a policy's to choose. Those of a sliding window are not: they leave by
    themselves. A buffer shorter than the others is such a window, which has not filled yet."""
    longest = max(g.capacity for g in sites)
    return [spec.chooses and not g.rolling and g.capacity == longest for g in sites]


def full_bytes(spec: CacheSpec, sites: list[Geometry]) -> int:
    """Bytes of pages, positions, tables and anchors when every site is full."""
    layout, total = Layout.of(spec), 0
    for g in _rolling(sites):
        total += arena_bytes(layout, g) + table_bytes(layout, g)
    return total


def for_tokens(room: int) -> int:
    """Of the bytes that a budget leaves for pages, those that tokens may have."""
    return room - -(-room // SPARE)


def least_bytes(spec: CacheSpec, sites: list[Geometry]) -> int:
    """Bytes below which a policy could keep nothing: tables, and a page of each tier for each head."""
    layout = Layout.of(spec, kept=True)
    pages = [sum(page_bytes(layout, g, tier) for tier in range(len(layout.tiers))) for g in sites]
    room = sum(g.batch * g.heads * page for g, page in zip(sites, pages))
    room = -(-room * SPARE // (SPARE - 1)) + UNIT
    return sum(table_bytes(layout, g) for g in sites) + room


def table_bytes(layout: Layout, g: Geometry) -> int:
    """Bytes beside the pages that grow with the capacity."""
    return empty_state(layout, g, torch.empty(0, dtype=torch.uint8, device="meta")).table_bytes


def _rolling(sites: list[Geometry]) -> list[Geometry]:
    """A buffer shorter than the others is a sliding window, which will need one span more once it rolls."""
    longest = max(g.capacity for g in sites)
    return [g._replace(rolling=g.rolling or g.capacity < longest) for g in sites]
