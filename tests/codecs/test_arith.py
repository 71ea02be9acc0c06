"""The arithmetic that codes rest on: sums in one order, quotients without NaN, rounding up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphkv_compile.codecs.arith import bf16_up, direction, fold_sum, norm, safe_divide


def halved(row):
    """The order of fold_sum, one float32 addition at a time."""
    row = list(row)
    while len(row) > 1:
        half = len(row) // 2
        row = [np.float32(row[i] + row[half + i]) for i in range(half)] + row[2 * half :]
    return row[0]


@pytest.mark.parametrize("size", [1, 2, 5, 40, 64, 80, 127, 128])
def test_sums_are_halvings_whatever_the_layout(size):
    x = torch.randn(50, size) * 10 ** torch.randn(50, 1)
    expected = torch.tensor(np.array([halved(row) for row in x.numpy()]))
    assert torch.equal(fold_sum(x), expected)
    assert torch.equal(fold_sum(x.T.contiguous(), 0), expected)
    assert torch.equal(fold_sum(x[7]), expected[7])


@given(st.floats(0, 2.0**127, width=32))
def test_rounding_up_to_bfloat16(value):
    x = torch.tensor(value)
    up = bf16_up(x)
    assert torch.equal(up, up.bfloat16().float()) and up >= x
    assert up == x or x.bfloat16().float() in (up, torch.nextafter(up.bfloat16(), torch.tensor(0.0).bfloat16()).float())


def test_quotients_by_zero_are_zero():
    assert safe_divide(torch.tensor([1.0, 0.0, 6.0]), torch.tensor([0.0, 0.0, 3.0])).tolist() == [0, 0, 2]


def test_direction_has_length_sqrt_of_dim_and_zero_stays():
    x = torch.cat([torch.randn(5, 80) * torch.tensor([1e-15, 1e-3, 1, 1e3, 1e15])[:, None], torch.zeros(1, 80)])
    torch.testing.assert_close(norm(direction(x)), torch.tensor([80**0.5] * 5 + [0.0]))
