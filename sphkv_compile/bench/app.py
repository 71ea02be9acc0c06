"""``sphkv bench``: attention, writes and plan (a GPU), decode (a CPU), model (a GPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from sphkv_compile.bench.record import header, numbers, save

app = typer.Typer(help="Measure ours beside dense, in one run on this machine.", no_args_is_help=True)
console = Console()

Batches = Annotated[str, typer.Option(help="Rows; several are separated by commas.")]
Lengths = Annotated[str, typer.Option(help="Cached tokens; several are separated by commas.")]
Tiers = Annotated[str, typer.Option(help="Widths of keys and values.")]
Dims = Annotated[str, typer.Option(help="head_dim.")]
Name = Annotated[str | None, typer.Option(help="Of the record; none is written without.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the record. Default: the current one.")]


@app.command()
def attention(
    batch: Batches = "1,8",
    length: Lengths = "8192,32768,131072",
    tiers: Tiers = "K4V4,K4V2",
    dim: Dims = "128",
    spread: Annotated[str, typer.Option(help="Standard deviations of the logits.")] = "2",
    ragged: Annotated[bool, typer.Option("--ragged", help="Also rows of unequal length.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also other caches and kernels, where they run.")] = False,
    heads: Annotated[int, typer.Option(min=1, help="kv heads.")] = 8,
    group: Annotated[int, typer.Option(min=1, help="Query heads of each.")] = 4,
    name: Name = None,
    out: Out = None,
) -> None:
    """One layer's attention of a decode step, on a GPU."""
    need_cuda("attention", "cuda")
    from sphkv_compile.bench import attention as bench

    menu, spreads = tiers.split(","), numbers(spread, float)
    shapes = numbers(batch), numbers(length), numbers(dim)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    record = {**header("cuda"), "peers_missing": missing, "rows": rows}
    for row in bench.run(*shapes, menu, spreads, ragged, peers, heads, group, missing):
        rows.append(row)
        save(record, "attention", name, out)  # after every row: what was measured is kept
    wide = Console(width=max(console.width, 130))
    wide.print(f"{torch.cuda.get_device_name()}: reads {rows[0]['ceiling_tbps']:.2f} TB/s", bench.table(rows))
    for peer, reason in missing.items():
        wide.print(f"not measured: {peer}: {reason}", markup=False)
    wrote(save(record, "attention", name, out))


@app.command()
def writes(
    batch: Batches = "1,8,64",
    length: Lengths = "32768,131072",
    tiers: Tiers = "K4V4",
    dim: Dims = "128",
    name: Name = None,
    out: Out = None,
) -> None:
    """A step's append, and the encoding of a prompt, on a GPU."""
    need_cuda("writes", "cuda")
    from sphkv_compile.bench import writes as bench

    rows: list[dict[str, Any]] = []
    record = {**header("cuda"), "rows": rows}
    for row in bench.run(numbers(batch), numbers(length), numbers(dim), tiers.split(",")):
        rows.append(row)
        save(record, "writes", name, out)  # after every row: what was measured is kept
    Console(width=max(console.width, 100)).print(torch.cuda.get_device_name(), bench.table(rows))
    wrote(save(record, "writes", name, out))


@app.command()
def plan(
    batch: Batches = "1",
    length: Lengths = "131072",
    budget: Annotated[str, typer.Option(help="Shares of bfloat16's bytes, separated by commas.")] = "0.125",
    layers: Annotated[int, typer.Option(min=1, help="Of Llama-3-8B's shape.")] = 32,
    device: str = "cuda",
    name: Name = None,
    out: Out = None,
) -> None:
    """A plan under a budget beside the steps until the next, on a GPU (--device cpu tries it out)."""
    need_cuda("plan", device)
    from sphkv_compile.bench import plan as bench

    rows: list[dict[str, Any]] = []
    record = {**header(device), "rows": rows}
    shapes = numbers(batch), numbers(length), numbers(budget, float)
    for row in bench.run(*shapes, bench.Shape(layers), device):
        rows.append(row)
        save(record, "plan", name, out)  # after every row: what was measured is kept
    Console(width=max(console.width, 100)).print(record["card"], bench.table(rows))
    wrote(save(record, "plan", name, out))


