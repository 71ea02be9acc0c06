"""Who is warned that codes are slower than dense, and who is not."""

import dataclasses
import re
import warnings

import pytest
import torch

import sphkv_compile
from sphkv_compile.lowering import compat
from sphkv_compile.runtime import breakeven
from sphkv_compile.runtime.breakeven import LENGTHS, break_even, warn_where_slower
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry
from sphkv_compile.testing.gpt_fast import SliceCopy
from sphkv_compile.testing.tiny import tiny_gpt_fast

CPU = torch.device("cpu")
LAYOUT = Layout.of(CacheSpec(bits=4), "half", 64)
SHAPE = Geometry(1, 2, 1000, 64, 64, torch.float32, torch.float32, False, 2)


@pytest.fixture(autouse=True)
def _forgotten():
    breakeven._predicted.cache_clear()
    yield
    breakeven._predicted.cache_clear()


@pytest.fixture
def predict(monkeypatch):
    """Says what is predicted, and counts how often it was asked."""
    asked = []

    def use(even):
        monkeypatch.setattr(breakeven, "break_even", lambda *args: asked.append(args) or even)
        return asked

    return use


def said(call, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args)
    return [str(w.message) for w in caught if "sphkv" in str(w.message)]


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [((-1, -9, -9), 512), ((3, -1, -9), 512 + 1536 * 3 // 4), ((4, 2, -2), 2048 + 6144 // 2), ((1, 2, 3), None)],
)
def test_the_lines_cross_between_two_lengths(gaps, expected, monkeypatch):
    timed = dict(zip(LENGTHS, gaps))
    monkeypatch.setattr(breakeven, "_time_attention", lambda _, g, *rest: (5.0 + timed[g.capacity], 5.0))
    assert break_even(LAYOUT, SHAPE, CPU) == expected


def test_it_is_measured_here():
    assert (even := break_even(LAYOUT, SHAPE, CPU)) is None or LENGTHS[0] <= even <= LENGTHS[-1]


def test_a_short_cache_is_warned_of_with_figures(predict):
    predict(1734)
    (text,) = said(warn_where_slower, [(LAYOUT, SHAPE)] * 3, CPU)
    assert "this cache holds 1,000 tokens" in text and "(K4V4, half RoPE 64)" in text
    assert "faster than dense on cpu from 1,734 cached tokens on; make the cache longer" in text
    assert said(warn_where_slower, [(LAYOUT, SHAPE)], CPU) == []  # once a process
    other = dataclasses.replace(LAYOUT, sink=8)
    assert len(said(warn_where_slower, [(other, SHAPE)], CPU)) == 1  # and configuration


def test_a_device_on_which_it_never_pays(predict):
    predict(None)
    (text,) = said(warn_where_slower, [(LAYOUT, SHAPE._replace(batch=4, capacity=1 << 17))], CPU)
    assert "holds 4 rows of 131,072 tokens" in text and "on cpu at no length up to 8,192 tokens;" in text


@pytest.mark.parametrize(
    ("even", "shape"),
    [
        (1500, SHAPE),  # or may: predictions vary
        (1501, SHAPE._replace(batch=2)),  # two rows
        (LENGTHS[0], SHAPE._replace(capacity=100)),  # nothing shorter is tried
    ],
)
def test_nothing_is_said_where_it_pays(even, shape, predict):
    predict(even)
    assert said(warn_where_slower, [(LAYOUT, shape)], CPU) == []


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (LAYOUT, SHAPE._replace(capacity=0)),
        (LAYOUT, SHAPE._replace(rolling=True)),
        (dataclasses.replace(LAYOUT, kept=True), SHAPE),
        (dataclasses.replace(LAYOUT, packing="tiles"), SHAPE),
    ],
    ids=["grows", "rolls", "drops", "a GPU's kernels"],
)
def test_nothing_is_said_or_timed_where_it_is_not_known(layout, shape, predict):
    asked = predict(None)
    assert said(warn_where_slower, [(layout, shape)], CPU) == [] and not asked


def test_the_longest_cache_counts(predict):
    predict(1500)
    sites = [(LAYOUT, SHAPE._replace(capacity=n)) for n in (512, 4096)]
    assert said(warn_where_slower, sites, CPU) == []


@torch.no_grad()
def test_a_model_of_many_layers_is_warned_of_once(predict, monkeypatch):
    """Bug: timed inside the compiler, under AOTAutograd's Python dispatcher: each call takes longer there, and ours and
    dense attention by other factors."""
    dispatched = lambda *_: torch._C._dispatch_tls_is_dispatch_key_included("PythonDispatcher")  # noqa: E731
    found_slow, asked = [], predict(4000)
    right = breakeven._predicted
    monkeypatch.setattr(breakeven, "_predicted", lambda *args: found_slow.append(dispatched()) or right(*args))
    monkeypatch.setattr(compat, "compile_fx_inner", lambda gm, inputs, **_: compat.interpret(gm, inputs))
    model = tiny_gpt_fast(layers=6)
    model.setup_caches(1, 64)
    step = torch.compile(model, backend=sphkv_compile.backend)
    found = said(lambda: [step(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([at])) for at in range(3)])
    assert len(found) == len(asked) == 1 and set(found_slow) == {False}
    assert re.search("holds 64 tokens.*K4V4.* from 4,000 cached tokens", found[0])


@torch.no_grad()
def test_debugging_node_by_node_is_not_about_speed(predict):
    asked = predict(None)
    step = torch.compile(SliceCopy(), backend=sphkv_compile.backend, options={"inductor": False})
    assert said(step, torch.randn(1, 4, 64), 0) == [] and not asked
