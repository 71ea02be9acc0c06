"""The examples are no installed package: the repository root has to be importable."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str, add_special_tokens: bool = True):
        return type("Encoded", (), {"input_ids": [ord(letter) % 128 for letter in text]})

    def batch_decode(self, rows: Any, **options: bool) -> list[str]:
        return ["".join(map(chr, row)) for row in rows.tolist()]


@pytest.fixture
def letters() -> Letters:
    return Letters()
