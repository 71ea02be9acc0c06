"""The fused CPU decode kernel against attention by the book, in float64, over the same coded cache.

Tolerance: the kernel and the specification (``ops/reference.py``) are two float32 evaluations of one function, so the
kernel may be off by a few times what the specification is off (MARGIN). A wrong level, token, radius or anchor is off
by a thousand times more.
"""

from __future__ import annotations

import itertools
import math
import platform
import warnings
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from torch import Tensor

from sphkv_compile.codecs.axis_cosine import AxisCosine
from sphkv_compile.kernels.cpu import binding
from sphkv_compile.ops import attend as blockwise
from sphkv_compile.ops import decode, schema
from sphkv_compile.ops.append import HIDDEN
from sphkv_compile.ops.append import append as append_python
from sphkv_compile.ops.pages import Pages, pages_in_use, read_pages, span_slots, with_positions, write_pages
from sphkv_compile.ops.read import exact_positions
from sphkv_compile.ops.reference import attend_reference
from sphkv_compile.spec import BITS, PASSTHROUGH, Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import BASE, START, Geometry, State, empty_state
from sphkv_compile.testing.oracle import attention
from sphkv_compile.testing.retained import retained

LIBRARY = binding.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler: there is no fused kernel to test")

MARGIN = 4.0
"""FlashAttention's tests allow twice the error of a plain evaluation in the same precision; twice that again, because a
logit here is a sum of two terms, anchor and residual, in a scaled frame."""


