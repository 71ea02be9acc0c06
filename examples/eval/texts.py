"""English documents for the evaluation: four short public-domain texts shipped here, and Python's own manuals.

    reported  manual, strings   reference pages of the standard library's ``pydoc_data.topics``
              docstrings        docstrings of standard library modules, one after the other
              constitution      The Constitution of the United States (1787), public domain
              novel             William Morris, News from Nowhere, chapter II (1890), public domain
              play              William Shakespeare, Richard III, act I (about 1593), public domain
    tuning    compound          another page of ``pydoc_data.topics``
              dictionary        Ambrose Bierce, The Devil's Dictionary, from ABASEMENT (1911), public domain

A choice is made on tuning documents and claimed on reported ones. The standard library's pages differ a little from one
Python release to the next, so figures are compared inside one run only.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPORTED = ("manual", "strings", "docstrings", "constitution", "novel", "play")
TUNING = ("compound", "dictionary")

_FOLDER = Path(__file__).with_name("texts")
_DOCSTRINGS = ("configparser", "statistics", "re", "socketserver", "argparse", "fileinput", "json", "csv", "shelve")


def text(name: str) -> str:
    """The document's whole text.

    Raises:
        ValueError: no such document; the message names the nearest.
    """
    if name not in _SOURCES:
        near = difflib.get_close_matches(name, _SOURCES, n=1, cutoff=0.0)[0]
        raise ValueError(f"document {name!r}: expected one of {', '.join(_SOURCES)}; did you mean {near!r}?")
    return _SOURCES[name]()


def tokens(tokenizer: Any, name: str, length: int) -> Tensor:
    """The document's first tokens, as the tokenizer would feed them to the model (with its own BOS, if it has one).

    Shapes: -> int64[1, length].

    Raises:
        ValueError: the document is shorter.
    """
    ids = tokenizer(text(name)).input_ids
    if len(ids) < length:
        raise ValueError(f"document {name!r} has {len(ids)} tokens; {length} are needed")
    return torch.tensor([ids[:length]])


def _topic(name: str) -> Callable[[], str]:
    return lambda: importlib.import_module("pydoc_data.topics").topics[name]


def _shipped(name: str) -> Callable[[], str]:
    return lambda: (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def _docstrings() -> str:
    modules = map(importlib.import_module, _DOCSTRINGS)
    return "\n\n".join(f"{module.__name__}\n\n{inspect.getdoc(module)}" for module in modules)


_SOURCES: dict[str, Callable[[], str]] = {
    "manual": _topic("types"),
    "strings": _topic("string-methods"),
    "docstrings": _docstrings,
    "compound": _topic("compound"),
    **{name: _shipped(name) for name in ("constitution", "novel", "play", "dictionary")},
}
