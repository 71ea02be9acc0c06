"""Kernels in Triton's interpreter, where there is no device; on one, tests/gpu runs them in earnest."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is first imported
