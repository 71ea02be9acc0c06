"""Explain: every attention of a model, what the backend would do with it and why, without compiling anything."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch.utils._pytree import tree_leaves

from sphkv_compile.backend import backend
from sphkv_compile.lowering import compat
from sphkv_compile.passes.match import Verdict
from sphkv_compile.passes.rewrite import geometry
from sphkv_compile.patterns import Site
from sphkv_compile.printing import Printed
from sphkv_compile.report import noise_warning, report
from sphkv_compile.runtime import log
from sphkv_compile.runtime.breakeven import LENGTHS, break_even
from sphkv_compile.runtime.certificate import Certificate
from sphkv_compile.spec import CacheSpec, human, option_names, parse_bytes
from sphkv_compile.storage.layout import Layout
from sphkv_compile.testing.clock import timed


@dataclass(frozen=True)
class SiteRow:
    """One attention.

    Args:
        idiom: how its cache is written, or None where it stays dense.
        reason: why it stays dense.
        node, source: the FX node, and the user's line.
        shape: query and kv heads, head_dim, rotary embedding.
        tiers: at which its tokens are held, widest first; several where a policy chooses.
        kept: whether tokens may be dropped too, and ``coded_bytes`` is what the budget has for each on average.

    Units: bytes per token over all kv heads, dense and coded beyond the window.
    """

    graph: int
    node: str
    source: str
    idiom: str | None
    reason: str | None
    shape: str = ""
    dense_bytes: float = 0.0
    coded_bytes: float = 0.0
    tiers: str = ""
    kept: bool = False


@dataclass
class Explanation(Printed):
    """What would become of a model.

    Args:
        spec: what is stored: where a budget was given, the tier that it buys for all tokens, or its bytes and who
            chooses.
        flagged: (site, certificate) of heads whose logits would be too noisy at the key bits given, as
            :class:`sphkv_compile.report.Report` has them; seen only where the traced call met a span of coded tokens.
        break_even: cached tokens from which a decode step's attention is predicted faster than dense on this device;
            None where it never is up to the longest length tried, nothing matched, or a policy chooses.

    Units: tokens.
    """

    rows: list[SiteRow]
    spec: CacheSpec
    graphs: int
    break_even: int | None
    device: str
    flagged: list[tuple[int, Certificate]] = field(default_factory=list)

    @property
    def matched(self) -> int:
        return sum(row.idiom is not None for row in self.rows)

    @property
    def refused(self) -> list[SiteRow]:
        return [row for row in self.rows if row.idiom is None]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _table(self)
        graphs = f"{self.graphs} graph{'s' * (self.graphs != 1)}"
        how = "under a budget" if self.spec.chooses else f"at {self.spec.tier}"
        yield Text(f"{self.matched} of {len(self.rows)} attentions matched, in {graphs}, {how}.")
        if self.spec.chooses:
            yield from _budget(self)
        elif self.matched:
            text = (
                f"from {self.break_even:,} cached tokens on"
                if self.break_even
                else f"at no length up to {LENGTHS[-1]:,} tokens"
            )
            replayed = ', in CUDA graphs (mode="reduce-overhead")' if self.device.startswith("cuda") else ""
            yield Text(f"The attention alone is predicted faster than dense on {self.device}{replayed}: {text}.")
        if self.flagged:
            yield noise_warning(self.flagged)
        if not self.rows:
            yield Text("No attention was found. Is the model called with its cache, under no_grad?")


def explain(
    model: Callable, *args: Any, options: dict | None = None, measure: bool = True, **kwargs: Any
) -> Explanation:
    """Trace ``model(*args, **kwargs)`` and say what the backend does with each attention in it.

    The call runs on copies, uncompiled; the model's caches are as before. With no inputs, a transformers model is
    traced at one decode step over a StaticCache with room for 4,096 tokens, which a budget is then for. A cache that
    has met no token yet is opened by the call in eager code, and empty again when the call is traced.

    Args:
        options: as for ``torch.compile(..., options=...)``; a SphericalCache says itself how it is stored.
        measure: time attention on this device to predict the break-even length; and, with no inputs, fill the cache
            with random tokens until some are coded, so that keys too large or too biased for their bits are seen.

    Raises:
        TypeError: an option among the model's arguments; ValueError: a SphericalCache that grows.
        What the call raises, and the backend.
    """
    options = options or {}
    spec = CacheSpec.from_options(options)
    options = {**options, "inductor": False, "strict": False}
    if not args and not kwargs:
        args, kwargs = (), _example_call(model, coded_length(spec) if measure else 4)
    call = _call(model)
    _check_names(call, kwargs)
    args, kwargs = copy.deepcopy((args, kwargs))
    layers = [c.layers for c in tree_leaves((args, kwargs)) if isinstance(getattr(c, "layers", None), list)]
    seen: list[log.Compiled] = []
    with torch.no_grad(), log.listening(seen.append):
        _open(layers, partial(call, *args, **kwargs))
        compat.trace_afresh(call, partial(backend, options=options), args, kwargs)
    if own := [layer.coded.spec for cache in layers for layer in cache if hasattr(layer, "coded")]:
        seen = [dataclasses.replace(graph, spec=own[0]) for graph in seen]
    spec = next((g.spec for g in seen if g.rewritten), spec)  # what a budget came to
    rows = [row for i, graph in enumerate(seen) for row in _rows(i, graph)]
    sites = [v.site for graph in seen for v in graph.verdicts if v.site]
    device = sites[0].k_buf.meta["val"].device if sites else torch.device("cpu")
    even = None
    if sites and measure and not spec.chooses:
        layout = next(g for g in seen if g.rewritten).rewritten.bindings[0].layout
        even = break_even(layout, geometry(sites[0]), device, lambda run: timed([run]) * 1e-6)
    try:
        flagged = report((args, kwargs, model)).flagged
    except ValueError:  # nothing is held as codes
        flagged = []
    return Explanation(rows, spec, len(seen), even, str(device), flagged)


def coded_length(spec: CacheSpec) -> int:
    """Tokens after which two spans are coded, and a certificate has something to go by."""
    return spec.sink + spec.window + 2 * spec.span


def _call(model: Callable) -> Callable:
    return model.forward if isinstance(model, torch.nn.Module) else model


def _check_names(call: Callable, kwargs: dict[str, Any]) -> None:
    """Raises: TypeError: an option that the model does not take."""
    names = set(option_names()) - inspect.signature(call).parameters.keys()
    if given := {name: value for name, value in kwargs.items() if name in names}:
        raise TypeError(
            f"explain() calls the model with what it is given, and {', '.join(given)} is an option of the "
            f"backend; did you mean options={given!r}?"
        )


def _open(caches: list[list[Any]], call: Callable) -> None:
    """Give transformers' caches that have met no token their tensors: within a graph they would be none of its inputs.

    Args:
        caches: the layers of each.

    Raises:
        ValueError: a cache that is codes already, and grows.
    """
    capacities = [[getattr(layer, "max_cache_len", None) for layer in layers] for layers in caches]
    for layers, rooms in zip(caches, capacities):
        if any(room is None and hasattr(layer, "coded") for layer, room in zip(layers, rooms)):
            raise ValueError(
                "this SphericalCache grows, and no compiled model takes it: eager code attends to its codes as it is. "
                "Give it max_cache_len, in tokens, to compile the model"
            )
    fixed = [layers for layers, rooms in zip(caches, capacities) if None not in rooms]
    closed = [layers for layers in fixed if not all(layer.is_initialized for layer in layers)]
    if closed:
        call()
        for layer in (layer for layers in closed for layer in layers):
            layer.reset()


def _example_call(model: Callable, filled: int) -> dict:
    """One decode step of a transformers model over a static cache."""
    if not hasattr(model, "config"):
        raise TypeError(
            f"explain({type(model).__name__}) without inputs: expected a transformers model; for any other pass the "
            "inputs of a decode step, as in explain(model, token, position)"
        )
    from sphkv_compile.integrations.transformers import decode_step

    return decode_step(model, filled)


def _rows(number: int, graph: log.Compiled) -> Iterator[SiteRow]:
    """The attentions of one graph, with the layouts that the backend gave them."""
    sites = [v.site for v in graph.verdicts if v.site]
    layouts = [binding.layout for binding in graph.rewritten.bindings] if sites else []
    dense = sum(geometry(site).dense_bytes for site, layout in zip(sites, layouts) if layout.kept)
    part = parse_bytes(graph.spec.budget or 0) / dense if dense else 1.0
    known = iter(layouts)
    for verdict in graph.verdicts:
        if (site := verdict.site) is None:
            yield SiteRow(number, verdict.node, verdict.source, None, str(verdict.refusal))
        else:
            yield _row(number, verdict, site, next(known), part)


def _row(graph: int, verdict: Verdict, site: Site, layout: Layout, part: float) -> SiteRow:
    """A site; ``part`` is the budget's share of the dense bytes of what tokens may be dropped of."""
    g = geometry(site)
    dense = g.k_dim * g.itemsize[0] + g.v_dim * g.itemsize[1]
    coded = dense * part if layout.kept else bytes_per_token(layout, g.k_dim, g.v_dim, g.itemsize)
    dims = str(g.k_dim) if g.k_dim == g.v_dim else f"{g.k_dim}/{g.v_dim}"
    shape = f"{g.heads * g.group}/{g.heads}, {dims}, {layout.rope}"
    tiers = "/".join(map(str, layout.tiers))
    place = graph, verdict.node, verdict.source, site.idiom, None
    return SiteRow(*place, shape, dense * g.heads, coded * g.heads, tiers, layout.kept)


