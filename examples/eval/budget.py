"""KL under a budget of bytes, by the compiled model itself: rate-distortion retention beside plain eviction.

    python -m examples.eval.budget                          # the bundled models, reported documents
    python -m examples.eval.budget --models smollm2 --documents novel play --budgets .125 .0625

Protocol: the prompt (2,048 tokens) goes through the compiled model in one call and is brought within the budget; then
256 tokens are read, teacher-forced, in a second call. Sinks (4) and window (64) are exact, the same for every method,
and come on top, as do the newest spans until they are planned. A budget is a share of the prompt's bytes in bfloat16;
everything else that is stored counts: codes, radii, scales, anchors, positions, statistics, page tables, and what is
left empty in pages. All layers but those with a sliding window.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import StaticCache

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

import sphkv_compile
from examples.eval import texts
from examples.eval.measure import expected_log_probs
from sphkv_compile.integrations.models import available, load
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.policies import Rdr

PROMPT, STEPS, WINDOW = 2048, 256, 64
BUDGETS = (0.25, 0.125, 0.0625)
RECORD = Path(__file__).with_suffix(".json")


class EqualHeads(Rdr):
    """The same choice of tokens, every head with the same bytes."""

    shares = False


METHODS: dict[str, dict[str, Any]] = {
    "rdr": {},
    "rdr, equal heads": {"policy": EqualHeads()},
    "rdr, one tier": {"tiers": "K4V4"},
    "4-bit heavy hitter": {"policy": "heavy_hitter", "tiers": "K4V4"},
    "4-bit SnapKV": {"policy": "snapkv", "tiers": "K4V4"},
    "4-bit window": {"policy": "window", "tiers": "K4V4"},
}


class Document:
    """One model on one document: what the dense cache says, and what a budget makes of it.

    Shapes: ``ids`` int64[1, PROMPT + STEPS + 1].
    """

    def __init__(self, model: Any, ids: Tensor):
        self.model, self.ids, self.keyword = model, ids, cache_keyword(model)
        logits = self.run(model.forward, self.cache())
        self.next = ids[0, PROMPT + 1 :]
        self.dense = logits.softmax(-1)
        self.entropy, self.nll = expected_log_probs(self.dense, logits, self.next)

    def cache(self) -> StaticCache:
        config = self.model.config.get_text_config()
        cache = StaticCache(config=self.model.config, max_cache_len=PROMPT + STEPS + WINDOW)
        device = self.ids.device
        cache.early_initialization(1, config.num_key_value_heads, config.head_dim, self.model.dtype, device)
        return cache

    def run(self, step: Any, cache: StaticCache) -> Tensor:
        """Shapes: -> float32[STEPS, vocabulary]."""
        passed = {self.keyword: cache, "use_cache": True}
        with torch.no_grad():
            step(self.ids[:, :PROMPT], **passed, logits_to_keep=1)
            return step(self.ids[:, PROMPT : PROMPT + STEPS], **passed).logits[0].float()

    def score(self, budget: float, options: dict[str, Any]) -> dict[str, float]:
        """Units: bytes per token and kv head; nats per token."""
        torch._dynamo.reset()
        cache = self.cache()
        longest = max(layer.keys.shape[2] for layer in cache.layers)
        growing = [layer.keys for layer in cache.layers if layer.keys.shape[2] == longest]  # the others are windows
        tokens = sum(k.shape[1] for k in growing) * PROMPT
        limit = int(budget * tokens * 4 * growing[0].shape[-1])
        options = {"inductor": False, "budget": limit, "window": WINDOW, **options}
        step = torch.compile(self.model.forward, backend=sphkv_compile.backend, options=options, fullgraph=True)
        logits = self.run(step, cache)
        report = sphkv_compile.report(cache)
        if report.budgeted_bytes > limit:
            raise RuntimeError(f"{report.budgeted_bytes:,} bytes are held, {limit:,} were the budget")
        entropy, nll = expected_log_probs(self.dense, logits, self.next)
        return {
            "total_bytes_per_token": report.budgeted_bytes / tokens,
            "kl": float((self.entropy - entropy).mean()),
            "nll_delta": float((self.nll - nll).mean()),
        }


def evaluate(args: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """A record for each model, document, method and budget."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        count = len(args.models) * len(args.documents) * len(args.methods) * len(args.budgets)
        bar = progress.add_task("loading", total=count)
        for name in args.models:
            model, tokenizer = load(name)
            model.to(args.device)
            for document in args.documents:
                ids = texts.tokens(tokenizer, document, PROMPT + STEPS + 1).to(args.device)
                at = Document(model, ids)
                for method in args.methods:
                    for budget in args.budgets:
                        progress.update(bar, description=f"{Path(name).name} {document} {method} {budget:g}")
                        which = {"model": Path(name).name, "document": document, "method": method, "budget": budget}
                        yield which | at.score(budget, METHODS[method])
                        progress.advance(bar)


def means(rows: list[dict[str, Any]], model: str) -> dict[str, dict[float, float]]:
    """Geometric mean of a model's KL over documents, by method and budget, the largest budget first."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: -row["budget"]):
        if row["model"] == model:
            found.setdefault(row["method"], {}).setdefault(row["budget"], []).append(row["kl"])
    return {
        method: {budget: math.exp(sum(map(math.log, kl)) / len(kl)) for budget, kl in cells.items()}
        for method, cells in found.items()
    }


def table(rows: list[dict[str, Any]], model: str) -> Table:
    """A row for each method, a column for each budget."""
    documents = ", ".join(dict.fromkeys(row["document"] for row in rows if row["model"] == model))
    out = Table(title=f"KL of {model}, nats per token, geometric mean of {documents}", title_justify="left")
    out.add_column("share of bfloat16's bytes")
    found = means(rows, model)
    budgets = sorted({budget for cells in found.values() for budget in cells}, reverse=True)
    for budget in budgets:
        out.add_column(f"{100 * budget:g} %", justify="right")
    for method in METHODS:
        if method in found:
            out.add_row(method, *(f"{found[method][b]:.4f}" if b in found[method] else "-" for b in budgets))
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=available(), help="bundled names, HF folders, .gguf files")
    parser.add_argument("--documents", nargs="+", default=list(texts.REPORTED))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RECORD, help="file of the record")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs and prints; the record is written after every row, so that what was measured is kept."""
    args, console, rows = parse(argv), Console(), []
    for row in evaluate(args, console):
        rows.append(row)
        args.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for model in dict.fromkeys(row["model"] for row in rows):
        console.print(table(rows, model))


if __name__ == "__main__":
    main()
