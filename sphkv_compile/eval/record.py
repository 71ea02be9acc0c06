"""The rows that were measured, and the files that keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Keys: model, document, method, budget (1 where all tokens stay), total_bytes_per_token, and what was found."""


class Record:
    """The rows of each task, in a file of its own that is written after every row, so that what was measured is kept.

    Args:
        out: the file of divergence; those of the others say what they are (:func:`record_of`).
        append: keep what the files hold, but what is measured again.
    """

    def __init__(self, out: Path, tasks: list[str], append: bool):
        self.out, self._rows = out, {task: dict[tuple, Row]() for task in tasks}
        out.parent.mkdir(parents=True, exist_ok=True)
        for task in tasks if append else ():
            if record_of(out, task).exists():
                self._rows[task] = {cell_of(row): row for row in json.loads(record_of(out, task).read_text())}

    def add(self, task: str, row: Row) -> None:
        """Of two rows of one cell the later counts."""
        self._rows[task][cell_of(row)] = row
        record_of(self.out, task).write_text("[\n" + ",\n".join(map(json.dumps, self.rows(task))) + "\n]\n")

    def rows(self, task: str) -> list[Row]:
        """Of one task."""
        return list(self._rows[task].values())


def cell_of(row: Row) -> tuple:
    """What was measured."""
    return row["model"], row["document"], row["method"], row["budget"]


def record_of(out: Path, task: str) -> Path:
    """The file of a task's rows: divergence has the name that was given, the others say what they are."""
    return out if task == "kl" else out.with_stem(f"{out.stem}_{task}")
