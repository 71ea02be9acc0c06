"""The sides of the model bench: one model, three ways to keep its cache and to compile a decode step.

Every side decodes the same seeded weights over the same seeded cache, so that their logits can be compared.

Shapes: B rows, L tokens of capacity, H kv heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sphkv_compile
from sphkv_compile.bench.loop import Loop, attentions, caches
from sphkv_compile.integrations.models import dtype_of
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.ops.append import append
from sphkv_compile.ops.decode import packing
from sphkv_compile.report import Report, report
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool, arena_bytes, reserve
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry
from sphkv_compile.testing import clock
from sphkv_compile.testing.gpt_fast import from_llama

MODE = "reduce-overhead"
WARM = 16
"""Steps before the clock starts: compiling, capturing, and the first replays."""
SCALE = 1.5
"""Standard deviation of random keys and values, and of what the random projections give: logits then have one of about
two, and attention is neither flat nor a choice of one."""
CHUNK = 8192
"""Tokens encoded at once, where a cache is made layer by layer."""
ROOM = 10
"""Scratch of an import, in times the float32 keys of one layer (9.1 counted)."""

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
}  # fmt: skip
"""``8b`` is Llama-3-8B's, ``tiny`` runs anywhere in a minute."""


@dataclass(frozen=True)
class Job:
    """One model at one batch and length.

    Args:
        length: capacity of the cache; the last step writes its last column.
        layers: fewer than the shape's; 0 keeps them.
        fill: how ours gets its codes: ``cache``, the first compiled step imports a dense cache; ``layers``, each layer
            is filled, encoded and released before the next; ``auto``, the first where the dense cache fits.
        ttft: measure the time to the first decoded token as well.
        chunk: tokens of a chunk, to measure ours with a compiled prefill in chunks; 0 does not.
        sdpa: attention kernel of the loop: flash, cudnn, torch (its own choice) or auto (the fastest here).

    Units: tokens.
    """

    shape: str = "8b"
    batch: int = 1
    length: int = 32768
    steps: int = 64
    layers: int = 0
    device: str = "cuda"
    dtype: str = "bfloat16"
    fill: str = "auto"
    ttft: bool = False
    chunk: int = 0
    sdpa: str = "auto"

    @property
    def start(self) -> int:
        """Tokens in the cache before the first step."""
        return self.length - self.steps - WARM

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def number(self) -> torch.dtype:
        return dtype_of(self.dtype)


def build(job: Job) -> Any:
    """The model, its weights made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = dict(SHAPES[job.shape])
    sizes["num_hidden_layers"] = job.layers or sizes["num_hidden_layers"]
    config = LlamaConfig(
        **sizes, max_position_embeddings=max(131072, job.length), tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=SCALE * sizes["hidden_size"] ** -0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    with job.where:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=job.number).eval()


class Side:
    """A compiled step and the cache that it decodes over."""

    tier = "dense"

    def __init__(self, job: Job, model: Any):
        self.job, self.model = job, model
        self.notes: dict[str, Any] = {}

    def step(self, token: Tensor) -> Tensor:
        """Shapes: int64[B, 1] -> [B, 1, V]."""
        raise NotImplementedError

    @property
    def kv_bytes(self) -> int:
        raise NotImplementedError

    def check(self) -> None:
        """Raises: RuntimeError: this side did not do what it stands for."""


class Transformers(Side):
    """transformers' own StaticCache, compiled as transformers does it."""

    def __init__(self, job: Job, model: Any):
        super().__init__(job, model)
        self.cache, self.keyword = filled(job, model), cache_keyword(model)
        self.forward = self.compiled()

    def compiled(self) -> Callable:
        return torch.compile(self.model.forward, mode=MODE, fullgraph=True, dynamic=False)

    def step(self, token: Tensor) -> Tensor:
        return self.forward(token, use_cache=True, **{self.keyword: self.cache}).logits

    @property
    def kv_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Plain(Side):
    """The mask-free loop, with the kernel that is the fastest at this shape."""

    def __init__(self, job: Job, model: Any):
        self.kernel, form = _kernel(job, model.config)
        loop = from_llama(model, "half", Loop)
        super().__init__(job, loop)
        loop.setup_caches(job.batch, job.length)
        for i, (cache, attention) in enumerate(zip(caches(loop), attentions(loop))):
            fill(cache.k_cache, cache.v_cache, job.start, seed=i)
            attention.form = form
        self.notes = {"kernel": f"{self.kernel or 'torch'}, {form}"}
        self.position = torch.tensor([job.start], device=job.where)
        self.forward = torch.compile(loop, mode=MODE, fullgraph=True, dynamic=False)

    def step(self, token: Tensor) -> Tensor:
        with clock.kernel_of(self.kernel):
            logits = self.forward(token, self.position)
        self.position += 1
        return logits

    @property
    def kv_bytes(self) -> int:
        return sum(cache.k_cache.nbytes + cache.v_cache.nbytes for cache in caches(self.model))


