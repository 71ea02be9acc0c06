"""Every family of transformers' causal language models that is tried, and what becomes of it.

:data:`FAMILIES` says of each what is expected: all attentions over its cache matched, or all refused for one reason,
and which part of the model's own code bears that out. :func:`try_family` builds a small random model of it as
transformers would load it (with the attention that transformers itself chooses), decodes with a dense cache and with a
coded one, and returns what was found. The README's table is made of that (``make docs``).

Shapes: B rows, N decoded tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sphkv_compile.backend import backend
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.runtime import log
from sphkv_compile.runtime.guarded import owner_of
from sphkv_compile.storage.state import SPANS

from .tiny import FAMILIES as TINY
from .tiny import draw_biases, sizes

ROWS, PROMPT, STEPS, WINDOW = 2, 40, 10, 32
"""Rows and tokens of a run; a sliding window is full behind the prompt."""
OPTIONS = {"inductor": False, "sink": 2, "window": 4, "span": 8, "page": 8}
"""Small, so that most of the prompt lies in codes and a span is coded on the way; run node by node."""


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: as its makers write it.
        model_type: transformers' name of its configuration.
        config: what this needs beyond the sizes; for a model with several towers, of its text tower.
        layers: more than one where layers differ.
        refused: a code of ``REFUSALS`` where its attentions stay dense.
        because: the reason in words; ``evidence``: the place in the model's code that shows it.
        towers: configurations of the other towers, by field.
    """

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 1
    refused: str | None = None
    because: str = ""
    evidence: str = ""
    towers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