# ---- a cache with a history ------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """A coded cache after ``length`` tokens, and its float32 twin, which holds the same numbers and codes."""

    tiers: tuple[Tier, ...] = (Tier(4, 4),)
    batch: int = 2
    heads: int = 2
    group: int = 3
    dim: int = 64
    v_dim: int = 64
    dtype: torch.dtype = torch.float32
    length: int = 150
    padding: tuple[int, ...] = (0, 21)
    capacity: int = 192
    rolling: bool = False
    page: int = 16
    seed: int = 0
    state: State = field(init=False)
    twin: State = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, dim: int, mean: float) -> Tensor:
            shift = mean * torch.randn(1, heads, 1, dim, generator=generator)
            x = torch.randn(self.batch, heads, self.length + 8, dim, generator=generator) + shift
            return x.to(self.dtype)

        self.q = draw(self.heads * self.group, self.dim, 0.0)
        self.k = draw(self.heads, self.dim, 1.0)
        self.v = draw(self.heads, self.v_dim, 0.5)
        self.state, self.twin = self.filled(self.dtype), self.filled(torch.float32)

    @property
    def layout(self) -> Layout:
        return Layout("axis_cosine", self.tiers, 4, 16, 32, self.page, seed=1, rope="half", rotary_dim=self.dim)

    def geometry(self, dtype: torch.dtype) -> Geometry:
        return Geometry(self.batch, self.heads, self.capacity, self.dim, self.v_dim, dtype, dtype, self.rolling)

    def filled(self, dtype: torch.dtype) -> State:
        """The state after ``length`` tokens, prefilled in two chunks."""
        shape, layout = self.geometry(dtype), self.layout
        size = max(layout.page_bytes(tier, self.dim, self.v_dim, shape.itemsize) for tier in self.tiers)
        pages = layout.spans(self.capacity, self.rolling) * layout.pages_per_span
        count = pages * self.batch * self.heads
        state = empty_state(layout, shape, torch.zeros(count * size, dtype=torch.uint8))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(2)).to(torch.int32)
        state.table.copy_(order.view_as(state.table) * (size // UNIT))
        self.write(state, 0, self.length // 2, dtype)
        self.write(state, self.length // 2, self.length, dtype)
        return state

    def write(self, state: State, begin: int, end: int, dtype: torch.dtype) -> None:
        q, k, v = (x[:, :, begin:end].to(dtype) for x in (self.q, self.k, self.v))
        starts = [pad if pad < end else -1 for pad in self.padding]
        append_python(state, self.layout, q, k, v, begin, starts)

    def new(self, count: int, at: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``count`` new tokens, as views that are not contiguous, as a model makes them."""
        at = self.length if at is None else at
        parts = (x[:, :, at : at + count] for x in (self.q, self.k, self.v))
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts)

    def mask(self, count: int, at: int | None = None, base: int = 0) -> Tensor:
        """Causal, and without the padding. Shapes: -> bool[B, 1, T, columns]."""
        at = self.length if at is None else at
        column = base + torch.arange(self.capacity)
        causal = column <= torch.arange(at, at + count).unsqueeze(-1)
        return causal & (column >= torch.tensor(self.padding).view(-1, 1, 1, 1))


@dataclass
class Kept(Cache):
    """One whose heads kept some of their tokens at each of the tiers, in any order; what is not in use is garbage.

    ``shares``: of the tokens that are kept, row by row and head by head, in turn.
    """

    tiers: tuple[Tier, ...] = (Tier(8, 4), Tier(4, 4), Tier(4, 2))
    shares: tuple[float, ...] = (0.7, 0.2, 0.0, 0.5)

    @property
    def layout(self) -> Layout:
        return replace(super().layout, kept=True)

    def filled(self, dtype: torch.dtype) -> State:
        same = {f.name: getattr(self, f.name) for f in fields(Cache) if f.init}
        caches = [Cache(**{**same, "tiers": (tier,)}) for tier in self.tiers]
        each = [(cache.state if dtype == self.dtype else cache.twin, cache.layout) for cache in caches]
        heads = self.batch * self.heads
        share = torch.tensor(self.shares * heads)[:heads].view(self.batch, self.heads, 1)
        tokens = each[0][0].table.shape[2] * self.page
        draw = torch.rand(self.batch, self.heads, tokens, generator=torch.Generator().manual_seed(4))
        choice = torch.where(draw < share, (draw / share * len(self.tiers)).long(), -1)
        return _spoiled(*retained(each, choice))


def _spoiled(state: State, layout: Layout) -> State:
    """Its pages in use alone, some empty slots before their tokens; these and all else in the arena are not a number in
    any float format, and places of the tables behind them name a page that would be seen twice."""
    used, tiers, table = pages_in_use(state), state.tiers.clone(), state.table.clone()
    for page in used.nonzero()[:1]:
        tiers[~used], table[~used] = state.tiers[tuple(page)], state.table[tuple(page)]
    spoiled = state._replace(arena=torch.full_like(state.arena, 255), tiers=tiers, table=table)
    for index, tier in enumerate(layout.tiers):
        offsets = state.table[used & (state.tiers == index)]
        pages = read_pages(state, layout, tier, offsets)
        empty = pages.position.contiguous().view(torch.int32) < 0  # whose position is 255s as well
        pages = Pages(*(part.masked_fill(empty, 255).roll(3, -2) for part in pages))
        write_pages(spoiled, layout, tier, offsets, pages)
    return spoiled


KINDS = pytest.mark.parametrize("kind", [Cache, Kept], ids=["all tokens", "kept tokens"])


# ---- the same in float64 ---------------------------------------------------------------------------------------------


def _turn(dim: int, layout: Layout) -> Tensor:
    return layout.rotation(dim, torch.device("cpu")).sign().double() / math.sqrt(dim)


def _held(cache: Cache, state: State, row: int, head: int, first: int):
    """Positions, keys and values that a row holds below ``first``, decoded in float64."""
    layout, rows = cache.layout, state.rows[row].tolist()
    if rows[START] < 0:
        return []
    out = []
    begin = rows[START] + layout.sink
    at, slots = exact_positions(layout, rows[0], min(rows[1], first), rows[2], begin)
    out.append((at, state.exact_k[row, head, slots].double(), state.exact_v[row, head, slots].double()))
    for page in range(state.table.shape[2]):
        tier = layout.tiers[state.tiers[row, head, page]]
        position = state.positions[row, head, page].long()
        parts = read_pages(state, layout, tier, state.table[row, head, page])
        if tier.k_bits == PASSTHROUGH:
            k = parts.k.contiguous().view(state.exact_k.dtype).double()
        else:
            slot = span_slots(state, layout, position.view(1, 1, -1), state.rows[row : row + 1, START])[0, 0]
            anchor, scales = state.anchors[row, head, slot].double(), state.span_scales[row, head, slot].double()
            code = AxisCosine().decode(parts.k, cache.dim, tier.k_bits).double()
            if tier.k_bits == 8:
                radius = parts.radius.contiguous().view(torch.float16).double() * scales[:, 1:]
            else:
                radius = parts.radius.double() * scales[:, 1:] / 255
            turned = radius * code + anchor * scales[:, :1]
            k = turned @ _turn(cache.dim, layout) * state.pair_scale[row, head].double()
        if tier.v_bits == PASSTHROUGH:
            v = parts.v.contiguous().view(state.exact_v.dtype).double()
        else:
            code = AxisCosine().decode(parts.v, cache.v_dim, tier.v_bits).double()
            v = parts.v_scale.contiguous().view(torch.float16).double() * code @ _turn(cache.v_dim, layout)
        live = (position >= 0) & (position < first)
        out.append((position[live], k[live], v[live]))
    return out


def _attend64(cache: Cache, state: State, q, k, v, first, base, columns, mask, is_causal, scale) -> Tensor:
    """Attention in float64 over ``columns`` columns; those that hold no token are zero keys, as in a dense buffer."""
    batch, heads, count = k.shape[:3]
    state = with_positions(state, cache.layout)
    keys = torch.zeros(batch, heads, columns, k.shape[3], dtype=torch.float64)
    values = torch.zeros(batch, heads, columns, v.shape[3], dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        for position, k_held, v_held in _held(cache, state, b, h, first):
            seen = (position >= base) & (position < base + columns)
            keys[b, h, position[seen] - base], values[b, h, position[seen] - base] = k_held[seen], v_held[seen]
    keys[:, :, first - base : first - base + count] = k.double()
    values[:, :, first - base : first - base + count] = v.double()
    return attention(q, keys, values, mask, is_causal, scale)


def _of_held(cache: Cache, mask: Tensor | None, first: int, base: int, columns: int) -> Tensor:
    """The mask without the columns whose tokens a head dropped: a dense buffer has zeros there, and would show them."""
    held = torch.zeros(cache.batch, cache.heads, columns, dtype=torch.bool)
    held[..., first - base :] = True
    state = with_positions(cache.twin, cache.layout)
    for b, h in itertools.product(range(cache.batch), range(cache.heads)):
        for position, *_ in _held(cache, state, b, h, first):
            seen = (position >= base) & (position < base + columns)
            held[b, h, position[seen] - base] = True
    held = held.repeat_interleave(cache.group, 1).unsqueeze(2)
    if mask is None:
        return held
    return mask & held if mask.dtype == torch.bool else torch.where(held, mask, -math.inf)


def _compare(
    cache: Cache, q, k, v, mask=None, is_causal=False, scale=None, first=None, base=0, library=LIBRARY
) -> None:
    """Run the kernel, and hold it to the float32 specification's own error against float64; over kept tokens, the
    block-wise path too.

    Tolerance: MARGIN times the largest error of the specification, which evaluates the same sums in float32, plus one
    rounding to the output's dtype.
    """
    first = cache.length if first is None else first
    if mask is None and not is_causal:  # a dense buffer shows its empty columns too; a call without a mask has none
        columns = first - base + k.shape[2]
    else:
        columns = cache.capacity
    arguments = (cache.layout, q, k, v, first, base, columns, mask, is_causal, scale)
    results = [binding.attend(library, cache.state, *arguments, HIDDEN)]
    if cache.layout.kept:
        results.append(blockwise.attend(cache.state, *arguments))
        mask = _of_held(cache, mask, first, base, columns)
        arguments = (cache.layout, q, k, v, first, base, columns, mask, is_causal, scale)
    exact = _attend64(cache, cache.twin, *arguments[1:])
    layout, *rest = arguments
    wide = [x.float() if isinstance(x, Tensor) and x.dtype != torch.bool else x for x in rest]
    specification = attend_reference(cache.twin, layout, *wide)
    allowed = MARGIN * (specification.double() - exact).abs().max()
    rounding = exact.abs() * (torch.finfo(q.dtype).eps / 2 if q.dtype != torch.float32 else 0)
    for found in results:
        error = (found.double() - exact).abs()
        assert found.dtype == q.dtype and found.shape == exact.shape
        assert bool((error <= allowed + rounding).all()), f"error {error.max():.3g}, allowed {allowed:.3g}"


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k_bits", BITS)
@pytest.mark.parametrize("v_bits", BITS)
def test_every_pair_of_widths(k_bits: int, v_bits: int):
    """Bug: a wrong level table, plane order, radius or scale field of some width."""
    cache = Cache(tiers=(Tier(k_bits, v_bits),))
    _compare(cache, *cache.new(1), mask=cache.mask(1))


@pytest.mark.parametrize(
    "dim, v_dim", [(64, 128), (80, 80), (96, 80), (112, 64), (128, 128), (256, 64), (8, 24), (40, 256)]
)
@pytest.mark.parametrize("tier", [Tier(4, 4), Tier(3, 2), Tier(2, 3), Tier(8, 16)], ids=str)
def test_head_dims(dim: int, v_dim: int, tier: Tier):
    """Bug: a dimension that is no whole number of vectors, a rotation with a base matrix, keys' width for values."""
    cache = Cache(tiers=(tier,), dim=dim, v_dim=v_dim, batch=1, padding=(0,))
    _compare(cache, *cache.new(2), mask=cache.mask(2))


@KINDS
@pytest.mark.parametrize("group", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_groups_and_new_tokens(kind, group: int, count: int):
    """Bug: query rows ordered wrongly, or a remainder of the blocks of rows lost."""
    cache = kind(group=group, tiers=(Tier(4, 3),))
    _compare(cache, *cache.new(count), mask=cache.mask(count))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tier", [Tier(4, 4), Tier(16, 16), Tier(16, 4), Tier(8, 16)], ids=str)
def test_dtypes(dtype: torch.dtype, tier: Tier):
    """Bug: a wrong conversion, or model-dtype bytes counted as four. The float32 twin holds the same numbers."""
    cache = Cache(tiers=(tier,), dtype=dtype)
    _compare(cache, *cache.new(2), mask=cache.mask(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_rounds_as_torch_does(dtype: torch.dtype):
    """Bug: ties not to even, subnormal or overflowing numbers wrong. Who sees one new token returns its value."""
    cache = Cache(batch=1, padding=(0,))
    steps = torch.arange(cache.v_dim // 8).double() / 2 + 1  # every other one is a tie
    parts = [steps * 2.0**e for e in (-7, -10, -24, -25)] + [1 + steps * 2.0**e for e in (-7, -10)]
    parts += [65504 + steps * 8, -steps * 1e38]
    q, k, _ = cache.new(1)
    v = torch.cat(parts).float().expand(1, cache.heads, 1, -1)
    mask = torch.arange(cache.capacity).view(1, 1, 1, -1) == cache.length
    arguments = cache.layout, q.to(dtype), k, v, cache.length, 0, cache.capacity, mask, False, None
    out = binding.attend(LIBRARY, cache.state, *arguments, HIDDEN)
    assert torch.equal(out, v.repeat_interleave(cache.group, 1).to(dtype))


def test_query_key_and_value_dtypes_may_differ():
    """Bug: one dtype assumed for all, as autocast does not have it."""
    cache = Cache()
    q, k, v = cache.new(2)
    _compare(cache, q.half(), k.bfloat16(), v.float(), mask=cache.mask(2))


def _masks(cache: Cache, count: int):
    causal, generator = cache.mask(count), torch.Generator().manual_seed(5)
    heads = cache.heads * cache.group
    bias = torch.randn(cache.batch, heads, count, cache.capacity, generator=generator)
    hidden = torch.finfo(torch.float32).min
    yield "bool per head", causal & (bias > -1)
    yield "bool of one row", causal[1:, :, -1:].clone()
    yield "strided columns", torch.stack([causal, ~causal], -1)[..., 0]
    yield "expanded over the batch", causal[1:].expand(cache.batch, heads, count, -1)
    yield "additive", torch.where(causal, 0.0, hidden)
    yield "additive per head", torch.where(causal, bias, -math.inf)
    yield "additive bfloat16", torch.where(causal, bias[:, :1], -math.inf).bfloat16()
    yield "additive float16", torch.where(causal, bias[:, :1], -math.inf).half()


@KINDS
@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("count", [1, 3])
def test_masks(kind, which: int, count: int):
    """Bug: a stride of a broadcast dimension, a column taken for a position, a bias left out or added twice."""
    cache = kind()
    _name, mask = list(_masks(cache, count))[which]
    _compare(cache, *cache.new(count), mask=mask)


@KINDS
def test_no_mask_and_scale(kind):
    """Bug: the default scale used although one is given; a column past the newest token read."""
    cache = kind(padding=(0, 0))
    _compare(cache, *cache.new(1), scale=0.3)


@KINDS
@pytest.mark.parametrize("base", [0, 7])
def test_is_causal_is_aligned_to_the_top_left(kind, base: int):
    """Bug: causality counted from the newest token, as a cache would like it, and not as SDPA defines it."""
    cache = kind(padding=(0, 0))
    q, k, v = cache.new(4)
    _compare(cache, q, k, v, is_causal=True, base=base)


@KINDS
def test_left_padding_starts_spans_where_the_row_starts(kind):
    """Bug: anchors or ring slots of row 0 used for a row that starts later."""
    cache = kind(batch=3, padding=(0, 5, 63))
    _compare(cache, *cache.new(2), mask=cache.mask(2))


@KINDS
def test_row_that_is_all_padding(kind):
    """Bug: a row without a start reads slots as if position -1 were one."""
    cache = kind(padding=(0, 10_000))
    mask = cache.mask(1)
    mask[1, ..., cache.length] = True  # it sees only its own new token
    _compare(cache, *cache.new(1), mask=mask)


def test_query_that_sees_nothing_gets_zeros():
    """Bug: 0 / 0, or the softmax of -inf."""
    cache = Cache()
    mask = cache.mask(2)
    mask[1, :, 1] = False
    q, k, v = cache.new(2)
    arguments = cache.layout, q, k, v, cache.length, 0, cache.capacity, mask, False, None
    out = binding.attend(LIBRARY, cache.state, *arguments, HIDDEN)
    assert bool((out[1, :, 1] == 0).all()) and bool((out[0] != 0).any(-1).all())


@pytest.mark.parametrize("length", [60, 200, 331])
def test_rolling_window(length: int):
    """Bug: pages that left the window still seen, or a span's slot not taken modulo the number of spans."""
    cache = Cache(rolling=True, capacity=96, length=length, padding=(0, 0), tiers=(Tier(4, 2),))
    base = max(0, length + 1 - cache.capacity)
    _compare(cache, *cache.new(1), mask=torch.ones(1, 1, 1, cache.capacity, dtype=torch.bool).tril(length), base=base)
    _compare(cache, *cache.new(1), mask=cache.mask(1, base=base), base=base)


@KINDS
@pytest.mark.parametrize("back", [1, 9, 40, 120])
def test_write_that_steps_back(kind, back: int):
    """Bug: tokens at or after the write are still seen, in the ring or in pages."""
    cache = kind()
    at = cache.length - back
    _compare(cache, *cache.new(2, at), mask=cache.mask(2, at), first=at)


def test_mixed_tiers():
    """Bug: a page read at its neighbour's tier, or its fields at another tier's offsets."""
    menu = (Tier(8, 16), Tier(16, 2), Tier(4, 8), Tier(3, 4), Tier(2, 3))
    caches = [Cache(tiers=menu[i:] + menu[:i], page=32) for i in range(len(menu))]  # append encodes at the first tier
    mixed, other = caches[0], 0
    generator = torch.Generator().manual_seed(9)
    for at in itertools.product(*map(range, mixed.state.table.shape)):
        other = int(torch.randint(len(menu), (), generator=generator))
        for state, source in ((mixed.state, caches[other].state), (mixed.twin, caches[other].twin)):
            state.tiers[at] = other
            state.span_scales[at], state.anchors[at] = (
                source.span_scales[at],
                source.anchors[at],
            )  # a span is one page here
            offset = int(state.table[at]) * UNIT
            size = mixed.layout.page_bytes(menu[other], mixed.dim, mixed.v_dim, (4, 4))
            state.arena[offset : offset + size] = source.arena[offset : offset + size]
    assert len(mixed.state.tiers.unique()) == len(menu)
    _compare(mixed, *mixed.new(2), mask=mixed.mask(2))


@pytest.mark.parametrize("menu", ["K4V4", "K4V4/K4V2", "K8V8/K3V8/K2V4", "K4V3/K3V2/K2V2", "K16V16/K16V4/K8V2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim, v_dim, page", [(64, 64, 16), (80, 24, 32)])
def test_menus_of_kept_tokens(menu: str, dtype: torch.dtype, dim: int, v_dim: int, page: int):
    """Bug: positions sought where another tier has them, a page's table of tiers counted from the wrong end."""
    cache = Kept(tiers=tuple(map(Tier.parse, menu.split("/"))), dtype=dtype, dim=dim, v_dim=v_dim, page=page)
    _compare(cache, *cache.new(2), mask=cache.mask(2))


@pytest.mark.parametrize("shares", [(0.0,), (0.02,), (0.8,)], ids=str)
def test_heads_that_keep_little_or_much(shares: tuple[float, ...]):
    """Bug: a page of a token or two read whole, or pages that are not in use."""
    cache = Kept(shares=shares, length=300, capacity=400)
    _compare(cache, *cache.new(1), mask=cache.mask(1))


@pytest.mark.parametrize("tier", [Tier(4, 4), Tier(8, 16), Tier(16, 3)], ids=str)
def test_dropped_tokens_and_pages_of_two_spans(tier: Tier):
    """Bug: one anchor for a whole page although retention moved tokens together; an empty slot read (0 * NaN)."""
    cache = Cache(tiers=(tier,))
    for state in (cache.state, cache.twin):
        tables = state.table[:, :, [0, 3]]  # of the first and of the second span
        parts = read_pages(state, cache.layout, cache.tiers[0], tables)
        even = (torch.arange(cache.page) % 4 == 0).view(1, 1, 1, -1, 1)
        swapped = [torch.where(even, part.flip(2), part) for part in parts]
        for part in swapped:
            part[:, 0, :, 2::5] = 255  # not a number in any float format
        swapped = type(parts)(*swapped)
        write_pages(state, cache.layout, cache.tiers[0], tables, swapped)
        positions = state.positions[:, :, [0, 3]]
        state.positions[:, :, [0, 3]] = torch.where(even.squeeze(-1), positions.flip(2), positions)
        state.positions[:, 0, :, 2::5] = -1
        state.positions[:, 1, 1] = -1
        state.table[:, 1, 1] = -1
    mask = cache.mask(2).expand(-1, cache.heads * cache.group, -1, -1).clone()
    mask &= torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    _compare(cache, *cache.new(2), mask=_of_held(cache, mask, cache.length, 0, cache.capacity))


@KINDS
@pytest.mark.parametrize("batch, heads", [(1, 1), (2, 3)])
def test_threads_split_the_pages(kind, batch: int, heads: int, monkeypatch):
    """Bug: partial results of a split lost, counted twice, or combined without their maxima; every head split as the
    one with the most pages is."""
    cache = kind(batch=batch, heads=heads, padding=(0, 5)[:batch], length=900, capacity=1024)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # what the kernel is told; all else keeps one thread
    _compare(cache, *cache.new(1), mask=cache.mask(1))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere all tests run this path")
@pytest.mark.parametrize("menu", ["K4V4", "K3V2", "K8V16", "K8V4/K4V4/K4V2"])
def test_portable_path(menu: str):
    """Bug: the code for machines without AVX2 decodes differently; nobody with AVX2 would see it."""
    tiers = tuple(map(Tier.parse, menu.split("/")))
    cache = (Kept if len(tiers) > 1 else Cache)(tiers=tiers)
    portable = binding.build((*binding.FLAGS, "-mno-avx", "-Wno-psabi"))
    _compare(cache, *cache.new(2), mask=cache.mask(2), library=portable)


@KINDS
@pytest.mark.parametrize("group, count", [(3, 41), (40, 3)])
def test_prefill_runs_in_blocks_of_queries(kind, group: int, count: int):
    """Bug: a block of query rows written to another's place, or causal rows counted from the block's first."""
    cache = kind(group=group, length=110)
    cache.length -= count  # what the cache holds past the write is dropped
    q, k, v = cache.new(count)
    _compare(cache, q, k, v, mask=cache.mask(count))
    shared = cache.mask(1)  # one mask row for all queries
    shared[..., cache.length :] = False
    _compare(cache, q, k, v, mask=shared)
    cache.padding = (0, 0)
    _compare(Cache(group=group, padding=(0, 0), length=0), *cache.new(count, 0), is_causal=True, first=0)


def test_mask_that_shows_dropped_slots_is_refused():
    """Bug: columns after the newest token are read as if the cache still held them."""
    cache = Cache()
    for kind in (lambda m: m, lambda m: torch.where(m, 0.0, HIDDEN), lambda m: torch.where(m, HIDDEN + 1, -1e9)):
        mask = cache.mask(1)
        mask[1, ..., cache.length + 3] = True
        arguments = (cache.layout, *cache.new(1), cache.length, 0, cache.capacity, kind(mask), False, None)
        assert binding.attend(LIBRARY, cache.state, *arguments, HIDDEN) is None
        with pytest.raises(RuntimeError, match="after the newest token"):
            decode.attend(cache.state, *arguments)


def test_dispatch(monkeypatch):
    """Bug: the fused kernel never runs, or runs on what it cannot read."""
    cache, calls = Cache(), []
    real = binding.attend
    monkeypatch.setattr(binding, "attend", lambda *a: calls.append(a) or real(*a))
    assert decode.checked_library() is not None
    calls.clear()

    def served(cache: Cache, q, k, v, mask) -> bool:
        before = len(calls)
        decode.attend(cache.state, cache.layout, q, k, v, cache.length, 0, cache.capacity, mask, False, None)
        return len(calls) > before

    q, k, v = cache.new(2)
    assert served(cache, q, k, v, cache.mask(2))
    assert served(Kept(), q, k, v, cache.mask(2))
    assert not decode._served(replace(cache.layout, packing="tiles"), q, k, v, None)
    assert not served(cache, q.double(), k, v, cache.mask(2))
    assert not served(cache, q, k.double(), v, cache.mask(2))
    assert not served(cache, q, k, v, torch.where(cache.mask(2), 0.0, -math.inf).double())
    assert not served(Cache(page=8), q, k, v, cache.mask(2))


def test_build_failure_falls_back_with_one_warning(monkeypatch):
    """Bug: a machine without a compiler raises, or says nothing, or warns at every step."""
    from torch._inductor.codecache import CppCodeCache

    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    binding.library.cache_clear(), decode.checked_library.cache_clear()
    try:
        cache = Cache()
        arguments = (
            cache.state,
            cache.layout,
            *cache.new(1),
            cache.length,
            0,
            cache.capacity,
            cache.mask(1),
            False,
            None,
        )
        with pytest.warns(UserWarning, match="no compiler here"):
            out = decode.attend(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode.attend(*arguments)
        assert not decode.append_in_window(cache.state, cache.layout, *cache.new(1), None, cache.length, False)
    finally:
        binding.library.cache_clear(), decode.checked_library.cache_clear()
    expected = attend_reference(*arguments)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_self_check_failure_falls_back_with_a_warning(kept: bool, monkeypatch):
    """Bug: a library that computes nonsense on this machine, of some pages alone, is used all the same."""
    real = binding.attend
    monkeypatch.setattr(binding, "attend", lambda *a: real(*a) * (1.01 if a[2].kept == kept else 1))
    decode.checked_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="differs from the block-wise path"):
            assert decode.checked_library() is None
    finally:
        decode.checked_library.cache_clear()


# ---- append ----------------------------------------------------------------------------------------------------------


def _step(cache: Cache, state: State, at: int, count: int, fused: bool, rolling: bool = False) -> bool:
    q, k, v = cache.new(count, at)
    base = int(state.rows[0, BASE])
    pos = torch.arange(at - base, at - base + count)
    if fused and decode.append_in_window(state, cache.layout, q, k, v, pos, None, rolling):
        return True
    append_python(state, cache.layout, q, k, v, at, list(cache.padding))
    state.rows[:, BASE] = base + rolling
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rolling", [False, True])
def test_append_equals_the_python_append(dtype: torch.dtype, rolling: bool):
    """Bug: a slot, counter, moment or base that differs; a span that leaves the window and is not encoded."""
    cache = Cache(dtype=dtype, length=190, rolling=rolling, padding=(0, 28))  # row 1 still fills its sinks at 30
    states = [cache.filled(dtype) for _ in range(2)]
    for state in states:
        for name, empty in zip(State._fields, empty_state(cache.layout, cache.geometry(dtype), state.arena)):
            if name not in ("arena", "table"):
                getattr(state, name).copy_(empty)
        state.arena.zero_()
    at, left_to_python = 30, 0
    for state in states:
        append_python(state, cache.layout, *(x[:, :, :at] for x in (cache.q, cache.k, cache.v)), 0, list(cache.padding))
    while at < 186:
        count = 1 + at % 3
        left_to_python += not _step(cache, states[0], at, count, True, rolling)
        _step(cache, states[1], at, count, False, rolling)
        at += count
    # n terms >= 0 added in another order differ by at most n u; a step's energies are added in float32 by Python
    tolerance = {"moments": cache.group * at * 2**-53, "energy": cache.group * 3 * cache.dim * 2**-24}
    for name, found, expected in zip(State._fields, *states):
        assert torch.allclose(found.double(), expected.double(), rtol=tolerance.get(name, 0), atol=0), name
    assert left_to_python == 5 + 4  # spans that left the windows of the two rows, never in the same step


def test_append_leaves_the_rest_to_python():
    """Bug: a write that needs more than the window is swallowed, or leaves a trace before it is refused."""
    cache = Cache(length=165)  # row 1 encodes a span when it holds 169
    untouched = State(*(x.clone() for x in cache.state))

    def served(count: int, pos: Tensor | None, start: int | None = None, **change) -> bool:
        q, k, v = cache.new(count)
        k = k.to(change.get("dtype", k.dtype))
        return decode.append_in_window(cache.state, cache.layout, q, k, v, pos, start, False)

    assert not served(1, torch.tensor([40]))  # reaches into coded spans
    assert not served(1, torch.tensor([0]))  # starts the rows again
    assert not served(2, torch.tensor([165, 167]))  # not consecutive
    assert not served(1, torch.tensor([166]))  # leaves a gap
    assert not served(1, torch.tensor([-1]))
    assert not served(1, torch.tensor([165]), dtype=torch.float16)  # another dtype than the ring's
    assert not served(8, None, 165)  # a span would leave the window
    assert all(map(torch.equal, cache.state, untouched))
    cache.state.rows[1, START] = -1
    assert not served(1, torch.tensor([165]))  # a row has no token yet
    cache.state.rows.copy_(untouched.rows)
    assert served(1, torch.tensor([165]))


def test_op_attend_and_append_run_fused():
    """Bug: the op's arguments reach the kernel in another order than the eager path's."""
    cache = Cache()
    q, k, v = cache.new(1)
    pos, mask, text = torch.tensor([cache.length]), cache.mask(1), str(cache.layout)
    out = schema.attend(*cache.state, q, k, v, pos, None, cache.capacity, mask, False, None, text, False)
    expected = attend_reference(cache.state, cache.layout, q, k, v, cache.length, 0, cache.capacity, mask, False, None)
    assert torch.allclose(out, expected, atol=1e-5)
