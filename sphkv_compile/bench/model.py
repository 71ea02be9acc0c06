"""A whole model at a long context: transformers compiled, the fastest dense loop in plain torch, and ours.

Weights and caches are random, seeded and the same on every side, so the record can say how far the logits of the first
steps part. A step is one token a row, greedy, with its argmax. Each side has a process of its own, one after the other
on the same card: its memory is its own, and no side sees another's leftovers.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from sphkv_compile.bench.sides import SHAPES, WARM, Job, Ours, Plain, Side, build, prefilled, side
from sphkv_compile.lowering.compat import recorded_graphs
from sphkv_compile.spec import human
from sphkv_compile.testing.clock import wait
from sphkv_compile.testing.compare import token_kl

BLOCK = 16
"""Steps between two looks at the clock."""
COMPARED = 4
"""First steps, fed with the same tokens on every side, whose logits are compared."""


def measure(job: Job, name: str) -> dict[str, Any]:
    """One side; what its own process does. Running out of memory is a result: ``failed`` says so."""
    try:
        with torch.no_grad():
            return _measure(job, name)
    except torch.OutOfMemoryError as full:
        return {"failed": str(full).partition(". GPU")[0]}


def _measure(job: Job, name: str) -> dict[str, Any]:
    model = build(job)
    clocked = side(name, job, model)
    if isinstance(clocked, Plain):
        del model  # the loop holds the weights, some of them merged
    gc.collect()
    decoded = decode(clocked)
    clocked.check()
    found = {"tier": clocked.tier, **clocked.notes, **decoded, "kv_bytes": clocked.kv_bytes}
    if job.ttft and not isinstance(clocked, Plain):
        found |= first_token(clocked)
    if job.chunk and isinstance(clocked, Ours):
        found |= first_token_in_chunks(clocked)
    return found


def decode(clocked: Side) -> dict[str, Any]:
    """The steps. Units: seconds, milliseconds, bytes."""
    job, where = clocked.job, clocked.job.where
    vocabulary = SHAPES[job.shape]["vocab_size"]
    forced = torch.randint(0, vocabulary, (COMPARED, job.batch, 1), generator=torch.Generator().manual_seed(1))
    forced = forced.to(where)
    peak, skipped = Peak(where), recorded_graphs(where)["skips"]
    compared, began = [], time.perf_counter()
    for i in range(COMPARED):
        logits = one(clocked, forced[i])
        compared.append(logits[:, -1].float().cpu().numpy())
        if i == 0:
            first, first_peak = time.perf_counter() - began, peak.take()
    token = logits[:, -1:].argmax(-1)
    compiled = time.perf_counter() - began
    for _ in range(WARM - COMPARED):
        token = one(clocked, token)[:, -1:].argmax(-1)
    peak.take()
    samples = []
    for _ in range(max(1, job.steps // BLOCK)):
        wait(where)
        began = time.perf_counter()
        for _ in range(BLOCK):
            token = one(clocked, token)[:, -1:].argmax(-1)
        wait(where)
        samples.append((time.perf_counter() - began) / BLOCK)
    ms, graphs = statistics.median(samples) * 1e3, recorded_graphs(where)
    return {
        "ms": ms, "mean_ms": statistics.mean(samples) * 1e3, "tokens_per_s": job.batch / ms * 1e3,
        "peak_bytes": peak.take(), "first_step_peak_bytes": first_peak, "first_step_s": first,
        "warm_s": compiled, "cudagraphs": graphs | {"skips": graphs["skips"] - skipped},
        "logits": np.stack(compared), "ttft_s": None,
    }  # fmt: skip


def one(clocked: Side, token: Tensor) -> Tensor:
    """A step. What the last one returned may be overwritten from here on."""
    torch.compiler.cudagraph_mark_step_begin()
    return clocked.step(token)


def first_token(clocked: Any) -> dict[str, Any]:
    """Eager prefill of a new cache and the first compiled step on it, which imports it on our side.

    Nothing is compiled any more; a CUDA graph is recorded again, since the cache is a new one.
    """
    job = clocked.job
    clocked.cache = None
    gc.collect()
    empty_cache(job.where)
    prompt, token = _prompt(job)
    if clocked.notes.get("fill") == "layers":
        return {
            "ttft_s": None,
            "ttft_missing": "an eager prefill needs the dense cache, and this side was filled layer by layer",
        }
    wait(job.where)
    began = time.perf_counter()
    clocked.cache = prefilled(job, clocked.model, prompt)
    wait(job.where)
    prefill = time.perf_counter() - began
    one(clocked, token)
    wait(job.where)
    ttft = time.perf_counter() - began
    return {"ttft_s": ttft, "prefill_s": prefill}


def first_token_in_chunks(clocked: Ours) -> dict[str, Any]:
    """A compiled prefill in chunks straight into codes, and the first step; the dense cache never exists whole."""
    job = clocked.job
    clocked.cache = None
    gc.collect()
    empty_cache(job.where)
    (prompt, token), chunked = _prompt(job), clocked.compiled(mode=None)
    prompt = prompt[:, : prompt.shape[1] // job.chunk * job.chunk]
    clocked.cache = clocked.coded(tokens=0)

    def run(ids: Tensor) -> None:
        chunked(ids, use_cache=True, logits_to_keep=1, **{clocked.keyword: clocked.cache})

    run(prompt[:, : job.chunk])  # compiles; then the prompt begins again, at position 0
    for layer in clocked.cache.layers:
        layer.cumulative_length.zero_()
    wait(job.where)
    began = time.perf_counter()
    for ids in prompt.split(job.chunk, 1):
        run(ids)
    one(clocked, token)
    wait(job.where)
    return {"ttft_chunked_s": time.perf_counter() - began, "chunk": job.chunk, "chunked_tokens": prompt.shape[1]}


def _prompt(job: Job) -> tuple[Tensor, Tensor]:
    """A prompt, and the token after it. Shapes: int64[B, S], int64[B, 1]."""
    vocabulary = SHAPES[job.shape]["vocab_size"]
    ids = torch.randint(0, vocabulary, (job.batch, job.start), generator=torch.Generator().manual_seed(2))
    return ids.to(job.where), torch.zeros(job.batch, 1, dtype=torch.int64, device=job.where)


class Peak:
    """Peak of allocated device memory since the last look; None without a device. Units: bytes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.take()

    def take(self) -> int | None:
        if self.device.type != "cuda":
            return None
        wait(self.device)
        found = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


