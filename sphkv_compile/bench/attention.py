"""One attention of a decode step on a GPU: dense beside codes, all overheads in, side by side in one run.

Ours is everything that a step does for one layer's attention: queries turned, anchors, codes, sinks and window, parts
merged, output turned back. Dense is the fastest of flash and cuDNN, each with query heads as heads and as rows. Both
are captured in a CUDA graph and replayed over copies of the cache that together exceed the second-level cache. Errors
are against float64 attention over the dequantised cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sphkv_compile.bench.kept import Menu, random_pages
from sphkv_compile.bench.peers import PEERS
from sphkv_compile.codecs.codebook import levels
from sphkv_compile.ops.pages import with_positions
from sphkv_compile.ops.read import dense
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import FROZEN, LENGTH, SPANS, START, Geometry, State, empty_state
from sphkv_compile.testing import clock

SINK, WINDOW, SPAN, PAGE = 4, 128, 128, 64
SPREAD = 2.0
"""Standard deviation of the attention logits unless a row says otherwise."""
ANCHOR = 0.9
"""Standard deviation of the anchors' entries."""


@dataclass
class Case:
    """A cache of ``length`` tokens and its new token. Shapes: B rows, H kv heads, G query heads each, D head_dim."""

    state: State
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    columns: int

    def attend(self) -> Tensor:
        from sphkv_compile.kernels.gpu import launch  # Triton is loaded where there is something to launch

        arguments = self.state, self.layout, self.q, self.k, self.v, self.pos, None, self.columns
        return launch.attend(*arguments, None, None, False)

    @property
    def bytes(self) -> int:
        """What one step has to read."""
        s, (h, d) = self.state, (self.k.shape[1], self.k.shape[3])
        itemsize = s.exact_k.element_size(), s.exact_v.element_size()
        sizes = [self.layout.page_bytes(tier, d, d, itemsize) + 4 for tier in self.layout.tiers]
        total = 0
        for row in s.rows.tolist():
            coded = row[SPANS] * (d + 2) + (
                0 if self.layout.kept else row[SPANS] * self.layout.pages_per_span * sizes[0]
            )
            total += coded + (row[LENGTH] - row[START] - row[SPANS] * SPAN) * d * sum(itemsize)
        return h * total + sum(int(pages) * size for pages, size in zip(s.held.sum((0, 1)), sizes))


