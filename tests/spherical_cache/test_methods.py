"""Whatever transformers can ask of a cache, in eager code and between compiled steps, each followed by steps that equal
those of a dense cache.

The layers are full (Llama), sliding (Mistral) or both in turn (Gemma3); each scenario says what a method must do.
"""

import copy

import pytest
import torch
from caches import CAPACITY, Run, assert_same, compiled, dense, model, prompt, spherical
from transformers import DynamicCache

from sphkv_compile.runtime import log

FAMILIES = {"full": "llama", "sliding": "mistral", "hybrid": "gemma3"}


def update(run):
    run.decode(run.call(prompt(40)), 20)


def in_chunks(run):
    token = None
    for chunk in prompt(50).split([9, 1, 24, 16], 1):
        token = run.call(chunk)
    run.decode(token, 6)


def get_seq_length(run):
    run.said.append(int(run.cache.get_seq_length()))
    token = run.call(prompt(20))
    run.said.append(int(run.cache.get_seq_length()))
    run.decode(token, 3)
    run.said.append(int(run.cache.get_seq_length()))


def get_query_offset(run):
    run.decode(run.call(prompt(20)), 3)
    offset = getattr(run.cache, "get_query_offset", run.cache.get_seq_length)
    run.said.append(int(offset()))


def reset(run):
    run.decode(run.call(prompt(50)), 10)
    if isinstance(run.cache, DynamicCache):  # which older transformers only fill with zeros
        run.cache = dense(run.family)
    run.cache.reset()
    run.said.append(int(run.cache.get_seq_length()))
    run.decode(run.call(prompt(13, 1)), 30)


def reorder_cache(run):
    token = run.decode(run.call(prompt(50)), 4)
    for order in ([1, 0], [1, 1], [0, 1]):
        run.cache.reorder_cache(torch.tensor(order))
        token = run.decode(token[order], 9)


def batch_repeat_interleave(run):
    token = run.decode(run.call(prompt(50)), 4)
    run.cache.batch_repeat_interleave(3)
    other = torch.arange(5, 11).view(6, 1)  # rows that share their past go different ways
    run.decode(torch.where(torch.arange(6).view(6, 1) % 2 == 0, token.repeat_interleave(3, 0), other), 30)


def batch_select_indices(run):
    token = run.decode(run.call(prompt(50, batch=3)), 4)
    run.cache.batch_select_indices(torch.tensor([2, 0]))
    token = run.decode(token[[2, 0]], 20)
    run.cache.batch_select_indices(torch.tensor([False, True]))
    run.decode(token[1:], 20)


def crop(run):
    token = run.decode(run.call(prompt(40)), 20)
    if not run.cache.is_croppable or "DynamicSlidingWindowLayer" in str(run.cache):
        pytest.skip("transformers' sliding layers cannot be cropped once their window is full")
    for count in (1, 3, 7):
        run.cache.crop(-count)
        run.said.append(int(run.cache.get_seq_length()))
        token = run.decode(token, 9)
    run.cache.crop(-30)  # behind the window of 8
    run.decode(token, 20)


def activate_past_recording(run):
    token = run.call(prompt(40))
    if not run.cache.is_croppable:
        pytest.skip("transformers' static sliding layers record no past")
    if hasattr(run.cache, "activate_past_recording"):
        run.cache.activate_past_recording()
    for _ in range(4):
        token = run.call(torch.cat([token, prompt(4, 1)], 1))
        run.cache.crop(-3)
    run.said.append(int(run.cache.get_seq_length()))


def deepcopy(run):
    token = run.decode(run.call(prompt(50)), 5)
    first, run.cache = run.cache, copy.deepcopy(run.cache)
    run.decode(token, 20)
    run.cache = first
    run.decode(prompt(1, 3), 20)


def fork_of_a_fork(run):
    token = run.call(prompt(40))
    run.cache.batch_repeat_interleave(2)
    token = run.decode(token.repeat_interleave(2, 0), 5)
    run.cache = copy.deepcopy(run.cache)
    run.cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    run.decode(token[[3, 3, 0, 1]], 30)


