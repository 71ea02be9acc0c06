"""The fastest dense decode step that plain torch gives: gpt-fast's loop without a mask.

Attention reads the whole buffer, so a mask would only say what its length says already, and torch's fast kernels take
none. It is right for a cache that is (almost) full, which is all that the bench asks of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphkv_compile.testing.gpt_fast import (
    Attention,
    GptFast,
    KVCache,
    ModelArgs,
    apply_rotary_emb,
    precompute_freqs_cis,
)


class MaskFree(Attention):
    """Attention over the whole buffer. Shapes: x [B, 1, dim] -> [B, 1, dim].

    Args:
        form: ``heads``: query heads share kv heads inside the kernel; ``rows``: they are rows of one kv head's query.
    """

    form = "heads"

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor | None, input_pos: Tensor) -> Tensor:
        args, (batch, seq, _) = self.args, x.shape
        heads = (args.n_head, args.n_local_heads, args.n_local_heads)
        q, k, v = self.wqkv(x).split([h * args.head_dim for h in heads], dim=-1)
        q, k, v = (t.view(batch, seq, h, args.head_dim) for t, h in zip((q, k, v), heads))
        q, k = (apply_rotary_emb(t, freqs, args.rope_layout).transpose(1, 2) for t in (q, k))
        assert self.kv_cache is not None, "call setup_caches first"
        k, v = self.kv_cache.update(input_pos, k, v.transpose(1, 2))
        if self.form == "rows":
            q = q.reshape(batch, args.n_local_heads, -1, args.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.form == "heads")
        return self.wo(y.reshape(batch, seq, -1))


class Loop(GptFast):
    """The decoder; one token a call. Shapes: idx [B, 1] int64, input_pos [1] int64 -> logits [B, 1, V]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.attention = MaskFree(args)

    def setup_caches(self, max_batch: int, max_seq: int) -> None:
        """As in gpt-fast, made on the device, and without the square of a mask. Units: max_seq in tokens."""
        args, weight = self.args, self.tok_embeddings.weight
        with torch.device(weight.device):
            for attention in attentions(self):
                attention.kv_cache = KVCache(max_batch, max_seq, args.n_local_heads, args.head_dim, weight.dtype)
            freqs = precompute_freqs_cis(max_seq, args.head_dim, args.rope_base)
        self.register_buffer("freqs_cis", freqs, persistent=False)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        freqs, x = self.freqs_cis[input_pos], self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, freqs, None, input_pos)
        return self.output(self.norm(x))


def attentions(loop: nn.Module) -> list[MaskFree]:
    """Layer by layer."""
    return [module for module in loop.modules() if isinstance(module, MaskFree)]


def caches(loop: nn.Module) -> list[KVCache]:
    """The buffers, layer by layer."""
    return [module for module in loop.modules() if isinstance(module, KVCache)]
