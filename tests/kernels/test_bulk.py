"""Many tokens at once in the interpreter: bulk encode against the portable path, byte for byte, and a prefill's attention
against float32 by the book."""

import pytest
import torch

from sphkv_compile.kernels.gpu import bulk
from sphkv_compile.ops import append as appending
from sphkv_compile.ops.append import append
from sphkv_compile.ops.reference import attend_reference
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import BASE, SPANS, Geometry, State
from sphkv_compile.testing.oracle import shuffled_state

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no device")
B, H, SINK, WINDOW, SPAN = 2, 2, 4, 32, 128


def make(tier, dim, dtype=torch.float32, rolling=False, capacity=700, span=SPAN):
    layout = Layout("axis_cosine", (Tier.parse(tier),), SINK, WINDOW, span, 64, 0, "half", dim, "tiles")
    return shuffled_state(layout, Geometry(B, H, capacity, dim, dim, dtype, dtype, rolling), seed=1), layout


def tokens(count, dim, group, dtype=torch.float32):
    """Queries, keys with a constant of their own, values. Shapes: [B, HQ, count, D], [B, H, count, D] twice."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    k = normal(B, H, count, dim) * 2 + normal(1, H, 1, dim) * 3
    return [x.to(dtype) for x in (normal(B, H * group, count, dim), k, normal(B, H, count, dim))]


def part(x, *index):
    return [t[:, :, slice(*index)] for t in x]


def masks(kind, first, count, columns):
    """Shapes: -> bool[B or 1, 1, T or 1, columns] or None."""
    column, row = torch.arange(columns), first + torch.arange(count)[:, None]
    causal = (column <= row).expand(B, 1, count, columns)
    if kind == "none":
        return None
    if kind == "causal":
        return causal[:1]
    padded = causal & (column >= torch.tensor([0, 7]).view(B, 1, 1, 1))
    if kind == "padded":
        return padded
    if kind == "sliding":
        return padded & (column > row - 100)
    if kind == "holes":
        return padded & ((column % 7 != 3) | (column == row))
    assert kind == "broadcast"
    return (column < first).expand(1, 1, 1, columns)


@pytest.mark.parametrize(
    ("tier", "dim", "group", "dtype", "kind", "held", "count"),
    [
        ("K4V4", 64, 3, torch.float32, "padded", 400, 17),
        ("K4V2", 128, 2, torch.float16, "holes", 300, 9),
        ("K3V3", 128, 1, torch.float32, "causal", 300, 9),
        ("K2V4", 64, 4, torch.float32, "none", 300, 5),
        ("K2V2", 64, 4, torch.float32, "sliding", 400, 40),
        ("K4V4", 256, 1, torch.float32, "broadcast", 300, 3),
        ("K4V4", 64, 2, torch.float32, "padded", 100, 70),  # no span has left the window
        ("K4V4", 64, 2, torch.float32, "padded", 0, 70),  # nothing is held
        ("K4V4", 64, 2, torch.float32, "holes", 0, 70),
        ("K4V4", 64, 2, torch.float32, "causal", 0, 70),
    ],
)
def test_attention_against_the_reference(tier, dim, group, dtype, kind, held, count):
    state, layout = make(tier, dim, dtype)
    x = tokens(held + count, dim, group, dtype)
    if held:
        append(state, layout, *part(x, 0, held), 0, [0, 7] if kind in ("padded", "holes", "sliding") else [0, 0])
    new, mask = part(x, held, held + count), masks(kind, held, count, 700)
    assert bulk.attend_served(layout, *new, mask)
    for is_causal in (False, True) if kind in ("none", "causal") else (False,):
        arguments = state, layout, *new, held, 0, held + count if kind == "none" else 700, mask, is_causal, None
        out, want = bulk.attend(*arguments), attend_reference(*arguments)
        gap = (out - want).float().norm() / want.float().norm()
        assert out.dtype == dtype and float(gap) < 2e-3  # float16 products; a wrong token gives over 1e-2


