"""One model, decoded twice: with its dense KV cache, and through ``torch.compile(backend=sphkv_compile.backend)``.

    python examples/compile_llama.py                                   # the bundled SmolLM2-135M, 4 bits
    python examples/compile_llama.py --bits K4V2 --file README.md --prompt "What is this about?"
    python examples/compile_llama.py --model ~/models/Llama-3.2-1B --budget 64MiB --device cuda

The model's own code and transformers' own StaticCache run on both sides; nothing about them is changed. Shown are the
attention sites that were found, both texts and where they part, how far the next-token distributions differ when both
sides read the same tokens, the bytes that each cache holds, and the speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import StaticCache
from transformers.utils import logging as transformers_logging

import sphkv_compile
from sphkv_compile.integrations.models import load
from sphkv_compile.integrations.transformers import cache_keyword, decode_step
from sphkv_compile.printing import wide_console
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.state import DTYPES
from sphkv_compile.testing.compare import Run, decode, first_divergence, token_kl

QUESTION = "What does the assert statement do when __debug__ is false?"


@dataclass(frozen=True)
class Side:
    """What was measured of one way to decode the prompt.

    Args:
        free: its own greedy tokens.
        forced: its distributions when fed with the dense side's tokens; the dense side's is ``free``.
        cache: as the last run left it.

    Units: seconds.
    """

    free: Run
    forced: Run
    cache: StaticCache
    prefill_seconds: float


@dataclass
class Job:
    """The prompt and the model that both sides share. Shapes: ids [1, S]. Units: count in tokens."""

    model: Any
    ids: Tensor
    count: int
    stop: set[int]
    progress: Progress

    def side(
        self, name: str, step: Callable[..., Any], feed: list[int] | None = None, reads_prompt: bool = False
    ) -> Side:
        """Decodes through ``step``: the model's forward, compiled or not; the prompt too with ``reads_prompt``."""
        free, cache, seconds = self.run(f"{name}, greedy", step, reads_prompt=reads_prompt)
        forced = free
        if feed is not None and feed != free.tokens:  # else the run was fed with them already
            forced, cache, seconds = self.run(f"{name}, fed with the dense tokens", step, feed, reads_prompt)
        return Side(free, forced, cache, seconds)

    def run(
        self, label: str, step: Callable[..., Any], feed: list[int] | None = None, reads_prompt: bool = False
    ) -> tuple[Run, StaticCache, float]:
        """Prefill of a new StaticCache, eager unless ``step`` reads the prompt, then the decode steps; also the seconds
        of the prefill."""
        count = self.count if feed is None else len(feed)
        task = begin(self.progress, f"{label}: prefill", count)
        cache = StaticCache(config=self.model.config, max_cache_len=self.ids.shape[1] + self.count)
        passed = {cache_keyword(self.model): cache, "use_cache": True}
        if reads_prompt:  # a compiled call takes over tensors that are there
            text, some = self.model.config.get_text_config(), next(self.model.parameters())
            cache.early_initialization(1, text.num_key_value_heads, text.head_dim, some.dtype, some.device)
        began = time.perf_counter()
        with torch.no_grad():
            logits = (step if reads_prompt else self.model)(self.ids, **passed, logits_to_keep=1).logits
        logits[0, 0, 0].item()  # waits for a GPU
        seconds = time.perf_counter() - began

        def show(token: int) -> None:
            self.progress.advance(task)
            first = self.progress.tasks[task].completed == 1
            self.progress.update(task, description=f"{label}: {'first step, may compile' if first else 'decoding'}")

        def one(token: Tensor, position: int) -> Tensor:
            return step(token, **passed).logits

        run = decode(one, logits, self.ids.shape[1], count, feed=feed, stop=self.stop, on_token=show)
        return run, cache, seconds


