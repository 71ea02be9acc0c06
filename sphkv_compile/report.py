"""What a cache holds right now: bytes from allocated storage, tokens, pages, counters, and error certificates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sphkv_compile.ops.pages import with_positions
from sphkv_compile.runtime.certificate import LIMIT, Certificate, bits_within_limit, certificate
from sphkv_compile.runtime.guarded import owner_of
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import repeated
from sphkv_compile.spec import human
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, LENGTH, SPANS, START


@dataclass
class SiteReport:
    """One site.

    Args:
        logical_tokens: what the model sees: one past the newest position less the oldest column, over all rows.
        resident_tokens: tokens held per kv head, coded or exact, over all rows.
        encoded_tokens: those of them that are codes.
        kept: whether its tokens are a policy's to choose.
        keep_all_heads: (row, kv head) of those that keep every token under a budget that others drop for.
        certificates: per (row, kv head).

    Units: bytes, tokens.
    """

    holds_codes: bool
    tier: str
    rope: str
    logical_tokens: int
    resident_tokens: int
    encoded_tokens: int
    pages: int
    page_bytes: int
    metadata_bytes: int
    table_bytes: int
    fixed_bytes: int
    dense_bytes: int
    imports: int
    exports: int
    recoded_tokens: int
    kept: bool = False
    keep_all_heads: list[tuple[int, int]] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)

    @property
    def flagged(self) -> list[Certificate]:
        """Heads whose logit noise is over the limit: give them more key bits."""
        return [c for c in self.certificates if c.logit_variance > LIMIT]


@dataclass
class Report:
    """A cache.

    Args:
        arena_bytes: allocated for pages; ``page_bytes`` of them are reserved or filled.
        dense_bytes: what the same cache takes in model dtype at the same capacity.
        dense_resident_bytes: dense storage that exists besides, because eager code asked for it.
        budget: for what grows with the length, where there is one.
        aside_bytes: of the arena, what does not grow and comes on top of the budget: pages for what leaves the window
            before the next plan, and those of sliding windows.
        dropped_tokens, demoted_tokens: of a kv head, over all plans.
        wanted_keep_all: heads that should keep every token; there are fewer where the budget is not for so many.

    Units: bytes, tokens, pages.
    """

    sites: list[SiteReport]
    arena_bytes: int
    dense_resident_bytes: int
    plans: int
    freed_pages: int
    budget: int | None = None
    aside_bytes: int = 0
    dropped_tokens: int = 0
    demoted_tokens: int = 0
    wanted_keep_all: int = 0

    def _sum(self, name: str) -> int:
        return sum(getattr(site, name) for site in self.sites)

    @property
    def matched(self) -> int:
        """Sites whose cache is held as codes."""
        return sum(site.holds_codes for site in self.sites)

    @property
    def encoded_tokens(self) -> int:
        return self._sum("encoded_tokens")

    @property
    def dense_bytes(self) -> int:
        return self._sum("dense_bytes")

    @property
    def fixed_bytes(self) -> int:
        """Ring, sinks, scales and counters: they do not grow."""
        return self._sum("fixed_bytes")

    @property
    def page_bytes(self) -> int:
        return self._sum("page_bytes")

    @property
    def resident_bytes(self) -> int:
        """All that is allocated for this cache: arena, tables, fixed part, and dense storage if there is any."""
        return self.arena_bytes + self._sum("table_bytes") + self.fixed_bytes + self.dense_resident_bytes

    @property
    def budgeted_bytes(self) -> int:
        """What a budget is for: pages, anchors, positions, statistics and page tables, of what may be dropped."""
        return self.arena_bytes - self.aside_bytes + sum(site.table_bytes for site in self.sites if site.kept)

    @property
    def metadata_share(self) -> float:
        """Share of what is not codes in pages and tables: radii, scales, anchors, positions, page tables."""
        grown = self.page_bytes + self._sum("table_bytes")
        return (self._sum("metadata_bytes") + self._sum("table_bytes")) / grown if grown else 0.0

    @property
    def keep_all_heads(self) -> list[tuple[int, int, int]]:
        """(site, row, kv head) of those that keep every token."""
        return [(i, *head) for i, site in enumerate(self.sites) for head in site.keep_all_heads]

    @property
    def flagged(self) -> list[tuple[int, Certificate]]:
        """(site, certificate) of every head over the limit."""
        return [(i, c) for i, site in enumerate(self.sites) for c in site.flagged]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _totals(self)
        yield _by_site(self)
        if self.flagged:
            yield noise_warning(self.flagged)


def noise_warning(flagged: list[tuple[int, Certificate]]) -> Text:
    """Which heads (site, certificate) are over the limit, and what helps."""
    heads = ", ".join(f"site {i} head {c.head}" for i, c in flagged[:8]) + ", ..." * (len(flagged) > 8)
    enough = bits_within_limit(max(c.kappa for _, c in flagged))
    return Text(
        f"{len(flagged)} heads have logit noise over {LIMIT} (biased or very large keys): {heads}. "
        f"Give their keys more bits: K{enough}V4 is enough.",
        style="bold yellow",
    )


def report(obj: Any) -> Report:
    """What the caches inside ``obj`` hold.

    Args:
        obj: a transformers cache, a module with cache buffers, or tensors; containers of them too.

    Raises:
        ValueError: no cache tensor in it was ever held as codes.
    """
    owners = list({id(o): o for t in _tensors(obj) if (o := owner_of(t)) is not None}.values())
    if not owners:
        raise ValueError(
            f"{type(obj).__name__} has no cache tensor that sphkv holds: run a compiled step first, "
            "and see sphkv_compile.explain for the attentions that stay dense"
        )
    pools = list({id(o.pool): o.pool for o in owners}.values())
    retentions = [p.retention for p in pools if p.retention is not None]
    dense = sum(_storage_bytes(ref()) for o in owners for ref in (o.k_ref, o.v_ref))
    return Report(
        [_site(o) for o in owners],
        sum(p.arena.nbytes for p in pools),
        dense,
        sum(p.plans for p in pools),
        sum(r.done.freed_pages for r in retentions),
        sum(r.budget for r in retentions) if retentions else None,
        sum(p.retention.aside(p) for p in pools if p.retention is not None),
        sum(r.done.dropped for r in retentions),
        sum(r.done.demoted for r in retentions),
        sum(p.retention.wanted(p) for p in pools if p.retention is not None),
    )


def _site(owner: Owner) -> SiteReport:
    state, g, layout = owner.state, owner.geometry, owner.layout
    rows = state.rows.tolist()
    held = int((with_positions(state, layout).positions >= 0).sum())
    exact = sum(_exact(layout, row) for row in rows) * g.heads
    keeps = owner.pool.retention.keeps.get(owner) if owner.pool.retention else None
    sizes = [layout.page_bytes(t, g.k_dim, g.v_dim, g.itemsize) for t in layout.tiers]
    extra = [layout.fields(t, g.k_dim, g.v_dim, g.itemsize).metadata * layout.page for t in layout.tiers]
    there = (state.table >= 0) & ~repeated(state.table)
    used = [int((there & (state.tiers == i)).sum()) for i in range(len(sizes))]
    return SiteReport(
        owner.holds_codes,
        "/".join(map(str, layout.tiers)),
        layout.rope,
        sum(row[LENGTH] - max(row[START], row[BASE]) for row in rows if row[START] >= 0),
        (held + exact) // g.heads,
        held // g.heads,
        sum(used),
        sum(n * size for n, size in zip(used, sizes)),
        sum(n * size for n, size in zip(used, extra)),
        state.table_bytes,
        state.fixed_bytes,
        g.dense_bytes,
        owner.imports,
        owner.exports,
        owner.recoded_tokens,
        layout.kept,
        [] if keeps is None else [tuple(head) for head in keeps.nonzero().tolist()],
        certificate(state, layout, owner.scale),
    )


def _exact(layout: Layout, row: list[int]) -> int:
    return max(0, row[LENGTH] - row[START] - row[SPANS] * layout.span) if row[START] >= 0 else 0


def _storage_bytes(t: torch.Tensor | None) -> int:
    if t is None:
        return 0
    with torch._C.DisableTorchFunctionSubclass():
        return t.untyped_storage().nbytes()


def _tensors(obj: Any, depth: int = 6, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Tensors reachable through attributes and containers."""
    seen = set() if seen is None else seen
    if isinstance(obj, torch.Tensor):
        yield obj
        return
    if id(obj) in seen or depth == 0 or isinstance(obj, (str, bytes, int, float, type(None), type)):
        return
    seen.add(id(obj))
    if isinstance(obj, torch.nn.Module):
        inner: Any = list(obj.buffers()) + [m.__dict__ for m in obj.modules()]
    elif isinstance(obj, dict):
        inner = obj.values()
    elif isinstance(obj, (list, tuple, set)):
        inner = obj
    else:
        inner = getattr(obj, "__dict__", {}).values()
    for item in inner:
        yield from _tensors(item, depth - 1, seen)


