"""What every test gets: one thread, a fixed seed, and no compiled code left over from the test before."""

import logging
import os
import sys

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests/kernels; Triton reads it when it is first imported, by any test

torch.set_num_threads(1)  # the workers share the cores, and float sums keep one order
settings.register_profile("sphkv", deadline=None)  # a first call may compile
settings.load_profile("sphkv")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Keep torch's structured trace out of what pytest captures: it hangs its handlers on each logger that does not
    propagate, torch writes its trace where it finds any, and that is hundreds of records for each graph."""
    logging.getLogger("torch.__trace").handlers.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    """The same, since pytest does so for each phase anew."""
    logging.getLogger("torch.__trace").handlers.clear()


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    if "sphkv_compile.runtime.log" in sys.modules:
        sys.modules["sphkv_compile.runtime.log"].WARNED.clear()  # each test is warned as a process is
    if "torch._dynamo" in sys.modules:  # not imported for tests that compile nothing
        torch._dynamo.reset()
