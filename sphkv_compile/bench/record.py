"""The record of a bench: one JSON file that says on what it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROW = ("what", "tier", "B", "L", "HKV", "G", "D", "us", "dense_us", "speedup", "rel_err", "bytes", "ceiling_tbps")
"""What every row of the attention bench holds. Units: microseconds, bytes, TB/s."""
MODEL_ROW = (
    "what", "tier", "B", "L", "tokens_per_s", "ms", "speedup", "peak_bytes", "kv_bytes", "ttft_s", "cudagraphs",
)  # fmt: skip
"""What every row of the model bench holds. Units: milliseconds a step, bytes, seconds."""


def header(device: str) -> dict[str, Any]:
    """Card or processor, versions, date."""
    names = ("torch", "triton", "transformers")
    return {"card": card(device), **{name: version(name) for name in names}, "date": time.strftime("%Y-%m-%d")}


def card(device: str) -> str:
    """What the device is called."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return torch.__version__ if package == "torch" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(record: dict[str, Any], bench: str, name: str | None, out: Path | None) -> Path | None:
    """Write ``<bench>_<name>.json`` into ``out``, or into the current folder; nothing without a name."""
    if name is None:
        return None
    folder = out or Path()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}_{name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)  # a run that is stopped leaves a whole record or none
    return path


def numbers(text: str, kind: Callable[[str], Any] = int) -> list[Any]:
    """``"1,8"`` -> [1, 8]. Raises: ValueError: something else than positive numbers of that kind."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if not min(found) > 0:
        example = "1,8" if kind is int else "0.5,2"
        raise ValueError(f"{text!r}: expected positive numbers, separated by commas, such as {example!r}")
    return found


def missing(row: dict[str, Any], keys: Sequence[str] = ROW) -> list[str]:
    """Keys that a row lacks."""
    return [key for key in keys if key not in row]


def attention_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Card, as :func:`short` calls it, and row of every measurement of the attention bench; of equal ones, the first
    record's."""
    seen = set()
    for path in sorted(folder.glob("attention*.json")):
        record = json.loads(path.read_text())
        for row in record["rows"]:
            key = record["card"], *(row.get(k) for k in ("what", "tier", "B", "L", "D", "spread", "ragged"))
            if key not in seen:
                seen.add(key)
                yield short(record["card"]), row


def short(card: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` -> ``"H100"``."""
    return card.removeprefix("NVIDIA ").split()[0]


def even(row: dict[str, Any]) -> bool:
    """Whether a row's lengths are equal and its logits the usual ones."""
    return not row.get("ragged") and row.get("spread", 2) == 2
