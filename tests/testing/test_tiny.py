"""The tiny models: seeded, peaked enough to notice a wrong key, and usable with the caches they stand for."""

import pytest
import torch
import torch.nn.functional as F
from transformers import StaticCache

from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.tiny import FAMILIES, WINDOW, tiny, tiny_config, tiny_gpt_fast


def logits(model, ids, **kw):
    with torch.no_grad():
        return model(ids, **kw).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decode_equals_full_forward(family):
    """Past the sliding window too: a family whose cache is misconfigured differs there."""
    model, length = tiny(family), WINDOW + 8
    ids = torch.randint(2, 128, (2, length))
    cache = StaticCache(config=model.config, max_cache_len=length)
    kept = {cache_keyword(model): cache}
    parts = [logits(model, ids[:, :10], **kept)]
    parts += [logits(model, ids[:, i : i + 1], **kept) for i in range(10, length)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids, use_cache=False), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_peaked(family, monkeypatch):
    """Softmax weights far from uniform, on the last row, which sees every token that the window allows."""
    spread = []

    def spy(query, key, value, **kw):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        spread.append((query @ key.transpose(-1, -2)).mul(query.shape[-1] ** -0.5).std().item())
        return real(query, key, value, **kw)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    logits(tiny(family), torch.randint(2, 128, (1, 32)), use_cache=False)
    assert len(spread) == 2 and min(spread) > 0.8


def test_seed_decides_the_weights():
    a, b, c = tiny("qwen2"), tiny("qwen2"), tiny("qwen2", seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    name = "model.layers.0.self_attn.k_proj.bias"
    assert not torch.equal(a.get_parameter(name), c.get_parameter(name))


def test_the_callers_random_state_is_left_alone():
    before = torch.get_rng_state()
    tiny(), tiny_gpt_fast()
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_reach_the_model():
    model = tiny("qwen3", layers=3, heads=6, kv_heads=3, head_dim=8, dtype=torch.bfloat16, vocab_size=40)
    attention = model.model.layers[2].self_attn
    assert attention.k_proj.weight.shape == (24, 48) and attention.k_proj.weight.dtype is torch.bfloat16
    assert model.lm_head.weight.shape == (40, 48) and not model.training


def test_families_differ_where_they_say():
    assert tiny("glm").config.rope_parameters["partial_rotary_factor"] == 0.5
    assert tiny("phi3").config.rope_parameters["partial_rotary_factor"] == 0.5
    assert tiny("smollm3").config.no_rope_layers == [1, 0]
    assert tiny("gemma3").config.layer_types == ["sliding_attention", "full_attention"]
    assert tiny("qwen2").model.layers[0].self_attn.k_proj.bias.std() > 0.5
    assert not hasattr(tiny("llama").config, "sliding_window")


@pytest.mark.parametrize(
    "kw, error, says",
    [
        (dict(family="lama"), ValueError, "'llama'"),
        (dict(kv_heads=3), ValueError, "multiple"),
        (dict(sliding_windw=3, family="mistral"), TypeError, "'sliding_window'"),
    ],
)
def test_errors_name_the_nearest(kw, error, says):
    with pytest.raises(error, match=says):
        tiny_config(**{"family": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, **kw})
