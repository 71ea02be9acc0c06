"""What is told to TORCH_LOGS, TORCH_TRACE and as warnings."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sphkv_compile
from sphkv_compile.runtime.log import WARNED, warn_once
from sphkv_compile.testing.gpt_fast import SliceCopy
from sphkv_compile.testing.tiny import tiny_gpt_fast

OPTIONS = {"bits": 16, "window": 8, "span": 16, "page": 16, "inductor": False}

STEP = f"""
import torch, sphkv_compile
from sphkv_compile.testing.gpt_fast import SliceCopy

def two(model, x):
    y = x.unsqueeze(0)
    return model(x, 0) + torch.nn.functional.scaled_dot_product_attention(y, y, y)

with torch.no_grad():
    torch.compile(two, backend=sphkv_compile.backend, options={OPTIONS})(SliceCopy(), torch.randn(1, 4, 64))
"""
"""One attention that is matched, and one that is not, in a process of its own: torch reads its settings at import."""


def told(**settings: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")} | settings
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, env=env, check=True)
    return done.stdout + done.stderr


def test_torch_logs_show_each_verdict():
    text = told(TORCH_LOGS="sphkv_compile")
    assert re.search(r"sdpa \(.*gpt_fast\.py:\d+\): slice_copy\n", text)
    assert re.search(r"sdpa_1 \([^)]*\): dense: K and V do not come from a cache", text)
    assert len(re.findall("slice_copy", text)) == 1 and "placeholder" not in text and "before:" not in text


def test_torch_logs_at_debug_and_the_trace_show_the_graphs(tmp_path):
    text = told(TORCH_LOGS="+sphkv_compile", TORCH_TRACE=str(tmp_path))
    assert "): slice_copy\n" in text
    before, after = text.split("before:\n")[1].split("after:\n")
    assert "sphkv.attend" not in before and "sphkv.attend" in after

    found = artifacts(tmp_path)
    assert set(found) == {"sphkv_verdicts", "sphkv_graphs"}
    rows = json.loads(found["sphkv_verdicts"])
    assert [row["node"] for row in rows] == ["sdpa", "sdpa_1"] and "gpt_fast.py:" in rows[0]["source"]
    assert rows[0]["idiom"] == "slice_copy" and "refusal" not in rows[0]
    assert rows[1]["refusal"] == "no_cache_write" and rows[1]["detail"] and "idiom" not in rows[1]
    before, after = found["sphkv_graphs"].split("after:\n")
    assert "sphkv.attend" not in before and "sphkv.attend" in after


def artifacts(folder: Path) -> dict[str, str]:
    """Ours in a trace: a line of JSON each, and its text behind it, indented by a tab."""
    found, name = {}, ""
    for line in next(folder.glob("*.log")).read_text().splitlines():
        if line.startswith("\t"):
            found[name] = found.get(name, "") + line[1:] + "\n"
        elif "{" in line:
            name = json.loads(line[line.index("{") :]).get("artifact", {}).get("name", "")
    return {name: text for name, text in found.items() if name.startswith("sphkv")}


def test_a_warning_is_given_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for key in ("a", "a", "b"):
            warn_once(key, f"this is {key}")
    assert [str(w.message) for w in said] == ["sphkv: this is a", "sphkv: this is b"]
    assert {"a", "b"} <= WARNED


@pytest.mark.parametrize("apart", [False, True], ids=["one graph", "a graph a layer"])
@torch.no_grad()
def test_many_layers_are_warned_of_once(apart):
    """Bug: once for each graph, which is once for each layer where a model breaks between layers."""
    model = tiny_gpt_fast(layers=8)
    model.setup_caches(1, 32)
    for layer in model.layers:
        kv = layer.attention.kv_cache
        kv.k_cache, kv.v_cache = torch.zeros(2, *kv.k_cache.shape).unbind()
        if apart:
            layer.forward = torch.compile(layer.forward, backend=sphkv_compile.backend, options=OPTIONS)
    step = model if apart else torch.compile(model, backend=sphkv_compile.backend, options=OPTIONS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for at in range(3):
            step(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([at]))
    ours = [str(w.message) for w in said if "sphkv" in str(w.message)]
    assert len(ours) == 1 and re.search(r"attention at .*gpt_fast\.py:\d+ shares its memory", ours[0])
    assert "give K and V storage of their own" in ours[0]


@torch.no_grad()
def test_strict_refuses_shared_storage():
    """Bug: strict=True let it run dense."""
    model = SliceCopy()
    model.k_cache, model.v_cache = torch.zeros(2, *model.k_cache.shape).unbind()
    step = torch.compile(model, backend=sphkv_compile.backend, options={**OPTIONS, "strict": True})
    with pytest.raises(sphkv_compile.SiteRefused, match=r"gpt_fast\.py:\d+ shares its memory"):
        step(torch.randn(1, 4, 64), 0)
