"""What the rows of the evaluation say: a table for each model, and KL against bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from sphkv_compile.eval.contenders import METHODS, WHOLE
from sphkv_compile.eval.record import Row

TASKS = {"kl": "kl", "streaming": "kl", "needles": "needle", "coherence": "repeated", "utilities": "kl"}
"""What can be measured, and the key of a row that says it best."""


def means(rows: list[Row], model: str, key: str = "kl") -> dict[str, dict[float, float]]:
    """A model's mean over documents, by method and budget, the largest budget first; of KL the geometric one."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: -row["budget"]):
        if row["model"] == model and row.get(key) is not None:
            found.setdefault(row["method"], {}).setdefault(row["budget"], []).append(row[key])
    mean = geometric_mean if key == "kl" else arithmetic_mean
    return {method: {budget: mean(x) for budget, x in per.items()} for method, per in found.items()}


def arithmetic_mean(x: list[float]) -> float:
    """Of one number or more."""
    return sum(x) / len(x)


def geometric_mean(x: list[float]) -> float:
    """Of one number or more; what is not positive, which is nothing but rounding, counts as very little."""
    return math.exp(arithmetic_mean([math.log(max(y, 1e-9)) for y in x]))


def table(rows: list[Row], model: str, key: str = "kl") -> Table:
    """A row for each method, a column for each budget; whoever keeps all tokens stands in the last, with the bytes."""
    rows = [row for row in rows if row["model"] == model]
    documents = ", ".join(dict.fromkeys(row["document"] for row in rows))
    what = "KL in nats per token, geometric mean" if key == "kl" else f"{key}, mean"
    out = Table(title=f"{model}: {what} of {documents}", title_justify="left")
    out.add_column("share of bfloat16's bytes")
    found, sizes = means(rows, model, key), means(rows, model, "total_bytes_per_token")
    budgets = sorted({budget for per in found.values() for budget in per}, key=lambda b: (b == WHOLE, -b))
    for budget in budgets:
        out.add_column("all (bytes per token)" if budget == WHOLE else f"{100 * budget:g} %", justify="right")
    for method in [name for name in METHODS if name in found]:
        cell = {budget: f"{value:.4f}" for budget, value in found[method].items()}
        if WHOLE in cell:
            cell[WHOLE] += f" ({sizes[method][WHOLE]:.0f})"
        out.add_row(method, *(cell.get(budget, "-") for budget in budgets))
    return out


def tables(task: str, rows: list[Row]) -> Iterator[Table]:
    """One for each model; of facts found again, one for each way to ask."""
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        kinds = dict.fromkeys(row["document"] for row in mine) if task == "needles" else [None]
        for kind in kinds:
            yield table([row for row in mine if kind in (None, row["document"])], model, TASKS[task])
        if task == "utilities":
            yield orders(mine, model)


def orders(rows: list[Row], model: str) -> Table:
    """How alike utilities from codes and from dense keys rank tokens, a row for each document."""
    rows = [row for row in rows if "correlation" in row]
    out = Table(
        title=f"{model}: attention from {rows[0]['tier']} beside exact, mean (lowest head)", title_justify="left"
    )
    for name in ("document", "rank correlation", "top 10 % in common"):
        out.add_column(name)
    for row in rows:
        pairs = (f"{row[key]:.4f} ({row[f'lowest_{key}']:.4f})" for key in ("correlation", "overlap"))
        out.add_row(row["document"], *pairs)
    return out


def plot(rows: list[Row], path: Path) -> bool:
    """KL against bytes, one panel per model. False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        return False
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.5 * len(models) + 2.5, 4.5), layout="constrained")
    names = list(dict.fromkeys(contender.line or name for name, contender in METHODS.items()))
    shown = {}
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        for line, points in lines(rows, model).items():
            number = names.index(line)  # a method looks the same in every panel
            style = {"marker": "os^vD<>pP"[number % 9], "color": f"C{number % 10}", "linewidth": 1}
            (shown[line],) = axes.plot(*zip(*points), **style | ({"linewidth": 3} if line == "rdr" else {}))
        axes.set(xscale="log", yscale="log", title=model)
        axes.set(xlabel="bytes per token and kv head, all counted", ylabel="KL(dense || cache), nats per token")
        axes.xaxis.set(major_formatter=ScalarFormatter(), minor_formatter=ScalarFormatter())
        axes.grid(alpha=0.3, which="both")
    figure.legend(shown.values(), shown, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)
    return True


def lines(rows: list[Row], model: str) -> dict[str, list[tuple[float, float]]]:
    """Bytes and KL of each line of the plot, from left to right."""
    kl, sizes = means(rows, model), means(rows, model, "total_bytes_per_token")
    found: dict[str, list[tuple[float, float]]] = {}
    for method in [name for name in METHODS if name in kl]:
        found.setdefault(METHODS[method].line or method, []).extend(
            (sizes[method][b], kl[method][b]) for b in kl[method]
        )
    return {line: sorted(points) for line, points in found.items()}
