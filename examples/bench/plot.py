"""The roofline: time of one attention against the bytes that it has to read, from the records; ``make docs`` draws it.

python examples/bench/plot.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sphkv_compile.bench.record import attention_rows, even

HERE = Path(__file__).parent
Row = dict[str, Any]


def rows(folder: Path, dim: int = 128) -> dict[str, list[Row]]:
    """Card -> its rows at even lengths and the usual logits."""
    found: dict[str, list[Row]] = defaultdict(list)
    for card, row in attention_rows(folder):
        if row["D"] == dim and even(row):
            found[card].append(row)
    return dict(found)


def series(card: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Name -> its points: bytes read, microseconds. Dense once per shape, our tiers, then peers."""
    points: dict[str, set[tuple[float, float]]] = {"dense (flash or cuDNN)": set()}
    for row in sorted(card, key=lambda row: row["what"] != "sphkv"):
        dense = 4.0 * row["B"] * row["HKV"] * row["L"] * row["D"]
        points["dense (flash or cuDNN)"].add((dense, row["dense_us"]))
        name = row["tier"] if row["what"] == "sphkv" else row["what"]
        points.setdefault(name, set()).add((float(row["bytes"]), row["us"]))
    return {name: sorted(found) for name, found in points.items()}


def plot(cards: dict[str, list[Row]], path: Path) -> bool:
    """One panel per card. False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.5 * len(cards), 4.6), layout="constrained")
    for axes, (card, found) in zip(figure.subplots(1, len(cards), squeeze=False)[0], cards.items()):
        lines = series(found)
        for marker, (name, points) in zip("osv^D<>pXP*", lines.items()):
            x, y = zip(*points)
            axes.plot([b / 2**20 for b in x], y, marker=marker, label=name, alpha=0.9, markersize=5)
        spread = sorted(b for points in lines.values() for b, _ in points)
        ceiling = max(row["ceiling_tbps"] for row in found)
        ends = spread[0], spread[-1]
        axes.plot(
            [b / 2**20 for b in ends], [b / ceiling / 1e6 for b in ends], "k--", label=f"reads {ceiling:.2f} TB/s"
        )
        axes.set(
            xscale="log", yscale="log", title=f"{card}, one attention of a decode step, head_dim 128",
            xlabel="MiB that a step reads", ylabel="microseconds",
        )  # fmt: skip
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return True


if __name__ == "__main__":
    done = plot(rows(HERE / "records"), HERE / "roofline.png")
    print(HERE / "roofline.png" if done else "no plot: pip install matplotlib")
