"""What every test gets: one thread, a fixed seed, and no compiled code left over from the test before."""

import sys

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the workers share the cores, and float sums keep one order
settings.register_profile("sphkv", deadline=None)  # a first call may compile
settings.load_profile("sphkv")


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # not imported for tests that compile nothing
        torch._dynamo.reset()
