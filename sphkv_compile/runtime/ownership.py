"""Ownership: whose copy of a user's cache tensors is the true one, the dense tensor or the codes.

Models write their own cache tensors, and eager code may read them at any time: a second chat turn, ``reorder_cache``,
``deepcopy``, a debugger. So each (K, V) pair has an :class:`Owner`. While the codes hold the data, the dense storage is
released and the tensor's class is :class:`Guarded`: any eager use first decodes it back (export). The next compiled
call takes it over again (import), and re-uses every span whose dense content is still what its codes decode to, so that
no code is ever made from a decoded value.
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sphkv_compile.ops.append import append
from sphkv_compile.ops.pages import holding, with_positions
from sphkv_compile.ops.read import dense
from sphkv_compile.runtime.guarded import HEIRS, Guarded
from sphkv_compile.runtime.pool import CHANGES, Pool, arena_bytes, give_back, repeated, unshare
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, FAULT, FROZEN, LENGTH, SPANS, START, Geometry, State, empty_state

LOCK = threading.RLock()
OVERWRITES = {"zero_"}
"""Eager uses that read nothing: StaticCache.reset."""
_SERIAL = itertools.count()
_plain = torch._C.DisableTorchFunctionSubclass


class Owner:
    """The codes of one (K, V) pair, and who holds the data.

    Args:
        handles: the tensors are outputs of a growing cache, without storage of their own.
        scale: of the softmax at this site; the error certificates need it.

    ``frequencies``, once known: how far one token turns each pair of the rotary embedding, in radians. ``grows``: a
    dense cache in its place would be as long as its tokens. ``rope_seen``: a graph has shown how positions turn keys.
    """

    def __init__(
        self, layout: Layout, geometry: Geometry, pool: Pool, handles: bool = False, scale: float | None = None
    ):
        self.layout, self.geometry, self.pool, self.handles, self.scale = layout, geometry, pool, handles, scale
        self.state = empty_state(layout, geometry, pool.arena.data)
        self.holds_codes, self.shares, self.serial = False, False, next(_SERIAL)
        self.k_ref: Any = lambda: None
        self.v_ref: Any = lambda: None
        self.imports = self.exports = self.recoded_tokens = 0
        self.last_export = ""
        self.frequencies: Tensor | None = None
        self.grows, self.rope_seen = handles, True
        pool.owners.add(self)
        self._pages_go_back()

    def _pages_go_back(self) -> None:
        """Once I am dead. The garbage collector may come by in the midst of anything, so it only leaves a note."""
        state = self.state
        weakref.finalize(self, self.pool.dead.append, (state.table, state.tiers, self.layout, self.geometry))

    def learn_frequencies(self, angles: Tensor, position: int) -> None:
        """How far one token turns each rotary pair, from the angles of a call's tokens; ``frequencies`` is float32[R /
        2], or stays None where a single token at position 0 says nothing.

        Args:
            position: of the first of them in the longest row.

        Units: radians.

        Shapes: ``angles`` [B or 1, T, R or R / 2].
        """
        angles = angles.double()
        if angles.shape[-1] == self.layout.rotary_dim:  # of each pair twice: side by side, or one half and the other
            first, second = angles.chunk(2, -1)
            angles = first if torch.equal(first, second) else angles[..., ::2]
        if angles.shape[1] > 1:  # steps forward; padding stands still, or goes back
            steps = angles.diff(dim=1).clamp(min=0)
            count = (steps[..., :1] > 0).sum(1)
            row = int(count.argmax())
            found = steps[row].sum(0) / count[row].clamp(min=1)
        else:
            found = angles[:, 0].amax(0) / max(1, position)
        if bool(found[0] > 0):
            self.frequencies = found.float()

    def serves(self, layout: Layout) -> bool:
        """Whether a graph that stores as ``layout`` says may use these codes. The graph may know the rotary embedding
        where a cache that was filled in eager code does not: what is yet to be learnt goes by it."""
        if self.layout.stored != layout.stored:
            return False
        self.rope_seen = True
        if self.layout.rope == "none" != layout.rope:
            self.layout = layout
        return True

    # ---- import: dense -> codes

    def take(self, k: Tensor, v: Tensor, length: int, starts: list[int] | None) -> None:
        """Encode the dense content of columns 0..``length``, then hold the data.

        Args:
            starts: each row's first real column; None keeps what the state knows.

        Shapes: ``k`` [B, H, L, D], ``v`` [B, H, L, Dv].
        """
        with _plain(), torch.no_grad(), _disable_current_modes():
            base = self._keep_unchanged(k, v, length)
            first = int(self.state.rows[:, LENGTH].min()) if base is not None else 0
            column = first - (base or 0)
            if column < length:
                k_new, v_new = k[:, :, column:length], v[:, :, column:length]
                self.pool.reserve([self], length - column)
                known = [max(s, 0) for s in self.state.rows[:, START].tolist()]
                append(self.state, self.layout, None, k_new, v_new, first, starts or known)
        self.imports += 1
        self.pool.tokens_left = -1  # the next step plans
        self.pool.queries = 0  # those of these tokens nobody saw
        if base is None and self.pool.retention is not None:
            self.pool.retention.begin()

    def _keep_unchanged(self, k: Tensor, v: Tensor, length: int) -> int | None:
        """Cut the state back to the leading tokens whose codes still say what the dense cache says.

        Returns the position of column 0, or None when nothing is kept.
        """
        rows = self.state.rows
        if not self.exports or int(rows[:, LENGTH].max()) == 0:
            self.forget()
            return None
        base = int(rows[0, BASE])
        columns = min(k.shape[2], int(rows[:, LENGTH].max()) - base, length)
        if columns <= 0:
            self.forget()
            return None
        was_k, was_v = dense(self.state, self.layout, columns, base)
        same = (was_k == k[:, :, :columns]).all(-1).all(1) & (was_v == v[:, :, :columns]).all(-1).all(1)
        columns_of = torch.arange(columns, device=same.device) + base
        same |= columns_of < rows[:, START].clamp(min=0).unsqueeze(1)  # padding is not stored
        kept = int(same.all(0).int().cumprod(0).sum())
        if kept == 0:
            self.recoded_tokens += columns
            self.forget()
            return None
        end, begin = base + kept, rows[:, START].clamp(min=0) + self.layout.sink
        coded = begin + rows[:, SPANS] * self.layout.span
        if self.layout.kept and bool(
            (coded > end).any()
        ):  # whole spans alone can be reopened, and some of them are gone
            self.recoded_tokens += columns
            self.forget()
            return None
        cut = torch.where(coded > end, (end - begin).clamp(min=0) % self.layout.span, 0)  # reopened by the next append
        self.recoded_tokens += columns - kept + int(cut.max())
        rows[:, LENGTH] = end
        return base

    def forget(self) -> None:
        """Hold no token. Pages stay reserved."""
        rows = self.state.rows
        rows.zero_()
        rows[:, START] = -1
        self.state.positions.fill_(-1)
        self.state.held.zero_()
        self.state.moments.zero_()
        self.state.energy.zero_()

    def cut(self, length: int) -> None:
        """Hold the first ``length`` tokens only. A span that this cuts returns to the window, decoded."""
        if length == 0:
            self.forget()
            return
        nothing = self.state.exact_k[:, :, :0], self.state.exact_v[:, :, :0]
        with _plain(), torch.no_grad():
            append(self.state, self.layout, None, *nothing, length, [-1] * self.geometry.batch)

    def hold(self, k: Tensor, v: Tensor) -> None:
        """Become the owner of ``k`` and ``v``: their storage is released, and eager uses come here first."""
        self.k_ref, self.v_ref, self.holds_codes = weakref.ref(k), weakref.ref(v), True
        CHANGES[0] += 1
        with _plain(), torch.no_grad(), _disable_current_modes():
            for t in (k, v):
                t.untyped_storage().resize_(0)
                t.__dict__["_sphkv"] = self
                if type(t) is not Guarded:
                    t.__class__ = Guarded

    # ---- export: codes -> dense

    @property
    def dropped(self) -> int:
        """Coded tokens that are gone, over rows and kv heads."""
        if not self.layout.kept:
            return 0
        held = int((with_positions(self.state, self.layout).positions >= 0).sum())
        return int(self.state.rows[:, SPANS].sum()) * self.layout.span * self.geometry.heads - held

    def export(self, why: str) -> None:
        """Decode into the user's tensors; they hold the data from here on.

        Raises:
            RuntimeError: tokens were dropped, which no dense tensor can say; what overwrites the cache whole may.
        """
        with LOCK, _plain(), torch.no_grad(), _disable_current_modes():
            if not self.holds_codes:
                return
            if why not in OVERWRITES and (gone := self.dropped):
                raise RuntimeError(
                    f"sphkv: eager code ({why}) reads a cache of which {gone:,} tokens (over rows and kv heads) were "
                    "dropped to fit the budget; dense keys and values cannot say which. Go on through the compiled "
                    "model, which takes several tokens at once too, or begin anew (cache.reset())."
                )
            self.holds_codes, self.exports, self.last_export = False, self.exports + 1, why
            CHANGES[0] += 1
            frozen = self.state.rows[:, FROZEN]
            frozen.masked_fill_(frozen == FAULT, 1)  # what a faulty row holds is sound, and goes to eager code
            k, v = self.k_ref(), self.v_ref()
            columns = next((t.shape[2] for t in (k, v) if t is not None), 0)
            for t, content in zip((k, v), dense(self.state, self.layout, columns)):
                if t is not None:
                    _fill(t, content)

    def materialize(self, t: Tensor, why: str) -> None:
        """Give ``t`` its content back. A handle of an earlier step still reads what it was when it was made."""
        if t is self.k_ref() or t is self.v_ref():
            self.export(why)
        elif self.handles:
            with LOCK, _plain(), torch.no_grad(), _disable_current_modes():
                if not t.untyped_storage().nbytes():
                    both = dense(self.state, self.layout, t.shape[2])
                    _fill(t, both[0 if t.__dict__["_sphkv_side"] == "k" else 1])

    def relayout(self, capacity: int, rolling: bool) -> None:
        """Room for more columns. Contents, and the slots of the spans that are held, stay."""
        old, self.geometry = self.state, self.geometry._replace(capacity=capacity, rolling=rolling)
        state = empty_state(self.layout, self.geometry, self.pool.arena.data)
        for new, was in zip(state[1:], old[1:]):
            if new.shape == was.shape:
                new.copy_(was)
            else:
                new[:, :, : was.shape[2]] = was
        self.state = state
        CHANGES[0] += 1
        self._pages_go_back()
        old.table.fill_(-1)  # its pages now belong to the new table

    # ---- rows

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was: tables and the exact window move, pages do not. Rows that stem from
        one row share its pages until one of them is to be written. Shapes: int64[rows]."""
        old, g = self.state, self.geometry
        with _plain(), torch.no_grad(), _disable_current_modes(), torch.inference_mode(False):
            new = old._replace(**{name: getattr(old, name)[rows] for name in old._fields if name != "arena"})
            twice = repeated(new.table)
            new.table[twice & ~holding(new, self.layout)] = -1
            gone = ~torch.isin(old.table, new.table) & (old.table >= 0) & ~repeated(old.table)
            give_back(old.table[gone], old.tiers[gone], self.layout, g, self.pool.arena)
            self.shares = bool((twice & (new.table >= 0)).any())
            self._put(new, g._replace(batch=rows.shape[0]))
        if self.pool.retention is not None:
            self.pool.retention.select(self, rows)
        self.pool.tokens_left = -1  # the next step plans

    def unshare(self) -> None:
        """Every row its own pages."""
        if self.shares:
            self.pool.fit(lambda: unshare(self.state, self.layout, self.geometry, self.pool.arena))
            self.shares = False

    def _put(self, state: State, geometry: Geometry) -> None:
        """Another state of the same pool; one of the same shapes where the old one was, for captured graphs."""
        old, self.geometry = self.state, geometry
        if geometry.batch == old.rows.shape[0]:
            for here, now in zip(old[1:], state[1:]):
                here.copy_(now)
            return
        self.state = state
        CHANGES[0] += 1
        self._pages_go_back()
        old.table.fill_(-1)  # its pages now belong to the new table

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        twin = Owner(self.layout, self.geometry, copy.deepcopy(self.pool, memo), self.handles, self.scale)
        for new, was in zip(twin.state[1:], self.state[1:]):
            new.copy_(was)  # the copied arena has the same pages at the same offsets
        twin.grows, twin.rope_seen = self.grows, self.rope_seen
        twin.exports, twin.frequencies = 1, self.frequencies  # its tensors are dense until they are imported
        twin.shares = self.shares
        memo[id(self)] = twin
        return twin


