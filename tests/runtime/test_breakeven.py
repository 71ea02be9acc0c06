"""From which length on codes are predicted to be faster than dense keys and values."""

import pytest
import torch

from sphkv_compile.runtime import breakeven
from sphkv_compile.runtime.breakeven import LENGTHS, break_even
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry

CPU = torch.device("cpu")
LAYOUT = Layout.of(CacheSpec(bits=4), "half", 64)
SHAPE = Geometry(1, 2, 1000, 64, 64, torch.float32, torch.float32, False, 2)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [((-1, -9, -9), 512), ((3, -1, -9), 512 + 1536 * 3 // 4), ((4, 2, -2), 2048 + 6144 // 2), ((1, 2, 3), None)],
)
def test_the_lines_cross_between_two_lengths(gaps, expected, monkeypatch):
    timed = dict(zip(LENGTHS, gaps))
    monkeypatch.setattr(breakeven, "_time_attention", lambda _, g, *rest: (5.0 + timed[g.capacity], 5.0))
    assert break_even(LAYOUT, SHAPE, CPU) == expected


def test_it_is_measured_here():
    assert (even := break_even(LAYOUT, SHAPE, CPU)) is None or LENGTHS[0] <= even <= LENGTHS[-1]
