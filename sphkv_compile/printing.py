"""What rich lays out as tables, for print(), for files and for pipes: nothing is cut there."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

WIDE = 10_000
"""Columns of an output that has no width. A table takes as many as its content needs."""


def wide_console() -> Console:
    """A console as wide as the terminal; without one, or a width in ``COLUMNS``, so wide that nothing is cut."""
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


class Printed:
    """What has a ``__rich_console__`` is the same text to print()."""

    def __str__(self) -> str:
        return as_text(self)


def as_text(shown: Any) -> str:
    """What rich would print, without colours."""
    out = Console(width=wide_console().width, color_system=None, force_terminal=False, force_jupyter=False)
    with out.capture() as text:
        out.print(shown)
    return "\n".join(line.rstrip() for line in text.get().splitlines())
