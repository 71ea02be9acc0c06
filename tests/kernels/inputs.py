"""What the kernels' tests feed: two rows of two heads, in tiled pages."""

import torch

from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry
from sphkv_compile.testing.oracle import shuffled_state

B, H, CAPACITY, SINK, WINDOW, SPAN = 2, 2, 500, 4, 32, 128


def make(tier, dim, dtype=torch.float32, rope="half", rolling=False, capacity=CAPACITY, span=SPAN):
    layout = Layout("axis_cosine", (Tier.parse(tier),), SINK, WINDOW, span, 64, 0, rope, dim, "tiles")
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
