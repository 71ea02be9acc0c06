"""Statistics on a device: the kernel's means are the portable path's."""

import pytest
import torch

from sphkv_compile.bench.attention import make
from sphkv_compile.bench.kept import Menu
from sphkv_compile.ops.pages import write_statistics
from sphkv_compile.ops.statistics import mean_attention, observe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")]


THREE = "K8V4:0.1/K4V4:0.2/K4V2:0.2"


@pytest.mark.parametrize(
    ("menu", "dim"), [("K4V4:0.1/K4V2:0.4", 64), ("K3V2:0.5", 128), (THREE, 64), (THREE, 128), (THREE, 256)]
)
def test_the_same_means_as_the_portable_path(menu, dim):
    case = make(Menu.parse(menu), 2, 5000, 2, 4, dim)
    random = torch.Generator("cuda").manual_seed(1)
    q = torch.randn(2, 8, 100, dim, device="cuda", generator=random).bfloat16() / 2
    at, parts = torch.arange(4900, 5000, device="cuda"), (30, 70)
    fused, portable = (mean_attention(case.state, case.layout, q, at, None, parts, fused) for fused in (True, False))
    for a, b in zip(fused, portable):
        assert float(b.sum()) > 0.5
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_same_is_remembered(dim):
    """Twice: the second time tokens have a past."""
    case = make(Menu.parse(THREE), 2, 5000, 2, 4, dim)
    state, random = case.state, torch.Generator("cuda").manual_seed(1)
    frequencies = 1e4 ** -torch.linspace(0, 1, dim // 2, device="cuda").expand(2, -1)
    none = torch.zeros(*state.table.shape, 64, device="cuda")
    write_statistics(state, case.layout, none, none)
    twin = state._replace(arena=state.arena.clone())
    for _ in range(2):
        state.queries.normal_(0, 0.5, generator=random)
        twin.queries.copy_(state.queries)
        fused, portable = (
            observe(s, case.layout, 128, None, frequencies, f) for s, f in ((state, True), (twin, False))
        )
        there = portable.positions >= 0
        assert torch.equal(fused.positions, portable.positions)
        assert torch.equal(fused.fresh[there], portable.fresh[there])
        for name in ("mean", "recent", "lengths", "expected"):
            a, b = getattr(fused, name)[there], getattr(portable, name)[there]
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-7)
