"""What writing the cache costs on a GPU: a step's append, a prompt's encoding, and that beside its attention.

``append`` is replayed from one CUDA graph over a whole span, so that its mean has the step that encodes in it; the
longest step is by its kernel's own clock. ``encode`` turns all spans of a prompt into codes, anchors in. ``prefill`` is
dense attention of the prompt alone, and followed by ``encode``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sphkv_compile.bench.attention import SINK, SPAN, Case, make
from sphkv_compile.spec import Tier
from sphkv_compile.storage.state import LENGTH, SPANS
from sphkv_compile.testing import clock


def append_row(tier: Tier, b: int, length: int, h: int, g: int, d: int) -> dict[str, Any]:
    """The mean and the longest append among those of one span. Units: microseconds."""
    from sphkv_compile.kernels.gpu import launch

    case = make(tier, b, length, h, g, d)
    rows = case.state.rows.clone()
    rows[:, LENGTH] -= SPAN
    rows[:, SPANS] -= 1

    def span() -> None:
        case.state.rows.copy_(rows)
        for _ in range(SPAN):
            launch.append(case.state, case.layout, case.q, case.k, case.v, None, None, None, False)

    us = clock.timed([span]) / SPAN
    if not bool((case.state.rows[:, SPANS] == rows[:, SPANS] + 1).all()):
        raise RuntimeError("the appends of a span encoded none: what was timed is not a span")
    with profile(activities=[ProfilerActivity.CUDA]) as kernels:
        span()
        torch.cuda.synchronize()
    longest = max(e.time_range.elapsed_us() for e in kernels.events() if e.name.startswith("append"))
    return _row("append", tier, b, length, h, g, d) | {"us": us, "longest_us": longest}


def encode_row(tier: Tier, b: int, length: int, h: int, g: int, d: int) -> dict[str, Any]:
    """All spans of a prompt from keys and values in bfloat16. Units: microseconds, bytes of input."""
    case = make(tier, b, length, h, g, d)
    k, v = _prompt(b, length, h, d)
    us = clock.timed([lambda: _encode(case, k, v)])
    nbytes = case.layout.coded_spans(length) * SPAN * b * h * d * 4
    return _row("encode", tier, b, length, h, g, d) | {"us": us, "bytes": nbytes, "gbps": nbytes / us / 1e3}


def prefill_row(tier: Tier, b: int, length: int, h: int, g: int, d: int) -> dict[str, Any]:
    """A layer's attention over a prompt by the faster of flash and cuDNN, without and with its encoding. Units:
    microseconds."""
    case = make(tier, b, length, h, g, d)
    k, v = _prompt(b, length, h, d)
    q = torch.randn(b, h * g, length, d, device="cuda", dtype=torch.bfloat16)

    def attention(kernel: SDPBackend) -> None:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def both(kernel: SDPBackend) -> None:
        attention(kernel)
        _encode(case, k, v)

    found = [(clock.timed([partial(attention, kernel)] * 16, rounds=3), name) for name, kernel in clock.KERNELS.items()]
    dense_us, name = min(found)
    us = clock.timed([partial(both, clock.KERNELS[name])] * 16, rounds=3)
    times = {"us": us, "dense_us": dense_us, "dense": name, "ratio": us / dense_us}
    return _row("prefill", tier, b, length, h, g, d) | times


def _row(what: str, tier: Tier, b: int, length: int, h: int, g: int, d: int) -> dict[str, Any]:
    return {"what": what, "tier": str(tier), "B": b, "L": length, "HKV": h, "G": g, "D": d}


def _prompt(b: int, length: int, h: int, d: int) -> list[torch.Tensor]:
    return [torch.randn(b, h, length, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)]


def _encode(case: Case, k: torch.Tensor, v: torch.Tensor) -> None:
    from sphkv_compile.kernels.gpu import bulk

    members = torch.arange(k.shape[0], device=k.device)
    spans = range(case.layout.coded_spans(k.shape[2]))
    bulk.encode(case.state, case.layout, members, k, v, SINK, spans, 0)


def run(batches: list[int], lengths: list[int], dims: list[int], tiers: list[str]) -> Iterator[dict[str, Any]]:
    """Every row as soon as it is measured: appends at each batch, encoding at each length, prefill at the first."""
    for d in dims:
        for tier in map(Tier.parse, tiers):
            for b in batches:
                yield append_row(tier, b, lengths[0], 8, 4, d)
                torch.cuda.empty_cache()
            for length in lengths:
                yield encode_row(tier, 1, length, 8, 4, d)
            yield prefill_row(tier, 1, lengths[0], 8, 4, d)


def remark(r: dict[str, Any]) -> str:
    """What a row says beside its time."""
    if r["what"] == "append":
        return f"longest {r['longest_us']:.1f} us"
    if r["what"] == "encode":
        return f"{r['gbps']:.0f} GB/s of keys and values"
    return f"{r['ratio']:.3f} of attention alone ({r['dense']})"


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    out = Table("", "tier", "B", "L", "D", "us", "")
    for r in rows:
        out.add_row(r["what"], r["tier"], str(r["B"]), f"{r['L']:,}", str(r["D"]), f"{r['us']:.1f}", remark(r))
    return out
