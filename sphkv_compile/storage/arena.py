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

    def take(self, nbytes: int) -> int:
        """Offset of a page of ``nbytes``.

        Raises:
            ArenaFull: not enough free bytes in one run.
        """
        units = -(-nbytes // UNIT)
        if not self.free_pages[units] and (self.tail + units) * UNIT > self.nbytes:
            self._merge()
        if self.free_pages[units]:
            offset = self.free_pages[units].pop()
        elif (self.tail + units) * UNIT <= self.nbytes:
            offset, self.tail = self.tail, self.tail + units
        else:
            offset = self._split(units)
        self.used += units * UNIT
        return offset

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

    def give(self, offset: int, nbytes: int) -> None:
        """Return a page."""
        units = -(-nbytes // UNIT)
        self.free_pages[units].append(offset)
        self.used -= units * UNIT

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
        runs: list[list[int]] = []
        for offset, units in sorted((o, u) for u, pages in self.free_pages.items() for o in pages):
            if runs and runs[-1][0] + runs[-1][1] == offset:
                runs[-1][1] += units
            else:
                runs.append([offset, units])
        self.free_pages.clear()
        if runs and sum(runs[-1]) == self.tail:
            self.tail = runs.pop()[0]
        for offset, units in runs:
            self.free_pages[units].append(offset)

    def _split(self, units: int) -> int:
        fitting = [size for size, pages in self.free_pages.items() if size > units and pages]
        if not fitting:
            free = self.nbytes - self.used
            raise ArenaFull(
                f"arena of {self.nbytes} bytes: a page of {units * UNIT} bytes does not fit ({free} bytes are free)"
            )
        size = min(fitting)
        offset = self.free_pages[size].pop()
        self.free_pages[size - units].append(offset + units)
        return offset
