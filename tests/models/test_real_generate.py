"""generate() on SmolLM2 over a cache that is born as codes: at 16 bits, 64 tokens as with a dense cache."""

from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from sphkv_compile import SphericalCache, report
from sphkv_compile.integrations.models import load_bundled
from sphkv_compile.integrations.transformers import cache_keyword

pytestmark = pytest.mark.slow
TOKENS, CAPACITY = 64, 640
PROMPT = "Explain in three sentences why the sky is blue."


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = load_bundled("smollm2")
    model.generation_config.eos_token_id = None  # 64 tokens, whatever they are
    return model, tokenizer


@pytest.fixture(scope="module")
def draft(smollm2):
    """Six of its thirty layers: wrong often enough that tokens are taken back."""
    model, _ = smollm2
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 6, "layer_types": None})
    small = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    small.load_state_dict(model.state_dict(), strict=False)
    small.generation_config = model.generation_config
    return small


def ids_of(tokenizer, count=300):
    return tokenizer(topics["compound"], return_tensors="pt").input_ids[:, :count]


def generate(model, cache, ids, new=TOKENS, **options):
    torch.manual_seed(0)
    options = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **{cache_keyword(model): cache}, **options)


def both(model, ids, **options):
    """Tokens over codes of 16 bits and over a dense cache, and the former cache."""
    cache = SphericalCache(model.config, max_cache_len=CAPACITY, bits=16)
    return (
        generate(model, cache, ids, **options),
        generate(model, DynamicCache(config=model.config), ids, **options),
        cache,
    )


@pytest.mark.parametrize("options", [
    {}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 4}, {"prefill_chunk_size": 77},
], ids=["greedy", "sampling", "beams", "chunked prefill"])  # fmt: skip
def test_tokens_are_those_of_a_dense_cache(smollm2, options):
    model, tokenizer = smollm2
    ours, dense, cache = both(model, ids_of(tokenizer), **options)
    assert torch.equal(ours, dense)
    assert report(cache).encoded_tokens >= 30 * 128


def test_assisted_decoding(smollm2, draft):
    model, tokenizer = smollm2
    ours, dense, _ = both(model, ids_of(tokenizer), assistant_model=draft)
    assert torch.equal(ours, dense) and torch.equal(dense, both(model, ids_of(tokenizer))[1])


def test_a_chat_of_two_turns(smollm2):
    model, tokenizer = smollm2
    answers = []
    for cache in (SphericalCache(model.config, max_cache_len=CAPACITY, bits=16), DynamicCache(config=model.config)):
        messages = [{"role": "user", "content": PROMPT}]
        for question in ("And at sunset?", None):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            out = generate(model, cache, ids)
            answers.append(out)
            messages.append({"role": "assistant", "content": tokenizer.decode(out[0, ids.shape[1] :])})
            messages.append({"role": "user", "content": question})
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])


def test_a_padded_batch_of_three(smollm2):
    model, tokenizer = smollm2
    ids, mask = ids_of(tokenizer).repeat(3, 1), torch.ones(3, 300, dtype=torch.int64)
    mask[0, :10], mask[2, :200] = 0, 0
    ids[mask == 0] = 0
    ours, dense, _ = both(model, ids, attention_mask=mask)
    assert torch.equal(ours, dense)
