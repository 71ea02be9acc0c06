"""Doctor: what a bug report needs, and a self-test of a few seconds."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from sphkv_compile.backend import backend
from sphkv_compile.ops.append import append
from sphkv_compile.ops.check import checked_library
from sphkv_compile.ops.decode import attend
from sphkv_compile.ops.reference import attend_reference
from sphkv_compile.runtime.pool import arena_bytes, reserve
from sphkv_compile.spec import CacheSpec, Tier
from sphkv_compile.storage.arena import Arena
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry, empty_state
from sphkv_compile.testing.gpt_fast import SliceCopy

PACKAGES = ("sphkv-compile", "torch", "triton", "sympy", "transformers", "numpy", "gguf", "accelerate")


@dataclass(frozen=True)
class Check:
    """One self-test. Units: seconds."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """Facts of this machine, and the self-test's results."""

    facts: dict[str, str]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table(title="environment", title_justify="left", show_header=False)
        for name, value in self.facts.items():
            facts.add_row(name, value)
        yield facts
        checks = Table("check", "result", "detail", "s", title="self-test", title_justify="left")
        for c in self.checks:
            checks.add_row(c.name, "[green]ok[/]" if c.ok else "[red]FAILED[/]", c.detail, f"{c.seconds:.1f}")
        yield checks


def doctor() -> Diagnosis:
    """Collect the facts and run the self-test."""
    checks = [_timed("codecs", "encode and attend against the float32 reference", _codecs)]
    checks.append(_timed("backend", "a slice-copy attention compiles, matches, and equals dense", _backend))
    return Diagnosis(_facts(), checks)


def _facts() -> dict[str, str]:
    facts = {name: _version(name) for name in PACKAGES}
    facts["python"] = platform.python_version()
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts["threads"] = str(torch.get_num_threads())
    facts["fused CPU decode"] = (
        "built, and agrees with the portable path" if checked_library() else "not available: the portable path serves"
    )
    entry = [e.value for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "sphkv"]
    facts["entry point 'sphkv'"] = entry[0] if entry else "missing: install the package (pip install -e .)"
    return facts


def _version(name: str) -> str:
    try:
        return torch.__version__ if name == "torch" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _timed(name: str, what: str, run: Callable[[], str]) -> Check:
    begin = time.perf_counter()
    try:
        detail = f"{what}: {run()}"
        ok = True
    except Exception as error:  # a self-test reports, whatever went wrong
        detail, ok = f"{what}: {type(error).__name__}: {error}", False
    return Check(name, ok, detail, time.perf_counter() - begin)


def _codecs() -> str:
    """Every width on a small ragged case; the fast path must agree with the reference to float32 accumulation."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 8, 16):
        layout = Layout.of(CacheSpec(bits=bits, window=16, span=32, page=16), "half", 64)
        g = Geometry(1, 2, 256, 64, 64, torch.float32, torch.float32, False)
        arena = Arena(arena_bytes(layout, g))
        state = empty_state(layout, g, arena.data)
        reserve(state, layout, g, arena, 256)
        k, v = torch.randn(2, 1, 2, 200, 64, generator=generator)
        append(state, layout, None, k, v, 0, [0])
        q, new_k, new_v = torch.randn(1, 4, 1, 64, generator=generator), k[:, :, :1], v[:, :, :1]
        call = (q, new_k, new_v, 200, 0, 201, None, False, None)
        difference = (attend(state, layout, *call) - attend_reference(state, layout, *call)).abs().max().item()
        if not difference < 1e-4:
            raise AssertionError(f"{Tier(bits, bits)}: largest difference {difference:.2e}")
        worst = max(worst, difference)
    return f"largest difference {worst:.1e}"


def _backend() -> str:
    torch.manual_seed(0)
    model, x = SliceCopy(max_seq=64), torch.randn(1, 40, 64)
    options: dict[str, Any] = {"bits": 16, "window": 8, "span": 16, "page": 16, "strict": True, "inductor": False}
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    with torch.no_grad():
        ours = [compiled(x[:, :39], 0), compiled(x[:, 39:], 39)][-1]
        model.k_cache.zero_()
        dense = [model(x[:, :39], 0), model(x[:, 39:], 39)][-1]
    difference = (ours - dense).abs().max().item()
    if not difference < 1e-4:
        raise AssertionError(f"largest difference {difference:.2e}")
    return f"largest difference {difference:.1e}"
