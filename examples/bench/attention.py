"""One attention of a decode step on a GPU: dense beside codes, all overheads in, side by side in one run.

    python examples/bench/attention.py --batch 1 8 --length 8192 32768 131072 --tiers K4V4 K4V2 --name h100

Ours is everything that a step does for one layer's attention: queries turned, anchors, codes, sinks and window, parts
merged, output turned back. Dense is the fastest of flash and cuDNN, each with query heads as heads and as rows. Both
are captured in a CUDA graph and replayed over copies of the cache that together exceed the second-level cache. Errors
are against float64 attention over the dequantised cache. The record goes to examples/bench/records/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sphkv_compile.kernels.gpu import launch
from sphkv_compile.ops.read import dense
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import FROZEN, LENGTH, SPANS, START, Geometry, State, empty_state

RECORDS = Path(__file__).parent / "records"
SINK, WINDOW, SPAN, PAGE = 4, 128, 128, 64
ROTATE = 200 << 20
"""Bytes that the copies of a cache exceed together, where one does not."""


@dataclass
class Case:
    """A cache of ``length`` tokens and its new token. Shapes: B rows, H kv heads, G query heads each, D head_dim."""

    state: State
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    columns: int

    def attend(self) -> Tensor:
        arguments = self.state, self.layout, self.q, self.k, self.v, self.pos, None, self.columns
        return launch.attend(*arguments, None, None, False)

    @property
    def bytes(self) -> int:
        """What one step has to read."""
        s, b = self.state, self.q.shape[0]
        spans = int(s.rows[0, SPANS])
        h, d = self.k.shape[1], self.k.shape[3]
        itemsize = s.exact_k.element_size(), s.exact_v.element_size()
        page = self.layout.page_bytes(self.layout.tiers[0], d, d, itemsize)
        coded = spans * (self.layout.pages_per_span * (page + 4) + d + 2)
        exact = (int(s.rows[0, LENGTH]) - spans * SPAN) * d * sum(itemsize)
        return b * h * (coded + exact)


def make(tier: Tier, b: int, length: int, h: int, g: int, d: int, seed: int = 0, spread: float = 2.0) -> Case:
    """Random codes of real statistics, in pages in random order. ``spread`` is about the logits' standard deviation."""
    generator = torch.Generator("cuda").manual_seed(seed)
    layout = Layout("axis_cosine", (tier,), SINK, WINDOW, SPAN, PAGE, 0, "half", d, "tiles")
    geometry = Geometry(b, h, length + 1, d, d, torch.bfloat16, torch.bfloat16, False)
    pages = layout.spans(length + 1, False) * layout.pages_per_span
    size = layout.page_bytes(tier, d, d, geometry.itemsize)
    arena = torch.randint(0, 256, (b * h * pages, size), dtype=torch.uint8, device="cuda", generator=generator)
    codes = PAGE * d * (tier.k_bits + tier.v_bits) // 8
    shape = b * h * pages, PAGE
    radius, weight = (torch.rand(shape, device="cuda", generator=generator) + 0.5 for _ in range(2))
    meta = torch.stack([radius, weight], -1).half().contiguous().view(torch.uint8)
    arena[:, codes:] = meta.view(shape[0], -1)
    state = empty_state(layout, geometry, arena.view(-1))
    order = torch.randperm(b * h * pages, device="cuda", generator=generator) * (size // UNIT)
    state.table.copy_(order.view(b, h, pages))
    begin = torch.arange(pages * PAGE, dtype=torch.int32, device="cuda").view(pages, PAGE) + SINK
    state.positions.copy_(begin.expand_as(state.positions))

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, device="cuda", generator=generator)

    state.anchors.copy_((normal(*state.anchors.shape) * 30).clamp(-127, 127))
    state.span_scales[..., 0], state.span_scales[..., 1] = 0.03, 1.0
    state.pair_scale.copy_(1 + 0.1 * normal(*state.pair_scale.shape))
    state.exact_k.copy_(normal(*state.exact_k.shape))
    state.exact_v.copy_(normal(*state.exact_v.shape))
    state.rows[:, START], state.rows[:, LENGTH], state.rows[:, FROZEN] = 0, length, 1
    state.rows[:, SPANS] = layout.coded_spans(length)
    q = (normal(b, h * g, 1, d) * spread).bfloat16()
    k, v = (normal(b, h, 1, d).bfloat16() for _ in range(2))
    return Case(state, layout, q, k, v, torch.tensor([length], device="cuda"), length + 1)