def crop_of_rows_that_share_pages(run):
    run.decode(run.call(prompt(40)), 20)
    if not run.cache.is_croppable or "DynamicSlidingWindowLayer" in str(run.cache):
        pytest.skip("transformers' sliding layers cannot be cropped once their window is full")
    run.cache.batch_repeat_interleave(2)
    run.cache.crop(-30)
    run.decode(torch.arange(5, 9).view(4, 1), 30)


def rows_chosen_after_a_crop(run):
    token = run.decode(run.call(prompt(40)), 20)
    if not run.cache.is_croppable or "DynamicSlidingWindowLayer" in str(run.cache):
        pytest.skip("transformers' sliding layers cannot be cropped once their window is full")
    run.cache.crop(-30)
    run.cache.batch_select_indices(torch.tensor([0, 0, 1]))
    run.decode(torch.arange(5, 8).view(3, 1) + token[:1] * 0, 40)


def batch_size(run):
    run.call(prompt(5))
    if hasattr(run.cache.layers[0], "batch_size"):  # growing layers of transformers do not say
        assert run.cache.batch_size == 2
    run.said.append(len(run.cache))


def padded(run):
    ids, mask = prompt(40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :11] = 0
    token = run.call(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for at in range(20):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        position = mask.sum(-1, keepdim=True) - 1
        token = run.call(token, attention_mask=mask, position_ids=position)
        run.said.append(at)


SCENARIOS = [
    update, in_chunks, get_seq_length, get_query_offset, reset, reorder_cache, batch_repeat_interleave,
    batch_select_indices, crop, activate_past_recording, deepcopy, fork_of_a_fork, crop_of_rows_that_share_pages,
    rows_chosen_after_a_crop,
    batch_size, padded,
]  # fmt: skip


CASES = [
    pytest.param(mode, kind, marks=pytest.mark.slow if mode == "compiled" and kind != "full" else ())
    for mode in ("eager", "growing", "compiled")
    for kind in FAMILIES
]


@pytest.mark.parametrize(("mode", "kind"), CASES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_method(scenario, mode, kind):
    family = FAMILIES[kind]
    cache = spherical(family, None if mode == "growing" else CAPACITY)
    got = Run(cache, compiled(family) if mode == "compiled" else model(family).forward, family)
    expected = Run(dense(family), model(family).forward, family)
    scenario(got)
    scenario(expected)
    assert_same(got, expected)


@pytest.mark.parametrize("kind", ["full", "hybrid"])
def test_a_compiled_model_may_read_the_prompt(kind):
    family = FAMILIES[kind]
    config = model(family).config
    cache = spherical(family)
    cache.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.float32, "cpu")
    got, expected = Run(cache, compiled(family), family), Run(dense(family), model(family).forward, family)
    log.WARNED.clear()
    for run in (got, expected):
        run.decode(run.call(prompt(40), step=run.step), 20)
    assert_same(got, expected)
    assert not log.WARNED  # a prompt longer than a sliding window is read without the cache, as it should be


def test_what_is_asked_of_layers_says_so():
    cache = spherical()
    layer = cache.layers[0]
    assert layer.keys is None and layer.values is None
    assert (layer.get_max_length(), layer.get_max_cache_shape(), layer.get_seq_length()) == (CAPACITY, CAPACITY, 0)
    assert spherical(capacity=None).layers[0].get_max_length() == -1
    assert layer.get_mask_sizes(5) == (5, 0)
    run = Run(cache, model().forward)
    run.call(prompt(9))
    assert layer.get_mask_sizes(1) == (10, 0)
    assert cache.is_croppable and not any(cache.is_sliding) and not cache.is_compileable
    assert cache.is_initialized and repr(layer) == "SphericalLayer"


def test_keys_and_values_are_copies():
    cache, like = spherical(), dense()
    for c in (cache, like):
        Run(c, model().forward).call(prompt(60))
    for ours, theirs in zip(cache.layers, like.layers):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
        ours.keys.zero_()
        assert float(ours.keys.abs().max()) > 0
        with pytest.raises(AttributeError, match="update"):
            ours.keys = theirs.keys


@pytest.mark.parametrize("method", ["offload", "prefetch"])
def test_what_is_refused(method):
    with pytest.raises(NotImplementedError, match="stays on its device"):
        getattr(spherical().layers[0], method)()
