"""The runner: what is called at every step in place of the compiled graph. It finds the codes that belong to the user's
cache tensors, feeds them to the graph, and hands handles back for caches that grow."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from sphkv_compile.ops.append import visible
from sphkv_compile.runtime.convention import Binding, Rewritten
from sphkv_compile.runtime.guarded import Guarded, exclusive, owner_of, restore
from sphkv_compile.runtime.log import warn_once
from sphkv_compile.runtime.ownership import LOCK, Owner, handles, heir_of, lay_out_anew, room_for
from sphkv_compile.runtime.pool import CHANGES, Pool, arena_bytes
from sphkv_compile.runtime.retention import Retention
from sphkv_compile.spec import CacheSpec, SiteRefused
from sphkv_compile.storage.layout import UNIT
from sphkv_compile.storage.state import Geometry

_plain = torch._C.DisableTorchFunctionSubclass


class Recent:
    """What a call found, for the next call in the same thread: cache tensors by identity, and the state behind them.

    It is cleared when any of the tensors dies, so that a cache which its user drops is freed, and an identity is never
    that of a later object.

    Args:
        changes: :data:`CHANGES` at that time.
    """

    def __init__(self, tensors: list[Tensor], owners: list[Owner]):
        self.identities, self.owners = list(map(id, tensors)), owners
        self.pools = list({id(o.pool): o.pool for o in owners}.values())
        self.read()
        me = weakref.ref(self)  # the tensors must not keep this alive either

        def clear(_: Any) -> None:
            if (alive := me()) is not None:
                alive.identities, alive.owners, alive.state, alive.pools = [], [], [], []

        self.watched = [weakref.ref(t, clear) for t in tensors]

    def read(self) -> None:
        """The states as they are now: a plan may have laid them out anew."""
        self.changes = CHANGES[0]
        self.state: list[Tensor] = [t for owner in self.owners for t in owner.state]


class Runner:
    """Boxed callable of one compiled graph.

    Args:
        run: the compiled, rewritten graph.
        dense: the graph as it was, interpreted: for a call whose tensors cannot be owned.
        prologue: computes, from the original inputs, each site's first position, mask and rotary angles; only imports
            need it.
        token_count: new tokens of a call, from its inputs.
        lookout: inputs that may be another graph's cache and must be made dense first.
    """

    _boxed_call = True

    def __init__(
        self,
        run: Callable,
        dense: GraphModule,
        prologue: GraphModule,
        rewritten: Rewritten,
        token_count: Callable[[list], int],
        lookout: list[int],
        spec: CacheSpec,
    ):
        self.run, self.dense, self.prologue, self.rewritten = run, dense, prologue, rewritten
        self.token_count, self.lookout, self.spec = token_count, lookout, spec
        self.grows = any(b.outputs for b in rewritten.bindings)
        self.cache_inputs = [i for b in rewritten.bindings for i in (b.k_input, b.v_input)]
        self.local = threading.local()

    def __call__(self, args: list) -> Any:
        release_others(args, self.lookout)
        recent: Recent | None = getattr(self.local, "recent", None)
        tokens = self.token_count(args)
        if self.grows or recent is None or not self._comes_again(recent, args):
            owners = self._find_owners(args)
            if owners is None:
                return self._run_dense(args)
            if self.grows:
                return self._run_growing(args, owners, tokens)
            recent = self.local.recent = Recent([args[i] for i in self.cache_inputs], owners)
        for pool in recent.pools:
            pool.step(tokens)
        if recent.changes != CHANGES[0]:
            recent.read()
        call = [args[i] for i in self.rewritten.kept]
        call += recent.state
        args.clear()
        with _plain():
            out = self.run(call)
        for pool in recent.pools:
            pool.settle(tokens)
        return out

    def _comes_again(self, recent: Recent, args: list) -> bool:
        """Whether these are the tensors of the last call, and nothing has changed hands since."""
        return recent.changes == CHANGES[0] and recent.identities == [id(args[i]) for i in self.cache_inputs]

    def _run_growing(self, args: list, owners: list[Owner], tokens: int) -> list:
        """A cache that grows: room for the new tokens first, handles of the new length last."""
        grown = [(args[b.k_input].shape, args[b.v_input].shape) for b in self.rewritten.bindings]
        self._make_room(owners, [k[2] + tokens for k, _ in grown])
        for pool in {id(o.pool): o.pool for o in owners}.values():
            pool.step(tokens)
        call = [args[i] for i in self.rewritten.kept] + [t for owner in owners for t in owner.state]
        args.clear()
        with _plain():
            out = list(self.run(call))
        for binding, owner, (k, v) in zip(self.rewritten.bindings, owners, grown):
            if binding.outputs:
                longer = [(*shape[:2], shape[2] + tokens, shape[3]) for shape in (k, v)]
                out[binding.outputs[0]], out[binding.outputs[1]] = handles(owner, *longer)
        return out

    # ---- the slow way, when a cache is met for the first time or comes back from eager code

    def _find_owners(self, args: list) -> list[Owner] | None:
        """Owners for every site, imported where the dense tensors hold the data; None if one cannot be owned."""
        with LOCK:
            bindings = self.rewritten.bindings
            pairs = [(args[b.k_input], args[b.v_input]) for b in bindings]
            memo: dict[int, Any] = {}  # sites that take over copied codes share the copied pool
            owners: list[Any] = [_usable_owner(b, *pair, memo) for b, pair in zip(bindings, pairs)]
            dense = [i for i, owner in enumerate(owners) if owner is None or not owner.holds_codes]
            coded = [i for i in range(len(owners)) if i not in dense]
            strange = [i for i in coded if owners[i].layout.kept and owners[i].frequencies is None]
            for i in dense:
                if not bindings[i].outputs and not exclusive(*pairs[i]):
                    self._refuse_shared(bindings[i])
                    return None
            missing = [i for i, owner in enumerate(owners) if owner is None]
            self._create(missing, pairs, owners)
            self._make_rolling(owners)
            self._make_room(owners, [k.shape[2] for k, _ in pairs])
            if dense or strange:
                self._meet(dense, strange, pairs, owners, args)
            return owners

    def _create(self, missing: list[int], pairs: list, owners: list) -> None:
        if not missing:
            return
        bindings, spec = self.rewritten.bindings, self.spec
        shapes = [_geometry(bindings[i], *pairs[i]) for i in missing]
        nbytes = sum(arena_bytes(bindings[i].layout, g) for i, g in zip(missing, shapes))
        retention = None
        if spec.chooses:
            retention = Retention.of(spec)
            nbytes = UNIT  # what is needed is taken, within the budget once queries say what matters
        pool = Pool(nbytes, spec.plan_every, pairs[missing[0]][0].device, retention)
        for i, geometry in zip(missing, shapes):
            owners[i] = Owner(bindings[i].layout, geometry, pool, bool(bindings[i].outputs), bindings[i].scale)

    def _make_rolling(self, owners: list[Owner]) -> None:
        """A window that has filled starts to roll: it needs a place for the span that is partly out of sight."""
        turned = [
            (o, o.geometry.capacity, True)
            for o, b in zip(owners, self.rewritten.bindings)
            if b.rolling and not o.geometry.rolling
        ]
        lay_out_anew(turned)

    def _make_room(self, owners: list[Owner], lengths: list[int]) -> None:
        small = [(o, room_for(n), False) for o, n in zip(owners, lengths) if o.handles and n > o.geometry.capacity]
        lay_out_anew(small)

    def _meet(self, dense: list[int], strange: list[int], pairs: list, owners: list[Owner], args: list) -> None:
        """Import what is dense; of all that may drop tokens learn how a token turns, also of what never was dense."""
        with _plain(), torch.no_grad(), _disable_current_modes():
            facts = self.prologue(*args)
        for i in dense + strange:
            where, mask, angles = facts[3 * i : 3 * i + 3]
            binding, (k, v) = self.rewritten.bindings[i], pairs[i]
            length = (
                k.shape[2] if where is None else int(where.flatten()[0]) if isinstance(where, Tensor) else int(where)
            )
            first = _first_real(mask, length, k.shape[0], binding)
            if i in dense:
                owners[i].take(k, v, length, first)
            if angles is not None and owners[i].layout.kept:
                owners[i].learn_frequencies(angles, length - min(first or [0]))
            if i in strange:
                continue
            if not binding.outputs:
                owners[i].hold(k, v)
            else:
                owners[i].holds_codes = True
                owners[i].k_ref, owners[i].v_ref = weakref.ref(k), weakref.ref(v)

    def _refuse_shared(self, binding: Binding) -> None:
        """Raises: SiteRefused: under ``strict=True``."""
        why = (
            f"the cache of the attention at {binding.source} shares its memory with another tensor, so it cannot be "
            "replaced by codes, and the call runs dense, uncompiled; give K and V storage of their own (.clone())"
        )
        if self.spec.strict:
            raise SiteRefused(f"strict=True, and {why}")
        warn_once(("shared storage", binding.source), why)

    def _run_dense(self, args: list) -> Any:
        for x in args:
            if type(x) is Guarded:
                restore(x, "a call that runs dense")
        plain = [x.as_subclass(Tensor) if type(x) is Guarded else x for x in args]
        args.clear()
        with _plain():
            return self.dense(*plain)


def release_others(args: list, lookout: list[int]) -> None:
    """Make dense what another graph's codes hold and this graph reads as it is."""
    for i in lookout:
        if type(args[i]) is Guarded:
            restore(args[i], "a graph that reads the cache without matching it")
            with _plain():
                args[i] = args[i].as_subclass(Tensor)


def _usable_owner(binding: Binding, k: Tensor, v: Tensor, memo: dict[int, Any]) -> Owner | None:
    """The pair's owner, if it stores as this graph wants; another's codes are decoded first."""
    owner = owner_of(k)
    if owner is not None and owner.k_ref() is k and owner.v_ref() is v and owner.serves(binding.layout):
        return owner
    for t in (k, v):
        if type(t) is Guarded:
            restore(t, "a graph that stores the cache otherwise")
    return heir_of(k, v, binding.layout, memo)


def _geometry(binding: Binding, k: Tensor, v: Tensor) -> Geometry:
    b, h, length, d = k.shape
    capacity = room_for(length) if binding.outputs else length
    return Geometry(b, h, capacity, d, v.shape[-1], k.dtype, v.dtype, binding.rolling, binding.group)


def _first_real(mask: Tensor | None, length: int, batch: int, binding: Binding) -> list[int] | None:
    """Each row's first column that some query of this step sees, among those held already."""
    if mask is None or binding.rolling or length == 0:
        return [0] * batch if length else None
    seen = visible(mask[..., :length]).flatten(1, 2).any(1)
    first = torch.where(seen.any(-1), seen.int().argmax(-1), -1).tolist()
    return first * batch if len(first) == 1 else first