def _fill(t: Tensor, content: Tensor) -> None:
    with torch.inference_mode(t.is_inference()):  # outside of that mode, its tensors cannot be written
        t.untyped_storage().resize_(t.numel() * t.element_size())
        t.copy_(content)


def heir_of(k: Tensor, v: Tensor, layout: Layout, memo: dict[int, Any]) -> Owner | None:
    """An owner for tensors that eager code has made of a cache's: it starts from a copy of the codes, and the import
    finds out how far they still hold."""
    (owner, rows), (other, other_rows) = (HEIRS.get(t, (None, None)) for t in (k, v))
    if owner is None or owner is not other or owner.layout != layout or (rows is None) != (other_rows is None):
        return None
    if not owner.handles:  # k and v live on, with an owner of their own
        HEIRS.pop(k)
        HEIRS.pop(v)
    g = owner.geometry
    batch = g.batch if rows is None else len(rows)
    if (batch, g.heads, g.k_dim, g.v_dim, g.k_dtype, g.v_dtype) != (
        *k.shape[:2], k.shape[3], v.shape[3], k.dtype, v.dtype,
    ) or not (owner.handles or g.capacity == k.shape[2]):  # fmt: skip
        return None
    with LOCK, _plain(), torch.no_grad(), _disable_current_modes():
        twin = copy.deepcopy(owner, memo)
        if rows is not None:
            twin.select(rows.to(twin.state.rows.device))
            twin.unshare()  # what a graph writes may be in a page that was coded already
        return twin


