"""Decoders in plain PyTorch that keep their own KV cache, in the two idioms found outside transformers.

:class:`GptFast` follows gpt-fast (pytorch-labs/gpt-fast, model.py): the cache is a pair of buffers of a
``KVCache`` module, written by ``k_cache[:, :, input_pos] = k_val``, and the mask is rows of a square of bools.
:class:`SliceCopy` writes a slice by ``copy_`` and reads the filled part only. Nothing here knows of this package: both
are what a user's own code looks like. Under ``torch.compile`` the buffers are inputs of the graph, because
``torch._dynamo.config.inline_inbuilt_nn_modules`` is on by default.

Shapes: B batch, HQ and HKV heads, S tokens of this call, L tokens of capacity, D head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelArgs:
    """Sizes of a :class:`GptFast`; the fields are gpt-fast's, ``rope_layout`` is ours.

    Args:
        rope_layout: ``"interleaved"`` rotates neighbours (2i, 2i + 1) as gpt-fast and the original Llama do;
            ``"half"`` rotates (i, i + D / 2) as transformers does.

    Raises:
        ValueError: heads that are no multiple of kv heads, or an unknown layout.
    """

    vocab_size: int = 128
    n_layer: int = 2
    n_head: int = 4
    n_local_heads: int = 2
    head_dim: int = 16
    dim: int = 64
    intermediate_size: int = 128
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    rope_layout: str = "interleaved"

    def __post_init__(self) -> None:
        if self.n_local_heads < 1 or self.n_head % self.n_local_heads:
            raise ValueError(f"n_head={self.n_head}: must be a multiple of n_local_heads={self.n_local_heads}")
        if self.rope_layout not in ("interleaved", "half"):
            raise ValueError(f"rope_layout={self.rope_layout!r}: expected 'interleaved' or 'half'")


class KVCache(nn.Module):
    """The buffers of one layer and the write that keeps them.

    Shapes: k_cache, v_cache [B, HKV, L, D]; input_pos [S]; k_val, v_val [B, HKV, S, D].
    """

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, max_batch: int, max_seq: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (max_batch, heads, max_seq, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens in place and returns the whole cache."""
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class Attention(nn.Module):
    """Grouped-query attention with a fused projection and RoPE. Shapes: x [B, S, dim] -> [B, S, dim]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        rows = (args.n_head + 2 * args.n_local_heads) * args.head_dim
        self.wqkv = nn.Linear(args.dim, rows, bias=False)
        self.wo = nn.Linear(args.n_head * args.head_dim, args.dim, bias=False)
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        args, (batch, seq, _) = self.args, x.shape
        heads = (args.n_head, args.n_local_heads, args.n_local_heads)
        q, k, v = self.wqkv(x).split([h * args.head_dim for h in heads], dim=-1)
        q, k, v = (t.view(batch, seq, h, args.head_dim) for t, h in zip((q, k, v), heads))
        q, k = (apply_rotary_emb(t, freqs, args.rope_layout).transpose(1, 2) for t in (q, k))
        v = v.transpose(1, 2)
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        group = args.n_head // args.n_local_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).reshape(batch, seq, -1))


class FeedForward(nn.Module):
    """SwiGLU. Shapes: x [B, S, dim] -> [B, S, dim]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w3 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w2 = nn.Linear(args.intermediate_size, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Pre-norm block. Shapes: x [B, S, dim] -> [B, S, dim]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs, mask, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))


class GptFast(nn.Module):
    """The decoder. Call :meth:`setup_caches` once, then the module with tokens and their positions.

    Shapes: idx [B, S] int64, input_pos [S] int64 -> logits [B, S, V].
    """

    freqs_cis: Tensor
    causal_mask: Tensor

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.max_batch = self.max_seq = 0

    def setup_caches(self, max_batch: int, max_seq: int) -> None:
        """Allocates (or reallocates, empty) every layer's cache, and the RoPE and mask tables.

        Units: max_seq in tokens.
        """
        args, weight = self.args, self.tok_embeddings.weight
        self.max_batch, self.max_seq = max_batch, max_seq
        for module in self.modules():
            if isinstance(module, Attention):
                cache = KVCache(max_batch, max_seq, args.n_local_heads, args.head_dim, weight.dtype)
                module.kv_cache = cache.to(weight.device)
        freqs = precompute_freqs_cis(max_seq, args.head_dim, args.rope_base)
        mask = torch.tril(torch.ones(max_seq, max_seq, dtype=torch.bool))
        self.register_buffer("freqs_cis", freqs.to(weight.device), persistent=False)
        self.register_buffer("causal_mask", mask.to(weight.device), persistent=False)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask, freqs = self.causal_mask[None, None, input_pos], self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, freqs, mask, input_pos)
        return self.output(self.norm(x))


