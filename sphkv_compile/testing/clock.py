"""Clocks of a GPU: a call replayed from a CUDA graph, the fastest dense attention, and how fast memory is read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

ROTATE = 200 << 20
"""Bytes that the copies of a cache exceed together, where one does not: no second-level cache holds them."""
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Of torch's attention kernels, those that are fast at one query."""


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies(nbytes: int, most: int = 24) -> int:
    """How many copies of a cache of ``nbytes`` exceed :data:`ROTATE` together."""
    return max(1, min(most, -(-ROTATE // nbytes)))


def timed(calls: Sequence[Callable[[], Any]], rounds: int = 20) -> float:
    """Median microseconds of one call, replayed from one graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the calls read may still be written
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
    count = copies(4 * b * h * length * d, most=1 << 10)
    kv = [[torch.randn(b, h, length, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(count)]
    q = torch.randn(b, h * g, 1, d, device="cuda", dtype=torch.bfloat16)
    found = []
    for name, kernel in KERNELS.items():
        for form, query in (("heads", q), ("rows", q.view(b, h, g, d))):
            gqa = form == "heads"

            def call(k, v, query=query, kernel=kernel, gqa=gqa):
                with sdpa_kernel(kernel):
                    return F.scaled_dot_product_attention(query, k, v, enable_gqa=gqa)

            try:
                found.append((timed([partial(call, *pair) for pair in kv]), f"{name}, {form}"))
            except RuntimeError as refused:  # a kernel that does not serve this shape
                Console().print(f"dense {name}, {form}: {str(refused).splitlines()[0]}")
    return min(found)


def kernel_of(name: str | None) -> AbstractContextManager:
    """The context in which torch takes the kernel called ``name``; its own choice for None."""
    return sdpa_kernel(KERNELS[name]) if name else nullcontext()


def read_ceiling() -> float:
    """Bytes per second that a reduction reads. Units: TB/s."""
    x = torch.ones(1 << 30, device="cuda", dtype=torch.float32)
    return x.nbytes / timed([lambda: x.sum()]) / 1e6
