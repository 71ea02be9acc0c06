"""What a user does wrong with a cache that is born as codes is named, with what was expected, and changes nothing."""

import copy
import io
import pickle

import pytest
import torch
from caches import CAPACITY, Run, assert_same, dense, filled, model, prompt, spherical
from transformers import DynamicCache, StaticCache, T5Config

import sphkv_compile
from sphkv_compile import SphericalCache, adopt
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.tiny import tiny


def test_too_many_tokens_change_nothing():
    runs = [filled(100), Run(dense(), model().forward)]
    runs[1].call(prompt(100))
    with pytest.raises(IndexError, match=f"max_cache_len={CAPACITY}.*129 or more"):
        runs[0].call(prompt(29))
    for run in runs:
        run.decode(torch.full((2, 1), 7), 28)
    assert_same(*runs)


def test_other_rows_are_refused_with_both_shapes():
    run = filled()
    with pytest.raises(ValueError, match=r"3, 2, 1, 16.*2 rows, 2 kv heads"):
        run.call(torch.full((3, 1), 7))


def test_no_gradient_is_lost_silently():
    with torch.enable_grad(), pytest.raises(RuntimeError, match="autograd is on"):
        model()(prompt(4), use_cache=True, **{cache_keyword(model()): spherical()})


def offloaded(cache):
    cache.offloading = True  # transformers' own way makes a CUDA stream
    return cache


def of_dtype(config, dtype):
    config = copy.deepcopy(config)
    config.dtype = dtype
    return config


