"""One decode step of a whole model at a long context: dense under Inductor beside ours, in one run.

Both sides are compiled by Inductor and take turns, block by block, so that a busy machine slows both alike; figures are
medians. Beside the ratio: compile time of both, the runner's own overhead per step, resident cache bytes, and the peak
of resident memory in prefill, import and decode (each side in a process of its own).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import sphkv_compile
from sphkv_compile.bench.record import card
from sphkv_compile.integrations.models import dtype_of
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.runtime.runner import Runner

console = Console()


@dataclass(frozen=True)
class Job:
    """What is measured.

    Args:
        model: bundled name, folder or .gguf file; ``random`` has SmolLM2's shape.
        length: cached tokens.
        steps: in a block.
    """

    model: str
    length: int
    bits: tuple[str, ...]
    dtype: str
    steps: int
    blocks: int
    threads: int

    @property
    def capacity(self) -> int:
        return self.length + 2 * (self.steps * self.blocks + 64)

    def prompt(self, vocabulary: int) -> torch.Tensor:
        """Random tokens. Shapes: int64[1, length]."""
        return torch.randint(0, vocabulary, (1, self.length), generator=torch.Generator().manual_seed(0))


def load(name: str, dtype: torch.dtype) -> Any:
    if name != "random":
        from sphkv_compile.integrations.models import load as load_model

        return load_model(name, dtype=dtype)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=65536, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)  # whose ``to`` is decorated beyond what mypy follows
    return model.to(dtype).eval()


def options_of(name: str) -> dict:
    return {"bits": int(name) if name.isdigit() else name}


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak since the last reset) of this process, on Linux. Units: bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def peak_of(run: Callable[[], Any], base: int) -> int:
    """Peak of resident memory during ``run``, over ``base``. Units: bytes."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    return resident("VmHWM") - base


def prefill(model: Any, prompt: torch.Tensor, capacity: int) -> Any:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=capacity)
    for chunk in prompt.split(512, 1):
        model(chunk, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    return cache


def peaks(model: Any, prompt: torch.Tensor, capacity: int, name: str) -> dict[str, int]:
    """Memory of one side, run node by node. Units: bytes over the loaded model and the loaded compiler."""
    keyword, call, step = cache_keyword(model), {"use_cache": True, "logits_to_keep": 1}, model.forward
    if name != "dense":
        step = torch.compile(step, backend=sphkv_compile.backend, options={**options_of(name), "inductor": False})
    for _ in range(2):  # on a short cache first: what the process loads once is no memory of the cache
        step(prompt[:, :1], **call, **{keyword: prefill(model, prompt[:, :512], capacity)})
    gc.collect()
    base, caches = resident("VmRSS"), []
    found = {"prefill_peak": peak_of(lambda: caches.append(prefill(model, prompt, capacity)), base)}
    call[keyword] = caches[0]
    found["first_step_peak"] = peak_of(lambda: step(prompt[:, :1], **call), base)
    step(prompt[:, :1], **call)
    found["decode_peak"] = peak_of(lambda: [step(prompt[:, :1], **call) for _ in range(4)], base)
    return found


class Side:
    """A compiled model and its own cache."""

    def __init__(self, model: Any, prompt: torch.Tensor, capacity: int, options: dict | None):
        torch._dynamo.reset()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="sphkv-bench-")  # compile cold, both sides
        self.keyword = cache_keyword(model)
        backend = {"backend": "inductor"} if options is None else {"backend": sphkv_compile.backend, "options": options}
        self.cache = prefill(model, prompt, capacity)
        self.forward = torch.compile(model.forward, fullgraph=True, **backend)
        begin = time.perf_counter()
        self.token = prompt[:, :1]
        self.step()
        self.step()  # the cache tensors' type has changed: the second and last graph
        self.compile_seconds = time.perf_counter() - begin
        self.seconds: list[float] = []
        self.block(4)
        self.seconds.clear()

    def step(self) -> None:
        self.forward(self.token, use_cache=True, **{self.keyword: self.cache})

    def block(self, steps: int) -> None:
        for _ in range(steps):
            begin = time.perf_counter()
            self.step()
            self.seconds.append(time.perf_counter() - begin)