def main(
    model: Annotated[
        str, typer.Option(help="A bundled name (smollm2, gemma3), a folder, or a .gguf file.")
    ] = "smollm2",
    prompt: Annotated[str | None, typer.Option(help="Question or instruction.")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Long text, put before --prompt.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="2, 3, 4, 8, or keys and values apart, like K4V2. Default 4.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Bytes for the codes, 8MiB, 0.1 or 64B/token, in place of --bits: tokens are dropped."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: cuda if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}. Default: float32 on cpu.")] = None,
    seed: Annotated[int, typer.Option(help="Of the codec's rotation.")] = 0,
    mode: Annotated[str | None, typer.Option(help="Of torch.compile. Default on cuda: reduce-overhead.")] = None,
    compile_dense: Annotated[bool, typer.Option("--compile-dense", help="Compile the dense side as well.")] = False,
) -> None:
    """Decode one prompt with a dense and with a spherical KV cache, and compare."""
    options = cache_options(bits, budget, seed)
    where, number = device_and_dtype(device, dtype)
    mode = mode or ("reduce-overhead" if where.type == "cuda" else "default")  # launching a step takes longer than it
    with progress_bar() as progress:
        with phase(progress, f"loading {model}"):
            network, tokenizer = load_model(model, number, where)
        ids = prompt_ids(tokenizer, prompt, file).to(where)
        check_length(network, ids.shape[1] + max_new_tokens)
        with phase(progress, "explaining one decode step"):
            step = decode_step(network, capacity=ids.shape[1] + max_new_tokens)
            explanation = sphkv_compile.explain(network, options=options, **step)
        job = Job(network, ids, max_new_tokens, stop_tokens(network, tokenizer), progress)

        dense = job.side("dense", torch.compile(network.forward, mode=mode) if compile_dense else network.forward)
        options["mode"] = mode
        compiled = torch.compile(network.forward, backend=sphkv_compile.backend, options=options, fullgraph=True)
        # under a budget the prompt's queries say what matters, so the compiled model reads it
        coded = job.side("spherical", compiled, feed=dense.free.tokens, reads_prompt=budget is not None)
    out, held = wide_console(), sphkv_compile.report(coded.cache)
    out.print(explanation)
    out.print(held)
    out.print(texts(tokenizer, dense.free.tokens, coded.free.tokens))
    out.print(summary(dense, coded))
    if not held.encoded_tokens:
        out.print("No token was coded: this context is shorter than sinks, window and one span (260 tokens).")
    if explanation.refused or held.matched < explanation.matched:
        out.print(f"[red]{held.matched} of {len(explanation.rows)} attentions hold codes.[/] The reasons are above.")
        raise typer.Exit(1)


# ---- what goes in


