"""The arena: one allocation of bytes, handed out as pages of any tier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sphkv_compile.storage.layout import UNIT


class ArenaFull(MemoryError):
    """No run of free bytes is long enough; nothing was taken."""


class Arena:
    """A fixed run of bytes from which pages are taken and to which they return.

    The bytes are allocated once, zeroed (an uninitialised radius could be NaN), and keep their address. Pages of equal
    size reuse each other's place; where none is free, the page comes from the tail, and where the tail is used up,
    free pages are merged and split, so that bytes freed by one tier serve any other.

    Args:
        nbytes: size; rounded up to whole units of 64 bytes.

    Units: sizes in bytes, offsets in units of 64 bytes.
    """

    @torch.inference_mode(False)  # the bytes may be written in that mode and outside of it
    def __init__(self, nbytes: int, device: torch.device | str = "cpu"):
        self.data = torch.zeros(-(-nbytes // UNIT) * UNIT, dtype=torch.uint8, device=device)
        self.tail = 0
        self.free_pages: dict[int, list[int]] = defaultdict(list)
        self.used = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.data.numel()

    def take(self, nbytes: int, count: int) -> list[int]:
        """Offsets of ``count`` pages of ``nbytes``.

        Raises:
            ArenaFull: not enough free bytes in long enough runs; nothing was taken.
        """
        units, merged = -(-nbytes // UNIT), False
        taken: list[int] = []
        while len(taken) < count:
            wanted = count - len(taken)
            pages, room = self.free_pages[units], (self.nbytes // UNIT - self.tail) // units
            if pages:
                taken += pages[-wanted:]
                del pages[-wanted:]
            elif room:
                taken += range(self.tail, self.tail + min(room, wanted) * units, units)
                self.tail += min(room, wanted) * units
            elif not merged:
                self._merge()
                merged = True
            elif parts := self._split(units, wanted):
                taken += parts
            else:
                free = self.nbytes - self.used - len(taken) * units * UNIT
                pages += taken
                raise ArenaFull(
                    f"arena of {self.nbytes} bytes: a page of {units * UNIT} bytes does not fit ({free} bytes are free)"
                )
        self.used += count * units * UNIT
        return taken

    def take_run(self, nbytes: int, count: int) -> int:
        """Offset of the first of ``count`` pages that lie one behind the other at the tail.

        Raises:
            ArenaFull: they do not fit there.
        """
        units = -(-nbytes // UNIT)
        if (self.tail + units * count) * UNIT > self.nbytes:
            raise ArenaFull(f"arena of {self.nbytes} bytes: {count} pages of {nbytes} bytes do not fit at its tail")
        offset, self.tail = self.tail, self.tail + units * count
        self.used += units * count * UNIT
        return offset

    def give(self, offsets: list[int], nbytes: int) -> None:
        """Return pages of ``nbytes``."""
        units = -(-nbytes // UNIT)
        self.free_pages[units] += offsets
        self.used -= len(offsets) * units * UNIT

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is taken and given inside holds only if nothing is raised."""
        before = self.tail, {units: list(pages) for units, pages in self.free_pages.items()}, self.used
        try:
            yield
        except BaseException:
            self.tail, pages, self.used = before
            self.free_pages = defaultdict(list, pages)
            raise

    def _merge(self) -> None:
        """Free pages that touch become one run, and the last of them the tail."""
        pages = [(units, offsets) for units, offsets in self.free_pages.items() if offsets]
        self.free_pages.clear()
        if not pages:
            return
        begin = torch.tensor([offset for _, offsets in pages for offset in offsets])
        size = torch.tensor([units for units, _ in pages]).repeat_interleave(torch.tensor([len(o) for _, o in pages]))
        begin, order = begin.sort()
        end = begin + size[order]
        apart = end[:-1] != begin[1:]
        first, last = torch.ones_like(begin, dtype=torch.bool), torch.ones_like(begin, dtype=torch.bool)
        first[1:], last[:-1] = apart, apart
        runs = list(zip(begin[first].tolist(), (end[last] - begin[first]).tolist()))
        if sum(runs[-1]) == self.tail:
            self.tail = runs.pop()[0]
        for offset, units in runs:
            self.free_pages[units].append(offset)

    def _split(self, units: int, wanted: int) -> list[int]:
        """As many of ``wanted`` pages as the shortest run that holds one gives; none if there is no such run."""
        fitting = [size for size, pages in self.free_pages.items() if size >= units and pages]
        if not fitting:
            return []
        size = min(fitting)
        offset, count = self.free_pages[size].pop(), min(size // units, wanted)
        if rest := size - count * units:
            self.free_pages[rest].append(offset + count * units)
        return list(range(offset, offset + count * units, units))
