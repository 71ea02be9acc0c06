"""The parts of the README that are generated: ``python -m sphkv_compile.docs README.md`` brings them up to date."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from sphkv_compile.patterns import IDIOMS, REFUSALS
from sphkv_compile.runtime.layout import Layout
from sphkv_compile.spec import CacheSpec


def idiom_table() -> str:
    """What is matched, from the first line of each pattern's docstring."""
    rows = [f"| `{name}` | {(module.__doc__ or '').strip().splitlines()[0]} |" for name, module in IDIOMS.items()]
    return "\n".join(["| idiom | how the model writes its cache |", "|---|---|", *rows])


def refusal_table() -> str:
    """What stays dense, and why."""
    rows = [f"| `{code}` | {text} |" for code, text in REFUSALS.items()]
    return "\n".join(["| code | the attention stays dense because |", "|---|---|", *rows])


def metadata_table() -> str:
    """Bytes per token and kv head beyond the window. Units: bytes."""
    lines = ["| tier | D | codes | metadata | total | of bf16 |", "|---|---|---|---|---|---|"]
    for bits in ("K8V4", "K4V4", "K4V2", "K3V2", "K2V2"):
        for dim in (64, 128):
            layout = Layout.of(CacheSpec(bits=bits))
            f = layout.fields(layout.tiers[0], dim, dim, (2, 2))
            beside = f.metadata + 4 + 5 / layout.page + (dim + 4) / layout.span
            total = f.k + f.v + beside
            lines.append(f"| {bits} | {dim} | {f.k + f.v} | {beside:.2f} | {total:.2f} | {total / (4 * dim):.3f} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {"idioms": idiom_table, "refusals": refusal_table, "metadata": metadata_table}


def rendered(text: str) -> str:
    """``text`` with every generated part brought up to date.

    Raises:
        ValueError: a part has no place in the text.
    """
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise ValueError(f"no place for the part {name!r}: expected '<!-- {name} -->' and '<!-- /{name} -->'")
        text = text[: found.end(1)] + part() + "\n" + text[found.start(2) :]
    return text


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rendered(path.read_text()))
