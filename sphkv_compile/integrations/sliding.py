"""Layers of a SphericalCache that have a sliding window: transformers' own, which a compiled model keeps as codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticSlidingWindowLayer

from sphkv_compile.ops import schema
from sphkv_compile.ops.decode import packing
from sphkv_compile.runtime.direct import CodedCache
from sphkv_compile.runtime.ownership import Owner, handles


class SlidingLayer(StaticSlidingWindowLayer):
    """transformers' layer, which says to a compiled graph how its cache wants it stored."""

    coded: CodedCache
    stored: str
    texts: dict[str, str]  # what ``stored`` may become in a compiled model, by packing

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' own."""
        if torch.compiler.is_compiling() and self.is_initialized:
            key_states = schema.stored(key_states, self.stored)
        return super().update(key_states, value_states, *args, **kwargs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Shapes: [B, H, any, D], [B, H, any, Dv]."""
        super().lazy_initialization(key_states, value_states)
        dims, device = (key_states.shape[3], value_states.shape[3]), key_states.device
        if torch.compiler.is_compiling():  # where the specification's numbers may be symbols, of which no text is made
            self.stored = self.texts[packing(self.coded.spec, *dims, device)]
        else:
            self.stored = str(self.coded.layout(*dims, device, False))

    @torch.inference_mode(False)
    def restore(self, owner: Owner) -> None:
        """Go on with codes."""
        g = owner.geometry
        lead = g.batch, g.heads, g.capacity
        like = torch.empty(*lead[:2], 0, g.k_dim, dtype=g.k_dtype), torch.empty(*lead[:2], 0, g.v_dim, dtype=g.v_dtype)
        self.lazy_initialization(*(x.to(owner.state.table.device) for x in like))
        self.keys, self.values = handles(owner, (*lead, g.k_dim), (*lead, g.v_dim))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As transformers' growing layers do. Shapes: int64[rows], or bool[B]."""
        if self.is_initialized:
            self.keys, self.values = (x[indices, ...] for x in (self.keys, self.values))  # type: ignore[index]
            self.batch_size = self.keys.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As transformers' growing layers do."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))
