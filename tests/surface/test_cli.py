"""The sphkv command, and the entry point that torch finds."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sphkv_compile.cli import app
from sphkv_compile.testing.tiny import tiny

run = CliRunner().invoke
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def shown(what) -> str:
    console = Console(width=200)
    with console.capture() as text:
        console.print(what)
    return text.get()


def test_inspect_shows_every_tier():
    result = run(app, ["inspect", "--k-dim", "64", "--bits", "K4V4,2"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "K4V4" in result.output and "K2V2" in result.output and "72.61" in result.output


def test_inspect_refuses_a_width_by_name():
    result = run(app, ["inspect", "--bits", "5"], env=WIDE)
    assert result.exit_code == 2 and "nearest is 4" in result.output


def test_doctor_passes_here():
    result = run(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "OK: 6 of 6 checks passed." in result.output and "FAILED" not in result.output


def test_doctor_has_what_a_bug_report_needs(monkeypatch):
    import sphkv_compile.doctor as doctor

    monkeypatch.setenv("TORCH_LOGS_OUT", "[here]")
    monkeypatch.setenv("A_SECRET", "not for a report")
    facts = doctor._facts()
    assert facts["torch"] == torch.__version__ and facts["triton"] and facts["transformers"] and facts["python"]
    assert "threads" in facts["CPU"] and "TORCH_LOGS_OUT=[here]" in facts["environment"]
    assert "GPU" in facts or "GPU 0" in facts
    assert "secret" not in str(facts).lower()


@pytest.mark.parametrize("times", [0, 2])
def test_doctor_wants_the_entry_point_once(times, monkeypatch):
    import sphkv_compile.doctor as doctor

    (entry,) = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "sphkv"]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] * times)
    with pytest.raises(RuntimeError, match=f"registered {times} times.*expected once: pip uninstall"):
        doctor._entry_point()


def test_doctor_says_why_a_kernel_is_not_there(monkeypatch):
    import warnings

    import sphkv_compile.doctor as doctor

    monkeypatch.setattr(doctor, "checked_library", lambda: warnings.warn("no compiler, [CXX]", stacklevel=1))
    check = doctor._timed("kernels", "fused", doctor._kernels)
    assert not check.ok and check.detail == "fused: RuntimeError: no compiler, [CXX]"
    text = shown(doctor.Diagnosis({}, [check]))
    assert "no compiler, [CXX]" in text and "FAILED: kernels. Put all of the above into a bug report." in text


def test_doctor_wants_folders_that_can_be_written(monkeypatch):
    import sphkv_compile.doctor as doctor

    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="TORCHINDUCTOR_CACHE_DIR or XDG_CACHE_HOME"):
        doctor._folders()


def test_doctor_fails_when_attention_is_wrong(monkeypatch):
    import sphkv_compile.doctor as doctor

    monkeypatch.setattr(doctor, "_backend", lambda **_: "not now")
    right = doctor.attend
    monkeypatch.setattr(doctor, "attend", lambda *args: right(*args) + 1e-3)
    result = run(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == 1 and "FAILED: codecs. Put" in result.output


def test_explain_loads_a_folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    result = run(app, ["explain", "--model", str(tmp_path), "--dtype", "float32"], env={"COLUMNS": "160"})
    assert "tokenizer" in str(result.exception or result.output).lower() or result.exit_code == 0


@pytest.fixture
def small(monkeypatch):
    """In place of the bundled model."""
    from sphkv_compile.integrations import models

    monkeypatch.setattr(models, "load", lambda name, dtype: (tiny("llama", head_dim=64, dtype=dtype), None))
    monkeypatch.setattr(models, "find", lambda name: None)


def test_explain_takes_a_budget(small):
    result = run(app, ["explain", "--budget", "0.1", "--length", "2048"], env=WIDE)
    assert result.exit_code == 0, result.exception
    assert f"{int(0.1 * 2048 * 2 * 2 * 256):,} bytes" in result.output and "policy rdr" in result.output
    assert "at K4V2" in run(app, ["explain", "--bits", "K4V2"], env=WIDE).output


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["explain", "--bits", "4", "--budget", "0.1"], "give one"),
        (["explain", "--budget", "64/token"], "did you mean '64B/token'"),
        (["explain", "--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["explain", "--model", "smollm"], "the nearest name is 'smollm2'"),
        (["explain", "--length", "0"], "Invalid value for '--length'"),
        (["explain", "--budget", "25%"], "did you mean 0.25"),
        (["inspect", "--k-dim", "60"], "nearest multiple of 8 is 64"),
        (["inspect", "--v-dim", "0"], "nearest multiple of 8 is 8"),
        (["inspect", "--length", "-1"], "Invalid value for '--length'"),
        (["inspect", "--layers", "0"], "Invalid value for '--layers'"),
        (["inspect", "--kv-heads", "-8"], "Invalid value for '--kv-heads'"),
        (["bench", "plan", "--device", "cpu", "--length", "a"], "'a': expected positive numbers, separated by commas"),
        (["bench", "plan", "--device", "cpu", "--budget", "0"], "such as '0.5,2'"),
        (["bench", "plan", "--device", "cpuu"], "expected 'cuda' or 'cpu'"),
        (["bench", "model", "--device", "cpu", "--batch", "0"], "'0': expected positive numbers"),
        (["bench", "decode", "--blocks", "0"], "Invalid value for '--blocks'"),
        (["bench", "decode", "--model", "random", "--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["eval", "--prompt", "0"], "expected 196 or more"),
    ],
)
def test_a_fault_of_what_was_typed_is_one_sentence(typed, said):
    """Bug: a traceback."""
    result = run(app, typed, env=WIDE)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("length", [[], ["--length", "300"]])
def test_a_budget_that_is_too_small_is_one_sentence(length, small):
    """Bug: what the backend raised within Dynamo came with Dynamo's words and a traceback."""
    result = run(app, ["explain", "--budget", "1KiB", *length], env=WIDE)
    assert result.exit_code == 2 and "Traceback" not in result.output and "Dynamo" not in result.output
    assert "budget='1KiB' is 1,024 bytes" in result.output and "Give at least that" in result.output