def handles(owner: Owner, k_shape: tuple, v_shape: tuple) -> tuple[Tensor, Tensor]:
    """Tensors without storage that stand for a grown cache; ``owner`` holds their data."""
    g = owner.geometry
    out = []
    with _plain(), torch.no_grad(), _disable_current_modes():
        for shape, dtype, side in ((k_shape, g.k_dtype, "k"), (v_shape, g.v_dtype, "v")):
            t = torch.empty(shape, dtype=dtype, device=owner.state.arena.device)  # its memory is released unused
            t.__dict__["_sphkv_side"] = side
            out.append(t)
    owner.hold(*out)
    return out[0], out[1]


def room_for(length: int) -> int:
    """Columns to allocate for a cache that grows: a power of two, so that growing is rare."""
    return max(1024, 1 << length.bit_length())


def lay_out_anew(owners: list[tuple[Owner, int, bool]]) -> None:
    """Give owners another capacity, in columns, or let their window roll; their arenas grow with them."""
    need: dict[int, int] = {}
    pools = {id(o.pool): o.pool for o, _, _ in owners}
    for owner, capacity, rolling in owners:
        wanted = owner.geometry._replace(capacity=capacity, rolling=rolling)
        extra = arena_bytes(owner.layout, wanted) - arena_bytes(owner.layout, owner.geometry)
        need[id(owner.pool)] = need.get(id(owner.pool), 0) + max(0, extra)
    for key, pool in pools.items():
        pool.resize(pool.arena.nbytes + need[key])
        pool.tokens_left = -1
    for owner, capacity, rolling in owners:
        owner.relayout(capacity, rolling)
