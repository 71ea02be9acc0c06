"""examples/compile_llama.py: its flags, its comparison, and the whole of it on a tiny model in a folder."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sphkv_compile.testing.compare import Run
from sphkv_compile.testing.tiny import tiny

FILE = Path(__file__).parents[2] / "examples" / "compile_llama.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("compile_llama", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def invoke(example):
    app = typer.Typer()
    app.command()(example.main)
    return lambda *flags: CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, list(flags))


def word_tokenizer(size=128):
    """Words w0, w1, ... by their numbers; the last one ends a text."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token=f"w{size - 1}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama", head_dim=32).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def text(renderable):
    console = Console(width=200, color_system="truecolor", force_terminal=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--bits", "5"], "nearest is 4"),
        (["--bits", "four"], "K4V2"),
        (["--bits", "4", "--budget", "8MiB"], "give one"),
        (["--budget", "8XB"], "512MiB"),
        (["--device", "gpu"], "'cpu' is always there"),
        (["--dtype", "int8"], "float32"),
        (["--model", "smolm2"], "'smollm2'"),
        (["--file", "no-such-file"], "does not exist"),
        (["--max-new-tokens", "1"], "greater than or equal to 2"),
    ],
)
def test_bad_flags_exit_2_and_say_what_is_right(invoke, flags, says):
    result = invoke(*flags)
    assert result.exit_code == 2 and says in result.output, result.output


def test_a_prompt_too_long_for_the_model_is_refused_before_any_run(invoke, folder, tmp_path):
    (tmp_path / "long.txt").write_text("w5 " * 4090)
    result = invoke("--model", str(folder), "--file", str(tmp_path / "long.txt"), "--max-new-tokens", "8")
    assert result.exit_code == 2 and "reads at most 4096" in result.output


@pytest.mark.parametrize(
    "bits, budget, expected",
    [
        (None, None, {"bits": 4}),
        ("8", None, {"bits": 8}),
        ("K4V2", None, {"bits": "K4V2"}),
        (None, "2KiB", {"budget": "2KiB"}),
    ],
)
def test_options_are_what_the_backend_takes(example, bits, budget, expected):
    assert example.cache_options(bits, budget, seed=3) == {"seed": 3, **expected}


def test_prompt_puts_the_file_before_the_question(example, tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2")
    assert example.prompt_ids(word_tokenizer(), "w3", tmp_path / "a.txt").tolist() == [[1, 2, 3]]
    assert example.prompt_ids(word_tokenizer(), "w3", None).tolist() == [[3]]
    assert example.prompt_ids(word_tokenizer(), None, None).shape[1] > 500, "Python's manual by default"


def test_stop_tokens_come_from_both_places(example):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[5, 6]))
    assert example.stop_tokens(model, SimpleNamespace(eos_token_id=7)) == {5, 6, 7}
    model.generation_config.eos_token_id = None
    assert example.stop_tokens(model, SimpleNamespace(eos_token_id=None)) == set()


def test_texts_colour_what_differs_and_only_that(example):
    shown = text(example.texts(word_tokenizer(), [1, 2, 3], [1, 2, 4]))
    assert "w1 w2\x1b[33m w3" in shown and "w1 w2\x1b[33m w4" in shown
    assert "\x1b[33m" not in text(example.texts(word_tokenizer(), [1, 2], [1, 2]))


def test_dense_bytes_counts_a_shared_storage_once(example):
    k = torch.zeros(2, 3, 8, 4)
    layers = [SimpleNamespace(keys=k, values=torch.zeros(2, 3, 8, 2)), SimpleNamespace(keys=k, values=k[..., :2])]
    assert example.dense_bytes(SimpleNamespace(layers=layers)) == 4 * (2 * 3 * 8 * 4 + 2 * 3 * 8 * 2)


def test_summary_skips_the_prefills_token(example, monkeypatch):
    """Both sides read the first logits from the same eager prefill; only later ones tell them apart."""
    monkeypatch.setattr(example, "dense_bytes", lambda cache: 300)
    monkeypatch.setattr(example.sphkv_compile, "report", lambda c: SimpleNamespace(resident_bytes=75, fixed_bytes=40))
    logits = torch.eye(3) * 9
    other = logits.clone()
    other[0] = 1.0
    dense, coded = Run([0, 1, 2], logits, [9.0, 0.5]), Run([0, 2, 1], other, [9.0, 1.0])
    shown = text(example.summary(example.Side(dense, dense, None, 1.0), example.Side(coded, coded, None, 2.0)))
    assert "first 1 of 3" in shown and "2 of 2" in shown and "mean 0.00e+00" in shown and "0.250 of dense" in shown


@pytest.fixture
def figures(invoke, folder, tmp_path):
    """Runs the example on 700 random words; the rows of its last table, by name."""

    def run(bits):
        words = torch.randint(1, 127, (700,), generator=torch.Generator().manual_seed(1)).tolist()
        (tmp_path / "words.txt").write_text(" ".join(f"w{i}" for i in words))
        result = invoke(
            "--model", str(folder), "--file", str(tmp_path / "words.txt"), "--prompt", "w9", "--bits", bits,
            "--max-new-tokens", "12", "--device", "cpu",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        rows = [line.split("│")[1:4] for line in result.stdout.splitlines() if line.count("│") == 4]
        return {name.strip(): (dense.split(), spherical.split()) for name, dense, spherical in rows}

    return run


def test_the_whole_example_at_16_bits_shows_no_difference(figures):
    """16 bits are exact, so that any mistake in feeding, positions or caches shows."""
    rows = figures("16")
    assert rows["greedy tokens that agree"] == (["12"], ["12", "of", "12"])
    assert abs(float(rows["on the dense tokens: KL, nats per token"][1][-1])) < 1e-8
    assert rows["on the dense tokens: same first choice"][1] == ["11", "of", "11"]


def test_the_whole_example_at_2_bits_shows_a_difference_and_fewer_bytes(figures, example, monkeypatch):
    options = example.cache_options
    monkeypatch.setattr(example, "cache_options", lambda *args: {**options(*args), "inductor": False})  # no C++ build
    rows = figures("2")
    assert float(rows["on the dense tokens: KL, nats per token"][1][-1]) > 1e-3
    (dense,), (ours, ratio, *_) = rows["cache, bytes allocated"]
    dense, ours = (int(x.strip(",").replace(",", "")) for x in (dense, ours))
    assert dense == 2 * 2 * 2 * 713 * 32 * 4 and ours < dense and ratio == f"{ours / dense:.3f}"
