"""From records to the table, the verdicts and the plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]
"""Keys: model, document, method, k_bits, v_bits, total_bits, kl (nats per token), ppl_delta (coded less dense)."""

FAMILIES = {"sphkv": "sphkv", "kivi": "KIVI", "turboquant": "TurboQuant-style"}
TARGETS = (  # our widths, the reference setting, the largest ratio of KL to reach
    ((4, 4), ("kivi-g64", 4, 4), 0.8),
    ((3, 2), ("kivi-g32", 2, 2), 0.3),
    ((4, 4), ("turboquant", 4, 4), 0.5),
)


def family(method: str) -> str:
    """``"kivi-g64"`` -> ``"kivi"``."""
    return method.split("-")[0]


def geometric_means(rows: Iterable[Row], model: str) -> dict[tuple[str, int, int], tuple[float, float]]:
    """(method, k_bits, v_bits) -> (total bits, geometric mean of KL over the model's documents)."""
    found: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row["model"] == model:
            found.setdefault((row["method"], row["k_bits"], row["v_bits"]), []).append(row)
    return {
        key: (group[0]["total_bits"], math.exp(sum(math.log(r["kl"]) for r in group) / len(group)))
        for key, group in found.items()
    }


def at_equal_bits(points: Sequence[tuple[float, float]], bits: float) -> float:
    """KL at ``bits`` on the lower convex hull of (total bits, log KL): the best that mixing the settings could reach.

    Below its cheapest setting a reference keeps that setting's KL: it is given the bits that it cannot save.

    Raises:
        ValueError: ``bits`` lies above the dearest setting, where nothing was measured.
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted((x, math.log(kl)) for x, kl in points):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (x, y)):
            hull.pop()
        hull.append((x, y))
    if bits <= hull[0][0]:
        return math.exp(hull[0][1])
    for left, right in pairwise(hull):
        if bits <= right[0]:
            return math.exp(left[1] + _slope(left, right) * (bits - left[0]))
    raise ValueError(f"{bits:.3f} bits: the reference was measured up to {hull[-1][0]:.3f} only")


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else math.copysign(math.inf, b[1] - a[1])


def width_table(rows: Sequence[Row], model: str) -> Table:
    """Our widths beside both references at equal total bits."""
    means = geometric_means(rows, model)
    documents = len({row["document"] for row in rows if row["model"] == model})
    table = Table(title=f"{model}: next-token KL in nats, geometric mean of {documents} documents")
    for column in ("K/V bits", "total bits", *FAMILIES.values(), "ratio to the better"):
        table.add_column(column, justify="right")
    for (method, k_bits, v_bits), (bits, kl) in sorted(means.items(), key=lambda item: -item[1][0]):
        if method == "sphkv":
            others = [reference_at(means, name, bits) for name in FAMILIES if name != "sphkv"]
            best = min((o for o in others if o is not None), default=math.nan)
            cells = ["-" if o is None else f"{o:.5f}" for o in others]
            table.add_row(f"{k_bits}/{v_bits}", f"{bits:.3f}", f"{kl:.5f}", *cells, f"{kl / best:.2f}")
    return table


def reference_at(means: dict[tuple[str, int, int], tuple[float, float]], name: str, bits: float) -> float | None:
    """KL of a reference family at ``bits``; None where it was not measured so far up."""
    points = [point for (method, *_), point in means.items() if family(method) == name]
    try:
        return at_equal_bits(points, bits)
    except (ValueError, IndexError):  # a quick run measures few settings
        return None


def settings_table(rows: Sequence[Row], model: str) -> Table:
    """Every setting as it was measured, one column per document."""
    documents = list(dict.fromkeys(row["document"] for row in rows if row["model"] == model))
    table = Table(title=f"{model}: every setting")
    for column in ("method", "K/V", "total bits", *documents, "geomean"):
        table.add_column(column, justify="left" if column == "method" else "right")
    kl = {(r["method"], r["k_bits"], r["v_bits"], r["document"]): r["kl"] for r in rows if r["model"] == model}
    means = geometric_means(rows, model)
    for key in sorted(means, key=lambda key: (family(key[0]), means[key])):
        bits, mean = means[key]
        cells = [f"{kl[(*key, document)]:.5f}" for document in documents]
        table.add_row(key[0], f"{key[1]}/{key[2]}", f"{bits:.3f}", *cells, f"{mean:.5f}")
    return table


def verdicts(rows: Sequence[Row], model: str) -> list[tuple[str, bool]]:
    """Each target that the records can answer, and whether it is met."""
    means, found = geometric_means(rows, model), []
    for (k_bits, v_bits), reference, most in TARGETS:
        if ("sphkv", k_bits, v_bits) in means and reference in means:
            ratio = means["sphkv", k_bits, v_bits][1] / means[reference][1]
            name = f"{reference[0]} {reference[1]}/{reference[2]}"
            found.append((f"{model}: K{k_bits}V{v_bits} / {name} = {ratio:.2f} (at most {most})", ratio <= most))
    for (method, k_bits, v_bits), (bits, kl) in means.items():
        others = [reference_at(means, name, bits) for name in FAMILIES if name != "sphkv"]
        if method == "sphkv" and None not in others:
            found.append((f"{model}: K{k_bits}V{v_bits} lowest at {bits:.2f} bits", all(kl < o for o in others if o)))
    return found


def plot(rows: Sequence[Row], path: Path) -> bool:
    """KL against total bits, one panel per model. False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.5 * len(models), 4.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        means = geometric_means(rows, model)
        for marker, (name, label) in zip("osv", FAMILIES.items()):
            points = sorted(point for (method, *_), point in means.items() if family(method) == name)
            axes.plot(*zip(*points), marker=marker, label=label, linestyle="-" if name != "kivi" else "")
        axes.set(
            yscale="log", title=model, xlabel="bits per element, in total", ylabel="KL(dense || coded), nats / token"
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=130)
    return True
