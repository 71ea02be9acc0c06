"""Codes as named tensors, and back: what a file of a cache holds of one layer.

Pages are numbered within their tier, so that they may lie anywhere when they come back. Nothing is allocated from the
numbers of a file: each tensor's shape follows from the layout and the geometry, and must be that of the one at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphkv_compile.ops.pages import holding, with_positions
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool, page_bytes, repeated
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import (
    BASE,
    DTYPES,
    FROZEN,
    LENGTH,
    READ,
    SPANS,
    START,
    STATE_FIELDS,
    Geometry,
    State,
    empty_state,
)

NUMBERS = ("batch", "heads", "capacity", "k_dim", "v_dim", "group")
KNOWN = ("keeps", "shares", "kappas")
"""What a budget has learnt of heads."""


def tensors_of(owner: Owner) -> dict[str, Tensor]:
    """Everything that the owner's codes are, on the CPU."""
    state, layout, g = owner.state, owner.layout, owner.geometry
    held = holding(state, layout)
    found = {name: getattr(state, name).cpu() for name in STATE_FIELDS if name != "arena"}
    found["table"] = torch.full_like(found["table"], -1)
    units = state.arena.view(-1, UNIT)
    for tier in range(len(layout.tiers)):
        here, size = held & (state.tiers == tier), page_bytes(layout, g, tier)
        at, number = state.table[here].long().unique(return_inverse=True)
        each = torch.arange(size // UNIT, device=at.device)
        found[f"pages{tier}"] = units[at.unsqueeze(-1) + each].flatten(1).cpu()
        found["table"][here.cpu()] = number.cpu().int()
    if owner.frequencies is not None:
        found["frequencies"] = owner.frequencies.cpu()
    if owner.pool.retention is not None:
        found |= {name: x.cpu() for name, x in owner.pool.retention.known(owner).items()}
    return {name: x.contiguous() for name, x in found.items()}


def facts_of(owner: Owner) -> dict[str, Any]:
    """The rest, as JSON has it."""
    g = owner.geometry._asdict()
    g |= {name: str(g[name]).removeprefix("torch.") for name in ("k_dtype", "v_dtype")}
    return {"layout": str(owner.layout), "geometry": g, "scale": owner.scale}


def parse(facts: Any) -> tuple[Layout, Geometry]:
    """Raises: ValueError: it says nothing that could be a layout and a geometry."""
    try:
        g = dict(facts["geometry"])
        if set(g) != set(Geometry._fields) or not isinstance(g["rolling"], bool):
            raise ValueError(f"geometry {g}, expected positive sizes")
        g["k_dtype"], g["v_dtype"] = DTYPES[g["k_dtype"]], DTYPES[g["v_dtype"]]
        if any(type(n) is not int or not 0 < n < 1 << 40 for n in map(g.get, NUMBERS)):
            raise ValueError(f"geometry {g}, expected positive sizes")
        layout = Layout.parse(str(facts["layout"]))
        if min(layout.span, layout.page) < 1 or min(layout.sink, layout.window) < 0 or layout.span % layout.page:
            raise ValueError(f"layout {layout}, expected positive sizes")
        if not isinstance(facts["scale"], (float, type(None))):
            raise ValueError(f"scale {facts['scale']!r}, expected a float")
        return layout, Geometry(**g)
    except (KeyError, TypeError, AttributeError, IndexError) as fault:
        raise ValueError(f"expected a layer's layout and geometry: {type(fault).__name__}: {fault}") from None


def check(layout: Layout, g: Geometry, given: dict[str, Tensor]) -> None:
    """Whether these are the tensors of such a layer, and nothing in them points anywhere that is not there.

    Raises:
        ValueError: with the first that is wrong.
    """
    with torch.device("meta"):
        state = empty_state(layout, g, torch.empty(0, dtype=torch.uint8))
    want: dict[str, Tensor] = {name: getattr(state, name) for name in STATE_FIELDS if name != "arena"}
    pages = {f"pages{tier}": page_bytes(layout, g, tier) for tier in range(len(layout.tiers))}
    heads = torch.empty(g.batch, g.heads, device="meta")
    learnt = {name: heads.bool() if name == "keeps" else heads for name in KNOWN}
    _same("tensors", sorted(set(given) - {"frequencies", *learnt}), sorted({*want, *pages}))
    for name, x in given.items():
        if name in pages:
            _same(name, (x.dtype, x.dim(), x.shape[-1]), (torch.uint8, 2, pages[name]))
        elif name == "frequencies":  # of as many pairs as the rotary embedding that a graph showed turns
            _same(name, (x.dtype, x.dim()), (torch.float32, 1))
        else:
            like = (want | learnt)[name]
            _same(name, (x.dtype, tuple(x.shape)), (like.dtype, tuple(like.shape)))
    rows, table, tiers = given["rows"], given["table"], given["tiers"]
    spans = 1 << 40 if g.rolling else layout.spans(g.capacity, False)
    end, base = (1 << 40, 1 << 40) if g.rolling else (g.capacity, 0)
    limits = {START: (-1, end), LENGTH: (0, end), SPANS: (0, spans), BASE: (0, base), FROZEN: (0, 1), READ: (0, 0)}
    for column, (low, high) in limits.items():
        _within(f"rows[{column}]", rows[:, column], low, high)
    for row in rows.tolist():  # a crop may have left codes inside the window
        end = row[START] + layout.sink + row[SPANS] * layout.span
        if row[SPANS] and (row[START] < 0 or end > row[LENGTH]):
            raise ValueError(f"rows: {row[SPANS]} coded spans end at {end}, expected at most at {row[LENGTH]}")
    _within("tiers", tiers, 0, len(layout.tiers) - 1)
    _within("held", given["held"], 0, table.shape[2])
    _within("positions", given["positions"], -1, int(rows[:, LENGTH].max()) - 1)
    for tier in range(len(layout.tiers)):
        _within(f"table, pages of tier {tier}", table[tiers == tier], -1, given[f"pages{tier}"].shape[0] - 1)
    filled = State(arena=torch.empty(0), **{name: given[name] for name in want})
    if not torch.equal(holding(filled, layout), table >= 0):
        raise ValueError("table: pages are not where the counters say, expected one for each that holds tokens")


def _same(what: str, got: Any, want: Any) -> None:
    if got != want:
        raise ValueError(f"{what}: {got}, expected {want}")


def _within(what: str, x: Tensor, low: int, high: int) -> None:
    if x.numel() and (int(x.min()) < low or int(x.max()) > high):
        raise ValueError(f"{what}: {int(x.min())}..{int(x.max())}, expected {low}..{high}")


def restore_pages(owner: Owner, given: dict[str, Tensor]) -> None:
    """Give a new owner what :func:`tensors_of` gave; all of it has been checked.

    Raises:
        ValueError: a page that holds a token which the row cannot have.
    """
    state, layout, g, pool = owner.state, owner.layout, owner.geometry, owner.pool
    for name in STATE_FIELDS:
        if name not in ("arena", "table"):
            getattr(state, name).copy_(given[name])
    need = sum(given[f"pages{tier}"].numel() for tier in range(len(layout.tiers)))
    if pool.arena.used + need > pool.arena.nbytes:
        pool.resize(pool.arena.used + need)
    state, table = owner.state, given["table"].to(owner.state.table.device)
    for tier in range(len(layout.tiers)):
        pages, here = given[f"pages{tier}"], (table >= 0) & (state.tiers == tier)
        size = page_bytes(layout, g, tier)
        first = pool.arena.take_run(size, pages.shape[0])
        state.arena.view(-1, UNIT)[first:][: pages.numel() // UNIT] = pages.to(state.arena.device).view(-1, UNIT)
        state.table[here] = (table[here] * (size // UNIT) + first).int()
    owner.shares = bool(repeated(state.table).any())
    if layout.kept:
        held = with_positions(state, layout).positions
        _within("positions in pages", held, -1, int(state.rows[:, LENGTH].max()) - 1)
    if "frequencies" in given:
        owner.frequencies = given["frequencies"].to(state.table.device)
    if pool.retention is not None:
        pool.retention.learn(owner, {n: given[n].to(state.table.device) for n in KNOWN if n in given})


def pool_facts(pool: Pool | None) -> dict[str, int]:
    """Counters that say when the next plan comes."""
    return {} if pool is None else {name: getattr(pool, name) for name in ("tokens_left", "queries", "plans")}


def continue_pool(pool: Pool, facts: dict[str, Any]) -> None:
    """The inverse. Raises: ValueError: they are no counters."""
    for name in pool_facts(pool):
        _within(name, torch.tensor(facts[name]), -1, 1 << 40)
        setattr(pool, name, int(facts[name]))