class Ours(Transformers):
    """The same model and StaticCache through our backend."""

    def __init__(self, job: Job, model: Any, bits: str):
        self.spec = CacheSpec(bits=int(bits) if bits.isdigit() else bits)
        self.tier = str(self.spec.tier)
        Side.__init__(self, job, model)
        self.keyword, self.forward = cache_keyword(model), self.compiled()
        by_layer = job.fill == "layers" or (job.fill == "auto" and not self.dense_fits())
        self.cache = self.coded() if by_layer else filled(job, model)
        self.notes = {"fill": "layers" if by_layer else "cache"}

    def compiled(self, mode: str | None = MODE) -> Callable:
        options: dict[str, Any] = {"bits": self.spec.bits, "mode": mode}
        return torch.compile(
            self.model.forward, backend=sphkv_compile.backend, options=options, fullgraph=True, dynamic=False
        )

    @property
    def geometry(self) -> Geometry:
        return geometry(self.job, self.model.config)

    @property
    def layout(self) -> Layout:
        d = self.geometry.k_dim
        packed = packing(self.spec, d, d, self.job.where)
        return Layout.of(self.spec, "half", d, packed)

    def dense_fits(self) -> bool:
        """Whether the dense cache, the codes, and the scratch of an import fit in what is free."""
        if self.job.where.type != "cuda":
            return True
        g, layers = self.geometry, self.model.config.num_hidden_layers
        scratch = ROOM * 4 * g.batch * g.heads * g.capacity * g.k_dim
        need = layers * (g.dense_bytes + arena_bytes(self.layout, g)) + scratch
        return need < torch.cuda.mem_get_info(self.job.where)[0]

    def coded(self, tokens: int | None = None) -> Any:
        """A cache whose layers are filled, encoded and released one by one: no two of them are ever dense.

        It is what the first compiled step would make of the whole dense cache, by the same ops.

        Args:
            tokens: to fill in; those of the job by default.
        """
        tokens = self.job.start if tokens is None else tokens
        layout, g, spec = self.layout, self.geometry, self.spec
        cache = empty(self.job, self.model)
        pool = Pool(len(cache.layers) * arena_bytes(layout, g), spec.plan_every, self.job.where)
        for i, layer in enumerate(cache.layers):
            begin(layer, self.job, g)
            fill(layer.keys, layer.values, tokens, seed=i)
            layer.cumulative_length.fill_(tokens)
            owner = Owner(layout, g, pool, scale=g.k_dim**-0.5)
            reserve(owner.state, layout, g, pool.arena, tokens)
            for at in range(0, tokens, CHUNK):
                k, v = (x[:, :, at : min(at + CHUNK, tokens)] for x in (layer.keys, layer.values))
                append(owner.state, layout, None, k, v, at, [0] * g.batch)
            owner.hold(layer.keys, layer.values)
        return cache

    @property
    def kv_bytes(self) -> int:
        return self.held.resident_bytes

    @property
    def held(self) -> Report:
        return report(self.cache)

    def check(self) -> None:
        held, layers = self.held, len(self.cache.layers)
        exports = sum(site.exports for site in held.sites)
        if held.matched != layers or not held.encoded_tokens or exports:
            raise RuntimeError(
                f"{held.matched} of {layers} attentions hold codes, {held.encoded_tokens} tokens are encoded, "
                f"{exports} caches were made dense again: this is no measurement of ours"
            )


def side(name: str, job: Job, model: Any) -> Side:
    """``hf``, ``loop``, or ours by its bits (``K4V2``, ``4``)."""
    if name in ("hf", "loop"):
        return {"hf": Transformers, "loop": Plain}[name](job, model)
    return Ours(job, model, name)


# ---- caches


def geometry(job: Job, config: Any) -> Geometry:
    """Of one layer's dense cache."""
    d = config.head_dim
    return Geometry(job.batch, config.num_key_value_heads, job.length, d, d, job.number, job.number, False)


def empty(job: Job, model: Any) -> Any:
    """A cache that has allocated nothing yet."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=job.length)


def begin(layer: Any, job: Job, g: Geometry) -> None:
    """Allocate a layer of a cache, in eager code: else no CUDA graph is captured over it."""
    one = torch.empty(g.batch, g.heads, 1, g.k_dim, dtype=g.k_dtype, device=job.where)
    layer.lazy_initialization(one, one)


def fill(k: Tensor, v: Tensor, tokens: int, seed: int) -> None:
    """Random content in the first columns. Shapes: [B, H, L, D]."""
    generator = torch.Generator(k.device).manual_seed(seed)
    for x in (k, v):
        x[:, :, :tokens].normal_(0, SCALE, generator=generator)


def filled(job: Job, model: Any) -> Any:
    """A dense cache of random content up to the first step."""
    cache = empty(job, model)
    for i, layer in enumerate(cache.layers):
        begin(layer, job, geometry(job, model.config))
        fill(layer.keys, layer.values, job.start, seed=i)
        layer.cumulative_length.fill_(job.start)
    return cache


def prefilled(job: Job, model: Any, prompt: Tensor) -> Any:
    """A dense cache after an eager prefill with torch's flash attention, row by row. Shapes: int64[B, S]."""
    cache, keyword = empty(job, model), cache_keyword(model)
    for layer in cache.layers:
        begin(layer, job, geometry(job, model.config))
    for row in range(job.batch):
        one = empty(job, model)
        one.layers = [_row(layer, row) for layer in cache.layers]
        model(prompt[row : row + 1], use_cache=True, logits_to_keep=1, **{keyword: one})
    for layer in cache.layers:
        layer.cumulative_length.fill_(prompt.shape[1])
    return cache


def _row(layer: Any, row: int) -> Any:
    """A layer that writes into one row of another."""
    one = copy.copy(layer)
    one.keys, one.values, one.batch_size = layer.keys[row : row + 1], layer.values[row : row + 1], 1
    one.cumulative_length = torch.zeros_like(layer.cumulative_length)
    return one


def _kernel(job: Job, config: Any) -> tuple[str | None, str]:
    """The loop's attention kernel and the form of its queries."""
    if job.sdpa != "auto":
        return None if job.sdpa == "torch" else job.sdpa, "heads"
    if job.where.type != "cuda":
        return None, "heads"
    heads = config.num_key_value_heads
    _, which = clock.dense_time(job.batch, job.length, heads, config.num_attention_heads // heads, config.head_dim)
    torch.cuda.empty_cache()
    kernel, form = which.split(", ")
    return kernel, form
