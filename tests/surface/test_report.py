"""report(): bytes that are allocated, counters that ran, heads that are flagged."""

import copy

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile import SphericalCache
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.tiny import tiny

OPTIONS = {"inductor": False, "window": 8, "span": 16, "page": 8}


def decoded(model, cache, prompt: int, steps: int, **options):
    """A cache that the compiled model has filled: prefill in compiled chunks, then single tokens."""
    torch._dynamo.reset()  # module fixtures are made before the reset of each test
    step = torch.compile(model.forward, backend=sphkv_compile.backend, options={**OPTIONS, **options}, fullgraph=True)
    ids, kept = torch.randint(5, 100, (1, prompt + steps)), {cache_keyword(model): cache}
    with torch.no_grad():
        model(ids[:, :2], **kept)
        step(ids[:, 2:prompt], **kept)
        for i in range(prompt, prompt + steps):
            step(ids[:, i : i + 1], **kept)
    return cache


@pytest.fixture(scope="module")
def static():
    model = tiny("llama", head_dim=16)
    return decoded(model, StaticCache(config=model.config, max_cache_len=96), 60, 12, bits=4)


def test_counts_by_hand(static):
    """72 tokens, 4 sinks, window 8, spans of 16: three spans (48 tokens) are coded, in 2 layers."""
    r = sphkv_compile.report(static)
    assert (len(r.sites), r.matched, r.encoded_tokens) == (2, 2, 2 * 48)
    site = r.sites[0]
    assert (site.logical_tokens, site.resident_tokens, site.tier, site.rope) == (72, 72, "K4V4", "half")
    assert site.page_bytes == site.pages * 192  # 8 tokens of 8 + 8 + 4 bytes, in whole units of 64
    assert site.metadata_bytes == site.pages * 8 * 4
    assert (site.imports, site.exports, site.recoded_tokens) == (1, 0, 0)


def test_bytes_are_those_of_the_storages(static):
    """Bug: a tensor left out of the account, a shared arena counted per site, dense storage forgotten."""
    r = sphkv_compile.report(static)
    owners = [layer.keys.__dict__["_sphkv"] for layer in static.layers]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for o in owners for t in o.state}
    assert r.resident_bytes == sum(storages.values())
    assert r.dense_bytes == 2 * 2 * 2 * 96 * 16 * 4
    assert r.dense_resident_bytes == 0


def test_dense_storage_is_counted_once_eager_code_asked_for_it():
    model = tiny("llama", head_dim=16)
    cache = decoded(model, StaticCache(config=model.config, max_cache_len=96), 40, 1)
    before = sphkv_compile.report(cache).resident_bytes
    cache.layers[0].keys.sum()
    r = sphkv_compile.report(cache)
    assert r.matched == 1 and r.sites[0].exports == 1
    assert r.resident_bytes - before == r.dense_resident_bytes == 2 * 2 * 96 * 16 * 4


def test_handles_of_a_growing_cache_are_no_dense_bytes():
    model = tiny("llama", head_dim=16)
    r = sphkv_compile.report(decoded(model, DynamicCache(config=model.config), 40, 4))
    assert r.matched == 2 and r.dense_resident_bytes == 0


def test_biased_keys_are_flagged_and_plain_ones_are_not():
    """A bias at 300 times the spread of the keys turns within a span, so that no anchor holds it."""
    reports = {}
    for size in (1.0, 300.0):
        model = tiny("qwen2", head_dim=16)
        with torch.no_grad():
            for layer in model.model.layers:
                spread = layer.self_attn.k_proj.weight.std() * model.config.hidden_size**0.5
                layer.self_attn.k_proj.bias.normal_().mul_(size * spread)
        cache = decoded(model, StaticCache(config=model.config, max_cache_len=96), 60, 12)
        reports[size] = sphkv_compile.report(cache)
    assert not reports[1.0].flagged
    assert len(reports[300.0].flagged) == 2 * 2  # every head of both layers
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(reports[300.0])
    assert "4 heads have logit noise over" in shown.get()


