"""Moves on a device: the kernels write the portable path's bytes, of every width and head_dim."""

import pytest
import torch

from sphkv_compile.ops.moves import move
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import UNIT, Layout
from sphkv_compile.storage.moves import Moves
from sphkv_compile.storage.state import Geometry, empty_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")]


@pytest.mark.parametrize(
    ("menu", "dim"),
    [("K4V4/K4V2", 64), ("K8V4/K4V4/K4V2", 128), ("K4V4/K3V3/K2V2", 128), ("K8V8/K3V8/K2V4", 256)],
)
def test_the_same_bytes_as_the_portable_path(menu, dim):
    """Random codes of some thousand pages; a third of the slots of the new ones are empty."""
    random = torch.Generator("cuda").manual_seed(0)
    tiers = tuple(map(Tier.parse, menu.split("/")))
    layout = Layout("axis_cosine", tiers, 4, 128, 128, 64, 0, "half", dim, "tiles", True)
    old, new = 1000, 300
    sizes = [layout.page_bytes(tier, dim, dim, (2, 2)) for tier in tiers]
    arena = torch.randint(0, 256, (sum(sizes) * old,), dtype=torch.uint8, device="cuda", generator=random)
    starts = [sum(sizes[:i]) * old // UNIT for i in range(len(tiers))]
    for start, size, tier in zip(starts, sizes, tiers):  # radii and scales that are numbers
        pages = arena[start * UNIT : start * UNIT + size * old].view(old, size)
        codes = 8 * dim * (tier.k_bits + tier.v_bits)
        scales = torch.rand(old, 128, device="cuda", generator=random).half() + 0.1
        pages[:, codes : codes + 256] = scales.view(torch.uint8)
    counts = tuple(new for _ in tiers)
    shape = (new * len(tiers), 64)
    index = torch.arange(len(tiers), device="cuda").repeat_interleave(new)
    draw = torch.rand(3, *shape, device="cuda", generator=random)
    wider = (draw[0] * (index + 1).unsqueeze(1)).long()
    units = torch.tensor([size // UNIT for size in sizes], device="cuda")
    sources = torch.tensor(starts, device="cuda")[wider] + (draw[1] * old).long() * units[wider]
    sources = torch.where(draw[2] < 1 / 3, -1, sources)
    offsets = (
        torch.tensor(starts, device="cuda")[index]
        + torch.randperm(old, device="cuda", generator=random)[:new].repeat(len(tiers)) * units[index]
    )  # in the place of pages that are read
    slots = torch.randint(0, 64, shape, dtype=torch.uint8, device="cuda", generator=random)
    owners = torch.zeros(shape[0], 2, dtype=torch.int32, device="cuda")
    moves = Moves(counts, offsets.int(), owners, sources.int(), wider.to(torch.uint8), slots)
    geometry = Geometry(1, 1, 4096, dim, dim, torch.bfloat16, torch.bfloat16, False)
    states = [empty_state(layout, geometry, arena.clone()) for _ in range(2)]
    for state, fused in zip(states, (True, False)):
        state.span_scales[..., 1] = 1  # radii are absolute
        move(state, layout, moves, fused)
    assert torch.equal(states[0].arena, states[1].arena) and not torch.equal(states[0].arena, arena)
