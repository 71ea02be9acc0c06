"""Which of the GPU's kernels serve a layout; they are loaded where there is something to launch, Triton with them."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from sphkv_compile.storage.layout import Layout


def gpu(name: str, layout: Layout, device: torch.device) -> ModuleType | None:
    """``sphkv_compile.kernels.gpu.<name>`` where pages are tiled and on a GPU; else None: the portable path serves."""
    if not layout.tiled or device.type != "cuda":
        return None
    return importlib.import_module(f"sphkv_compile.kernels.gpu.{name}")
