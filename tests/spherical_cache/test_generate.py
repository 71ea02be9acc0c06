"""generate() over a cache of codes: at 16 bits, token for token what a dense cache gives."""

from functools import lru_cache

import pytest
import torch
from caches import CAPACITY, SPEC, dense, model, prompt, spherical

import sphkv_compile
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.tiny import tiny

KINDS = {"static": 2 * CAPACITY, "growing": None}


@lru_cache(None)
def compiled_model():
    m = tiny("llama")
    m.compile(backend=sphkv_compile.backend, options={"inductor": False}, fullgraph=True)
    return m


def generate(cache, ids, new=40, m=None, **options):
    m = m or model()
    m.generation_config.update(pad_token_id=0, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    return m.generate(ids, max_new_tokens=new, **{cache_keyword(m): cache}, **options)


OPTIONS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_as_with_a_dense_cache(name, kind):
    options = {"do_sample": False, **OPTIONS[name]}
    ids = prompt(40, batch=1)
    ours = generate(spherical(capacity=KINDS[kind]), ids, **options)
    assert torch.equal(ours, generate(dense(), ids, **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_with_all_of_a_model_compiled(name):
    """Prefill too: ``model.compile()`` leaves nothing of it eager."""
    options = {"do_sample": False, **OPTIONS[name]}
    ids = prompt(40, batch=1)
    ours = generate(spherical(capacity=2 * CAPACITY), ids, m=compiled_model(), **options)
    assert torch.equal(ours, generate(dense(), ids, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding_is_greedy_decoding(kind):
    ids, draft = prompt(40, batch=1), tiny("llama", layers=1)
    draft.generation_config.update(pad_token_id=0, bos_token_id=0, eos_token_id=None)
    ours = generate(spherical(capacity=KINDS[kind]), ids, do_sample=False, assistant_model=draft)
    assert torch.equal(ours, generate(dense(), ids, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
def test_two_turns_of_a_chat(kind):
    answers = []
    for cache in (spherical(capacity=KINDS[kind]), dense()):
        ids = generate(cache, prompt(40, batch=1), 20, do_sample=False)
        ids = torch.cat([ids, prompt(9, 1, batch=1)], 1)
        answers.append(generate(cache, ids, 30, do_sample=False))
    assert torch.equal(*answers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_of_three(kind):
    ids, mask = prompt(40, batch=3), torch.ones(3, 40, dtype=torch.int64)
    mask[0, :7], mask[2, :23] = 0, 0
    ids[mask == 0] = 0
    ours = generate(spherical(capacity=KINDS[kind]), ids, do_sample=False, attention_mask=mask)
    assert torch.equal(ours, generate(dense(), ids, do_sample=False, attention_mask=mask))


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_short_prompts_and_small_windows(tokens, window):
    ids = prompt(tokens, batch=1)
    ours = generate(spherical(**{**SPEC, "window": window}), ids, do_sample=False)
    assert torch.equal(ours, generate(dense(), ids, do_sample=False))