def make(
    tier: Tier | Menu,
    b: int,
    length: int,
    h: int,
    g: int,
    d: int,
    seed: int = 0,
    spread: float = SPREAD,
    ragged: bool = False,
    device: str = "cuda",
) -> Case:
    """Random codes of real statistics, in pages in random order.

    Args:
        spread: the logits' standard deviation over coded tokens.
        ragged: rows hold from a quarter of ``length`` to all of it, behind padding on the left.
    """
    generator = torch.Generator(device).manual_seed(seed)
    kept = isinstance(tier, Menu)
    menu = tier.tiers if isinstance(tier, Menu) else (tier,)
    layout = Layout("axis_cosine", menu, SINK, WINDOW, SPAN, PAGE, 0, "half", d, "tiles", kept)
    geometry = Geometry(b, h, length + 1, d, d, torch.bfloat16, torch.bfloat16, False)
    pages = layout.spans(length + 1, False) * layout.pages_per_span
    state = empty_state(layout, geometry, torch.zeros(UNIT, dtype=torch.uint8, device=device))
    if isinstance(tier, Menu):
        coded = layout.coded_spans(length) * SPAN
        state = state._replace(**random_pages(tier, layout, b, h, coded, pages, d, SINK, generator))
    else:
        size = layout.page_bytes(tier, d, d, geometry.itemsize)
        arena = torch.randint(0, 256, (b * h * pages, size), dtype=torch.uint8, device=device, generator=generator)
        codes = PAGE * d * (tier.k_bits + tier.v_bits) // 8
        meta = (torch.rand(b * h * pages, PAGE, 2, device=device, generator=generator) + 0.5).half()
        arena[:, codes:] = meta.view(torch.uint8).view(b * h * pages, -1)
        state = state._replace(arena=arena.view(-1))
        order = torch.randperm(b * h * pages, device=device, generator=generator) * (size // UNIT)
        state.table.copy_(order.view(b, h, pages))

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, device=device, generator=generator)

    state.anchors.copy_((normal(*state.anchors.shape) * 30).clamp(-127, 127))
    state.span_scales[..., 0], state.span_scales[..., 1] = ANCHOR / 30, 1.0
    state.pair_scale.copy_(1 + 0.1 * normal(*state.pair_scale.shape))
    state.exact_k.copy_(normal(*state.exact_k.shape))
    state.exact_v.copy_(normal(*state.exact_v.shape))
    within = torch.arange(pages * PAGE, dtype=torch.int32, device=device).view(pages, PAGE)
    for row, held in enumerate(lengths(b, length) if ragged else [length] * b):
        start, spans = length - held, layout.coded_spans(held)
        state.rows[row, START], state.rows[row, LENGTH], state.rows[row, FROZEN] = start, length, 1
        state.rows[row, SPANS] = spans
        if not kept:
            state.positions[row] = torch.where(within < spans * SPAN, start + SINK + within, -1)
    # radii are even between 0.5 and 1.5, codes are all as likely
    keys = (ANCHOR**2 + 13 / 12 * float(levels(menu[-1].k_bits).square().mean())) ** 0.5
    q = (normal(b, h * g, 1, d) * (spread / keys)).bfloat16()
    k, v = (normal(b, h, 1, d).bfloat16() for _ in range(2))
    return Case(state, layout, q, k, v, torch.tensor([length], device=device), length + 1)


