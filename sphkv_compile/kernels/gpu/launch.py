"""Launches the decode step's kernels on a state's memory, without a read from the device.

These launches stand behind custom operators, not behind Inductor's TritonTemplate: an attention is two or three
kernels, the last of them launched while the one before it still runs, and an append writes a dozen tensors of state,
where a template is one kernel with one output. In a CUDA graph that costs the host nothing. Without one it does: 306
microseconds an attend and 185 an append on an H200's host, where an empty kernel of Triton takes 18.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from sphkv_compile.codecs.codebook import levels, thresholds
from sphkv_compile.kernels.gpu import append as appending
from sphkv_compile.kernels.gpu import words
from sphkv_compile.kernels.gpu.decode import HEADS, LOG2E, combine, decode, prepare
from sphkv_compile.spec import CacheSpec, Tier
from sphkv_compile.storage import tiles
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import State

DIMS = (64, 128, 256)
BITS = (2, 3, 4, 8)
CHUNK = 64
"""Spans of one program of ``prepare``."""
OCCUPANCY = 12
"""Coded parts, of one warp each, for every multiprocessor: as many as fit at once. Fewer leave memory idle; a few more
wait for a second round."""
REGISTERS = 168
"""Of a thread of ``decode``, so that as many fit; the twin, which decodes in arithmetic, takes more warps instead."""
PASSES = 2
"""Passes over the codes at most, for more query heads than one product holds."""
LEAST = 2
"""Pages of a part, where all rows are full."""
SLICES = 128
"""Parts that ``combine`` merges at once; more slow it."""


def layout_served(spec: CacheSpec, k_dim: int, v_dim: int, kept: bool = False) -> bool:
    """Whether pages of this kind can be tiled for these kernels."""
    return (
        spec.codec == "axis_cosine"
        and spec.page == tiles.TOKENS
        and spec.span & (spec.span - 1) == 0  # what a kernel lists is a power of two
        and k_dim == v_dim
        and k_dim in DIMS
        and all(
            bits in BITS and tiles.served(k_dim, bits)
            for tier in (spec.menu if kept else (spec.tier,))
            for bits in (tier.k_bits, tier.v_bits)
        )
    )


def call_served(layout: Layout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether one attention is a decode step that these kernels serve."""
    return (
        layout.tiled
        and (layout.kept or len(layout.tiers) == 1)
        and q.shape[2] == 1
        and not is_causal  # aligned to the upper left, it would show one column
        and q.shape[1] // k.shape[1] <= PASSES * HEADS
        and q.dtype == k.dtype == v.dtype
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and (
            mask is None or (mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1 and mask.stride(-1) == 1)
        )
    )


