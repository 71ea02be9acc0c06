"""Statistics against float64 over what the cache decodes to, by torch and by the kernel, interpreted."""

import math

import pytest
import torch
from test_moves import cache

from sphkv_compile.kernels.gpu import statistics as kernels
from sphkv_compile.ops import statistics
from sphkv_compile.ops.pages import with_positions
from sphkv_compile.ops.read import dense
from sphkv_compile.ops.statistics import mean_attention
from sphkv_compile.storage.state import LENGTH

GROUP, SCALE = 3, 0.3


def expected(state, layout, queries, first):
    """Shapes: -> float64[B, H, positions]."""
    h, length = state.exact_k.shape[1], int(state.rows[0, LENGTH])
    keys, _ = dense(state, layout, length)
    held = keys.abs().sum(-1) > 0  # a dropped token reads as zeros
    q = queries.double().unflatten(1, (h, -1))
    logits = (q @ keys.double().mT.unsqueeze(2)) * SCALE
    column, at = torch.arange(length), torch.arange(first, first + queries.shape[2])
    seen = (column <= at.unsqueeze(-1)) & held[:, :, None, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    looks = (at >= column.unsqueeze(-1)).sum(-1)
    return weights.sum((2, 3)) / (looks.clamp(min=1) * GROUP)


@pytest.mark.parametrize(
    ("menu", "dim", "packing", "count"),
    [
        (("K4V4", "K4V2"), 64, "rows", 60),
        (("K8V4", "K4V4", "K4V2"), 64, "tiles", 50),
        (("K4V4", "K3V3", "K2V2"), 128, "tiles", 22),
    ],
)
def test_against_float64(menu, dim, packing, count, monkeypatch):
    """Queries from before the newest coded tokens on: some look at fewer of them."""
    state, layout, _ = cache(menu, dim, packing)
    length = int(state.rows[0, LENGTH])
    first = length - count
    q = torch.randn(2, 2 * GROUP, count, dim, generator=torch.Generator().manual_seed(5))
    found = mean_attention(state, layout, q, first, SCALE)
    positions = with_positions(state, layout).positions
    want = expected(state, layout, q, first)
    want = want.gather(2, positions.clamp(min=0).long().flatten(2)).view(positions.shape) * (positions >= 0)
    assert bool((positions >= first).any()) == (count > 48)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-9)
    if packing == "tiles":
        monkeypatch.setattr(statistics, "gpu", lambda *_: kernels)
        fused = mean_attention(state, layout, q, first, SCALE)
        torch.testing.assert_close(fused.double(), want, rtol=5e-3, atol=1e-7)  # queries are float16