@app.command()
def decode(
    model: Annotated[
        str, typer.Option(help="Bundled name, folder or .gguf; 'random' has SmolLM2's shape.")
    ] = "smollm2",
    length: Annotated[int, typer.Option(min=1, help="Cached tokens.")] = 4096,
    bits: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "4",
    dtype: str = "float32",
    steps: Annotated[int, typer.Option(min=1, help="Steps in a block.")] = 8,
    blocks: Annotated[int, typer.Option(min=1)] = 6,
    threads: Annotated[int, typer.Option(min=0, help="0: as torch has them.")] = 0,
    name: Name = None,
    out: Out = None,
) -> None:
    """A decode step of a whole small model, on a CPU."""
    from sphkv_compile.bench import decode as bench

    job = bench.Job(model, length, tuple(bits.split(",")), dtype, steps, blocks, threads or torch.get_num_threads())
    record = bench.run(job)
    Console(width=max(console.width, 100)).print(bench.table(record))
    wrote(save(record, "decode", name, out))


@app.command()
def model(
    batch: Batches = "1",
    length: Lengths = "32768",
    sides: Annotated[
        str, typer.Option(help="hf, loop, and widths of ours, separated by commas.")
    ] = "hf,loop,K4V4,K4V2",
    shape: Annotated[str, typer.Option(help="8b (Llama-3-8B's) or tiny.")] = "8b",
    layers: Annotated[int, typer.Option(min=0, help="Fewer layers than the shape has; 0: all.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps on the clock, in blocks of 16.")] = 64,
    fill: Annotated[str, typer.Option(help="How ours gets its codes: cache, layers, auto.")] = "auto",
    ttft: Annotated[bool, typer.Option("--ttft", help="Also the time to the first decoded token.")] = False,
    chunk: Annotated[int, typer.Option(min=0, help="Also ours prefilled by compiled chunks of this size.")] = 0,
    sdpa: Annotated[str, typer.Option(help="The loop's kernel: flash, cudnn, torch, auto.")] = "auto",
    device: str = "cuda",
    dtype: str = "bfloat16",
    name: Name = None,
    out: Out = None,
) -> None:
    """Tokens per second, memory and time to first token of a whole model, on a GPU (--device cpu tries it out)."""
    need_cuda("model", device)
    from sphkv_compile.bench import model as bench
    from sphkv_compile.bench.sides import SHAPES, WARM, Job

    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape}: expected one of {', '.join(SHAPES)}")
    rows: list[dict[str, Any]] = []
    record = {**header(device), "shape": shape, "layers": layers or SHAPES[shape]["num_hidden_layers"], "rows": rows}
    faults = []
    for b in numbers(batch):
        for n in numbers(length):
            if n <= steps + WARM:
                raise typer.BadParameter(f"--length {n}: expected more than the {steps + WARM} steps that are taken")
            job = Job(shape, b, n, steps, layers, device, dtype, fill, ttft, chunk, sdpa)
            for row in bench.rows(job, sides.split(",")):
                rows.append(row)
                bench.compare(rows)
                faults += bench.faults(row, device)
                save(record, "model", name, out)  # after every side: what was measured is kept
                said = row.get("failed") or f"{row['ms']:.2f} ms a step"
                console.print(f"{row['what']} {row['tier']}, B {b}, L {n:,}: {said}", markup=False)
    title = f"Llama of shape {shape}, {record['layers']} layers, {dtype}, on {record['card']}"
    Console(width=max(console.width, 130)).print(bench.table(rows, title))
    wrote(save(record, "model", name, out))
    for fault in faults:
        console.print(f"[red]{fault}[/]")
    raise typer.Exit(1 if faults else 0)


def need_cuda(bench: str, device: str) -> None:
    """Raises: typer.Exit: the bench needs a GPU, and this machine has none; ValueError: there is no such device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device {device!r}: expected 'cuda' or 'cpu'") from None
    if kind != "cuda" or torch.cuda.is_available():
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    console.print(
        f"`sphkv bench {bench}` measures on an NVIDIA GPU, and torch finds none here (torch {torch.__version__} "
        f"{built}). On a CPU use `sphkv bench decode`, which measures a whole decode step.",
        soft_wrap=True,
    )
    raise typer.Exit(2)


def wrote(path: Path | None) -> None:
    """Say where the record is."""
    if path is not None:
        console.print(f"record: {path}", soft_wrap=True)
