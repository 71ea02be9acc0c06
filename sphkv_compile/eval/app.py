"""``sphkv eval``: the command line of :mod:`.budget`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphkv_compile.printing import wide_console

if TYPE_CHECKING:
    from sphkv_compile.eval.order import Order

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="'smollm2', 'gemma3' (bundled), a Hugging Face folder, or a .gguf file; repeatable. "
        "Default: all bundled ones that are installed.",
    ),
]
Documents = Annotated[
    list[str] | None,
    typer.Option(
        "--document",
        help="manual, strings, docstrings, constitution, novel, play (the default); shelf, language, library, layers "
        "(16,000 tokens and more); compound, dictionary; repeatable.",
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", exists=True, dir_okay=False, help="A text of your own, as a UTF-8 file; repeatable."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="'rdr' is ours; an unknown name is answered with all; repeatable. Default: all."),
]
Budgets = Annotated[
    list[float] | None,
    typer.Option("--budget", help="A share of the bytes in bfloat16; repeatable. Default: .25, .125, .0625."),
]


def evaluate(
    model: Models = None,
    document: Documents = None,
    text: Texts = None,
    method: Methods = None,
    budget: Budgets = None,
    kl: Annotated[bool, typer.Option("--kl", help="KL and perplexity after a prompt (the default).")] = False,
    streaming: Annotated[bool, typer.Option("--streaming", help="The same, while a text streams by.")] = False,
    needles: Annotated[bool, typer.Option("--needles", help="Facts found again, question known and unknown.")] = False,
    coherence: Annotated[bool, typer.Option("--coherence", help="How often a continuation repeats itself.")] = False,
    utilities: Annotated[bool, typer.Option("--utilities", help="Ours beside itself planned by exact logits.")] = False,
    prompt: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    cases: Annotated[int, typer.Option(min=1, help="Of each kind of question.")] = 48,
    batch: Annotated[int, typer.Option(min=1, help="Cases that share a cache.")] = 8,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model and of what is kept exact.")] = "float32",
    out: Annotated[Path, typer.Option(help="File of the record; the plot stands beside it.")] = Path("sphkv_eval.json"),
    append: Annotated[bool, typer.Option("--append", help="Keep the record, but what is measured again.")] = False,
) -> None:
    """Measure what a budget of bytes costs a model, beside other methods at equal bytes."""
    from sphkv_compile.eval.order import Order
    from sphkv_compile.integrations.models import available

    asked = {"kl": kl, "streaming": streaming, "needles": needles, "coherence": coherence, "utilities": utilities}
    lists = {
        "documents": [*(document or ()), *map(str, text or ())],
        "methods": method,
        "budgets": budget,
        "tasks": [task for task, wanted in asked.items() if wanted],
    }
    given: dict[str, Any] = {name: value for name, value in lists.items() if value}  # the order knows the defaults
    run(Order(model or available(), prompt, cases, batch, device, dtype, **given), out, append)


def run(order: Order, out: Path, append: bool) -> None:
    """Measures, records and prints.

    Raises:
        typer.BadParameter: what there is not.
    """
    from sphkv_compile.eval import budget, quanto, tables
    from sphkv_compile.eval.record import Record, record_of
    from sphkv_compile.eval.texts import TooShort

    console = wide_console()
    try:
        order.check()
    except (ValueError, OSError, ImportError) as fault:
        raise typer.BadParameter(str(fault)) from None
    record = Record(out, order.tasks, append)
    try:
        for task, row in budget.evaluate(order, console):
            record.add(task, row)
    except TooShort as fault:
        raise typer.BadParameter(str(fault)) from None
    for task in order.tasks:
        for table in tables.tables(task, record.rows(task)):
            console.print(table)
        console.print(f"record: {record_of(out, task)}", soft_wrap=True)
    if "kl" in order.tasks and not tables.plot(record.rows("kl"), out.with_suffix(".png")):
        console.print("No plot: matplotlib is not installed (pip install 'sphkv-compile[plot]').", markup=False)
    if not quanto.available():
        console.print("Not there to measure: transformers' QuantizedCache (pip install --no-deps optimum-quanto).")
