"""Sites of one kind, seen as one: their states stand one behind the other, as rows of a larger batch.

A plan asks the device for little, hundreds of times over; of all of a model's layers together it asks as often as of
one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import STATE_FIELDS, Geometry, State

if TYPE_CHECKING:
    from sphkv_compile.runtime.ownership import Owner

MOST = 1 << 25
"""Slots of tokens that are seen at once: 128 MiB for every number of each."""
TABLES = ("table", "tiers", "held")


class Sites(NamedTuple):
    """Sites of equal layout, geometry and scale, and their state as one.

    Args:
        geometry: whose batch is that of all sites.
        state: a copy, where there is more than one site; the arena is theirs.
    """

    owners: list[Owner]
    state: State
    geometry: Geometry

    @property
    def layout(self) -> Layout:
        return self.owners[0].layout

    @property
    def scale(self) -> float | None:
        return self.owners[0].scale

    @property
    def rows(self) -> list[int]:
        """Rows of each site."""
        return [owner.geometry.batch for owner in self.owners]

    def now(self) -> Sites:
        """The same with the arena and the tables as they are by now."""
        state = stacked(self.owners, TABLES).state
        tables = {name: getattr(state, name) for name in TABLES}
        return self._replace(state=self.state._replace(arena=state.arena, **tables))

    def write_tables(self) -> None:
        """What changed in the tables, back to the sites."""
        if len(self.owners) > 1:
            for name in TABLES:
                theirs = [getattr(owner.state, name) for owner in self.owners]
                torch._foreach_copy_(theirs, list(getattr(self.state, name).split(self.rows)))


def stacked(owners: list[Owner], names: tuple[str, ...] = STATE_FIELDS[1:]) -> Sites:
    """Owners of one kind as one.

    Args:
        names: fields that are wanted; of others, the first site's stand there.
    """
    first = owners[0]
    if len(owners) == 1:
        return Sites(owners, first.state, first.geometry)
    fields = {name: torch.cat([getattr(owner.state, name) for owner in owners]) for name in names}
    geometry = first.geometry._replace(batch=sum(owner.geometry.batch for owner in owners))
    return Sites(owners, first.state._replace(**fields), geometry)


def together(owners: list[Owner], most: int = MOST) -> list[list[Owner]]:
    """Owners of one kind in groups, as few as there can be and nearly equal, each of ``most`` slots or of one owner."""
    kinds: dict[tuple, list[Owner]] = {}
    for owner in owners:
        kinds.setdefault((owner.layout, owner.geometry, owner.scale), []).append(owner)
    groups = []
    for (layout, _, _), kind in kinds.items():
        each = max(1, most // max(1, kind[0].state.table.numel() * layout.page))
        count = -(-len(kind) // each)
        groups += [kind[len(kind) * i // count : len(kind) * (i + 1) // count] for i in range(count)]
    return groups


def counters(owners: list[Owner], column: int) -> Tensor:
    """A counter of every row of all sites. Shapes: -> int64[rows]."""
    return torch.cat([owner.state.rows[:, column] for owner in owners])
