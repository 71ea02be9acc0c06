"""From which length on attention over codes is faster than over dense keys and values: timed, on this device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from sphkv_compile.ops.decode import attend, on_device
from sphkv_compile.runtime.log import warn_once
from sphkv_compile.runtime.pool import arena_bytes, reserve
from sphkv_compile.storage.arena import Arena
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import LENGTH, Geometry, empty_state

LENGTHS = (512, 2048, 8192)
"""Cached tokens at which attention is timed."""

MARGIN = 1.5
"""By which a cache must be too short before it is said: on two cores, SmolLM2's heads were predicted 512 tokens in one
process and 838 in the next."""

Clock = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


def in_turns(*runs: Callable[[], object], rounds: int = 9) -> list[float]:
    """The shortest of a few calls of each, launches included: other work on the machine only ever adds, and taking
    turns meets all alike. Units: seconds."""
    shortest = [math.inf] * len(runs)
    for _ in range(rounds + 1):  # the first is to warm up, and never the shortest
        for i, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            shortest[i] = min(shortest[i], time.perf_counter() - begin)
    return shortest


def break_even(
    layout: Layout, g: Geometry, device: torch.device, graphed: Clock = lambda run: in_turns(run)[0]
) -> int | None:
    """Cached tokens of one row from which a decode step's attention over codes is faster than over dense keys and
    values; None: at no length up to the longest that is tried.

    Both are timed at a few lengths, and the crossing of the lines between them is returned.

    Args:
        g: of which batch and capacity do not matter.
        graphed: times what a GPU's kernels serve, which a model replays within a CUDA graph.

    Units: tokens.
    """
    previous = None
    for n in LENGTHS:
        ours, dense = _time_attention(layout, g._replace(batch=1, capacity=n, rolling=False), device, graphed)
        gap = ours - dense
        if gap <= 0:
            if previous is None:
                return n
            n0, gap0 = previous
            return round(n0 + (n - n0) * gap0 / (gap0 - gap))
        previous = (n, gap)
    return None


def _time_attention(layout: Layout, g: Geometry, device: torch.device, graphed: Clock) -> Sequence[float]:
    """Seconds of one decode attention over a full cache: codes, dense."""
    n, h, hq = g.capacity, g.heads, g.heads * g.group
    arena = Arena(max(64, arena_bytes(layout, g)), device)
    state = empty_state(layout, g, arena.data)
    state.rows[:, 0] = 0
    reserve(state, layout, g, arena, n)
    spans = layout.coded_spans(n)
    state.rows[0, LENGTH], state.rows[0, 2], state.rows[0, 4] = n - 1, spans, 1
    tokens = layout.sink + torch.arange(spans * layout.span, dtype=torch.int32, device=device)
    state.positions[:, :, : spans * layout.pages_per_span] = tokens.view(1, 1, -1, layout.page)
    make, key, value = torch.Generator().manual_seed(0), (g.k_dim, g.k_dtype), (g.v_dim, g.v_dtype)

    def random(heads: int, count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(1, heads, count, dim, generator=make).to(device, dtype)

    q, (new_k, new_v), (k, v) = random(hq, 1, *key), *((random(h, t, *key), random(h, t, *value)) for t in (1, n))
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool, device=device)

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=hq != h)

    new = state, layout, q, new_k, new_v
    if (fused := on_device(layout, q, new_k, new_v, mask)) is not None:
        return graphed(lambda: fused.attend(*new, None, n - 1, n, mask, None, False)), graphed(dense)
    return in_turns(lambda: attend(*new, n - 1, 0, n, mask, False, None), dense)


def warn_where_slower(sites: list[tuple[Layout, Geometry]], device: torch.device) -> None:
    """Warn once for each kind of cache that is too short to decode faster as codes than dense.

    Nothing is said where it is not known: of a cache that grows, or rolls, or drops tokens, and of a GPU's kernels,
    which are timed within a CUDA graph, and by ``explain`` alone. The longest cache of a model counts, and its rows
    together, since a step has its fixed cost but once.
    """
    known = [(at, g) for at, g in sites if g.capacity and not (g.rolling or at.kept or at.tiled)]
    if not known:
        return
    layout, g = max(known, key=lambda site: site[1].capacity)
    even, tokens = _predicted(layout, g._replace(batch=1, capacity=0), device), g.batch * g.capacity
    pays = even is not None and (even <= MARGIN * tokens or even == LENGTHS[0])  # nothing shorter is tried
    if pays:
        return
    where = f"at no length up to {LENGTHS[-1]:,} tokens" if even is None else f"from {even:,} cached tokens on"
    rows = f"{g.batch} rows of " * (g.batch > 1)
    warn_once(
        ("slower", layout, g, device),
        f"this cache holds {rows}{g.capacity:,} tokens, and attention over its codes ({layout.summary}) is predicted "
        f"faster than dense on {device} {where}; make the cache longer, give fewer bits, leave the model dense, or "
        "ignore this where bytes are what counts",
    )


@lru_cache(None)
def _predicted(layout: Layout, g: Geometry, device: torch.device) -> int | None:
    return break_even(layout, g, device)
