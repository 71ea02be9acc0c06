"""A saved cache goes on as if nothing had happened; any other file is refused, and nothing is half-done."""

import copy
import json
import os
import pickle
import stat

import pytest
import torch
from caches import CAPACITY, Run, compiled, model, prompt, spherical
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.cache_utils import LinearAttentionLayer

from sphkv_compile import SphericalCache, report
from sphkv_compile.integrations import saved
from sphkv_compile.testing.tiny import WINDOW, tiny

SPECS = {
    "16 bits": {"bits": 16}, "4 bits": {"bits": 4}, "K8V2": {"bits": (8, 2)},
    "budget": {"budget": 0.5, "plan_every": 16}, "tight": {"budget": "18B/token", "plan_every": 16},
}  # fmt: skip
STEPS = {"eager": lambda f: model(f).forward, "compiled": compiled}


def read(path, family="llama"):
    return SphericalCache.load(path, model(family).config)


BOTH = [
    pytest.param(name, mode, marks=pytest.mark.slow if mode == "compiled" and name in ("K8V2", "budget") else ())
    for name in SPECS
    for mode in STEPS
]


@pytest.mark.parametrize(("name", "mode"), BOTH)
def test_it_goes_on_bit_for_bit(name, mode, tmp_path):
    run = Run(spherical(**SPECS[name]), STEPS[mode]("llama"))
    run.call(prompt(40))
    for at in range(27):
        run.call(torch.full((2, 1), 7 + at))
    run.cache.save(tmp_path / "cache")
    other = Run(read(tmp_path / "cache"), run.step)
    assert report(other.cache).encoded_tokens == report(run.cache).encoded_tokens
    for r in (run, other):
        r.logits = []
        for at in range(50):
            r.call(torch.full((2, 1), 9 + at))
    assert all(torch.equal(a, b) for a, b in zip(run.logits, other.logits))
    if name == "tight":
        assert report(other.cache).dropped_tokens > 0


@pytest.mark.parametrize("mode", [*STEPS, "growing"])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_sliding_windows_too(family, mode, tmp_path):
    step = STEPS["eager" if mode == "growing" else mode](family)
    run = Run(spherical(family, None if mode == "growing" else CAPACITY, bits=4), step, family)
    run.decode(run.call(prompt(40)), 10)
    run.cache.save(tmp_path / "cache")
    other = Run(read(tmp_path / "cache", family), step, family)
    for r in (run, other):
        r.logits = []
        for at in range(30):
            r.call(torch.full((2, 1), 9 + at))
    assert all(torch.equal(a, b) for a, b in zip(run.logits, other.logits))


def test_rows_that_share_pages(tmp_path):
    run = Run(spherical(bits=4), model().forward)
    run.call(prompt(60))
    run.cache.batch_repeat_interleave(3)
    run.cache.save(tmp_path / "cache")
    other = Run(read(tmp_path / "cache"), run.step)
    for r in (run, other):
        r.logits = []
        r.decode(torch.arange(5, 11).view(6, 1), 30)
    assert report(other.cache).page_bytes == report(run.cache).page_bytes
    assert all(torch.equal(a, b) for a, b in zip(run.logits, other.logits))


@pytest.fixture
def file(tmp_path):
    run = Run(spherical(bits=4), model().forward)
    run.call(prompt(60))
    run.cache.save(tmp_path / "cache")
    return tmp_path / "cache"