@contextlib.contextmanager
def overhead(samples: list[float]) -> Iterator[None]:
    """Collect the runner's time outside of the compiled graph, per step."""
    call, inside = Runner.__call__, [0.0]

    def timed(self: Runner, args: list) -> Any:
        run = self.run

        def measured(inputs: list) -> Any:
            begin = time.perf_counter()
            try:
                return run(inputs)
            finally:
                inside[0] = time.perf_counter() - begin

        self.run = measured
        begin = time.perf_counter()
        try:
            return call(self, args)
        finally:
            samples.append(time.perf_counter() - begin - inside[0])
            self.run = run

    with mock.patch.object(Runner, "__call__", timed):
        yield


@torch.inference_mode()
def run(job: Job) -> dict[str, Any]:
    """Every side, block by block in turns, and the record of it."""
    torch.set_num_threads(job.threads)
    model = load(job.model, dtype_of(job.dtype))
    prompt = job.prompt(model.config.vocab_size)
    sides: dict[str, Side] = {}
    for name in ("dense", *job.bits):
        options = None if name == "dense" else options_of(name)
        with console.status(f"{name}: prefill and compile"):
            sides[name] = Side(model, prompt, job.capacity, options)
    with console.status("decoding in turns"):
        for _ in range(job.blocks):
            for side in sides.values():
                side.block(job.steps)
        samples: list[float] = []
        with overhead(samples):
            sides[job.bits[0]].block(job.steps)
    return {
        "machine": card("cpu"), "threads": job.threads, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "model": job.model, "dtype": job.dtype, "length": job.length, "overhead_us": statistics.median(samples) * 1e6,
        "rows": [row(job, name, side, sides["dense"]) for name, side in sides.items()],
    }  # fmt: skip


def row(job: Job, name: str, side: Side, dense: Side) -> dict[str, Any]:
    median = statistics.median(side.seconds)
    out = {
        "what": name, "ms": median * 1e3, "ratio": median / statistics.median(dense.seconds),
        "compile_s": side.compile_seconds, "compile_ratio": side.compile_seconds / dense.compile_seconds,
    }  # fmt: skip
    with console.status(f"{name}: memory, in a process of its own"):
        command = [sys.executable, "-m", __name__, json.dumps(asdict(job)), name]
        # the C library keeps freed blocks below its threshold, which grows; fixed, tensors go back to the system
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        out |= json.loads(found.stdout.splitlines()[-1])
    if side is dense:
        return out | {"resident": sum(x.keys.nbytes + x.values.nbytes for x in side.cache.layers)}
    report = sphkv_compile.report(side.cache)
    if report.matched != len(side.cache.layers) or not report.encoded_tokens:
        raise SystemExit(
            f"{name}: {report.matched} sites matched, {report.encoded_tokens} tokens encoded: nothing to compare"
        )
    return out | {"resident": report.resident_bytes, "matched": report.matched, "encoded": report.encoded_tokens}


def table(record: dict[str, Any]) -> Table:
    """The record for a person."""
    title = f"{record['model']} {record['dtype']}, {record['length']:,} cached tokens, {record['threads']} threads"
    names = ("ms/step", "of dense", "compile s", "of dense", "cache MiB", "peak: prefill", "first step", "decode")
    caption = f"runner overhead {record['overhead_us']:.0f} us a step"
    out = Table("", *names, title=title, title_justify="left", caption=caption, caption_justify="left")
    for r in record["rows"]:
        memory = (f"{r[k] / 2**20:.0f}" for k in ("resident", "prefill_peak", "first_step_peak", "decode_peak"))
        times = f"{r['ms']:.1f}", f"{r['ratio']:.2f}", f"{r['compile_s']:.0f}", f"{r['compile_ratio']:.2f}"
        out.add_row(r["what"], *times, *memory)
    return out


@torch.inference_mode()
def main(job: Job, side: str) -> None:
    """Print one side's memory, as JSON: what the process of its own does."""
    torch.set_num_threads(job.threads)
    model = load(job.model, dtype_of(job.dtype))
    print(json.dumps(peaks(model, job.prompt(model.config.vocab_size), job.capacity, side)))


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])), sys.argv[2])
