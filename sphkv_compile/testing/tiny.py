"""Tiny seeded random models, for tests that need a real model's graph in milliseconds.

Each of transformers' families is here for one thing that its attention or its cache does differently
(:data:`FAMILIES`). The weights are wide enough that attention is peaked: under the usual initialisation all attention
logits of such small models are almost equal, and a test would not notice a broken key.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch

from .gpt_fast import GptFast, ModelArgs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 16
"""Sliding window of the families that have one, in tokens."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # the plain case: half RoPE, GQA by repeat_kv
    "qwen2": {},  # biases on q, k, v (drawn here; transformers starts them at zero)
    "qwen3": {},  # RMS norm on q and k
    "mistral": {"sliding_window": WINDOW},  # every layer slides
    "gemma3": {"sliding_window": WINDOW, "query_pre_attn_scalar": 24},  # sliding and full in turn, own scale
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},  # fused qkv
    "glm": {},  # interleaved RoPE on half of the head
    "cohere": {"logit_scale": 1.0},  # interleaved RoPE, parallel blocks
    "smollm3": {"no_rope_layer_interval": 2},  # layers without RoPE in turn
}
"""Family name -> what its configuration needs beyond the sizes."""

_MODEL_TYPE = {"gemma3": "gemma3_text"}


def tiny(
    family: str = "llama",
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A random causal language model in eval mode, the same for the same arguments.

    Args:
        family: a key of :data:`FAMILIES`.
        config: further fields of the family's transformers configuration.

    Shapes:
        hidden size = ``heads * head_dim``; vocabulary 128 unless ``vocab_size`` says otherwise.

    Raises:
        ValueError: an unknown family, or heads that are no multiple of kv_heads.
        TypeError: a field that the family's configuration does not have.
    """
    from transformers import AutoModelForCausalLM  # here, so that the package imports without transformers

    model_config = tiny_config(family, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation="sdpa", dtype=torch.float32)
        draw_biases(model)
    return model.to(device=device, dtype=dtype).eval()


def draw_biases(model: torch.nn.Module) -> None:
    """transformers starts biases at zero, where a lost one would not be noticed."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)


def tiny_config(family: str, *, layers: int, heads: int, kv_heads: int, head_dim: int, **config: Any) -> Any:
    """The transformers configuration behind :func:`tiny`.

    Raises:
        ValueError, TypeError: as :func:`tiny`.
    """
    from transformers import AutoConfig

    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(f"family={family!r}: expected one of {', '.join(FAMILIES)}; did you mean {near!r}?")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads={heads}, kv_heads={kv_heads}: heads must be a multiple of kv_heads; try kv_heads=1")
    model_type = _MODEL_TYPE.get(family, family)
    fields = {**sizes(layers, heads, kv_heads, head_dim), **FAMILIES[family]}
    if family == "gemma3":
        fields["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    known = vars(AutoConfig.for_model(model_type))
    unknown = [name for name in config if name not in known and name not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise TypeError(f"{family} has no configuration field {unknown[0]!r}; did you mean {near!r}?")
    return AutoConfig.for_model(model_type, **{**fields, **config})


def sizes(layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """The fields that most configurations share, with weights as wide as this module's docstring asks for.

    Shapes:
        as :func:`tiny`.
    """
    hidden = heads * head_dim
    return {
        "vocab_size": 128,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "initializer_range": _spread(hidden),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def tiny_gpt_fast(
    *, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, seed: int = 0, **args: Any
) -> GptFast:
    """A random :class:`GptFast` in eval mode, without caches: call ``setup_caches`` on it.

    Args:
        args: further fields of :class:`ModelArgs`.

    Raises:
        ValueError: as :class:`ModelArgs`.
    """
    dim = heads * head_dim
    sizes = dict(n_layer=layers, n_head=heads, n_local_heads=kv_heads, head_dim=head_dim, dim=dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GptFast(ModelArgs(**{**sizes, "intermediate_size": 2 * dim, **args}))
        for parameter in model.parameters():
            if parameter.ndim > 1:  # not the norms
                torch.nn.init.normal_(parameter, std=_spread(dim))
    return model.eval()


def _spread(hidden: int) -> float:
    """Standard deviation of the weights at which the attention logits q.k / sqrt(D) have one of about 2."""
    return 1.5 * hidden**-0.5