def test_logit_noise_is_what_the_certificate_says():
    """sigma^2 against the noise measured with the decoded keys: the law holds within a factor of 1.5 on average."""
    model = tiny("llama", head_dim=16)
    cache = decoded(model, StaticCache(config=model.config, max_cache_len=400), 300, 12, bits=3)
    owner = cache.layers[0].keys.__dict__["_sphkv"]
    from sphkv_compile.ops.read import dense

    coded = slice(4, 4 + 16 * int(owner.state.rows[0, 2]))
    found, _ = dense(owner.state, owner.layout, 300)
    exact = StaticCache(config=model.config, max_cache_len=400)
    torch.manual_seed(0)
    ids = torch.randint(5, 100, (1, 312))
    with torch.no_grad():
        model(ids[:, :300], **{cache_keyword(model): exact})
    error = (found - exact.layers[0].keys[:, :, :300])[:, :, coded]
    certificates = sphkv_compile.report(cache).sites[0].certificates
    # an isotropic stand-in for the query in the scaled frame has the energy that the certificate counted
    scaled = error / owner.state.pair_scale[:, :, None]
    total, seen = owner.state.energy[0].unbind(-1)
    measured = (total / seen) * scaled.square().sum(-1).mean(-1)[0] / 16 / 16
    for c, m in zip(certificates, measured.tolist()):
        assert 1 / 1.5 < m / c.logit_variance < 1.5


def test_nothing_to_report_is_said():
    with pytest.raises(ValueError, match="no cache tensor that sphkv holds"):
        sphkv_compile.report({"a": torch.zeros(1)})


def read(model, cache, tokens):
    """A prompt in eager code."""
    with torch.no_grad():
        model(torch.randint(5, 100, (1, tokens)), **{cache_keyword(model): cache})
    return cache


@pytest.mark.parametrize(
    ("make", "tokens", "said"),
    [
        (lambda config: SphericalCache(config, max_cache_len=64), 0, "SphericalCache holds no token yet: run a prompt"),
        (lambda config: StaticCache(config, max_cache_len=64), 0, "no token yet: run a prompt with it, and a step of"),
        (lambda config: DynamicCache(), 0, "no token yet"),
        (lambda config: StaticCache(config, max_cache_len=64), 9, "StaticCache is dense: run a step of .*adopt"),
        (lambda config: DynamicCache(config=config), 9, "DynamicCache is dense: run a step of torch.compile"),
    ],
)
def test_a_cache_without_codes_gets_the_next_step(make, tokens, said):
    """Bug: a compiled step for each, also for one that eager code fills with codes."""
    model = tiny("llama", head_dim=16)
    cache = make(model.config)
    with pytest.raises(ValueError, match=said):
        sphkv_compile.report(read(model, cache, tokens) if tokens else cache)


def test_a_reason_of_a_dense_attention_is_passed_on():
    model = tiny("llama", head_dim=16)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="left dense: attention is written as matmul and softmax"):
        sphkv_compile.report(decoded(model, StaticCache(config=model.config, max_cache_len=96), 20, 1))


def test_sliding_windows_wait_for_a_compiled_model():
    model = tiny("gemma3", head_dim=16)
    cache = read(model, SphericalCache(model.config, max_cache_len=64), 9)
    r = sphkv_compile.report(cache)
    assert (len(r.sites), r.dense_layers, r.dense_windows) == (1, 1, 1)
    assert "Dense layers with a sliding window: 1." in str(r)
    model = tiny("mistral", head_dim=16)
    with pytest.raises(ValueError, match=r"sliding windows only.*run a step of torch.compile"):
        sphkv_compile.report(read(model, SphericalCache(model.config, max_cache_len=64), 9))


def test_a_cache_that_grows_is_compared_with_its_tokens():
    """Bug: with the room that it has grown to; and a division by zero of one without tokens."""
    model = tiny("llama", head_dim=16)
    cache = read(model, SphericalCache(model.config), 300)
    for held in (cache, copy.deepcopy(cache), decoded(model, DynamicCache(config=model.config), 280, 20)):
        assert sphkv_compile.report(held).dense_bytes == 2 * 2 * 2 * 300 * 16 * 4
    cache.reset()
    assert sphkv_compile.report(cache).dense_bytes == 0 and "of dense" not in str(sphkv_compile.report(cache))


def test_the_rotary_embedding_is_seen_by_a_graph():
    """Bug: "none", as of a model without one."""
    model = tiny("llama", head_dim=16)
    cache = read(model, SphericalCache(model.config, max_cache_len=96), 9)
    assert {site.rope for site in sphkv_compile.report(cache).sites} == {"not seen yet"}
    assert {site.rope for site in sphkv_compile.report(decoded(model, cache, 3, 2)).sites} == {"half"}


def test_a_budget_below_what_does_not_grow_gets_a_notice(static):
    model = tiny("llama", head_dim=64)
    cache = read(model, SphericalCache(model.config, max_cache_len=600, budget=0.1), 300)
    r = sphkv_compile.report(cache)
    assert r.budget < r.fixed_bytes + r.aside_bytes and "A smaller window, span or plan_every" in str(r)
    assert "does not grow takes" not in str(sphkv_compile.report(static))