def error(case: Case) -> float:
    """Of the first and last row, against float64 over what the cache decodes to; relative to the output's norm."""
    found, worst = case.attend().double(), 0.0
    b, hq, _, d = case.q.shape
    for row in {0, b - 1}:
        one = slice(row, row + 1)
        state = State(*(x if name == "arena" else x[one] for name, x in zip(State._fields, case.state)))
        widened = state._replace(exact_k=state.exact_k.float(), exact_v=state.exact_v.float())
        k, v = dense(widened, case.layout, case.columns, block=256)
        k[:, :, -1], v[:, :, -1] = case.k[one, :, 0].float(), case.v[one, :, 0].float()
        for head in range(k.shape[1]):
            group = slice(head * hq // k.shape[1], (head + 1) * hq // k.shape[1])
            logits = case.q[row, group, 0].double() @ k[0, head].double().T * d**-0.5
            expected = logits.softmax(-1) @ v[0, head].double()
            gap = (found[row, group, 0] - expected).norm() / expected.norm()
            worst = max(worst, float(gap))
    return worst


def timed(calls: list[Callable[[], Any]], rounds: int = 20) -> float:
    """Median microseconds of one call, replayed from one graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    repeat = max(1, 16 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    samples = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / repeat / len(calls))
    return statistics.median(samples[3:])


def dense_time(b: int, length: int, h: int, g: int, d: int) -> tuple[float, str]:
    """The fastest dense attention, and its name. Units: microseconds."""
    nbytes = 4 * b * h * length * d
    copies = max(1, -(-ROTATE // nbytes)) if nbytes < ROTATE else 1
    kv = [[torch.randn(b, h, length, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies)]
    q = torch.randn(b, h * g, 1, d, device="cuda", dtype=torch.bfloat16)
    found = []
    for name, kernel in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        for form, query in (("heads", q), ("rows", q.view(b, h, g, d))):
            gqa = form == "heads"

            def call(pair, query=query, kernel=kernel, gqa=gqa):
                with sdpa_kernel(kernel):
                    return F.scaled_dot_product_attention(query, *pair, enable_gqa=gqa)

            try:
                found.append((timed([lambda pair=pair, call=call: call(pair) for pair in kv]), f"{name}, {form}"))
            except RuntimeError as refused:  # a kernel that does not serve this shape
                Console().print(f"dense {name}, {form}: {str(refused).splitlines()[0]}")
    return min(found)


def read_ceiling() -> float:
    """Bytes per second that a reduction reads. Units: TB/s."""
    x = torch.ones(1 << 30, device="cuda", dtype=torch.float32)
    return x.nbytes / timed([lambda: x.sum()]) / 1e6


def measure(tier: Tier, b: int, length: int, h: int, g: int, d: int, dense_us: float, check: bool) -> dict[str, Any]:
    first = make(tier, b, length, h, g, d)
    copies = max(1, min(24, -(-ROTATE // first.bytes)))
    cases = [first, *(make(tier, b, length, h, g, d, seed) for seed in range(1, copies))]
    us = timed([case.attend for case in cases])
    return {
        "what": "sphkv", "tier": str(tier), "B": b, "L": length, "HKV": h, "G": g, "D": d, "us": us,
        "dense_us": dense_us, "speedup": dense_us / us, "rel_err": error(first) if check else None,
        "bytes": first.bytes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--tiers", nargs="+", default=["K4V4", "K4V2"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--dim", type=int, nargs="+", default=[128])
    parser.add_argument("--name", help="of the record; none is written without")
    args = parser.parse_args()
    ceiling, rows = read_ceiling(), []
    table = Table("tier", "B", "L", "D", "dense us", "ours us", "speedup", "% of ceiling", "error")
    for dim in args.dim:
        for b in args.batch:
            for length in args.length:
                shape = b, length, args.heads, args.group, dim
                dense_us, which = dense_time(*shape)
                for name in args.tiers:
                    row = measure(Tier.parse(name), *shape, dense_us, check=b * length <= 1 << 20)
                    row |= {"dense": which, "ceiling_tbps": ceiling}
                    rows.append(row)
                    share = row["bytes"] / row["us"] / 1e4 / ceiling
                    cells = f"{dense_us:.1f} ({which})", f"{row['us']:.1f}", f"{row['speedup']:.2f}", f"{share:.0f}"
                    table.add_row(name, str(b), str(length), str(dim), *cells, f"{row['rel_err'] or float('nan'):.1e}")
                    torch.cuda.empty_cache()
    console = Console(width=120)
    console.print(f"{torch.cuda.get_device_name()}: reads {ceiling:.2f} TB/s", table)
    if args.name:
        import triton

        record = {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "date": time.strftime("%Y-%m-%d"), "rows": rows,
        }  # fmt: skip
        RECORDS.mkdir(exist_ok=True)
        (RECORDS / f"attention_{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