def empty_cache(device: torch.device) -> None:
    """Hand free memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the process that asks


def apart(job: Job, name: str) -> dict[str, Any]:
    """:func:`measure` in a process of its own. A side that breaks is a row that says why."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, job, name).result()
        except Exception as broken:  # whatever it was, the other sides go on, and the exit code tells
            return {"failed": f"{type(broken).__name__}: {broken}".strip().splitlines()[0]}


def rows(job: Job, names: list[str], run: Callable[[Job, str], dict[str, Any]] = apart) -> Iterator[dict[str, Any]]:
    """A row for each side, dense ones first: the first side's logits are the reference."""
    reference = None
    for name in sorted(names, key=lambda n: {"hf": 0, "loop": 1}.get(n, 2)):
        found = run(job, name)
        logits = found.pop("logits", None)
        reference = logits if reference is None else reference
        row = {
            "what": name if name in ("hf", "loop") else "sphkv", "tier": name, "B": job.batch, "L": job.length,
            "tokens_per_s": None, "ms": None, "speedup": None, "peak_bytes": None, "kv_bytes": None, "ttft_s": None,
            "cudagraphs": None, **found, "kl": None if logits is None else kl(reference, logits),
        }  # fmt: skip
        yield row


def compare(found: list[dict[str, Any]]) -> None:
    """Set every row's speedup over the faster dense side at its batch and length."""
    for row in found:
        shape = row["B"], row["L"]
        dense = [r["ms"] for r in found if (r["B"], r["L"]) == shape and r["what"] != "sphkv" and r["ms"]]
        row["speedup"] = min(dense) / row["ms"] if dense and row["ms"] else None


def kl(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean divergence of the first steps' tokens from the first side's. Units: nats."""
    p, q = (torch.from_numpy(x).flatten(0, 1) for x in (reference, logits))
    return float(token_kl(p, q).mean())


def faults(row: dict[str, Any], device: str) -> list[str]:
    """Why a row is no measurement; a dense cache that does not fit is none of them."""
    if "failed" in row:
        return [f"{row['tier']}: {row['failed']}"] if row["what"] == "sphkv" or "memory" not in row["failed"] else []
    graphs = row["cudagraphs"]
    if torch.device(device).type == "cuda" and (not graphs["replaying"] or graphs["skips"]):
        return [f"{row['tier']}: no CUDA graph was replayed: {graphs}"]
    return []


def table(found: list[dict[str, Any]], title: str) -> Table:
    """The rows for a person."""
    columns = (
        "",
        "tier",
        "B",
        "L",
        "tokens/s",
        "ms/step",
        "of the faster dense",
        "peak",
        "cache",
        "TTFT s",
        "graphs",
        "KL",
    )
    out = Table(*columns, title=title, title_justify="left")
    for r in found:
        lead = r["what"], r["tier"], str(r["B"]), f"{r['L']:,}"
        if "failed" in r:
            out.add_row(*lead, r["failed"])
            continue
        peak = "-" if r["peak_bytes"] is None else human(r["peak_bytes"])
        speedup = "-" if r["speedup"] is None else f"{r['speedup']:.2f}x"
        first = "-" if r["ttft_s"] is None else f"{r['ttft_s']:.2f}"
        graphs = f"{r['cudagraphs']['recorded']}{'' if r['cudagraphs']['replaying'] else ', not replayed'}"
        times = f"{r['tokens_per_s']:.1f}", f"{r['ms']:.2f}", speedup
        out.add_row(*lead, *times, peak, human(r["kv_bytes"]), first, graphs, f"{r['kl']:.1e}")
    return out
