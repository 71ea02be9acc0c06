"""Retention under a budget: what recent queries say of the tokens that are held, and what a policy makes of it.

Runs between steps. Nothing is decided before enough queries were seen, so a prompt that eager code has filled in, whose
queries nobody saw, is held whole for the first steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sphkv_compile.ops.pages import trimmed, value_lengths, with_positions
from sphkv_compile.ops.statistics import Seen, mean_attention, newest_queries, observe, realised_losses
from sphkv_compile.policies import DROP, POLICIES, Held, Policy
from sphkv_compile.policies.choice import at_one_tier
from sphkv_compile.policies.shares import GRID, keepers, shares, whole
from sphkv_compile.runtime.budget import for_tokens
from sphkv_compile.runtime.certificate import kappa
from sphkv_compile.runtime.pool import Pool, arena_bytes, page_bytes
from sphkv_compile.runtime.retain import Done, rearrange
from sphkv_compile.runtime.sites import Sites, counters, stacked, together
from sphkv_compile.spec import CacheSpec, parse_bytes
from sphkv_compile.storage.layout import MEMORY, UNIT
from sphkv_compile.storage.state import LENGTH

if TYPE_CHECKING:
    from sphkv_compile.runtime.ownership import Owner


NOTHING = Done(0, 0, 0, 0, 0)
KEEP_BITS = 4
"""Bits of keys and values that a head which keeps every token has bytes for, where the menu has such a tier: with K4V2
for all their tokens such heads lose more than they did by dropping some. Geometric mean of KL on two documents that are
not reported (SmolLM2, 2,048 tokens, 12.5 % of bfloat16's bytes, a fifth of the heads): .0034 with K4V4, .0066 with
K4V2, .0035 where no head keeps all: examples/eval/keep_all.json."""


@dataclass
class Retention:
    """The budget of one pool, and how heads share it.

    Args:
        budget: of pages, anchors, positions, statistics and page tables of all sites of the pool.
        keep_all_heads: the share of heads that should keep every token.
        done: by all plans so far.
        keeps: the heads that do, of each site, once queries have said which; nothing where none should.

    Shapes: ``keeps`` bool[B, H] of each.

    Units: bytes.
    """

    policy: Policy
    budget: int
    keep_all_heads: float = 0.0
    done: Done = NOTHING
    keeps: weakref.WeakKeyDictionary[Owner, Tensor] = field(default_factory=weakref.WeakKeyDictionary)
    _kappas: weakref.WeakKeyDictionary[Owner, Tensor] = field(default_factory=weakref.WeakKeyDictionary)
    _shares: weakref.WeakKeyDictionary[Owner, Tensor] = field(default_factory=weakref.WeakKeyDictionary)

    @classmethod
    def of(cls, spec: CacheSpec) -> Retention:
        """As a spec says whose budget is resolved to bytes."""
        policy = POLICIES[spec.policy]() if isinstance(spec.policy, str) else spec.policy
        return cls(policy, parse_bytes(spec.budget or 0), spec.keep_all_heads)

    def anew(self) -> Retention:
        """The same, of a cache about which nothing is known."""
        return Retention(self.policy, self.budget, self.keep_all_heads)

    def begin(self) -> None:
        """Another prompt: heads may lose otherwise."""
        self.keeps.clear()
        self._shares.clear()
        self._kappas.clear()

    def known(self, owner: Owner) -> dict[str, Tensor]:
        """What was learnt of the owner's heads. Shapes: [B, H] each."""
        return {name: what[owner] for name, what in self._learnt().items() if owner in what}

    def learn(self, owner: Owner, known: dict[str, Tensor]) -> None:
        """The inverse of :meth:`known`."""
        for name, value in known.items():
            self._learnt()[name][owner] = value

    def _learnt(self) -> dict[str, weakref.WeakKeyDictionary[Owner, Tensor]]:
        return {"keeps": self.keeps, "shares": self._shares, "kappas": self._kappas}

    def select(self, owner: Owner, rows: Tensor) -> None:
        """Row i of ``owner`` is now what row ``rows[i]`` was. Shapes: int64[rows]."""
        self.learn(owner, {name: value[rows] for name, value in self.known(owner).items()})

    def plan(self, pool: Pool, owners: list[Owner]) -> None:
        """Bring ``owners`` within the budget, if enough queries were seen since the last time."""
        length = int(counters(owners, LENGTH).max()) if owners else 0
        count = min(pool.queries, MEMORY, length)
        if not count or count < min(MEMORY, pool.plan_every, length):
            return
        pool.queries = 0
        room = self.room(pool)
        each = self._equal(pool, for_tokens(room))
        seen: Iterable[tuple[Sites, Seen]] = self._observe(owners, count)
        if count == MEMORY and getattr(self.policy, "shares", False) and not len(self._shares):
            seen = found = list(seen)
            self._share(found, each, count, self.wanted(pool))
        for sites, known in seen:
            self._retain(pool, sites, known, each[sites.owners[0]])
        limit = room + self.aside(pool)
        if pool.arena.nbytes > limit:
            pool.resize(limit)

    def room(self, pool: Pool) -> int:
        """What the budget leaves for pages of kept tokens, and the bytes that are free between them."""
        tables = sum(owner.state.table_bytes for owner in pool.members if owner.layout.kept)
        return max(0, (self.budget - tables) // UNIT * UNIT)

    def wanted(self, pool: Pool) -> int:
        """How many heads should keep every token."""
        kept = [owner.geometry for owner in pool.members if owner.layout.kept]
        return round(self.keep_all_heads * sum(g.batch * g.heads for g in kept))

    def aside(self, pool: Pool) -> int:
        """Bytes of the arena that do not grow with the length and come on top of the budget, as the window does: pages
        into which its tokens are coded until the next plan, and those of sliding windows."""
        total = 0
        for owner in pool.members:
            layout, g = owner.layout, owner.geometry
            if layout.kept:
                spans = min(layout.spans(g.capacity, False), -(-pool.plan_every // layout.span))
                total += g.batch * g.heads * spans * layout.pages_per_span * page_bytes(layout, g)
            else:
                total += arena_bytes(layout, g)
        return total

    def _equal(self, pool: Pool, room: int) -> dict[Owner, float]:
        """Bytes of an equal share of a head of each owner: in proportion to its dense cache."""
        dense = {owner: owner.geometry.dense_bytes for owner in pool.members if owner.layout.kept}
        total = max(1, sum(dense.values()))
        return {o: room * dense[o] / total / (o.geometry.batch * o.geometry.heads) for o in dense}

    def _observe(self, owners: list[Owner], count: int) -> Iterator[tuple[Sites, Seen]]:
        """One kind after the other, with the positions of what they hold, and nothing behind it in the tables."""
        for group in together(owners):
            sites = stacked(group)
            sites = sites._replace(state=trimmed(sites.state))
            seen = self._look(sites, count)
            yield sites._replace(state=sites.state._replace(positions=seen.positions)), seen

    def _look(self, sites: Sites, count: int) -> Seen:
        return observe(sites.state, sites.layout, count, sites.scale, self._frequencies(sites))

    def _held(self, sites: Sites, seen: Seen) -> Held:
        state, layout, g = sites.state, sites.layout, sites.geometry
        return Held(
            seen.positions, state.tiers, state.rows[:, LENGTH], layout.tiers,
            tuple(page_bytes(layout, g, tier) for tier in range(len(layout.tiers))), seen.fresh, seen.mean, seen.recent,
            seen.expected, seen.lengths, self._known(sites, self._kappas),
        )  # fmt: skip

    def _frequencies(self, sites: Sites) -> Tensor | None:
        """Of each row's rotary embedding; None where they are not known, or the policy asks for nothing expected.

        Shapes: -> float32[B, rotary_dim / 2].
        """
        known = [(owner.frequencies, owner.geometry.batch) for owner in sites.owners if owner.frequencies is not None]
        if len(known) < len(sites.owners) or not getattr(self.policy, "expects", False):
            return None
        return torch.cat([own.expand(batch, -1) for own, batch in known])

    def _known(self, sites: Sites, what: weakref.WeakKeyDictionary[Owner, Tensor]) -> Tensor | None:
        """Shapes: -> float32[B, H] of all the sites; None if nothing is known."""
        return torch.cat([what[owner] for owner in sites.owners]) if sites.owners[0] in what else None

    def _budget(self, sites: Sites, each: float) -> Tensor:
        """In pages of the narrowest tier, since less than one of them buys nothing. Shapes: -> int64[B, H]."""
        held = sites.state.held
        share = self._known(sites, self._shares)
        wanted = torch.full(held.shape[:2], each, device=held.device) if share is None else each * share
        if (keeps := self._known(sites, self.keeps)) is not None:
            wanted = torch.where(keeps, float(whole_bytes(sites)), wanted)
        narrowest = page_bytes(sites.layout, sites.geometry, len(sites.layout.tiers) - 1)
        return whole(wanted.flatten(), narrowest).view(wanted.shape)

    def _share(self, found: list[tuple[Sites, Seen]], each: dict[Owner, float], count: int, keep: int) -> None:
        """Which heads keep every token, and the shares of the others, once."""
        losses, sizes = [], []
        for sites, seen in found:
            equal = each[sites.owners[0]]
            losses.append(self._losses(sites, self._bought(sites, seen, equal), count).flatten(0, 1))
            sizes.append(head_bytes(sites, equal))
            self._kappas.update(zip(sites.owners, kappa(sites.state, sites.layout, sites.scale).split(sites.rows)))
        counts = [len(x) for x in losses]
        lost, (equals, needs, least) = torch.cat(losses), torch.cat(sizes).unbind(-1)
        keeps = keepers(lost, needs, least, float(equals.sum()), keep)
        others, parts = ~keeps, torch.ones_like(lost[:, 0])
        left = (equals.sum() - needs[keeps].sum()) / equals[others].sum()
        parts[others] = shares(lost[others], equals[others].float(), float(left))
        for (sites, _), part, own in zip(found, parts.split(counts), keeps.split(counts)):
            heads = sites.geometry.heads
            self._shares.update(zip(sites.owners, part.view(-1, heads).split(sites.rows)))
            if keep:
                self.keeps.update(zip(sites.owners, own.view(-1, heads).split(sites.rows)))

    def _bought(self, sites: Sites, seen: Seen, equal: float) -> Tensor:
        """How many tokens each share of ``GRID`` buys a head: at the prices of the tiers that the policy chooses for an
        equal one. Shapes: -> int64[B, H, len(GRID)]."""
        known = self._held(sites, seen)
        choice = self.policy.plan(known, self._budget(sites, equal))
        price = torch.tensor(known.prices, device=choice.device) / sites.layout.page
        stays = (choice != DROP) & (known.positions >= 0)
        paid = torch.where(stays, price[torch.where(stays, choice, 0).long()], 0.0)
        mean_price = paid.sum((2, 3)) / stays.sum((2, 3)).clamp(min=1)
        return (equal * torch.tensor(GRID, device=price.device) / mean_price.clamp(min=1e-3).unsqueeze(-1)).long()

    def _losses(self, sites: Sites, keep: Tensor, count: int) -> Tensor:
        """What the second half of the newest queries would have lost, had the first half chosen so many tokens.

        Shapes: ``keep`` int64[B, H, S] -> float32[B, H, S].
        """
        state, layout, half = sites.state, sites.layout, count // 2
        end = int(state.rows[:, LENGTH].max())
        worth = mean_worth(sites, newest_queries(state, end - count, end - half), end - count)
        later = newest_queries(state, end - half, end)
        return realised_losses(state, layout, worth, keep, later, end - half, sites.scale)

    def _retain(self, pool: Pool, sites: Sites, seen: Seen, each: float) -> None:
        held, budget = self._held(sites, seen), self._budget(sites, each)
        choice = self.policy.plan(held, budget)
        if (keeps := self._known(sites, self.keeps)) is not None:
            all_tokens, fits = at_one_tier(held, budget)
            choice = torch.where(fits & keeps[..., None, None], all_tokens, choice)

        def apply() -> Done:  # once more, if the arena was laid out anew in between
            now = sites.now()
            done = rearrange(now.state, now.layout, now.geometry, pool.arena, choice)
            now.write_tables()
            return done

        self.done = Done(*map(sum, zip(self.done, pool.fit(apply))))


def whole_bytes(sites: Sites) -> int:
    """Bytes with which a head keeps every token up to the capacity, at the narrowest tier of ``KEEP_BITS`` or more."""
    layout, g = sites.layout, sites.geometry
    wide = [tier for tier, own in enumerate(layout.tiers) if min(own.k_bits, own.v_bits) >= KEEP_BITS]
    return layout.spans(g.capacity, False) * layout.pages_per_span * page_bytes(layout, g, max(wide, default=0))


def head_bytes(sites: Sites, equal: float) -> Tensor:
    """Of each head: an equal share, what keeps every token, and the least, a page of each tier.

    Shapes: -> float64[B * H, 3].
    """
    layout, g = sites.layout, sites.geometry
    least = sum(page_bytes(layout, g, tier) for tier in range(len(layout.tiers)))
    one = torch.tensor([equal, whole_bytes(sites), least], dtype=torch.float64, device=sites.state.table.device)
    return one.expand(g.batch * g.heads, 3)


def mean_worth(sites: Sites, queries: Tensor, first: int) -> Tensor:
    """What queries paid to each token, times the length of its value; -1 where there is none.

    Shapes: ``queries`` [B, HQ, T, D] -> float32[B, H, P, page].
    """
    state, layout = sites.state, sites.layout
    at = torch.arange(first, first + queries.shape[2], device=queries.device)
    paid = mean_attention(state, layout, queries, at, sites.scale)[0] * value_lengths(state, layout)
    return torch.where(with_positions(state, layout).positions >= 0, paid, -1.0)
