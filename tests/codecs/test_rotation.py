"""The rotation: orthonormal and reproducible at every head_dim, and the same bits for a row in any batch."""

import hashlib

import pytest
import torch

from sphkv_compile.codecs.rotation import rotate, rotation, unrotate

HEAD_DIMS = [8, 16, 24, 40, 56, 64, 72, 80, 88, 96, 112, 120, 128, 160, 192, 256, 576]


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_orthonormal(dim):
    rot = rotation(dim, seed=3).double()
    torch.testing.assert_close(rot @ rot.T, torch.eye(dim, dtype=torch.float64), atol=3e-7, rtol=0)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_butterflies_are_the_matrix(dim):
    rot, x = rotation(dim, seed=3), torch.randn(3, 5, dim)
    torch.testing.assert_close(rotate(x, rot).double(), x.double() @ rot.double().T, atol=3e-6, rtol=0)
    torch.testing.assert_close(unrotate(x, rot).double(), x.double() @ rot.double(), atol=3e-6, rtol=0)
    torch.testing.assert_close(unrotate(rotate(x, rot), rot), x, atol=3e-6, rtol=0)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_one_axis_spreads_over_all(dim):
    spread = rotate(torch.eye(dim), rotation(dim)).abs()
    torch.testing.assert_close(spread, torch.full_like(spread, dim**-0.5))


@pytest.mark.parametrize("turn", [rotate, unrotate])
@pytest.mark.parametrize("dim", [64, 80, 112, 128, 256])
def test_a_row_does_not_depend_on_its_batch(dim, turn):
    rot, x = rotation(dim), torch.randn(7, 33, dim)
    whole = turn(x, rot)
    assert torch.equal(whole[4, 17], turn(x[4, 17], rot))
    assert torch.equal(whole[2:4], turn(x[2:4], rot))
    assert torch.equal(whole, turn(x.mT.contiguous().mT, rot))  # another memory layout
    assert turn(x[:0], rot).shape == (0, 33, dim)


def test_half_precision_input_is_widened_first():
    x, rot = torch.randn(4, 64).bfloat16(), rotation(64)
    assert torch.equal(rotate(x, rot), rotate(x.float(), rot))


def test_signs_follow_the_seed_alone():
    assert torch.equal(rotation(64, 5), rotation(64, 5))
    assert not torch.equal(rotation(64, 5), rotation(64, 6))
    signs = b"".join(rotation(dim, 0)[0].sign().to(torch.int8).numpy().tobytes() for dim in HEAD_DIMS)
    assert hashlib.sha256(signs).hexdigest()[:16] == "dcbddaae8608a0b9"  # saved caches need the same signs for ever


@pytest.mark.parametrize("dim, below, above", [(100, 96, 112), (13, 8, 16)])
def test_a_dim_without_a_matrix_names_its_neighbours(dim, below, above):
    with pytest.raises(ValueError, match=rf"head_dim {dim}.*nearest are {below} and {above}"):
        rotation(dim)