def attend(
    state: State,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    start: int | None,
    columns: int,
    mask: Tensor | None,
    scale: float | None,
    rolling: bool,
) -> Tensor:
    """Attention of one new token per row over the coded cache and itself.

    Shapes: ``q`` [B, H * G, 1, D], ``k`` / ``v`` [B, H, 1, D], ``mask`` bool[B or 1, 1, 1, columns] -> like ``q``.
    """
    b, hq, _, d = q.shape
    h, device = k.shape[1], q.device
    g, spans, pages = hq // h, state.anchors.shape[2], state.table.shape[2]
    if g > HEADS:  # the codes are read once for each pass
        passes = q.view(b, h, g, d).chunk(triton.cdiv(g, HEADS), 2)
        parts = (x.reshape(b, -1, 1, d) for x in passes)
        outs = [attend(state, layout, x, k, v, pos, start, columns, mask, scale, rolling) for x in parts]
        return torch.cat([x.view(b, h, -1, d) for x in outs], 2).view(b, hq, 1, d)
    exact = triton.cdiv(layout.sink + layout.ring, tiles.EDGE)
    programs = min(OCCUPANCY * processors(device), b * h * (pages // LEAST))
    if exact < SLICES:
        programs = min(programs, b * h * (SLICES - exact))
    # Rows and heads that hold as much as each other are divided as they are, others by their bytes, on the device;
    # where there is one program for each, nothing is.
    listed = (layout.kept or b > 1) and programs > b * h
    programs = max(b * h, programs if listed else programs - programs % (b * h))
    slices = programs + b * h * exact
    block = min(SLICES, triton.next_power_of_2(triton.cdiv(slices, b * h)))
    bias = torch.empty(b * h, max(1, spans), HEADS, dtype=torch.float32, device=device)
    partial = torch.empty(slices, HEADS, d, dtype=torch.float16, device=device)
    lse = torch.empty(slices, HEADS, dtype=torch.float32, device=device)
    out = torch.empty(b, hq, 1, d, dtype=q.dtype, device=device)
    twin = not converts(device)
    depends = _depends(device)
    qscale = (d**-0.5 if scale is None else scale) * LOG2E
    signs = signs_of(layout, d, device)
    where, shown, mask_row = _inputs(state, pos, mask)
    numbers = start or 0, columns, qscale, q.stride(0), q.stride(1)
    menu = menu_of(layout.tiers)
    heads = {"G": g, "D": d, "N": HEADS}
    flags = {
        **heads, "HAS_POS": pos is not None, "HAS_START": start is not None, "ROLLING": rolling,
        "MASKED": mask is not None, "LISTED": listed, "KEPT": layout.kept, "SPAN": layout.span, "SINK": layout.sink,
        "ALL": triton.next_power_of_2(b * h), "EXACT": exact, "PDL": depends,
    }  # fmt: skip
    if layout.kept:
        prepare[(max(1, triton.cdiv(spans, CHUNK)), b * h)](
            q, state.pair_scale, signs, state.anchors, state.span_scales, state.rows, bias, qscale, q.stride(0),
            q.stride(1), h, spans, CHUNK=CHUNK, TWIN=twin, num_warps=4, **heads,
        )  # fmt: skip
    decode[(slices,)](
        q, state.pair_scale, signs, sylvester(device), state.anchors, state.span_scales,
        state.arena, state.arena.view(torch.int32), words.level_table(device), state.table, state.held, bias, shown,
        state.rows, where, state.exact_k, state.exact_v, partial, lse, *numbers, mask_row, h, spans, pages, programs,
        b * h, TWIN=twin, RING=layout.ring, STAGES=3, IEEE=q.dtype == torch.float32, num_stages=3,
        maxnreg=None if twin else REGISTERS, num_warps=(2 if d == 256 else 1) * (4 if twin else 1), **menu, **flags,
    )  # fmt: skip
    combine[(d // tiles.EDGE * g, b * h)](
        partial, lse, state.held, q, k, v, signs, state.rows, where, shown, out, *numbers,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), mask_row, h, pages, programs, b * h,
        BLOCK=block, WEIGHTS=menu["WEIGHTS"], launch_pdl=depends, num_warps=max(1, block // 64), **flags,
    )  # fmt: skip
    return out


def append(
    state: State,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    start: int | None,
    mask: Tensor | None,
    rolling: bool,
) -> None:
    """One new token per row into the state, as :func:`sphkv_compile.ops.append.append` does it.

    A write into coded spans marks the row as faulty instead: see :data:`sphkv_compile.storage.state.FAULT`.
    """
    b, hq, _, d = q.shape
    h = k.shape[1]
    where, shown, mask_row = _inputs(state, pos, mask)
    depends = _depends(q.device)
    flags = {
        "HAS_POS": pos is not None, "HAS_START": start is not None, "MASKED": mask is not None,
        "SPAN": layout.span, "SINK": layout.sink, "RING": layout.ring, "MEMORY": state.queries.shape[2],
        "PDL": depends,
    }  # fmt: skip
    spans, pages = state.anchors.shape[2], state.table.shape[2]
    tier = layout.tiers[0]
    factors = torch.empty(b * h, d, dtype=torch.float32, device=q.device)
    heads = heads_of_program(b, h, q.device)
    appending.append[(b * h // heads,)](
        q, k, v, state.arena.view(torch.int32), state.table, state.tiers, state.positions, state.held,
        state.anchors, state.span_scales, state.exact_k, state.exact_v, state.pair_scale, state.moments, state.energy,
        state.queries, signs_of(layout, d, q.device), levels_of(tier, q.device), factors, state.rows, where, shown,
        start or 0, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), mask_row, h,
        max(1, spans), pages, G=hq // h, D=d, N=triton.next_power_of_2(hq // h), HEADS=heads,
        KB=tier.k_bits, VB=tier.v_bits, **borders_of(tier),
        ROTARY=layout.rotary_dim, INTERLEAVED=layout.rope == "interleaved", KNOWN=layout.rope != "none",
        KEPT=layout.kept, TIERCOUNT=len(layout.tiers), TWIN=not converts(q.device), ROLLING=rolling,
        enable_fp_fusion=False, launch_pdl=depends, **encoding_block(layout, d), **flags,
    )  # fmt: skip


def _inputs(state: State, pos: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Position, mask and its stride over rows; what is not there is stood in for by a tensor that no kernel reads."""
    shown = state.rows if mask is None else mask.view(torch.uint8)
    return state.rows if pos is None else pos, shown, mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0


@lru_cache(None)
def menu_of(tiers: tuple[Tier, ...]) -> dict[str, tuple]:
    """What ``decode`` needs of each tier, narrowest first: widths, steps, and a page's weight in bytes."""
    kbits, vbits = zip(*((tier.k_bits, tier.v_bits) for tier in reversed(tiers)))
    return {
        "KBITS": kbits, "VBITS": vbits,
        "KSTEPS": tuple(map(words.step, kbits)), "VSTEPS": tuple(map(words.step, vbits)),
        "WEIGHTS": tuple(k + v + 1 for k, v in zip(kbits, vbits)),
    }  # fmt: skip


@lru_cache(None)
def borders_of(tier: Tier) -> dict[str, tuple]:
    """Positive borders of both widths, as bits: what the encoders compare with. Those of 8 bits lie in memory."""
    widths = (("KBORDERS", tier.k_bits), ("VBORDERS", tier.v_bits))
    return {
        name: () if bits == 8 else tuple(thresholds(bits)[1 << (bits - 1) :].view(torch.int32).tolist())
        for name, bits in widths
    }


@lru_cache(None)
def levels_of(tier: Tier, device: torch.device) -> Tensor:
    """Positive levels of keys, at 8 bits then the border below each, and the same of values. Shapes: -> float32[n]."""
    parts = []
    for bits in (tier.k_bits, tier.v_bits):
        parts.append(levels(bits)[1 << (bits - 1) :])
        if bits == 8:
            parts.append(torch.cat([torch.zeros(1), thresholds(bits)[1 << (bits - 1) :]]))
    return torch.cat(parts).to(device)


def encoding_block(layout: Layout, dim: int) -> dict[str, int]:
    """Tokens that a program encodes at once, and its warps: a thread for 64 columns of each token."""
    tokens = min(layout.span, 64 if dim == 256 else 128)
    return {"BLOCK": tokens, "num_warps": tokens * (dim // 64) // 32}


def heads_of_program(b: int, h: int, device: torch.device) -> int:
    """kv heads of a program of ``append``: of powers of two that divide them the least with which all programs run at
    once, one a multiprocessor; else the greatest."""
    heads = 1
    while b * h > heads * processors(device) and h % (2 * heads) == 0:
        heads *= 2
    return heads


@lru_cache(None)
def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@lru_cache(None)
def converts(device: torch.device) -> bool:
    """Whether the device has e4m3 conversion; the interpreter has no assembly at all."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache(None)
def _depends(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(None)
def sylvester(device: torch.device) -> Tensor:
    """A quarter of Sylvester's matrix: what is turned back keeps its size. Shapes: -> float16[32, 32]."""
    i = torch.arange(tiles.EDGE, device=device)
    bits = (i[:, None, None] & i[None, :, None]) >> torch.arange(5, device=device)
    return (0.25 - 0.5 * ((bits & 1).sum(-1) & 1)).half()


@lru_cache(None)
def signs_of(layout: Layout, dim: int, device: torch.device) -> Tensor:
    """The signs that the rotation begins with. Shapes: -> float32[dim]."""
    return layout.rotation(dim, device)[0].sign().contiguous()
