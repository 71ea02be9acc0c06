"""A cache that is born as codes: no dense tensor of it ever exists, and eager code attends to the codes themselves.

Its layers hand a model views (:mod:`sphkv_compile.runtime.views`): tensors without data that stand for all keys or
values. A compiled graph meets tensors that have an owner, as with any other cache that is held as codes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.ops.check import check_kernels
from sphkv_compile.ops.decode import packing
from sphkv_compile.ops.read import dense
from sphkv_compile.runtime.budget import resolve
from sphkv_compile.runtime.ownership import Owner, handles, lay_out_anew, room_for
from sphkv_compile.runtime.pool import Pool, arena_bytes
from sphkv_compile.runtime.retention import Retention
from sphkv_compile.runtime.views import NewTokens
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import DTYPES, SPANS, START, Geometry

_plain = torch._C.DisableTorchFunctionSubclass


class CodedCache:
    """What the layers of one cache share: how they are stored, a pool on each device, and the steps they take together.

    Args:
        spec: of the whole cache.
        sites: layers that will open in it.
        group: query heads of a kv head.
    """

    def __init__(self, spec: CacheSpec, sites: int, group: int = 1):
        self.spec, self.sites, self.group = spec, sites, group
        self.pools: dict[torch.device, Pool] = {}
        self.layers: list[CodedLayer] = []
        self.first = self.tokens = 0
        self.running: list[CodedLayer] = []

    # ---- layers

    def layout(self, k_dim: int, v_dim: int, device: torch.device, kept: bool) -> Layout:
        """How a layer of such heads is stored. The rotary embedding is not known before a graph is seen."""
        return Layout.of(self.spec, packing=packing(self.spec, k_dim, v_dim, device, kept), kept=kept)

    def check(self, dim: int | None, dtype: torch.dtype | None) -> None:
        """Raises: ValueError: no codes are made of heads of ``dim``, or of ``dtype``; None is not known yet."""
        if isinstance(dtype, torch.dtype) and dtype not in DTYPES.values():
            near = "torch.float32" if dtype.itemsize > 2 else "torch.bfloat16"
            raise ValueError(f"sphkv: keys of {dtype}; expected one of {', '.join(DTYPES)}; the nearest is {near}")
        if dim is not None:
            layout = Layout.of(self.spec, kept=self.spec.chooses)
            for tier in layout.tiers:
                layout.page_bytes(tier, dim, dim, (4, 4))
            layout.rotation(dim, torch.device("cpu"))

    def owner(self, k: Tensor, v: Tensor, capacity: int | None) -> Owner:
        """The codes of one more layer, with room for ``capacity`` tokens; None grows.

        Shapes: ``k`` [B, H, any, D], ``v`` [B, H, any, Dv]: what they hold does not matter.

        Raises:
            ValueError: the budget is too small, this layer is not like the others that share it, or there are no codes
                for such keys.
        """
        for x in (k, v):
            self.check(x.shape[3], x.dtype)
        rows, heads = k.shape[:2]
        room = capacity or room_for(0)
        geometry = Geometry(rows, heads, room, k.shape[3], v.shape[3], k.dtype, v.dtype, False, self.group)
        if not self.layers:
            self.spec = resolve(self.spec, [geometry] * self.sites)
        elif self.spec.chooses and (geometry != self.layers[0].owner.geometry or k.device not in self.pools):
            raise ValueError(
                f"budget={self.spec.budget!r} is shared by layers of one shape on one device; this one is "
                f"{tuple(k.shape[:2])} x {k.shape[3]} on {k.device}, the first {self.layers[0].owner.geometry}. "
                "Give bits instead"
            )
        layout = self.layout(k.shape[3], v.shape[3], k.device, self.spec.chooses)
        check_kernels(layout, geometry, geometry.heads * self.group, k.device)
        return Owner(layout, geometry, self.pool(layout, geometry, k.device))

    def pool(self, layout: Layout, geometry: Geometry, device: torch.device) -> Pool:
        """Where such layers on ``device`` have their pages; the first one makes room for all that are to come."""
        if device not in self.pools:
            retention = Retention.of(self.spec) if self.spec.chooses else None
            nbytes = UNIT if retention else arena_bytes(layout, geometry) * self.sites
            self.pools[device] = Pool(nbytes, self.spec.plan_every, device, retention)
        return self.pools[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> CodedCache:
        twin = CodedCache.__new__(CodedCache)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "sphkv: a SphericalCache cannot be pickled (pickle, torch.save, a process that is spawned); expected "
            "cache.save(path), and SphericalCache.load(path, model.config)"
        )

    # ---- steps

    @property
    def length(self) -> int:
        """Tokens that all layers hold. Those of a step that was interrupted half-way do not count: the next step
        overwrites them."""
        counts = [layer.length for layer in self.layers]
        if not counts or len(counts) < self.sites:  # a first step, or one that was interrupted: not all have opened
            return 0
        return int(torch.stack([c.to(counts[0].device) for c in counts]).min())

    def begin(self, layer: CodedLayer, tokens: int) -> int:
        """``layer`` gets ``tokens`` more: where the first of them goes.

        Raises:
            ValueError: layers that the prompt left out are left out by decoding too: the model has fewer.
        """
        if not self.running or layer in self.running:
            reached = len(self.running)
            if 0 < reached < self.sites and tokens == 1 < self.tokens and not self.length:  # a prompt, then a step
                raise ValueError(
                    f"sphkv: the prompt reached {reached} of this cache's {self.sites} layers, so its {self.tokens} "
                    "tokens do not count; expected the model that the cache was made for. If it was interrupted, read "
                    "it again, or call cache.reset() first"
                )
            for other in self.layers:
                other.settle()
            self.running = []
            self.first, self.tokens = self.length, tokens
            for pool in self.pools.values():
                pool.step(tokens)
        self.running.append(layer)
        return self.first

    def end(self) -> None:
        """A layer has taken its tokens in. After the last one, many tokens are brought within the budget."""
        if len(self.running) < self.sites or any(layer.new is not None for layer in self.running):
            return
        self.running = []
        for pool in self.pools.values():
            pool.settle(self.tokens)


def fits(slot: Tensor, x: Tensor) -> bool:
    """Whether new keys or values can enter ``slot``. Shapes: [B, H, any, D] each."""
    return (x.dtype, x.device) == (slot.dtype, slot.device) and all(x.shape[i] == slot.shape[i] for i in (0, 1, 3))


def holds(k: Tensor, v: Tensor) -> str:
    """What can enter the slots ``k`` and ``v``."""
    sizes = f"{k.shape[0]} rows, {k.shape[1]} kv heads and head_dim {k.shape[3]} / {v.shape[3]}"
    return f"a cache of {sizes}, {k.dtype} / {v.dtype} on {k.device}"


class CodedLayer:
    """One layer's codes, and the tokens that its attention has not read yet.

    Args:
        capacity: in tokens; None grows.

    ``slots``: what a compiled graph takes for the dense keys and values. ``length``: int64[], tokens held.
    """

    def __init__(self, cache: CodedCache, owner: Owner, capacity: int | None, length: Tensor):
        self.cache, self.owner, self.capacity, self.length = cache, owner, capacity, length
        self.slots = self._slots()
        self.new: NewTokens | None = None
        self.planned = False  # whether a plan has seen this layer as it is laid out
        owner.grows, owner.rope_seen = capacity is None, False
        cache.layers.append(self)

    @torch.inference_mode(False)
    def _slots(self) -> tuple[Tensor, Tensor]:
        g = self.owner.geometry
        lead = g.batch, g.heads, g.capacity
        return handles(self.owner, (*lead, g.k_dim), (*lead, g.v_dim))

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens; views of all keys and values with them. Shapes: [B, H, T, D], [B, H, T, Dv].

        Raises:
            IndexError: more tokens than the cache has room for; nothing was written.
            ValueError: another batch, other heads, another dtype or device than before.
        """
        owner = self.owner
        with _plain():
            welcome = all(map(fits, self.slots, (k, v)))
        if not welcome:
            raise ValueError(
                f"sphkv: keys {tuple(k.shape)} of {k.dtype} on {k.device} and values {tuple(v.shape)} of {v.dtype} on "
                f"{v.device} for {holds(*self.slots)}; expected the same; give a model of other shapes, another dtype "
                "or device a cache of its own"
            )
        tokens = k.shape[2]
        first = self.cache.begin(self, tokens)
        if self.capacity is not None and first + tokens > self.capacity:
            self.cache.running = []
            raise IndexError(
                f"sphkv: {tokens} tokens behind {first} exceed the cache's max_cache_len={self.capacity}; nothing was "
                f"written. Give max_cache_len={first + tokens} or more, or none, and it grows"
            )
        self.hold()
        if owner.shares and (excess := int(self.length) - first) > 0:  # of an interrupted step
            self.crop(excess)
        if first + tokens > owner.geometry.capacity:
            lay_out_anew([(owner, room_for(first + tokens), False)])
            self.slots, self.planned = self._slots(), False
        if not self.planned:
            owner.pool.reserve([owner], max(tokens, owner.pool.plan_every))
            self.planned = True
        self.new = NewTokens(self, k, v, first)
        return self.new.views()

    def hold(self) -> None:
        """Take the data back, if a graph that left the attention dense has it."""
        if not self.owner.holds_codes:
            k, v = self.slots
            with _plain():
                self.owner.take(k, v, int(self.length), None)
            self.owner.hold(k, v)

    def settle(self) -> None:
        """Take in what no attention has asked for."""
        if self.new is not None:
            self.new.enter(None, None)

    # ---- what a cache can be asked to do

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values, decoded. Shapes: -> [B, H, length, D], [B, H, length, Dv].

        Raises:
            RuntimeError: tokens were dropped, which no dense tensor can say.
        """
        self.settle()
        self.hold()
        return self.decoded(int(self.length))

    def decoded(self, columns: int) -> tuple[Tensor, Tensor]:
        """As :meth:`read`, of so many columns."""
        if gone := self.owner.dropped:
            raise RuntimeError(
                f"sphkv: {gone:,} tokens (over rows and kv heads) were dropped to fit the budget, so keys and values "
                "cannot be read as dense tensors; expected attention through torch's scaled_dot_product_attention "
                "(attn_implementation='sdpa')"
            )
        with _plain(), torch.no_grad():
            return dense(self.owner.state, self.owner.layout, columns)

    def reset(self) -> None:
        """Begin anew; shapes, budget and pages stay."""
        self.new, self.cache.running = None, []
        self.hold()
        self.owner.unshare()
        self.owner.forget()
        self.length.zero_()
        if self.owner.pool.retention is not None:
            self.owner.pool.retention.begin()
        self.owner.pool.queries = 0

    def crop(self, count: int) -> None:
        """Forget the newest ``count`` tokens. Of those behind the exact window, the rest of a span that is cut is
        decoded, and coded again later.

        Raises:
            RuntimeError: the window does not reach back so far, and the budget has let go of tokens there.
        """
        self.settle()
        self.hold()
        length, layout = int(self.length), self.owner.layout
        rows = self.owner.state.rows
        coded = rows[:, START].clamp(min=0) + layout.sink + rows[:, SPANS] * layout.span
        behind = bool(((rows[:, SPANS] > 0) & (coded > length - count)).any())
        if behind and layout.kept:
            exact = length - int(coded.max())
            raise RuntimeError(
                f"sphkv: crop of {count} tokens reaches behind the {exact} newest, which are exact; those before them "
                f"share a budget, and what it let go cannot come back. Crop {exact} or less, or reset()"
            )
        if behind:
            self.owner.unshare()
        self.owner.cut(length - count)
        self.length.fill_(length - count)

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was. Shapes: int64[rows].

        Raises:
            IndexError: no such row; nothing has changed.
        """
        self.settle()
        self.hold()
        g = self.owner.geometry
        rows = torch.arange(g.batch)[rows.cpu()].to(self.owner.state.rows.device)  # also what is boolean or negative
        self.owner.select(rows)
        if rows.shape[0] != g.batch:
            self.slots = self._slots()

    def __deepcopy__(self, memo: dict[int, Any]) -> CodedLayer:
        self.settle()
        self.hold()
        twin = CodedLayer.__new__(CodedLayer)
        memo[id(self)] = twin
        twin.cache, twin.capacity, twin.new = copy.deepcopy(self.cache, memo), self.capacity, None
        twin.planned = self.planned
        twin.length = copy.deepcopy(self.length, memo)
        twin.owner = copy.deepcopy(self.owner, memo)
        twin.slots = twin._slots()
        return twin