def _totals(r: Report) -> Table:
    table = Table(title="KV cache as spherical codes", title_justify="left", show_header=False)
    resident = r.resident_bytes
    limit = "-" if r.budget is None else f"{human(r.budget)}, {human(r.budgeted_bytes)}"
    for name, value in (
        ("sites held as codes", f"{r.matched} of {len(r.sites)}"),
        ("encoded tokens (over sites)", f"{r.encoded_tokens:,}"),
        ("resident, allocated", f"{human(resident)}  ({resident / r.dense_bytes:.3f} of dense {human(r.dense_bytes)})"),
        ("budget, of it taken", limit),
        ("  arena, of it in pages", f"{human(r.arena_bytes)}, {human(r.page_bytes)}"),
        ("  tables, anchors, positions", human(r._sum("table_bytes"))),
        ("  fixed: ring, sinks, scales, queries", human(r.fixed_bytes)),
        ("  fixed, in the arena: staging, sliding", human(r.aside_bytes)),
        ("  dense besides", human(r.dense_resident_bytes)),
        ("metadata share beyond the window", f"{100 * r.metadata_share:.1f} %"),
        ("plans, freed pages", f"{r.plans:,}, {r.freed_pages:,}"),
        ("tokens dropped, demoted (over kv heads)", f"{r.dropped_tokens:,}, {r.demoted_tokens:,}"),
        ("heads that keep every token, asked for", f"{len(r.keep_all_heads)}, {r.wanted_keep_all}"),
        (
            "imports, exports, re-encoded tokens",
            f"{r._sum('imports')}, {r._sum('exports')}, {r._sum('recoded_tokens')}",
        ),
        ("heads over the noise limit", f"{len(r.flagged)}"),
    ):
        table.add_row(name, value)
    return table


def _by_site(r: Report) -> Table:
    table = Table(title="by site", title_justify="left")
    for name in ("site", "tier", "RoPE", "logical", "coded", "pages", "page bytes", "max logit var"):
        table.add_column(name, justify="right")
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(r.sites):
        key = (s.tier if s.holds_codes else "dense", s.rope, s.logical_tokens, s.encoded_tokens, s.pages, s.page_bytes)
        groups.setdefault(key, []).append(i)
    for key, members in groups.items():
        known = [c.logit_variance for i in members for c in r.sites[i].certificates]
        tier, rope, logical, coded, pages, size = key
        table.add_row(
            _ranges(members), tier, rope, f"{logical:,}", f"{coded:,}", str(pages), human(size),
            f"{max(known):.3g}" if known else "-",
        )  # fmt: skip
    return table


def _ranges(members: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    parts: list[list[int]] = []
    for i in members:
        if parts and parts[-1][-1] == i - 1:
            parts[-1][-1:] = [i] if len(parts[-1]) > 1 else [parts[-1][0], i]
        else:
            parts.append([i])
    return ", ".join("-".join(map(str, p)) for p in parts)