_IN_TURN = {"layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_VIT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_NOT_CACHED = "keys and values are made anew of cached latents at each step"

FAMILIES = (
    Family("Llama", "llama"),
    Family("Llama 4", "llama4_text"),
    Family("Mistral", "mistral"),
    Family("Mixtral", "mixtral"),
    Family("Qwen2", "qwen2"),
    Family("Qwen3", "qwen3"),
    Family("Qwen3-MoE", "qwen3_moe"),
    Family("Qwen3-Next", "qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, layers=2),
    Family("Qwen2-VL", "qwen2_vl", _MROPE,
           towers={"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}}),
    Family("Llava", "llava", towers={"vision_config": {**_VIT, "image_size": 28, "projection_dim": 32}}),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", _IN_TURN, 2, "not_sdpa", "soft cap", "torch.tanh(attn_weights)"),
    Family("Gemma 3", "gemma3_text", _IN_TURN, 2),
    Family("Gemma 3, multimodal", "gemma3", _IN_TURN, 2, towers={"vision_config": {**_VIT, "image_size": 32}}),
    Family("Gemma 4", "gemma4_text", _IN_TURN, 2),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3"),
    Family("Phi-MoE", "phimoe"),
    Family("GPT-2", "gpt2"),
    Family("GPT-J", "gptj", {"rotary_dim": 8}),
    Family("GPT-NeoX", "gpt_neox"),
    Family("GPT-BigCode", "gpt_bigcode"),
    Family("gpt-oss", "gpt_oss", {}, 2, "not_sdpa", "learned sinks", "torch.cat([attn_weights, sinks]"),
    Family("StarCoder2", "starcoder2"),
    Family("StableLM", "stablelm"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", _IN_TURN, 2),
    Family("OLMoE", "olmoe"),
    Family("Granite", "granite"),
    Family("Falcon", "falcon"),
    Family("Falcon-H1", "falcon_h1", {**_MAMBA, "mamba_d_ssm": 128}),
    Family("Bloom", "bloom", {}, 1, "not_sdpa", "alibi, added to logits by baddbmm", "alibi.baddbmm("),
    Family("OPT", "opt"),
    Family("Cohere", "cohere"),
    Family("Cohere 2", "cohere2", _IN_TURN, 2),
    Family("GLM", "glm"),
    Family("GLM-4", "glm4"),
    Family("SmolLM3", "smollm3", layers=2),
    Family("Nemotron", "nemotron"),
    Family("Helium", "helium"),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("EXAONE 4", "exaone4", _IN_TURN, 2),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}, 2),
    Family("Bamba", "bamba", {**_MAMBA, "attn_layer_indices": [1]}, 2),
    Family("Jamba", "jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 8,
                              "use_mamba_kernels": False}, 2),
    Family("DeepSeek-V3", "deepseek_v3", {**_LATENT, "num_key_value_heads": 4, "head_dim": 8}, 1, "unknown_write",
           _NOT_CACHED, "self.expand_kv("),
    Family("MiniCPM3", "minicpm3", {**_LATENT, "num_key_value_heads": 4}, 1, "unknown_write",
           _NOT_CACHED, "self.expand_kv("),
    Family("DiffLlama", "diffllama", {}, 1, "unknown_write", "two attentions share a cache of which each reads half",
           "torch.chunk(value_states, 2, dim=1)"),
    Family("Doge", "doge", {}, 1, "other_readers", "its mask is computed from cached values",
           "dt_states = self.dt_proj("),
)  # fmt: skip
"""What is tried, and what must come of it."""

_OTHER_NAMES = {
    "sliding_window": WINDOW, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "ffn_dim": 128, "word_embed_proj_dim": 64, "logit_scale": 1.0, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128, "init_std": 0.2, "attention_chunk_size": WINDOW,
}  # fmt: skip
"""Sizes that only some configurations have; each gets those that it knows."""


class OtherTransformersError(Exception):
    """The installed transformers lacks a family, or runs it otherwise than the newest that we know."""


def build(family: Family, seed: int = 0) -> Any:
    """A small random model of the family in eval mode, with the attention that transformers chooses for it.

    Raises:
        OtherTransformersError: it has no such family, or computes its attention otherwise.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if family.model_type not in CONFIG_MAPPING_NAMES:
        raise OtherTransformersError(f"no model of type {family.model_type!r}")
    text = AutoConfig.for_model(family.model_type).get_text_config()
    known = {*vars(text), *type(text).attribute_map}
    wanted = {**sizes(family.layers, heads=4, kv_heads=2, head_dim=16), **_OTHER_NAMES}
    fields = {name: value for name, value in wanted.items() if name in known}
    fields |= TINY.get(family.model_type, {}) | family.config
    if family.towers:
        fields = {"text_config": {"model_type": text.model_type, **fields}, **family.towers}
    config = AutoConfig.for_model(family.model_type, **fields)
    kind = AutoModelForImageTextToText if family.towers else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config, dtype=torch.float32)
        draw_biases(model)
    chosen, known_as = model.config._attn_implementation, "eager" if family.refused == "not_sdpa" else "sdpa"
    if chosen != known_as:
        raise OtherTransformersError(f"attention of {family} is {chosen!r}, which we know as {known_as!r}")
    return model.eval()


@dataclass(frozen=True)
class Found:
    """What became of one family.

    Args:
        model: name of its class.
        attentions: verdicts on one decode step; ``matched``: layers whose cache was held as codes at the end, of
            ``layers`` that have keys and values.
        idioms, refusals: of the verdicts, each once, in order.
        encoded: tokens that were coded, over all layers.
        error: largest difference of a logit from what dense attention gives over the same content of the cache.
        tolerance: what that may be (:func:`tolerance`).
        lost_key: largest difference of a logit where the newest cached key of each head is lost, for comparison.
    """

    family: Family
    model: str
    attentions: int
    matched: int
    layers: int
    idioms: tuple[str, ...]
    refusals: tuple[str, ...]
    encoded: int
    error: float
    tolerance: float
    lost_key: float

    def row(self) -> str:
        """The family's line in the README's table."""
        how = ", ".join(f"`{idiom}`" for idiom in self.idioms)
        why = ", ".join(f"`{code}`: {self.family.because}" for code in self.refusals)
        return f"| {self.family} | {self.model} | {self.matched} / {self.attentions} | {how} | {why} |"


@torch.no_grad()
def try_family(family: Family, bits: int = 16, dynamic: bool = False) -> Found:
    """Decodes with a random model of the family, dense and with a coded cache.

    At 16 bits ours is compared with the dense run. Below, what is held differs, so each step is compared with an eager
    step over a copy of our cache, which eager code reads as the tensors that the codes decode to; the first step, which
    encodes the prompt, has no such copy.

    What this process has compiled before is forgotten: transformers' models share the frame around ``forward``, of
    which Dynamo keeps a few versions only, and sizes that differ from model to model would be symbols.

    Args:
        dynamic: over a DynamicCache instead of a StaticCache.

    Raises:
        OtherTransformersError: as :func:`build`, or this transformers itself cannot decode with the family.
    """
    torch._dynamo.reset()
    model = build(family)
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")  # the grouped product of matrices has no float64
    try:
        dense = _Decoding(model, dynamic).steps()
    except RuntimeError as why:
        raise OtherTransformersError(f"{family} does not decode: {why}") from why
    exact, ours = _Decoding(double, dynamic).steps(), _Decoding(model, dynamic)
    seen: list[log.Compiled] = []
    lost_key = ours.lost_key()
    compiled = torch.compile(model.forward, backend=backend, options={**OPTIONS, "bits": bits})
    error, graphs = 0.0, 0
    with log.listening(seen.append):
        for i in range(STEPS):
            expected = dense[i] if bits == 16 else copy.deepcopy(ours).step()
            found = ours.step(compiled)
            graphs = graphs or len(seen)  # those of the first step; it is compiled again when codes come in
            if i or bits == 16:
                error = max(error, float((found - expected).abs().max()))
    verdicts = [verdict for graph in seen[:graphs] for verdict in graph.verdicts]
    keys = [keys for layer in ours.cache.layers if isinstance(keys := getattr(layer, "keys", None), Tensor)]
    owners = [owner for k in keys if (owner := owner_of(k))]
    return Found(
        family=family,
        model=type(model).__name__,
        attentions=len(verdicts),
        matched=sum(owner.holds_codes for owner in owners),
        layers=len(keys),
        idioms=tuple(dict.fromkeys(v.site.idiom for v in verdicts if v.site)),
        refusals=tuple(dict.fromkeys(v.refusal.code for v in verdicts if v.refusal)),
        encoded=sum(int(owner.state.rows[:, SPANS].sum()) * owner.layout.span for owner in owners),
        error=error,
        tolerance=tolerance(dense - exact),
        lost_key=lost_key,
    )


def tolerance(rounding: Tensor) -> float:
    """How far a logit of ours may be from the dense one, both float32, from the errors of the dense run.

    The errors of logits are taken as independent and of mean zero, as in :func:`.oracle.float32_bound`. Where dense
    attention rounds one sum, ours rounds three (the query's rotation, the anchor, the code), so its variance is at most
    three times the dense one's and that of the difference four times. Six standard deviations are passed by one of
    5e8.

    Args:
        rounding: logits of the dense run in float32, less those of the same model in float64.
    """
    return 6 * 2 * float(rounding.square().mean().sqrt())


class _Decoding:
    """A cache that holds the prompt, and the tokens to come, which do not depend on what the model says."""

    def __init__(self, model: Any, dynamic: bool):
        from transformers import DynamicCache, StaticCache

        self.model, config = model, model.config.get_text_config()
        self.ids = torch.randint(5, 100, (ROWS, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
        self.cache: Any = DynamicCache(config=config) if dynamic else StaticCache(config, PROMPT + STEPS)
        self.at = 0
        self._forward(model, PROMPT)

    def _forward(self, model: Callable, count: int) -> Tensor:
        token, self.at = self.ids[:, self.at : self.at + count], self.at + count
        return model(token, use_cache=True, **{cache_keyword(self.model): self.cache}).logits[:, -1].double()

    def step(self, model: Callable | None = None) -> Tensor:
        """The next token's logits, from ``model`` if that is another than our own. Shapes: -> float64[B, V]."""
        return self._forward(model or self.model, 1)

    def steps(self) -> Tensor:
        """All of them. Shapes: -> float64[N, B, V]."""
        return torch.stack([self.step() for _ in range(STEPS)])

    def __deepcopy__(self, memo: dict) -> _Decoding:
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache, memo)
        return twin

    def lost_key(self) -> float:
        """How much the next logits change where the newest cached key of every layer and head is zero."""
        twin, other = copy.deepcopy(self), copy.deepcopy(self)
        for layer in twin.cache.layers:
            if isinstance(keys := getattr(layer, "keys", None), Tensor):
                keys[:, :, min(PROMPT, keys.shape[2]) - 1] = 0
        return float((twin.step() - other.step()).abs().max())
