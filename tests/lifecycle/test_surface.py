"""What generate() asks of a cache, while it is held as 4-bit codes.

The reference is exact: a dense cache that holds what the codes decode to, put through the same operation and read by
the eager model. So a code made anew from its decoded value shows, as does a row, a span or a scale left behind.
"""

import copy

import pytest
import torch
from runs import Log, assert_same, content, owners, prompt
from transformers.cache_utils import StaticLayer

from sphkv_compile import report
from sphkv_compile.runtime.guarded import HEIRS
from sphkv_compile.testing.tiny import tiny

SINK, WINDOW, SPAN = 4, 8, 16


@pytest.fixture(params=["static", "dynamic"])
def m(request, compiled):
    return compiled("llama", request.param, bits=4)


def generated(m, count=50, batch=2):
    cache, log = m.cache(), Log()
    return cache, log.decode(m.step, cache, log.call(m.eager, cache, prompt(20, batch=batch)), count)


def rows_in_another_order(cache, token):
    cache.reorder_cache(torch.tensor([1, 0]))
    return token[[1, 0]]


def one_row_twice(cache, token):
    cache.reorder_cache(torch.tensor([1, 1]))
    return token[[1, 1]]


def each_row_twice(cache, token):
    cache.batch_repeat_interleave(2)
    return token.repeat_interleave(2, 0)


def one_row_alone(cache, token):
    cache.batch_select_indices(torch.tensor([1]))
    return token[[1]]


def rows_that_a_mask_selects(cache, token):
    chosen = torch.tensor([False, True])
    cache.batch_select_indices(chosen)
    return token[chosen]


def a_few_tokens_less(cache, token):
    cache.crop(-3)
    return token


def tokens_less_to_within_a_span(cache, token):
    cache.crop(-37)
    return token


def begun_anew(cache, token):
    cache.reset()
    return prompt(1, 4)


def nothing(cache, token):
    return token


OPERATIONS = [
    rows_in_another_order,
    one_row_twice,
    each_row_twice,
    one_row_alone,
    rows_that_a_mask_selects,
    a_few_tokens_less,
    tokens_less_to_within_a_span,
    begun_anew,
    nothing,
]


def needs_crop():
    if not hasattr(StaticLayer, "crop"):
        pytest.skip("this transformers' static layers have no crop, and no assisted decoding")


CHOOSE_ROWS = OPERATIONS[:5]
OF_GROWING_CACHES = OPERATIONS[2:5]
"""transformers' static layers do not have them."""


def skip_what_is_not_there(kind, operation):
    if kind == "static" and operation.__name__.startswith(("a_few_tokens", "tokens_less")):
        needs_crop()
    if kind == "static" and operation in OF_GROWING_CACHES:
        pytest.skip("transformers' static layers refuse it without us")
    if kind == "dynamic" and operation is begun_anew:
        pytest.skip("an empty DynamicCache has no tensors for a graph to match: tests/lifecycle/test_door1.py")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_r1_a_step_after_an_operation_is_the_dense_one(m, operation):
    """On the cache, and on a deepcopy of it. Both sides are one step in float32 from the same content."""
    skip_what_is_not_there(m.kind, operation)
    cache, token = generated(m)
    dense, twin = copy.deepcopy(cache), copy.deepcopy(cache)
    expected = Log()
    expected.call(m.eager, dense, operation(dense, token))
    for one in (cache, twin):
        got = Log()
        got.call(m.step, one, operation(one, token))
        assert_same(got, expected)
        assert report(one).matched == 2


@pytest.mark.parametrize(
    "operation",
    CHOOSE_ROWS[:2] + [pytest.param(f, marks=pytest.mark.slow) for f in CHOOSE_ROWS[2:]],
    ids=lambda f: f.__name__,
)
def test_r1_rows_move_as_codes(m, operation):
    """Four times in turn, as a beam search does at every step: what is coded decodes to the same, bit for bit.

    Bug: the rows that eager code chose are encoded anew, from decoded values, so that each beam step adds noise; or
    are one page in two rows, of which one is cropped and written to.
    """
    skip_what_is_not_there(m.kind, operation)
    cache, token = generated(m)
    before, coded, rows = content(cache), SINK + 3 * SPAN, torch.arange(2)
    for _ in range(1 if operation in OF_GROWING_CACHES else 4):
        rows = operation(FakeRows(rows), rows.view(-1, 1)).flatten()
        token = Log().call(m.step, cache, operation(cache, token))
    for (k, v), (was_k, was_v) in zip(content(cache), before):
        assert torch.equal(k[:, :, :coded], was_k[rows, :, :coded])
        assert torch.equal(v[:, :, :coded], was_v[rows, :, :coded])
    assert all(o.recoded_tokens == 0 for o in owners(cache))
    assert all(layer.keys not in HEIRS for layer in cache.layers), "the old codes are kept beside the new ones"
    pools = {id(o.pool): o.pool for o in owners(cache)}
    assert len(pools) == 1
    (pool,) = pools.values()
    used = [o.state.table[o.state.table >= 0] for o in owners(cache)]
    assert torch.cat(used).unique().numel() == sum(t.numel() for t in used), "two rows share a page"
    # and one of them may be cropped and go on without the other
    if len(rows) > 1 and hasattr(cache.layers[0], "crop"):
        cache.crop(-30)
        log = Log()
        log.decode(m.step, cache, token, 20)
        assert all(torch.equal(k[0, :, :20], b[rows[0], :, :20]) for (k, _), (b, _) in zip(content(cache), before))
    assert pool.arena.used <= pool.arena.nbytes