def test_the_shortest_cache_is_explained(small):
    result = run(app, ["explain", "--length", "2"], env=WIDE)
    assert result.exit_code == 0 and "2 of 2 attentions matched" in result.output


def test_a_folder_that_is_not_there_is_one_sentence(monkeypatch, tmp_path):
    import sphkv_compile.doctor as doctor

    monkeypatch.setattr(doctor, "doctor", lambda: (tmp_path / "no" / "where").read_text())
    result = run(app, ["doctor"], env=WIDE)
    assert result.exit_code == 2 and "No such file" in result.output and "Traceback" not in result.output


def test_a_fault_of_other_code_keeps_its_traceback(monkeypatch):
    """Bug: a fault within torch, of which the user's words are not the cause, would be hidden."""
    import sphkv_compile.doctor as doctor

    monkeypatch.setattr(doctor, "doctor", lambda: torch.zeros(2).view(3, "a"))
    result = run(app, ["doctor"], env=WIDE)
    assert isinstance(result.exception, TypeError) and result.exit_code == 1


def test_without_a_terminal_no_table_is_cut():
    """Bug: 80 columns, in a pipe or a file too."""
    tiers = "K8V8,K8V4,K4V4,K4V3,K4V2,K3V2,K2V2,K16V16"
    result = run(app, ["inspect", "--bits", tiers, "--length", "123456"], env={"COLUMNS": None, "TERM": "dumb"})
    assert "\u2026" not in result.output and "cache of 123,456 tokens" in result.output
    assert all(tier in result.output for tier in tiers.split(","))


def test_the_entry_point_is_the_only_registration():
    """Registering in code as well would trip Dynamo's duplicate-name assertion."""
    assert "sphkv" in torch._dynamo.list_backends()
    entries = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "sphkv"]
    assert len(entries) == 1 and entries[0].load().__name__ == "backend"


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"mode": "reduce-overhead", "bits": 4}])
def test_a_mode_among_the_options_reaches_inductor(options, monkeypatch):
    """torch.compile takes no mode beside options."""
    from sphkv_compile.lowering import compat

    seen = {}

    def compile_fx(gm, inputs, inner_compile, config_patches):
        seen.update(config_patches)
        return gm

    monkeypatch.setattr(compat, "compile_fx", compile_fx)
    torch.compile(lambda x: x + 1, backend="sphkv", options=options)(torch.zeros(1))
    assert seen["triton.cudagraphs"] is True


def test_an_unknown_mode_names_those_that_there_are():
    step = torch.compile(lambda x: x + 1, backend="sphkv", options={"mode": "reduce-overheads"})
    with pytest.raises(Exception, match=r"reduce-overheads.*max-autotune"):
        step(torch.zeros(1))


def test_an_unknown_option_names_the_nearest():
    step = torch.compile(lambda x: x + 1, backend="sphkv", options={"bit": 4})
    with pytest.raises(Exception, match="did you mean 'bits'"):
        step(torch.zeros(1))


@pytest.mark.parametrize(
    ("given", "said"),
    [({"max_autotun": True}, "'max_autotun' of Inductor; did you mean 'max_autotune'"), ("max", "expected a dict")],
)
def test_an_unknown_option_of_inductor_names_the_nearest(given, said):
    step = torch.compile(lambda x: x + 1, backend="sphkv", options={"inductor": given})
    with pytest.raises(Exception, match=said):
        step(torch.zeros(1))


@pytest.mark.parametrize("bench", ["attention", "model"])
def test_a_bench_of_the_gpu_says_what_to_use_without_one(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(app, ["bench", bench])
    assert result.exit_code == 2
    assert "torch finds none here" in result.output and "sphkv bench decode" in result.output


@pytest.mark.parametrize(
    ("module", "light"), [("sphkv_compile", ""), ("sphkv_compile.cli", "sphkv_compile.eval sphkv_compile.eval.app")]
)
def test_the_evaluation_is_not_imported_before_it_runs(module, light):
    """``import sphkv_compile`` and ``sphkv --help`` cost what they did without it."""
    code = (
        f"import sys, {module}\n"
        "heavy = {'transformers', 'matplotlib', *(m for m in sys.modules if m.startswith('sphkv_compile.eval'))}\n"
        f"print(*sorted((heavy & set(sys.modules)) - set({light.split()!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_bench_refuses_an_unknown_shape():
    result = run(app, ["bench", "model", "--shape", "7b", "--device", "cpu"])
    assert result.exit_code == 2 and "expected one of 8b, tiny" in result.output
