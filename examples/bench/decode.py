"""One decode step of a whole model at a long context: dense under Inductor beside ours, in one run.

    python examples/bench/decode.py --length 4096 --bits 4 K4V2

Both sides are compiled by Inductor and take turns, block by block, so that a busy machine slows both alike; figures are
medians. Beside the ratio: compile time of both, the runner's own overhead per step, resident cache bytes, and the peak
of resident memory in prefill and decode. The record goes to examples/bench/records/.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sphkv_compile
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.runtime.runner import Runner

RECORDS = Path(__file__).parent / "records"
console = Console()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2", help="bundled name, folder or .gguf; 'random' has SmolLM2's shape"
    )
    parser.add_argument("--length", type=int, default=4096, help="cached tokens")
    parser.add_argument("--bits", nargs="+", default=["4"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="decode", help="of the record")
    return parser.parse_args()


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
    return LlamaForCausalLM(config).to(dtype).eval()


class Memory:
    """Peak of the process's resident memory since the last reset (Linux). Units: bytes."""

    @staticmethod
    def reset() -> int:
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return Memory.read("VmRSS")

    @staticmethod
    def read(field: str = "VmHWM") -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        return 0


class Side:
    """A compiled model and its own cache."""

    def __init__(self, model: Any, prompt: torch.Tensor, capacity: int, options: dict | None):
        from transformers import StaticCache

        torch._dynamo.reset()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="sphkv-bench-")  # compile cold, both sides
        self.keyword = cache_keyword(model)
        backend = {"backend": "inductor"} if options is None else {"backend": sphkv_compile.backend, "options": options}
        base = Memory.reset()
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        for chunk in prompt.split(512, 1):
            model(chunk, use_cache=True, logits_to_keep=1, **{self.keyword: self.cache})
        self.prefill_peak = Memory.read() - base
        self.forward = torch.compile(model.forward, fullgraph=True, **backend)
        begin = time.perf_counter()
        self.token = prompt[:, :1]
        self.step()
        self.step()  # the cache tensors' type has changed: the second and last graph
        self.compile_seconds = time.perf_counter() - begin
        self.seconds: list[float] = []
        base = Memory.reset()
        self.block(4)
        self.decode_peak = Memory.read() - base
        self.seconds.clear()

    def step(self) -> None:
        self.forward(self.token, use_cache=True, **{self.keyword: self.cache})

    def block(self, steps: int) -> None:
        for _ in range(steps):
            begin = time.perf_counter()
            self.step()
            self.seconds.append(time.perf_counter() - begin)


@contextlib.contextmanager
def overhead(samples: list[float]):
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

    Runner.__call__ = timed
    try:
        yield
    finally:
        Runner.__call__ = call


@torch.inference_mode()
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    model = load(args.model, getattr(torch, args.dtype))
    capacity = args.length + 2 * (args.steps * args.blocks + 64)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, args.length), generator=generator)
    sides: dict[str, Side] = {}
    for name in ("dense", *args.bits):
        options = None if name == "dense" else {"bits": int(name) if name.isdigit() else name}
        with console.status(f"{name}: prefill and compile"):
            sides[name] = Side(model, prompt, capacity, options)
    with console.status("decoding in turns"):
        for _ in range(args.blocks):
            for side in sides.values():
                side.block(args.steps)
        samples: list[float] = []
        with overhead(samples):
            sides[args.bits[0]].block(args.steps)
    rows = [row(args, name, side, sides["dense"]) for name, side in sides.items()]
    record = {
        "machine": platform.processor() or platform.machine(), "threads": args.threads, "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "model": args.model, "dtype": args.dtype, "length": args.length,
        "overhead_us": statistics.median(samples) * 1e6, "rows": rows,
    }  # fmt: skip
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    show(record)


def row(args: argparse.Namespace, name: str, side: Side, dense: Side) -> dict[str, Any]:
    median = statistics.median(side.seconds)
    out = {
        "what": name, "ms": median * 1e3, "ratio": median / statistics.median(dense.seconds),
        "compile_s": side.compile_seconds, "compile_ratio": side.compile_seconds / dense.compile_seconds,
        "prefill_peak": side.prefill_peak, "decode_peak": side.decode_peak,
    }  # fmt: skip
    if side is dense:
        return out | {"resident": sum(x.keys.nbytes + x.values.nbytes for x in side.cache.layers)}
    report = sphkv_compile.report(side.cache)
    if report.matched != len(side.cache.layers) or not report.encoded_tokens:
        raise SystemExit(
            f"{name}: {report.matched} sites matched, {report.encoded_tokens} tokens encoded: nothing to compare"
        )
    return out | {"resident": report.resident_bytes, "matched": report.matched, "encoded": report.encoded_tokens}


def show(record: dict[str, Any]) -> None:
    """Print the record."""
    title = f"{record['model']} {record['dtype']}, {record['length']:,} cached tokens, {record['threads']} threads"
    names = ("ms/step", "of dense", "compile s", "of dense", "cache MiB", "prefill peak", "decode peak")
    table = Table("", *names, title=title, title_justify="left")
    for r in record["rows"]:
        memory = (f"{r[k] / 2**20:.0f}" for k in ("resident", "prefill_peak", "decode_peak"))
        times = f"{r['ms']:.1f}", f"{r['ratio']:.2f}", f"{r['compile_s']:.0f}", f"{r['compile_ratio']:.2f}"
        table.add_row(r["what"], *times, *memory)
    console.print(table)
    console.print(f"runner overhead {record['overhead_us']:.0f} us a step")


if __name__ == "__main__":
    main()
