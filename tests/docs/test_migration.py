"""What the README tells users of other caches to type, typed: every attention is matched and holds codes."""

import re
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile import SphericalCache
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.lowering import compat
from sphkv_compile.runtime import log
from sphkv_compile.testing.tiny import tiny, tiny_gpt_fast

README = Path(__file__).parents[2] / "README.md"


def rows() -> list[tuple[str, str]]:
    """(who comes, what to type) of the table, and what is typed twice once; a cache that grows is another case."""
    table = README.read_text().split("<!-- migration -->\n")[1].split("<!-- /migration -->")[0]
    cells = [re.split(r" \| |^\| | \|$", line)[1:4] for line in table.splitlines()[2:] if line.startswith("|")]
    found = {(typed, "Dynamic" in name): (name, typed.strip("`")) for name, _, typed in cells}
    return list(found.values())


def on_any_device(**fields):
    """transformers compiles on a CPU only if asked to."""
    config = CompileConfig(**fields)
    config._compile_all_devices = True
    return config


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
@pytest.mark.parametrize(("name", "typed"), rows(), ids=[name for name, _ in rows()])
@torch.no_grad()
def test_it_runs_and_holds_codes(name, typed, monkeypatch):
    monkeypatch.setattr(compat, "compile_fx_inner", lambda gm, inputs, **_: compat.interpret(gm, inputs))
    fast, seen, ids = "gpt-fast" in name, [], torch.ones(1, 300, dtype=torch.int64)
    model = tiny_gpt_fast(layers=1) if fast else tiny("llama", layers=1, head_dim=64, dtype=torch.bfloat16)
    known = {"torch": torch, "model": model, "step": model, "ids": ids}
    known |= {"StaticCache": StaticCache, "CompileConfig": on_any_device, "SphericalCache": SphericalCache}
    with log.listening(seen.append):
        exec(typed.replace("cache=cache", f"{cache_keyword(model)}=cache") if not fast else typed, known)
    if "SphericalCache" in typed:  # eager: there is no graph to match
        report = sphkv_compile.report(known["cache"])
        assert report.matched == len(report.sites) == 1 and report.encoded_tokens > 0
        assert report.budget == (report.dense_bytes // 4 if "budget" in typed else None)
        return
    with log.listening(seen.append):
        if fast:
            model.setup_caches(1, 512)
            model(ids, torch.arange(300))
            known["step"](ids[:, :1], torch.tensor([300]))
        elif "decode" in known:
            cache = DynamicCache(config=model.config) if "DynamicCache" in name else known.get("cache")
            cache = cache or StaticCache(config=model.config, max_cache_len=2048)
            for tokens in (ids, ids[:, :1]):
                known["decode"](tokens, use_cache=True, **{cache_keyword(model): cache})
    last = seen[-1].verdicts  # the first call of a cache that grows has none to match
    assert last and all(v.idiom for v in last)
    if "generate" not in typed:  # which keeps its cache to itself
        report = sphkv_compile.report(model if fast else cache)
        assert report.matched == len(report.sites) == 1 and report.encoded_tokens > 0
        assert report.budget == (report.dense_bytes // 4 if "kvpress" in name else None)