def bytes_per_token(layout: Layout, k_dim: int, v_dim: int, itemsize: tuple[int, int]) -> float:
    """Bytes that one coded token of one kv head costs: its page's share, position, page-table entry and anchor row."""
    page = layout.page_bytes(layout.tiers[0], k_dim, v_dim, itemsize) / layout.page
    return page + 4 + 5 / layout.page + (k_dim + 4) / layout.span


def _budget(e: Explanation) -> Iterator[Text]:
    """What becomes of a budget that does not hold all tokens."""
    spec, limit = e.spec, parse_bytes(e.spec.budget or 0)
    name = spec.policy if isinstance(spec.policy, str) else type(spec.policy).__name__
    kept, sliding = (sum(row.kept is own for row in e.rows if row.idiom) for own in (True, False))
    heads = f"; {100 * spec.keep_all_heads:g} % of its heads keep every token" if spec.keep_all_heads else ""
    yield Text(
        f"{limit:,} bytes ({human(limit)}) are for what grows of {kept}: policy {name} keeps each token at "
        f"{', '.join(map(str, spec.menu))}, or drops it{heads}."
    )
    if sliding:
        yield Text(f"{sliding} with a sliding window keep all of it at {spec.tier}, on top of the budget.")
    yield Text("How fast that is depends on what is kept, and is not predicted.")


def _table(e: Explanation) -> Table:
    table = Table(title="attentions", title_justify="left")
    for name in ("graph", "sites", "idiom or reason", "heads, D, RoPE", "tiers", "bytes/token", "source"):
        table.add_column(name, overflow="fold")
    groups: dict[tuple, list[SiteRow]] = {}
    for row in e.rows:
        groups.setdefault(dataclasses.astuple(dataclasses.replace(row, node="")), []).append(row)
    for rows in groups.values():
        row = rows[0]
        names = row.node if len(rows) == 1 else f"{len(rows)}: {row.node}..{rows[-1].node}"
        what = Text(row.idiom, style="green") if row.idiom else Text(f"dense: {row.reason}", style="yellow")
        ratio = row.coded_bytes / row.dense_bytes if row.idiom else 0
        numbers = f"{row.dense_bytes:.0f} -> {row.coded_bytes:.0f} ({ratio:.3f})" if row.idiom else ""
        tiers = row.tiers + ", drop" * row.kept
        table.add_row(str(row.graph), names, what, row.shape, tiers, numbers, row.source.rpartition("/")[2])
    return table