MISTAKES = {
    "unknown field": (lambda c: SphericalCache(c, bit=4), TypeError, "bits"),
    "width": (lambda c: SphericalCache(c, bits=5), ValueError, "nearest is 4"),
    "budget that grows": (lambda c: SphericalCache(c, budget="1MiB"), ValueError, "max_cache_len"),
    "encoder-decoder": (lambda c: SphericalCache(T5Config()), ValueError, "encoder-decoder"),
    "budget without a config": (
        lambda c: adopt(StaticCache(c, max_cache_len=8), budget=0.5),
        ValueError,
        "model.config",
    ),
    "budget that grows, adopted": (
        lambda c: adopt(DynamicCache(config=c), c, budget=0.5),
        ValueError,
        "StaticCache to adopt",
    ),
    "no config": (lambda c: SphericalCache(None), TypeError, "NoneType .*model.config"),
    "a path": (lambda c: SphericalCache("model"), TypeError, "str .*model.config"),
    "nothing to adopt": (lambda c: adopt(None), TypeError, "NoneType is no cache"),
    "a number to adopt": (lambda c: adopt(42), TypeError, "int is no cache"),
    "adopted twice": (lambda c: adopt(adopt(DynamicCache(config=c))), ValueError, "holds codes already"),
    "adopted at birth": (lambda c: adopt(SphericalCache(c)), ValueError, "holds codes already"),
    "another model": (lambda c: adopt(DynamicCache(config=c), tiny(layers=3)), ValueError, "2 layers, the model 3"),
    "a class of its own": (
        lambda c: adopt(type("Mine", (DynamicCache,), {})(config=c)),
        ValueError,
        "Mine has methods of its own",
    ),
    "head_dim": (lambda c: SphericalCache(tiny(head_dim=100).config, bits=4), ValueError, "100.*nearest .* 96"),
    "head_dim, exact": (lambda c: SphericalCache(tiny(head_dim=100).config, bits=16), ValueError, "nearest are 96"),
    "dtype": (lambda c: SphericalCache(of_dtype(c, torch.float64)), ValueError, "float64.*nearest is torch.float32"),
    "no layers": (lambda c: adopt(DynamicCache()), ValueError, "no layers yet"),
    "offloaded": (lambda c: adopt(offloaded(StaticCache(c, max_cache_len=8))), ValueError, "offloaded"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_right_thing(name):
    make, error, match = MISTAKES[name]
    with pytest.raises(error, match=match):
        make(model().config)


@pytest.mark.parametrize(("length", "near"), [(1.5, 2), ("8192", 8192), (0, 1), (-1, 1), (True, 1), ("long", 1)])
def test_a_capacity_that_is_none_is_named(length, near):
    with pytest.raises(ValueError, match=f"max_cache_len={length!r}: expected .*nearest is {near}$"):
        SphericalCache(model().config, max_cache_len=length)


def test_an_adopted_cache_of_an_unknown_model_is_not_saved(tmp_path):
    run = Run(DynamicCache(config=model().config), model().forward)
    run.call(prompt(9))
    with pytest.raises(ValueError, match=r"expected adopt\(cache, model.config"):
        adopt(run.cache).save(tmp_path / "cache")


def test_a_lazy_cache_that_was_adopted_grows_no_dense_layers():
    run = Run(DynamicCache(), model().forward)
    run.call(prompt(9))
    adopt(run.cache)
    with pytest.raises(RuntimeError, match="3 layers or more with a cache of 2"):
        run.call(prompt(1), step=tiny(layers=3).forward)


def test_a_model_with_more_layers_than_the_cache_is_named():
    with pytest.raises(RuntimeError, match="3 layers or more with a cache of 2"):
        Run(spherical(), tiny(layers=3).forward).call(prompt(9), step=tiny(layers=3).forward)
    step = torch.compile(tiny(layers=3).forward, backend=sphkv_compile.backend)
    for run in (filled(9), Run(spherical(), step)):
        with pytest.raises(Exception, match="3 layers or more with a cache of 2"):
            run.call(prompt(1), step=step)


def test_a_model_with_fewer_layers_than_the_cache_is_named():
    run = Run(SphericalCache(tiny(layers=3).config), model().forward)
    run.call(prompt(9))
    with pytest.raises(ValueError, match="reached 2 of this cache's 3 layers, so its 9 tokens"):
        run.call(prompt(1))
    run.cache.reset()
    run.call(prompt(1), step=tiny(layers=3).forward)
    assert run.cache.get_seq_length() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keys_of_another_dtype_change_nothing(dtype):
    run, like = filled(), Run(dense(), model().forward)
    like.call(prompt(60))
    with pytest.raises(ValueError, match=f"of {dtype} on cpu .* a cache of .*torch.float32 on cpu; expected the same"):
        run.call(prompt(1), step=tiny(dtype=dtype).forward)
    with pytest.raises(ValueError, match=r"on meta .* on cpu; expected the same"):
        run.cache.update(*torch.empty(2, 2, 2, 1, 16, device="meta"), 0)
    for r in (run, like):
        r.decode(torch.full((2, 1), 7), 20)
    assert_same(run, like)


def test_a_dtype_that_no_code_is_made_of_is_refused_before_the_first_token():
    with pytest.raises(ValueError, match=r"float64; expected one of float32, float16, bfloat16; .*float32"):
        spherical().update(*torch.zeros(2, 2, 2, 1, 16, dtype=torch.float64), 0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_pickle_is_refused(family):
    run = Run(spherical(family), model(family).forward, family)
    run.call(prompt(9))
    for write in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cache.save\(path\)"):
            write(run.cache)
    assert copy.deepcopy(run.cache).get_seq_length() == 9


def test_adopt_changes_all_layers_or_none():
    cache = StaticCache(model().config, max_cache_len=CAPACITY)
    Run(cache, model().forward).call(prompt(20))
    before = list(cache.layers)
    with pytest.raises(ValueError, match="takes at least"):
        adopt(cache, model().config, budget=200, window=8, span=16, page=8)
    assert cache.layers == before
    Run(cache, model().forward).call(prompt(1))


def test_a_budget_that_is_too_small_says_the_least_one():
    with pytest.raises(ValueError, match="takes at least"):
        filled(4, budget=200)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_crop_is_asked_for_in_negative_numbers(family):
    run = Run(spherical(family), model(family).forward, family)
    run.call(prompt(60))
    wrong = {
        3: r"crop\(-3\) removes 3; to keep 3, as older transformers took it: crop\(-57\)",
        70: r"crop\(-70\) removes 70$",
        -100: r"crop of 100 tokens from a cache of 60; expected crop\(-60\) at most",
        "5": r"crop\('5'\): expected a whole number",
        -5.0: r"crop\(-5.0\): expected a whole number",
        None: r"crop\(None\): expected a whole number",
    }
    for number, match in [*wrong.items(), (True, r"crop\(True\): expected a whole number")]:
        with pytest.raises(ValueError, match=match):
            run.cache.crop(number)
        with pytest.raises(ValueError, match=match):
            run.cache.layers[-1].crop(number)
    assert [int(layer.get_seq_length()) for layer in run.cache.layers] == [60, 60]


def test_more_than_half_may_be_cropped():
    runs = [filled(), Run(dense(), model().forward)]
    runs[1].call(prompt(60))
    for run in runs:
        run.cache.crop(-45)
        run.decode(run.call(prompt(3, 1)), 20)
    assert_same(*runs)


def test_a_number_may_be_a_tensor():
    run = filled()
    run.cache.crop(torch.tensor(-3))  # as assisted decoding of older transformers counts
    assert run.cache.get_seq_length() == 57
