"""What plans cost beside the steps between them: all layers of a model under a budget, on random tokens.

A plan is timed as the runtime makes it, from a device that is idle to one that is idle again, so what the host does
counts. Between two plans ``plan_every`` random tokens come. Attention is that of one layer's decode step over what the
last plan has left, captured in a CUDA graph; a step has one of every layer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from sphkv_compile.ops.append import append
from sphkv_compile.ops.decode import packing
from sphkv_compile.policies.solver import Prices, allocate
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool, page_bytes
from sphkv_compile.runtime.retention import Retention
from sphkv_compile.spec import CacheSpec, parse_bytes
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.state import Geometry
from sphkv_compile.testing import clock

WARM, PLANS = 4, 8
"""Plans before the clock, and on it."""
BASE = 5e5
"""Of the rotary embedding."""


class Shape(NamedTuple):
    """Layers, kv heads, query heads of each, and head_dim."""

    layers: int = 32
    heads: int = 8
    group: int = 4
    dim: int = 128


class Run:
    """Sites under one budget and the tokens that come to them.

    Args:
        length: tokens of the prompt.
        budget: as the spec has it.
    """

    def __init__(self, shape: Shape, batch: int, length: int, budget: float | str, device: str):
        self.shape, self.batch, self.length = shape, batch, length
        self.random = torch.Generator(device).manual_seed(0)
        spec = CacheSpec(budget=budget)
        _, heads, group, d = shape
        where = torch.device(device)
        self.layout = Layout.of(spec, "half", d, packing(spec, d, d, where, True), kept=True)
        capacity = length + spec.plan_every * (WARM + PLANS)
        kind = torch.bfloat16
        self.geometry = g = Geometry(batch, heads, capacity, d, d, kind, kind, False, group)
        dense = g.dense_bytes * shape.layers
        self.retention = Retention.of(dataclasses.replace(spec, budget=parse_bytes(budget, dense)))
        self.pool = Pool(UNIT, spec.plan_every, where, self.retention)
        self.owners = [Owner(self.layout, g, self.pool, scale=d**-0.5) for _ in range(shape.layers)]
        for owner in self.owners:
            owner.holds_codes = True
            owner.frequencies = BASE ** -torch.linspace(0, 1, d // 2 + 1, device=where)[:-1]

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one layer, keys of uneven lengths. Shapes: [B, HQ or H, count, D]."""
        b, (_, h, group, d) = self.batch, self.shape

        def normal(*dims: int) -> Tensor:
            return torch.randn(dims, device=self.random.device, generator=self.random)

        q, k, v = 1.5 * normal(b, h * group, count, d), normal(b, h, count, d), normal(b, h, count, d)
        k *= (0.5 * normal(b, h, count, 1)).exp()
        return q.bfloat16(), k.bfloat16(), v.bfloat16()

    def step(self, count: int) -> float:
        """So many tokens come, and a plan before them if it is time. Units: milliseconds of the plan."""
        spent = milliseconds(lambda: self.pool.step(count), self.random.device)
        for owner in self.owners:
            append(owner.state, self.layout, *self.draw(count), self.length, [0] * self.batch)
        self.length += count
        self.pool.settle(count)
        return spent

    def attention(self) -> float:
        """A layer's decode attention over what is held. Units: milliseconds."""
        from sphkv_compile.kernels.gpu import launch

        q, k, v = self.draw(1)
        at, columns = torch.tensor([self.length], device=q.device), self.geometry.capacity
        calls = [
            lambda owner=owner: launch.attend(owner.state, self.layout, q, k, v, at, None, columns, None, None, False)
            for owner in self.owners
        ]
        return clock.timed(calls) / 1e3


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """From an idle device to an idle one."""
    clock.wait(device)
    began = time.perf_counter()
    call()
    clock.wait(device)
    return (time.perf_counter() - began) * 1e3


def solver_ms(heads: int, tokens: int, kinds: int, shape: Shape, device: str) -> float:
    """The allocation alone, of random worths, at an eighth of bfloat16's bytes. Units: milliseconds, the median."""
    random = torch.Generator(device).manual_seed(0)
    worth = (3 * torch.randn(heads, tokens, device=device, generator=random)).exp()
    kind = torch.randint(0, kinds, (heads, tokens), device=device, generator=random)
    loss = torch.tensor([1.0, 0.06, 0.01, 0.003], device=device).expand(heads, kinds, -1)
    layout = Layout.of(CacheSpec(budget=0.125), "half", shape.dim, "tiles", kept=True)
    g = Geometry(1, heads, tokens, shape.dim, shape.dim, torch.bfloat16, torch.bfloat16, False, shape.group)
    prices = Prices((0, *sorted(page_bytes(layout, g, tier) for tier in range(len(layout.tiers)))), layout.page)
    budget = torch.full((heads,), g.dense_bytes // heads // 8, device=device)
    call = partial(allocate, worth, kind, loss, prices, budget)
    return statistics.median([milliseconds(call, worth.device) for _ in range(WARM + PLANS)][WARM:])


def run(
    batches: list[int], lengths: list[int], budgets: Sequence[float | str], shape: Shape, device: str
) -> Iterator[dict[str, Any]]:
    """A row for each batch, length and budget, and then the allocation alone."""
    for batch in batches:
        for length in lengths:
            for budget in budgets:
                yield row(Run(shape, batch, length, budget, device), budget)
    for kinds in (1, 4):
        ms = solver_ms(8, 1 << 17, kinds, shape, device)
        yield {"what": f"allocation, {kinds} kinds", "B": 1, "L": 1 << 17, "HKV": 8, "ms": ms}


def row(job: Run, budget: float | str) -> dict[str, Any]:
    """Units: milliseconds; ``share`` of the attention of the steps between two plans."""
    length, every = job.length, job.pool.plan_every
    job.length = 0
    job.step(length)
    for _ in range(WARM):
        job.step(every)
    made = job.pool.plans
    spent = [job.step(every) for _ in range(PLANS)]
    if job.pool.plans != made + PLANS:
        raise RuntimeError(
            f"{job.pool.plans - made} plans in {PLANS} steps of {every} tokens: these are not what is timed"
        )
    plan = statistics.median(spent)
    out = {
        "what": "plan", "B": job.batch, "L": length, "HKV": job.shape.heads, "G": job.shape.group, "D": job.shape.dim,
        "layers": job.shape.layers, "budget": budget, "every": every, "ms": plan, "longest_ms": max(spent),
        "bytes": job.pool.arena.used, "moved": job.retention.done.moved,
    }  # fmt: skip
    if job.random.device.type == "cuda":
        step = job.attention() * job.shape.layers
        out |= {"attention_ms": step, "share": plan / (every * step)}
    return out


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each row. Units: milliseconds."""
    out = Table("", "B", "L", "budget", "ms", "longest", "attention of a step", "of the steps between")
    for r in rows:
        step = [f"{r['attention_ms']:.3f}", f"{100 * r['share']:.1f} %"] if "share" in r else ["-", "-"]
        longest = f"{r['longest_ms']:.1f}" if "longest_ms" in r else "-"
        out.add_row(r["what"], str(r["B"]), f"{r['L']:,}", str(r.get("budget", "-")), f"{r['ms']:.1f}", longest, *step)
    return out