class FakeRows:
    """Stands for a cache where only the tokens that an operation returns are asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.parametrize(
    ("prefill", "chunks"),
    [("eager", (60, 1))] + [pytest.param("compiled", c, marks=pytest.mark.slow) for c in ((20, 40, 1), (3, 58))],
    ids=str,
)
def test_r10_sinks_and_window_are_exact_after_prefill(compiled, chunks, prefill):
    """What lies between is coded, and the span is that of the whole prompt, however it came.

    Bug: the whole prompt is coded at once, whatever the window; or none of it is.
    """
    m = compiled("llama", "static", bits=4)
    cache, dense, at = m.cache(), m.cache(), 0
    ids = prompt(61)
    for i, count in enumerate(chunks):
        part = ids[:, at : at + count]
        Log().call(m.eager, dense, part)
        Log().call(m.step if i + 1 == len(chunks) or (i and prefill == "compiled") else m.eager, cache, part)
        at += count
    coded = slice(SINK, SINK + (61 - SINK - WINDOW) // SPAN * SPAN)
    exact = [slice(0, SINK), slice(coded.stop, 61)]
    assert exact[1].stop - exact[1].start >= WINDOW and report(cache).encoded_tokens == 2 * 2 * 48
    pairs = zip(content(cache)[:1], content(dense)[:1])  # of the first layer, whose inputs are the same
    for (k, v), (dense_k, dense_v) in pairs:
        for part in exact:  # to the rounding of products of other sizes, where chunks are compiled
            torch.testing.assert_close(k[:, :, part], dense_k[:, :, part], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(v[:, :, part], dense_v[:, :, part], rtol=1e-5, atol=1e-5)
        for x, y in ((k, dense_k), (v, dense_v)):
            gap = (x - y)[:, :, coded].norm(dim=-1) / y[:, :, coded].norm(dim=-1)
            assert float(gap.min()) > 1e-3, "a token that should be coded is exact"


@pytest.mark.parametrize(
    ("kind", "how", "layers"),
    [("static", "lookup", 1)]
    + [pytest.param(kind, "assistant", 2, marks=pytest.mark.slow) for kind in ("static", "dynamic")],
)
def test_r14_assisted_generation_is_greedy(compiled, kind, how, layers):
    """The model that verifies is compiled, its cache is codes, and what was rejected is cropped from it."""
    if kind == "static":
        needs_crop()
    m = compiled("llama", kind, layers)
    ids = prompt(20, batch=1)
    call = dict(do_sample=False, max_new_tokens=40, attention_mask=torch.ones_like(ids), disable_compile=True)
    greedy = m.model.generate(ids, **call)
    helper = dict(prompt_lookup_num_tokens=3) if how == "lookup" else dict(assistant_model=tiny("llama", layers=1))
    cache, crops = m.cache(), []
    crop = cache.crop
    cache.crop = lambda n: (crops.append(n), crop(n))
    m.model.forward = m.step
    try:
        got = m.model.generate(ids, past_key_values=cache, **helper, **call)
    finally:
        del m.model.forward
    assert torch.equal(got, greedy)
    assert min(crops) < 0, "nothing was ever rejected"
    seen = report(cache)
    assert seen.matched == layers and seen.encoded_tokens > 0


def test_r14_a_window_may_be_cropped_until_it_fills(compiled):
    """A window that can fill has lost by then what a crop would need, and generate() is told so: codes change nothing
    in that. As long as it has not filled, a crop gives the dense result, in the exact window and in the codes."""
    needs_crop()
    m = compiled("gemma3", "static", window=4, span=4, page=4, sink=2)
    caches, logs = (m.cache(), m.cache()), (Log(), Log())
    for step, cache, log in zip((m.eager, m.step), caches, logs):
        token = log.decode(step, cache, log.call(m.eager, cache, prompt(5)), 6)
        for back in (2, 6):
            cache.crop(-back)
            token = log.decode(step, cache, token, back)
        log.decode(step, cache, token, 8)
        assert not cache.is_croppable and m.cache(16).is_croppable
    assert_same(logs[1], logs[0])
    assert all(site.encoded_tokens > 0 for site in report(caches[1]).sites)