def precompute_freqs_cis(seq_len: int, head_dim: int, base: float) -> Tensor:
    """cos and sin of position times frequency. Shapes: [L, D / 2, 2] float32. Units: radians."""
    freqs = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), freqs)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rotary_emb(x: Tensor, freqs: Tensor, layout: str) -> Tensor:
    """Rotates the pairs of each head. Shapes: x [B, S, H, D], freqs [S, D / 2, 2] -> [B, S, H, D]."""
    shape = (*x.shape[:-1], -1, 2) if layout == "interleaved" else (*x.shape[:-1], 2, -1)
    axis = -1 if layout == "interleaved" else -2
    a, b = x.float().reshape(shape).unbind(axis)
    cos, sin = freqs[:, None, :, 0], freqs[:, None, :, 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2).type_as(x)


@torch.no_grad()
def from_llama(model: nn.Module, rope_layout: str = "interleaved", kind: type[GptFast] = GptFast) -> GptFast:
    """A :class:`GptFast` with the weights of a transformers Llama, which it then shares where they need no change.

    transformers' checkpoints hold q and k in the half layout; the interleaved one needs their rows permuted, as
    gpt-fast's convert_hf_checkpoint.py does.

    Args:
        model: a ``LlamaForCausalLM``; any model with its modules, no biases and default RoPE would do.
        kind: the class to build.

    Raises:
        ValueError: biases or scaled RoPE, which gpt-fast's module does not have.
    """
    config: Any = model.config
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise ValueError(f"{type(model).__name__} has biases or {rope['rope_type']!r} RoPE; expected a plain Llama")
    args = ModelArgs(
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_local_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dim=config.hidden_size,
        intermediate_size=config.intermediate_size,
        rope_base=rope["rope_theta"],
        norm_eps=config.rms_norm_eps,
        rope_layout=rope_layout,
    )
    with torch.device("meta"):
        ours = kind(args)
    ours.load_state_dict(_gpt_fast_names(model.state_dict(), args), assign=True)
    return ours.eval()


_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gpt_fast_names(weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Renames the weights; q, k and v become one. Shapes: q [HQ * D, dim], k and v [HKV * D, dim] -> wqkv."""

    def pairs(w: Tensor) -> Tensor:
        if args.rope_layout == "half":
            return w
        return w.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    out = {}
    for name, weight in weights.items():
        if "self_attn.q_proj" in name:
            k, v = (weights[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
            name, weight = name.replace("self_attn.q_proj", "attention.wqkv"), torch.cat([pairs(weight), pairs(k), v])
        elif "k_proj" in name or "v_proj" in name:
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        out[name] = weight
    return out


class SliceCopy(nn.Module):
    """One attention layer whose cache is written by ``narrow(...).copy_()`` and read up to the newest token.

    Shapes: x [B, S, dim], start an int -> [B, S, dim]; buffers [B, HKV, L, D].
    """

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, max_batch: int = 1, max_seq: int = 64):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, dim = heads, kv_heads, head_dim, heads * head_dim
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * head_dim, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(max_batch, kv_heads, max_seq, head_dim), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        seq, end = x.shape[1], start + x.shape[1]
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        self.k_cache.narrow(2, start, seq).copy_(k)
        self.v_cache[:, :, start:end].copy_(v)
        keys, values = self.k_cache[:, :, :end], self.v_cache[:, :, :end]
        mask = torch.ones(seq, end, dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        return self.o(y.transpose(1, 2).flatten(2))
