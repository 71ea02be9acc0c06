"""Door 1: a user does with a cache what users do, between compiled steps; the run must be the one of a dense cache.

Each scenario is run twice: on an eager model with its dense cache, and on the compiled one. Tokens, logits and the
cache's contents must agree.
"""

import pytest
import torch
from runs import Log, assert_same, assert_same_content, content, prompt
from transformers.cache_utils import StaticLayer

from sphkv_compile import report


def reset_then_second_generation(m, step, log):
    cache = m.cache()
    log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 40)
    cache.reset()
    log.decode(step, cache, log.call(m.eager, cache, prompt(13, 1)), 40)
    return cache


def second_turn_by_eager_prefill(m, step, log):
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 25)
    for turn in (1, 2):
        token = log.call(m.eager, cache, torch.cat([token, prompt(7, turn)], 1))
        token = log.decode(step, cache, token, 8)
    return cache


def more_on_the_same_cache(m, step, log):
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 10)
    for _ in range(3):
        token = log.decode(step, cache, token, 15)
        content(cache)  # the user looks at it
    return cache


def two_caches_interleaved(m, step, log):
    a, b = m.cache(), m.cache()
    x, y = log.call(m.eager, a, prompt(20)), log.call(m.eager, b, prompt(9, 1))
    for _ in range(30):
        x, y = log.call(step, a, x), log.call(step, b, y)
    return a


def eager_and_compiled_steps_mixed(m, step, log):
    cache = m.cache()
    token = log.call(m.eager, cache, prompt(20))
    for i in range(40):
        token = log.call(m.eager if i % 5 == 2 else step, cache, token)
    return cache


def crop_inside_the_window(m, step, log):
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 30)
    for back in (1, 3, 7):
        cache.crop(-back)
        token = log.decode(step, cache, token, 10)
    return cache


def crop_beyond_the_window(m, step, log):
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(30)), 50)
    for back in (37, 12, 40):  # into a span, at no edge, into the first span
        cache.crop(-back)
        token = log.decode(step, cache, token, 20)
    return cache


def crop_and_look(m, step, log):
    """An export between the crop and the next step."""
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(30)), 50)
    for back in (5, 37):
        cache.crop(-back)
        content(cache)
        token = log.decode(step, cache, token, 20)
    return cache


def rows_reordered(m, step, log):
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 20)
    cache.reorder_cache(torch.tensor([1, 1]))
    token = log.decode(step, cache, token[[1, 1]], 20)
    cache.reorder_cache(torch.tensor([1, 0]))
    log.decode(step, cache, token[[1, 0]], 15)
    return cache


def the_user_edits_the_cache(m, step, log):
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(30)), 30)
    cache.layers[0].keys[:, :, 12:15] = 0.5  # in the codes
    token = log.decode(step, cache, token, 10)
    cache.layers[1].values[1, :, 2] *= 2  # in the sinks, one row
    token = log.decode(step, cache, token, 10)
    cache.layers[1].values[:, :, -1 if m.kind == "dynamic" else 40] += 1
    log.decode(step, cache, token, 5)
    return cache


def in_inference_mode(m, step, log):
    with torch.inference_mode():
        cache = m.cache()
        log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 25)
    return cache


def inference_mode_then_no_grad(m, step, log):
    with torch.inference_mode():
        cache = m.cache()
        token = log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 25)
        token = token.clone()
    token = torch.tensor(token.tolist())
    log.decode(step, cache, token, 20)
    return cache


def no_grad_then_inference_mode(m, step, log):
    cache = m.cache()
    token = log.decode(step, cache, log.call(m.eager, cache, prompt(20)), 25)
    with torch.inference_mode():
        log.decode(step, cache, token, 20)
    return cache


def short_prompts(m, step, log):
    """R10."""
    for count in range(1, 9):
        cache = m.cache()
        log.decode(step, cache, log.call(m.eager, cache, prompt(count, count)), 6)
    return cache


SCENARIOS = [
    reset_then_second_generation,
    second_turn_by_eager_prefill,
    more_on_the_same_cache,
    two_caches_interleaved,
    eager_and_compiled_steps_mixed,
    crop_inside_the_window,
    crop_beyond_the_window,
    crop_and_look,
    rows_reordered,
    the_user_edits_the_cache,
    in_inference_mode,
    inference_mode_then_no_grad,
    no_grad_then_inference_mode,
    short_prompts,
]
DYNAMIC_ONLY = [inference_mode_then_no_grad, no_grad_then_inference_mode]  # eager static caches cannot change modes
if not hasattr(StaticLayer, "crop"):  # until transformers 5.18
    DYNAMIC_ONLY += [crop_inside_the_window, crop_beyond_the_window, crop_and_look]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_the_run_of_a_dense_cache(compiled, scenario, kind):
    if kind == "static" and scenario in DYNAMIC_ONLY:
        pytest.skip("torch or transformers refuse it without us")
    m = compiled("llama", kind)
    expected, got = Log(), Log()
    dense = scenario(m, m.eager, expected)
    cache = scenario(m, m.step, got)
    if scenario is not short_prompts:
        assert report(cache).encoded_tokens > 0
    assert_same(got, expected)
    assert_same_content(cache, dense)
