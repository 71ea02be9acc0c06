"""What a budget of bytes costs a model: divergence, streaming, facts found again, coherence; and what others reach.

    python -m sphkv_compile.eval.budget                          # divergence: the bundled models, reported documents
    python -m sphkv_compile.eval.budget --models smollm2 --documents novel play --budgets .125 .0625
    python -m sphkv_compile.eval.budget --models /path/to/model --prompt 16384 --documents shelf --device cuda
    python -m sphkv_compile.eval.budget --needles --streaming --coherence --out /tmp/found.json

Divergence: a prompt (2,048 tokens) goes into the cache in one call and is brought within the budget; then 256 tokens
are read, teacher-forced, in a second call. Streaming: three eighths of so many tokens are the prompt, the others come
128 at a time, and the budget stays. Needles: :mod:`.needles`; coherence: :mod:`.coherence`.

Sinks (4) and window (64) are exact, the same for every method, and come on top, as does the newest span until it is
planned. A budget is a share of the bytes in bfloat16 of what grows; everything else that is stored counts: codes,
radii, scales, anchors, positions, statistics, page tables, and what is left empty in pages. Layers with a sliding
window stay dense, and are not counted. No compiler is needed: :mod:`.retention`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sphkv_compile.eval import coherence, divergence, needles, quanto, texts
from sphkv_compile.eval.contenders import METHODS, WHOLE, Cell, cells
from sphkv_compile.integrations.models import available, load

PROMPT = 2048
BUDGETS = (0.25, 0.125, 0.0625)
RECORD = Path("sphkv_eval.json")
TASKS = {"kl": "kl", "streaming": "kl", "needles": "needle", "coherence": "repeated"}
"""What can be measured, and the key of a row that says it best."""

Row = dict[str, Any]
"""Keys: model, document, method, budget (1 where all tokens stay), total_bytes_per_token, and what was found. Kept
records have ``expected``, false, where a run was older than expected attention."""
Job = Callable[[list[Cell]], Iterator[Row]]
"""All cells on one dense prefill."""


def jobs(task: str, model: Any, tokenizer: Any, args: argparse.Namespace) -> list[tuple[str, Job]]:
    """What there is to do for one model: a name for the rows, and the job, one after the other."""
    if task == "needles":
        return list(_needle_jobs(model, tokenizer, args))
    more = {"kl": divergence.STEPS + 1, "streaming": 1, "coherence": 0}[task]
    ids = {name: texts.tokens(tokenizer, name, args.prompt + more).to(args.device) for name in args.documents}
    if task == "coherence":
        rows = torch.cat(list(ids.values()))
        return [(", ".join(ids), partial(coherence.rows, model, rows, tokens=coherence.TOKENS))]
    return [(name, partial(divergence.rows, model, x, streaming=task == "streaming")) for name, x in ids.items()]


def _needle_jobs(model: Any, tokenizer: Any, args: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    for name, kind in needles.KINDS.items():
        for known in (False, True):
            found = needles.cases(tokenizer, args.documents, kind, known, args.prompt, args.cases)
            tally = needles.Tally()
            for batch in needles.batches(found, args.batch):
                label = f"{name}, question {'known' if known else 'unknown'}"
                yield label, partial(needles.rows, model, tokenizer, batch, tally=tally)


def evaluate(args: argparse.Namespace, console: Console) -> Iterator[tuple[str, Row]]:
    """The task and a row, for each model, document, method and budget; a later row stands for an earlier one of the
    same names."""
    todo = cells(args.methods, args.budgets)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in args.models:
            model, tokenizer = load(name, getattr(torch, args.dtype))
            model.to(args.device)
            short = Path(name).name.removesuffix(".gguf")
            for task in args.tasks:
                work = jobs(task, model, tokenizer, args)
                bar = progress.add_task(task, total=len(work) * len(todo))
                for document, job in work:
                    progress.update(bar, description=f"{short} {task} {document}")
                    for row in job(todo):
                        yield task, {"model": short, "document": document, **row}
                        progress.advance(bar)


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


def plot(rows: list[Row], path: Path) -> bool:
    """KL against bytes, one panel per model. False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
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


def cell_of(row: Row) -> tuple:
    """What was measured; of two rows of one cell the later counts."""
    return row["model"], row["document"], row["method"], row["budget"]


def record_of(out: Path, task: str) -> Path:
    """The file of a task's rows: divergence has the name that was given, the others say what they are."""
    return out if task == "kl" else out.with_stem(f"{out.stem}_{task}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=available(), help="bundled names, HF folders, .gguf files")
    parser.add_argument("--documents", nargs="+", default=list(texts.REPORTED))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens")
    for task in TASKS:
        parser.add_argument(f"--{task}", action="append_const", const=task, dest="tasks", help="measure this")
    parser.add_argument("--cases", type=int, default=needles.CASES, help="of each kind of question")
    parser.add_argument("--batch", type=int, default=8, help="cases that share a cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model and of what is kept exact")
    parser.add_argument("--out", type=Path, default=RECORD, help="file of the record")
    parser.add_argument("--append", action="store_true", help="keep what the record holds, but what is measured again")
    args = parser.parse_args(argv)
    args.tasks = args.tasks or ["kl"]
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs and prints; a record is written after every row, so that what was measured is kept."""
    args, console = parse(argv), Console()
    found: dict[str, dict[tuple, Row]] = {task: {} for task in args.tasks}
    for task in args.tasks:
        if args.append and record_of(args.out, task).exists():
            found[task] = {cell_of(row): row for row in json.loads(record_of(args.out, task).read_text())}
    for task, row in evaluate(args, console):
        found[task][cell_of(row)] = row
        record_of(args.out, task).write_text("[\n" + ",\n".join(map(json.dumps, found[task].values())) + "\n]\n")
    if not quanto.available():
        console.print("Not there to measure: transformers' QuantizedCache (pip install --no-deps optimum-quanto).")
    for task, rows in ((task, list(per.values())) for task, per in found.items()):
        for each in tables(task, rows):
            console.print(each)
        if task == "kl":
            plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
