"""Doctor: what a bug report needs, and a self-test of some seconds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sphkv_compile.backend import backend
from sphkv_compile.integrations.models import cache_dir
from sphkv_compile.lowering import compat
from sphkv_compile.ops.append import append
from sphkv_compile.ops.check import check_kernels, checked_library
from sphkv_compile.ops.decode import attend, packing
from sphkv_compile.ops.reference import attend_reference
from sphkv_compile.printing import Printed
from sphkv_compile.runtime.pool import arena_bytes, reserve
from sphkv_compile.spec import CacheSpec, Tier, human
from sphkv_compile.storage.arena import Arena
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry, empty_state
from sphkv_compile.testing.gpt_fast import SliceCopy

ENVIRONMENT = ("TORCH", "PYTORCH_", "TRITON_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "CC", "CXX", "XDG_CACHE_HOME")
"""Beginnings of the names of variables that change what torch, Triton and this package do."""
PACKAGES = ("sphkv-compile", "torch", "triton", "sympy", "transformers", "numpy", "gguf", "accelerate")


@dataclass(frozen=True)
class Check:
    """One self-test. Units: seconds."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Diagnosis(Printed):
    """Facts of this machine, and the self-test's results."""

    facts: dict[str, str]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table(title="environment", title_justify="left", show_header=False)
        for name, value in self.facts.items():
            facts.add_row(name, Text(value))
        yield facts
        checks = Table("check", "result", "detail", "s", title="self-test", title_justify="left")
        for c in self.checks:
            checks.add_row(c.name, "[green]ok[/]" if c.ok else "[red]FAILED[/]", Text(c.detail), f"{c.seconds:.1f}")
        yield checks
        failed = [c.name for c in self.checks if not c.ok]
        if failed:
            yield Text(f"FAILED: {', '.join(failed)}. Put all of the above into a bug report.", style="bold red")
        else:
            yield Text(f"OK: {len(self.checks)} of {len(self.checks)} checks passed.", style="bold green")


def doctor() -> Diagnosis:
    """Collect the facts and run the self-test."""
    facts = _facts()
    checks = [
        _timed("entry point", "torch finds backend='sphkv' once", _entry_point),
        _timed("cache folders", "can be written", _folders),
        _timed("kernels", "fused, against the portable path", _kernels),
        _timed("codecs", "encode and attend against the float32 reference", _codecs),
        _timed("backend", "a slice-copy attention is matched, and equals dense", _backend),
        _timed("compiler", "the same through Inductor", lambda: _backend(inductor={})),
    ]
    return Diagnosis(facts, checks)


def _facts() -> dict[str, str]:
    facts = {name: _version(name) for name in PACKAGES}
    facts["python"] = platform.python_version()
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts["CPU"] = f"{torch.backends.cpu.get_cpu_capability()}, {cores}"
    facts["CUDA of torch"] = f"{torch.version.cuda or torch.version.hip or 'none'}"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts[f"GPU {i}"] = f"{p.name}, compute {p.major}.{p.minor}, {human(p.total_memory)}"
    if not torch.cuda.is_available():
        facts["GPU"] = "torch finds none"
    known = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)}
    facts["environment"] = "\n".join(f"{name}={value}" for name, value in known.items()) or "nothing set that matters"
    return facts


def _entry_point() -> str:
    """Twice, and Dynamo finds none: it asserts that names are unique."""
    found = [e.value for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "sphkv"]
    if len(found) != 1:
        raise RuntimeError(
            f"registered {len(found)} times {found}; expected once: pip uninstall sphkv-compile until none is left, "
            "then install it once"
        )
    return found[0]


def _folders() -> str:
    """Inductor's, and ours: the nearest folder that exists must be writable."""
    folders = [Path(compat.inductor_cache()), cache_dir()]
    for folder in folders:
        there = next(f for f in (folder, *folder.parents) if f.exists())
        if not os.access(there, os.W_OK):
            raise PermissionError(
                f"{folder}; expected a folder that can be written: TORCHINDUCTOR_CACHE_DIR or XDG_CACHE_HOME"
            )
    return ", ".join(map(str, folders))


def _kernels() -> str:
    """Those of the CPU, and of each GPU."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        library = checked_library()
    if library is None:
        raise RuntimeError(
            str(said[-1].message) if said else "the CPU's: expected to be built and right; the slower path serves"
        )
    spec, g = CacheSpec(), Geometry(1, 1, 0, 128, 128, torch.bfloat16, torch.bfloat16, False)
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        layout = Layout.of(spec, "half", 128, packing(spec, 128, 128, device))
        check_kernels(layout, g, 4, device)
    return f"agree on the CPU and on {torch.cuda.device_count()} GPUs"


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


def _backend(inductor: Any = False) -> str:
    torch.manual_seed(0)
    model, x = SliceCopy(max_seq=64), torch.randn(1, 40, 64)
    options: dict[str, Any] = {"bits": 16, "window": 8, "span": 16, "page": 16, "strict": True, "inductor": inductor}
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*predicted faster than dense")  # a cache of 64 tokens
        ours = [compiled(x[:, :39], 0), compiled(x[:, 39:], 39)][-1]
        model.k_cache.zero_()
        dense = [model(x[:, :39], 0), model(x[:, 39:], 39)][-1]
    difference = (ours - dense).abs().max().item()
    if not difference < 1e-4:
        raise AssertionError(f"largest difference {difference:.2e}")
    return f"largest difference {difference:.1e}"
