"""Where everything of one site's cache lies: the constants that an op needs, and the byte layout of a page.

A :class:`Layout` travels through the graph as one short, readable string, so a dumped graph says how its cache is
stored, and two graphs share a kernel exactly when their strings agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from sphkv_compile.codecs import get_codec
from sphkv_compile.codecs.rotation import rotation
from sphkv_compile.spec import PASSTHROUGH, CacheSpec, Tier

UNIT = 64
"""Bytes of one arena unit; page-table entries count units."""
MEMORY = 128
"""Newest queries that a cache of kept tokens remembers: what a policy learns from."""


@dataclass(frozen=True)
class Layout:
    """Constants of one site's storage.

    Args:
        tiers: the menu; a page's tier is an index into it, widest first.
        rope: how the site's rotary embedding pairs dimensions (``half``, ``interleaved``) or ``none`` when unknown.
        rotary_dim: dimensions that rotate; the rest pass through.
        packing: order of a page's code bits: ``rows``, a token after the other, or ``tiles``
            (:mod:`sphkv_compile.storage.tiles`), in which radius and value scale are float16 and stand side by side.
        kept: pages of the tokens that were kept, at any of the tiers: each page says which tokens it holds and what
            attention they got, and a row and kv head's pages stand in its table by tier, the narrowest first. Without
            it a page holds the tokens that its place in the table says, all at one tier.

    ``text``: as it stands in graphs.

    Units: ``sink``, ``window``, ``span``, ``page`` in tokens.
    """

    codec: str
    tiers: tuple[Tier, ...]
    sink: int
    window: int
    span: int
    page: int
    seed: int
    rope: str = "none"
    rotary_dim: int = 0
    packing: str = "rows"
    kept: bool = False
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once, and at once: eager code passes it to each op of each step, and a compiled function that reads it must
        # not meet a property that is yet to be computed, whose lock (Python 3.11) Dynamo cannot trace.
        menu = "/".join(map(str, self.tiers))
        text = (
            f"{self.codec} {menu} sink={self.sink} window={self.window} span={self.span} page={self.page} "
            f"seed={self.seed} rope={self.rope}:{self.rotary_dim}"
            + (f" packing={self.packing}" if self.tiled else "")
            + (" kept=1" if self.kept else "")
        )
        object.__setattr__(self, "text", text)

    @classmethod
    def of(
        cls, spec: CacheSpec, rope: str = "none", rotary_dim: int = 0, packing: str = "rows", kept: bool = False
    ) -> Layout:
        """The layout that a spec asks for at a site whose rotary embedding was recognised as ``rope``."""
        tiers = spec.menu if kept else (spec.tier,)
        return cls(
            spec.codec, tiers, spec.sink, spec.window, spec.span, spec.page, spec.seed, rope, rotary_dim, packing, kept
        )

    def __str__(self) -> str:
        return self.text

    @property
    def summary(self) -> str:
        """The part that differs between sites: the menu and the rotary embedding."""
        rope = "no RoPE" if self.rope == "none" else f"{self.rope} RoPE {self.rotary_dim}"
        return f"{'/'.join(map(str, self.tiers))}, {rope}"

    @classmethod
    @lru_cache(None)
    def parse(cls, text: str) -> Layout:
        """The inverse of ``str``; cached, since ops call it every step."""
        codec, menu, *fields = text.split()
        values = dict(part.split("=") for part in fields)
        rope, rotary_dim = values.pop("rope").split(":")
        packing = values.pop("packing", "rows")
        kept = bool(values.pop("kept", False))
        numbers = {name: int(value) for name, value in values.items()}
        tiers = tuple(map(Tier.parse, menu.split("/")))
        return cls(codec, tiers, rope=rope, rotary_dim=int(rotary_dim), packing=packing, kept=kept, **numbers)

    @property
    def tiled(self) -> bool:
        """Whether pages are laid out for a GPU's kernels."""
        return self.packing == "tiles"

    @property
    def stored(self) -> Layout:
        """What codes are stored by: a rotary embedding only says how the scale of pairs is learnt, once."""
        return replace(self, rope="none", rotary_dim=0)

    @property
    def queries(self) -> int:
        """Newest queries that are remembered."""
        return MEMORY if self.kept else 0

    @property
    def ring(self) -> int:
        """Exact slots beside the sinks: the window, and the span that waits until it has left it whole."""
        return self.window + self.span

    @property
    def pages_per_span(self) -> int:
        return self.span // self.page

    def spans(self, capacity: int, rolling: bool) -> int:
        """Spans that ``capacity`` columns can need; a rolling window keeps one more, partly out of sight."""
        if rolling:
            return -(-capacity // self.span) + 1
        return max(0, (capacity - self.sink - self.window) // self.span)

    def coded_spans(self, length: int) -> int:
        """Spans that have left the window whole when a row holds ``length`` real tokens."""
        return max(0, (length - self.sink - self.window) // self.span)

    def fields(self, tier: Tier, k_dim: int, v_dim: int, itemsize: tuple[int, int]) -> PageFields:
        """Byte sizes, per token, of what a page of ``tier`` holds."""
        return _fields(self, tier, k_dim, v_dim, itemsize)

    def page_bytes(self, tier: Tier, k_dim: int, v_dim: int, itemsize: tuple[int, int]) -> int:
        """Bytes of one page, rounded up to whole units."""
        return -(-self.fields(tier, k_dim, v_dim, itemsize).total * self.page // UNIT) * UNIT

    @property
    def code(self):
        """The key codec."""
        return get_codec(self.codec)

    def rotation(self, dim: int, device: torch.device) -> torch.Tensor:
        """Rotation of this layout. Shapes: float32[dim, dim]."""
        return _rotation(dim, self.seed, device)


@dataclass(frozen=True)
class PageFields:
    """Bytes per token of each field, in the order in which a page stores them."""

    k: int
    v: int
    radius: int
    v_scale: int
    anchor: int
    position: int
    statistics: int

    @property
    def widths(self) -> tuple[int, ...]:
        return self.k, self.v, self.radius, self.v_scale, self.anchor, self.position, self.statistics

    @property
    def total(self) -> int:
        return sum(self.widths)

    @property
    def metadata(self) -> int:
        """Bytes per token that are not codes."""
        return self.total - self.k - self.v


@lru_cache(None)
def _fields(layout: Layout, tier: Tier, k_dim: int, v_dim: int, itemsize: tuple[int, int]) -> PageFields:
    exact_k, exact_v = tier.k_bits == PASSTHROUGH, tier.v_bits == PASSTHROUGH
    return PageFields(
        k=k_dim * itemsize[0] if exact_k else layout.code.code_bytes(k_dim, tier.k_bits),
        v=v_dim * itemsize[1] if exact_v else v_dim * tier.v_bits // 8,
        radius=0 if exact_k else 2 if tier.k_bits == 8 or layout.tiled else 1,
        v_scale=0 if exact_v else 2,
        anchor=0 if exact_k or layout.tiled or layout.kept else 1,
        position=4 if layout.kept else 0,
        statistics=4 if layout.kept else 0,
    )


@lru_cache(None)
def _rotation(dim: int, seed: int, device: torch.device) -> torch.Tensor:
    return rotation(dim, seed).to(device)
