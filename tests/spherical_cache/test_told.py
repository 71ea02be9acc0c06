"""What a compiled model says of a cache that is stored otherwise than its options ask for."""

import warnings

import pytest
import torch
from caches import SPEC, Run, filled, model, prompt, spherical

import sphkv_compile
from sphkv_compile.runtime import log

BESIDE = [
    ({"bits": 4}, {"bits": 4}, None),
    ({"bits": 4}, {"bits": "K4V4", **SPEC}, None),
    ({"bits": 4}, {}, None),
    ({"bits": 4}, {"bits": 8}, "bits=8 "),
    ({"bits": 4}, {"bits": 8, "window": 16, "seed": 0}, "bits=8, window=16 "),
    ({"bits": 4}, {"budget": 0.25}, "budget=0.25 "),
    ({"budget": "18B/token"}, {"budget": "18B/token"}, None),
    ({"budget": "18B/token"}, {"budget": "18B/token", "tiers": "K4V4"}, "tiers='K4V4' "),
    ({"budget": "18B/token"}, {"bits": 4}, "bits=4 "),
    ({"budget": 0.9}, {"budget": 0.9}, None),
]


@pytest.mark.parametrize(("own", "options", "match"), BESIDE, ids=str)
def test_options_that_a_cache_overrules_are_named(own, options, match):
    step = torch.compile(model().forward, backend=sphkv_compile.backend, options={"inductor": False, **options})
    run = filled(40, **own)
    log.WARNED.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.call(torch.full((2, 1), 7), step=step)
    told = [str(w.message) for w in told if "sphkv: " in str(w.message)]
    assert len(told) == (match is not None)
    assert match is None or told[0].startswith(f"sphkv: {match}of the compiler's options: this cache says itself")


@pytest.mark.parametrize("chunks", [(9, 1, 24), (60, 1)], ids=str)
def test_a_prompt_that_fills_a_sliding_window_is_no_cause(chunks):
    step = torch.compile(model("gemma3").forward, backend=sphkv_compile.backend, options={"inductor": False, "seed": 1})
    run = Run(spherical("gemma3", seed=1), step, "gemma3")
    log.WARNED.clear()
    for count in chunks:
        run.call(prompt(count), step=step)
    assert "spherical cache stays dense" not in log.WARNED