def rewritten(file, change, sign=True):
    """The same file after ``change(tensors, head, meta)``, with a digest that is right, as an attacker's would be."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as f:
        meta = dict(f.metadata())
    head = json.loads(meta["cache"])
    change(tensors, head, meta)
    meta["cache"] = json.dumps(head)
    if sign:
        meta["digest"] = saved._digest(tensors)
    save_file(tensors, file, metadata=meta)
    return file


def put(name, index, value):
    def change(tensors, head, meta):
        tensors[name][index] = value

    return change


def fact(layer, path, value):
    def change(tensors, head, meta):
        where = head["layers"][layer]
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value

    return change


def drop(name):
    return lambda tensors, head, meta: tensors.pop(name)


FORGED = {
    "page number": (put("0.table", (0, 0, 0), 1 << 20), "table"),
    "page taken away": (put("0.table", (0, 0, 0), -1), "table"),
    "length": (put("0.rows", (0, 1), 1 << 30), "rows"),
    "spans": (put("1.rows", (0, 2), 7), "rows"),
    "tier": (put("1.tiers", (0, 0, 0), 9), "tiers"),
    "position": (put("0.positions", (0, 0, 0, 0), 1 << 20), "positions"),
    "capacity": (fact(0, ("geometry", "capacity"), 1 << 38), "expected"),
    "negative size": (fact(0, ("geometry", "heads"), -4), "geometry"),
    "dtype": (fact(0, ("geometry", "k_dtype"), "object"), "object"),
    "layout": (fact(0, ("layout",), "axis_cosine K4V4 sink=4 window=8 span=16 page=0 seed=0 rope=none:0"), "layout"),
    "no layout": (fact(0, ("layout",), "__import__('os')"), "expected a"),
    "codec": (
        fact(0, ("layout",), "axes K4V4 sink=4 window=8 span=16 page=8 seed=0 rope=none:0"),
        "stored as|unknown|expected",
    ),
    "tensor is missing": (drop("1.pages0"), "expected"),
    "another model": (lambda t, head, m: head["layers"].append(head["layers"][0]), "3 layers"),
    "option": (lambda t, head, m: head["spec"].update(bits=5), "nearest is 4"),
    "unknown option": (lambda t, head, m: head["spec"].update(exec=1), "exec"),
    "version": (lambda t, head, m: m.update(version="7"), "version 7, expected 2"),
    "the version before, which said nothing of the model": (
        lambda t, h, m: m.update(version="1"),
        "version 1, expected 2",
    ),
    "no model": (lambda t, head, m: head.pop("model"), "damaged"),
    "format": (lambda t, head, m: m.update(format="other"), "format 'other'"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_refused(name, file):
    change, match = FORGED[name]
    with pytest.raises(ValueError, match=match):
        read(rewritten(file, change))


@pytest.mark.parametrize("at", [0, 3, 40, 400, -400, -1])
def test_a_damaged_file_is_refused(at, file):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(ValueError, match="cache"):
        read(file)


@pytest.mark.parametrize("size", [0, 7, 300, 20_000])
def test_a_cut_file_is_refused(size, file):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged"):
        read(file)


def test_a_pickle_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    (tmp_path / "cache").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "cache")
    torch.save(torch.ones(3), tmp_path / "cache")
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "cache")


OTHERS = {
    "model_type": (lambda: tiny("qwen2").config, "model_type 'llama', expected 'qwen2'"),
    "layers": (lambda: tiny(layers=3).config, "num_hidden_layers 2, expected 3"),
    "kv heads": (lambda: tiny(kv_heads=4).config, "num_key_value_heads 2, expected 4"),
    "head_dim": (lambda: tiny(head_dim=32).config, "head_dim 16, expected 32"),
    "query heads": (lambda: tiny(heads=8).config, "num_attention_heads 4, expected 8"),
    "hidden size": (lambda: tiny(hidden_size=96).config, "hidden_size 64, expected 96"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_named(name, file):
    make, match = OTHERS[name]
    with pytest.raises(ValueError, match=match):
        SphericalCache.load(file, make())


@pytest.mark.parametrize("window", [16, 32])
def test_the_window_tells_a_model_too(window, tmp_path):
    run = Run(spherical("mistral"), model("mistral").forward, "mistral")
    run.call(prompt(9))
    run.cache.save(tmp_path / "cache")
    config = copy.deepcopy(model("mistral").config)
    config.sliding_window = window
    if window == WINDOW:
        assert SphericalCache.load(tmp_path / "cache", config).get_seq_length() == 9
    else:
        with pytest.raises(ValueError, match="sliding_window 16, expected 32"):
            SphericalCache.load(tmp_path / "cache", config)


def test_layers_of_another_kind_are_named(tmp_path):
    run = Run(spherical("gemma3"), model("gemma3").forward, "gemma3")
    run.call(prompt(9))
    run.cache.save(tmp_path / "cache")
    config = copy.deepcopy(model("gemma3").config)
    config.layer_types = config.layer_types[::-1]
    with pytest.raises(ValueError, match="layers"):
        SphericalCache.load(tmp_path / "cache", config)


def test_the_model_will_do_for_its_config(file):
    assert SphericalCache.load(file, model()).get_seq_length() == 60
    for wrong in (None, "llama", 7):
        with pytest.raises(TypeError, match=f"{type(wrong).__name__} .*model.config"):
            SphericalCache.load(file, wrong)


@pytest.mark.parametrize("device", ["cud", 1.5, *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_named(device, file):
    with pytest.raises(ValueError, match=f"device={device!r}: expected one that torch has here"):
        SphericalCache.load(file, model(), device)


@pytest.mark.parametrize("content", [b"not a cache\n", b"", b"{}" * 50])
def test_any_other_file_is_called_no_cache(content, tmp_path):
    (tmp_path / "cache").write_bytes(content)
    with pytest.raises(ValueError, match="is no file of a saved cache"):
        read(tmp_path / "cache")


def test_a_file_of_weights_is_told_apart(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "cache", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="format 'pt', expected 'sphkv-cache'"):
        read(tmp_path / "cache")


def test_where_no_file_can_be_written(file):
    cache = read(file)
    missing = file.parent / "nowhere" / "cache"
    with pytest.raises(FileNotFoundError, match=rf"^{missing} is in no folder; expected"):
        cache.save(missing)
    with pytest.raises(IsADirectoryError, match=rf"^{file.parent} is a folder; expected"):
        cache.save(file.parent)
    assert list(file.parent.iterdir()) == [file]


def test_a_file_is_as_readable_as_any_other(file):
    other = file.with_name("other")
    before = os.umask(0o027)
    try:
        read(file).save(other)
    finally:
        os.umask(before)
    assert stat.S_IMODE(other.stat().st_mode) == 0o640


def test_what_stood_there_stays_when_writing_fails(file, monkeypatch):
    before = file.read_bytes()
    run = Run(spherical(), model().forward)
    run.call(prompt(9))
    for fault in (OSError("disk full"), SafetensorError("disk full")):
        monkeypatch.setattr(saved, "save_file", lambda *args, fault=fault, **kwargs: (_ for _ in ()).throw(fault))
        with pytest.raises(OSError, match=f"^{file} was not written; expected .*disk full"):
            run.cache.save(file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_what_cannot_be_saved_says_so(tmp_path):
    with pytest.raises(ValueError, match="no token"):
        spherical().save(tmp_path / "cache")
    run = Run(spherical(), model().forward)
    run.call(prompt(9))
    run.cache.layers.append(LinearAttentionLayer())
    with pytest.raises(ValueError, match=r"LinearAttentionLayer: .*expected attention only"):
        run.cache.save(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no saved cache"):
        read(tmp_path / "cache")