def lengths(b: int, longest: int) -> list[int]:
    """Tokens of each row of a ragged batch, evenly from a quarter of the longest."""
    return [longest - longest * 3 * row // (4 * max(1, b - 1)) for row in range(b)]


def error(case: Case, found: Tensor | None = None) -> float:
    """Of the first and last row, against float64 over what the cache decodes to; relative to the output's norm."""
    found, worst = (case.attend() if found is None else found).double(), 0.0
    b, hq, _, d = case.q.shape
    for row in {0, b - 1}:
        one = slice(row, row + 1)
        state = State(*(x if name == "arena" else x[one] for name, x in zip(State._fields, case.state)))
        widened = state._replace(exact_k=state.exact_k.float(), exact_v=state.exact_v.float())
        k, v = dense(widened, case.layout, case.columns, block=256)
        k[:, :, -1], v[:, :, -1] = case.k[one, :, 0].float(), case.v[one, :, 0].float()
        seen = held(state, case.layout, case.columns)
        heads = k.shape[1]
        for head in range(heads):
            group = slice(head * hq // heads, (head + 1) * hq // heads)
            keys, values = (x[0, head, seen[head]].double() for x in (k, v))
            expected = (case.q[row, group, 0].double() @ keys.T * d**-0.5).softmax(-1) @ values
            gap = (found[row, group, 0] - expected).norm() / expected.norm()
            worst = max(worst, float(gap))
    return worst


def held(state: State, layout: Layout, columns: int) -> Tensor:
    """Columns of one row that were not dropped and are no padding. Shapes: -> bool[H, columns]."""
    start, spans = (int(state.rows[0, i]) for i in (START, SPANS))
    column = torch.arange(columns, device=state.table.device)
    coded = (column >= start + SINK) & (column < start + SINK + spans * SPAN)
    seen = ((column >= start) & ~coded).expand(state.table.shape[1], -1).clone()
    positions = with_positions(state, layout).positions[0].flatten(1).long()
    head, slot = (positions >= 0).nonzero(as_tuple=True)
    seen[head, positions[head, slot]] = True
    return seen


def measure(
    tier: Tier | Menu,
    shape: tuple[int, int, int, int, int],
    dense_us: float,
    spread: float = SPREAD,
    ragged: bool = False,
) -> dict[str, Any]:
    """One row of the record. Shapes: ``shape`` is B, L, H, G, D."""
    b, length, h, g, d = shape
    first = make(tier, *shape, spread=spread, ragged=ragged)
    count = clock.copies(first.bytes)
    cases = [first, *(make(tier, *shape, seed, spread, ragged) for seed in range(1, count))]
    us = clock.timed([case.attend for case in cases])
    checked = b * length <= 1 << 20
    return {
        "what": "sphkv", "tier": str(tier), "B": b, "L": length, "HKV": h, "G": g, "D": d, "us": us,
        "dense_us": dense_us, "speedup": dense_us / us, "rel_err": error(first) if checked else None,
        "bytes": first.bytes, "spread": spread, "ragged": ragged,
    }  # fmt: skip


def peer_rows(
    shape: tuple[int, int, int, int, int], dense_us: float, missing: dict[str, str]
) -> Iterable[dict[str, Any]]:
    """A row for every peer that runs here; ``missing`` gets the others, with the reason."""
    b, length, h, g, d = shape
    for name, prepare in PEERS.items():
        torch._dynamo.reset()  # each shape compiles anew, and there is a limit to how often
        try:
            peer = prepare(*shape)
            us = clock.timed(peer.calls)
        except Exception as refused:  # whatever another package raises is a reason not to time it, and no more
            at = "" if isinstance(refused, ImportError) else f", B {b}, L {length}, D {d}"  # absent at every shape
            missing[name + at] = f"{type(refused).__name__}: {refused}".splitlines()[0]
            continue
        yield {
            "what": name, "tier": peer.tier, "B": b, "L": length, "HKV": h, "G": g, "D": d, "us": us,
            "dense_us": dense_us, "speedup": dense_us / us, "rel_err": peer.error, "bytes": peer.bytes,
            "spread": SPREAD, "ragged": False,
        }  # fmt: skip
        del peer
        torch.cuda.empty_cache()


def run(
    batches: list[int], lengths_: list[int], dims: list[int], tiers: list[str], spreads: list[float],
    ragged: bool, peers: bool, heads: int, group: int, missing: dict[str, str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Every row as soon as it is measured; ``missing`` gets the peers that do not run, with the reason."""
    ceiling = clock.read_ceiling()
    for shape in ((b, length, heads, group, d) for d in dims for b in batches for length in lengths_):
        dense_us, which = clock.dense_time(*shape)
        torch.cuda.empty_cache()
        for name in tiers:
            tier = Menu.parse(name) if ":" in name else Tier.parse(name)
            uneven_too = ragged and shape[0] > 1 and isinstance(tier, Tier)  # heads that keep unequal shares are uneven
            for spread, uneven in [(spread, False) for spread in spreads] + [(SPREAD, True)] * uneven_too:
                row = measure(tier, shape, dense_us, spread, uneven)
                # dense reads a padded batch whole; that it would need a mask besides is not held against it
                yield row | {"dense": f"{which}, padded" if uneven else which, "ceiling_tbps": ceiling}
                torch.cuda.empty_cache()
        if peers:
            for row in peer_rows(shape, dense_us, missing):
                yield row | {"dense": which, "ceiling_tbps": ceiling}


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    out = Table("", "tier", "B", "L", "D", "dense us", "us", "speedup", "% of ceiling", "error")
    for r in rows:
        kind = " ragged" * r["ragged"] + f" spread {r['spread']:g}" * (r["spread"] != SPREAD)
        share = r["bytes"] / r["us"] / 1e4 / r["ceiling_tbps"]
        cells = f"{r['dense_us']:.1f} ({r['dense']})", f"{r['us']:.1f}", f"{r['speedup']:.2f}", f"{share:.0f}"
        error_ = "-" if r["rel_err"] is None else f"{r['rel_err']:.1e}"
        out.add_row(r["what"] + kind, r["tier"], str(r["B"]), f"{r['L']:,}", str(r["D"]), *cells, error_)
    return out