def cache_options(bits: str | None, budget: str | None, seed: int) -> dict[str, Any]:
    """The backend's options. Raises: typer.BadParameter, with CacheSpec's own words."""
    options: dict[str, Any] = {"seed": seed}
    if budget is not None:
        options["budget"] = budget
    if bits is not None or budget is None:
        bits = bits or "4"
        options["bits"] = int(bits) if bits.isdigit() else bits
    try:
        CacheSpec.from_options(options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    return options


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Raises: typer.BadParameter, for a device that is not here or a dtype that is not known."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {device}: {str(error).splitlines()[0]}; 'cpu' is always there") from None
    name = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise typer.BadParameter(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return where, DTYPES[name]


def load_model(source: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Raises: typer.BadParameter, if there is no such model on this machine."""
    transformers_logging.disable_progress_bar()  # ours is on the screen
    try:
        model, tokenizer = load(source, dtype)
    except (OSError, ImportError) as error:
        raise typer.BadParameter(f"--model {source}: {error}") from None
    return model.to(device), tokenizer


def prompt_ids(tokenizer: Any, prompt: str | None, file: Path | None) -> Tensor:
    """The prompt's tokens, as a chat turn where the tokenizer has a template. Shapes: [1, S] int64."""
    text = file.read_text() if file else "" if prompt else _manual()
    question = prompt or ("Summarise the text above." if file else QUESTION)
    content = f"{text}\n\n{question}" if text else question
    if tokenizer.chat_template is None:
        return tokenizer(content, return_tensors="pt").input_ids
    turn = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def check_length(model: Any, tokens: int) -> None:
    """Raises: typer.BadParameter, if the model was not made for that many tokens."""
    most = model.config.get_text_config().max_position_embeddings
    if tokens > most:
        raise typer.BadParameter(f"prompt and --max-new-tokens make {tokens} tokens; the model reads at most {most}")


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a text, by the tokenizer or the generation config."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _manual() -> str:
    """Two chapters of Python's own manual, about 1100 tokens: several spans of coded tokens."""
    from pydoc_data.topics import topics

    return topics["with"] + topics["assert"]


# ---- what comes out


def progress_bar() -> Progress:
    """Phases on stderr, so that stdout holds the results only."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def begin(progress: Progress, name: str, total: int) -> TaskID:
    """A new task; where no terminal shows its bar, a line says that it began."""
    if not progress.console.is_terminal:
        progress.console.print(name)
    return progress.add_task(name, total=total)


@contextmanager
def phase(progress: Progress, name: str) -> Iterator[None]:
    """A task of one step."""
    task = begin(progress, name, 1)
    yield
    progress.advance(task)


def texts(tokenizer: Any, dense: list[int], coded: list[int]) -> Table:
    """Both texts; from their first different token on in yellow."""
    at = first_divergence(dense, coded)
    table = Table("dense", "spherical", title="Greedy text", expand=True)
    row = []
    for tokens in (dense, coded):
        same = tokens[:at]
        whole, start = (
            tokenizer.decode(tokens, skip_special_tokens=True),
            tokenizer.decode(same, skip_special_tokens=True),
        )
        row.append(Text(start).append(whole[len(start) :], style="yellow"))
    table.add_row(*row)
    return table


def summary(dense: Side, coded: Side) -> Table:
    """The figures of both sides. Units: nats per token, bytes, tokens per second, seconds."""
    at = first_divergence(dense.free.tokens, coded.free.tokens)
    table = Table("", "dense", "spherical", title="Dense and spherical")
    for column in table.columns[1:]:
        column.justify = "right"
    count = len(dense.free.tokens)
    table.add_row(
        "greedy tokens that agree", str(count), f"{count} of {count}" if at is None else f"first {at} of {count}"
    )
    kl = token_kl(dense.forced.logits, coded.forced.logits)[1:]  # the first comes from the prefill, equal on both sides
    top = (dense.forced.logits.argmax(-1) == coded.forced.logits.argmax(-1))[1:]
    table.add_row("on the dense tokens: KL, nats per token", "", f"mean {kl.mean():.2e}, worst {kl.max():.2e}")
    table.add_row("on the dense tokens: same first choice", "", f"{int(top.sum())} of {len(top)}")
    held, codes = dense_bytes(dense.cache), sphkv_compile.report(coded.cache)
    table.add_row(
        "cache, bytes allocated", f"{held:,}", f"{codes.resident_bytes:,}, {codes.resident_bytes / held:.3f} of dense"
    )
    table.add_row("  of them exact window and sinks", "", f"{codes.fixed_bytes:,}")
    table.add_row("decode, tokens/s (median step)", *(f"{side.free.tokens_per_second:.2f}" for side in (dense, coded)))
    table.add_row(
        "compiling (beyond the median step), s", *(f"{side.free.extra_seconds:.1f}" for side in (dense, coded))
    )
    table.add_row(
        "prefill (compiling included, if compiled), s", *(f"{side.prefill_seconds:.2f}" for side in (dense, coded))
    )
    return table


def dense_bytes(cache: StaticCache) -> int:
    """What the cache's own tensors have allocated."""
    storages = [t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


if __name__ == "__main__":
    typer.run(main)
