"""What a budget of bytes costs a model: divergence, streaming, facts found again, coherence; and what others reach.

Divergence: a prompt (2,048 tokens) goes into the cache in one call and is brought within the budget; then 256 tokens
are read, teacher-forced, in a second call. Streaming: three eighths of so many tokens are the prompt, the others come
128 at a time, and the budget stays. Needles: :mod:`.needles`; coherence: :mod:`.coherence`; utilities from codes and
from exact keys: :mod:`.utilities`.

Sinks (4) and window (64) are exact, the same for every method, and come on top, as does the newest span until it is
planned. A budget is a share of the bytes in bfloat16 of what grows; everything else that is stored counts: codes,
radii, scales, anchors, positions, statistics, page tables, and what is left empty in pages. Layers with a sliding
window stay dense, and are not counted. No compiler is needed: :mod:`.retention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sphkv_compile.eval import coherence, divergence, needles, texts, utilities
from sphkv_compile.eval.contenders import Cell, cells
from sphkv_compile.eval.order import Order, short
from sphkv_compile.eval.record import Row
from sphkv_compile.integrations.models import dtype_of, load

Job = Callable[[list[Cell]], Iterator[Row]]
"""All cells on one dense prefill."""


def jobs(task: str, model: Any, tokenizer: Any, order: Order) -> list[tuple[str, Job]]:
    """What there is to do for one model: a name for the rows, and the job, one after the other.

    Raises:
        texts.TooShort: a document.
    """
    if task == "needles":
        return list(_needle_jobs(model, tokenizer, order))
    length = order.prompt + {"streaming": 1, "coherence": 0}.get(task, divergence.STEPS + 1)
    ids = {texts.label(name): texts.tokens(tokenizer, name, length).to(order.device) for name in order.documents}
    if task == "coherence":
        rows = torch.cat(list(ids.values()))
        return [(", ".join(ids), partial(coherence.rows, model, rows, tokens=coherence.TOKENS))]
    if task == "utilities":
        return [(name, partial(utilities.rows, model, x)) for name, x in ids.items()]
    return [(name, partial(divergence.rows, model, x, streaming=task == "streaming")) for name, x in ids.items()]


def _needle_jobs(model: Any, tokenizer: Any, order: Order) -> Iterator[tuple[str, Job]]:
    for name, kind in needles.KINDS.items():
        for known in (False, True):
            found = needles.cases(tokenizer, order.documents, kind, known, order.prompt, order.cases)
            tally = needles.Tally()
            for batch in needles.batches(found, order.batch):
                label = f"{name}, question {'known' if known else 'unknown'}"
                yield label, partial(needles.rows, model, tokenizer, batch, tally=tally)


def cells_of(task: str, order: Order) -> list[Cell]:
    """The methods that were asked for, but of utilities, which has its own, at every budget."""
    return utilities.cells(order.budgets) if task == "utilities" else cells(order.methods, order.budgets)


def evaluate(order: Order, console: Console) -> Iterator[tuple[str, Row]]:
    """The task and a row, for each model, document, method and budget; a later row stands for an earlier one of the
    same names."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in order.models:
            model, tokenizer = load(name, dtype_of(order.dtype))
            model.to(order.device)
            for task in order.tasks:
                work, todo = jobs(task, model, tokenizer, order), cells_of(task, order)
                bar = progress.add_task(task, total=len(work) * len(todo))
                for document, job in work:
                    progress.update(bar, description=f"{short(name)} {task} {document}")
                    for row in job(todo):
                        yield task, {"model": short(name), "document": document, **row}
                        progress.advance(bar)
