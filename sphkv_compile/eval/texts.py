"""English documents for the evaluation: four short public-domain texts shipped here, and manuals that come with Python
and torch.

    reported  manual, strings   reference pages of the standard library's ``pydoc_data.topics``
              docstrings        docstrings of standard library modules, one after the other
              constitution      The Constitution of the United States (1787), public domain
              novel             William Morris, News from Nowhere, chapter II (1890), public domain
              play              William Shakespeare, Richard III, act I (about 1593), public domain
    tuning    compound          another page of ``pydoc_data.topics``
              dictionary        Ambrose Bierce, The Devil's Dictionary, from ABASEMENT (1911), public domain
    long      shelf             novel, play, constitution and manual, one after the other
              language          all other pages of ``pydoc_data.topics``, less what the pages above say too
              library           docstrings of other standard library modules, of their classes and functions
              layers            docstrings of ``torch.nn``

A choice is made on tuning documents and claimed on reported and long ones; no text of the former is in the latter. The
manuals differ a little from one release to the next, so figures are compared inside one run only. Any other text is
given by the path of its file.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPORTED = ("manual", "strings", "docstrings", "constitution", "novel", "play")
TUNING = ("compound", "dictionary")
LONG = ("shelf", "language", "library", "layers")
"""16,000 tokens and more."""

_FOLDER = Path(__file__).with_name("texts")
_DOCSTRINGS = ("configparser", "statistics", "re", "socketserver", "argparse", "fileinput", "json", "csv", "shelve")
_LIBRARY = (
    *("asyncio", "collections", "contextlib", "datetime", "decimal", "functools", "heapq", "itertools", "logging"),
    *("pathlib", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "unittest", "urllib.parse", "zipfile"),
)


class TooShort(ValueError):
    """A document has fewer tokens than are wanted of it."""


def text(name: str) -> str:
    """The document's whole text.

    Args:
        name: one of those above, or the path of a file in UTF-8.

    Raises:
        ValueError: no such document, and the message names the nearest; or a file that is not UTF-8.
        ModuleNotFoundError: this Python comes without the manual that the document is from.
    """
    if name in _SOURCES:
        return _SOURCES[name]()
    if not Path(name).is_file():
        near = difflib.get_close_matches(name, _SOURCES, n=1, cutoff=0.0)[0]
        known = ", ".join(_SOURCES)
        raise ValueError(f"document {name!r}: expected one of {known}, or a file; did you mean {near!r}?")
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"document {name!r} is no text; expected UTF-8: {fault}") from None


def label(name: str) -> str:
    """What a document is called in the record: its name, or that of its file."""
    return name if name in _SOURCES else Path(name).name


def tokens(tokenizer: Any, name: str, length: int) -> Tensor:
    """The document's first tokens, as the tokenizer would feed them to the model (with its own BOS, if it has one).

    Shapes: -> int64[1, length].

    Raises:
        TooShort: the document.
    """
    ids = tokenizer(text(name)).input_ids
    if len(ids) < length:
        raise TooShort(
            f"document {name!r} has {len(ids)} tokens; expected {length} or more, for the prompt and what follows"
        )
    return torch.tensor([ids[:length]])


def _topics() -> dict[str, str]:
    """Raises: ModuleNotFoundError: some distributions leave this part of the standard library out."""
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"this Python has no pydoc_data.topics, from which {', '.join(_TOPICS)}, shelf and language are; "
            "expected a Python with its whole standard library, or other documents: constitution, novel, play"
        ) from None


def _topic(name: str) -> Callable[[], str]:
    return lambda: _topics()[name]


def _shipped(name: str) -> Callable[[], str]:
    return lambda: (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def _docstrings() -> str:
    modules = map(importlib.import_module, _DOCSTRINGS)
    return "\n\n".join(f"{module.__name__}\n\n{inspect.getdoc(module)}" for module in modules)


def _members(*modules: str) -> Callable[[], str]:
    """Docstrings of modules, and of their public classes and functions."""

    def docstrings() -> Iterator[str]:
        for module in map(importlib.import_module, modules):
            yield f"{module.__name__}\n\n{inspect.getdoc(module) or ''}"
            for name, value in sorted(vars(module).items()):
                public = not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
                if public and value.__doc__ and value.__module__.split(".")[0] == module.__name__.split(".")[0]:
                    yield f"{name}\n\n{inspect.cleandoc(value.__doc__)}"

    return lambda: "\n\n".join(dict.fromkeys(docstrings()))


def _other_topics() -> str:
    """Paragraphs, each once, that are on none of the pages above: a statement's own page repeats its chapter."""
    topics = _topics()
    found: dict[str, str] = {}
    for name in sorted(topics):
        if name not in _TOPICS.values():
            found |= _paragraphs(topics[name])
    used = {words for name in _TOPICS.values() for words in _paragraphs(topics[name])}
    return "\n\n".join(paragraph for words, paragraph in found.items() if words not in used)


def _paragraphs(page: str) -> dict[str, str]:
    """By their words, since indents differ."""
    return {" ".join(paragraph.split()): paragraph for paragraph in page.split("\n\n")}


def _shelf() -> str:
    return "\n\n".join(map(text, ("novel", "play", "constitution", "manual")))


_TOPICS = {"manual": "types", "strings": "string-methods", "compound": "compound"}
_SOURCES: dict[str, Callable[[], str]] = {
    "docstrings": _docstrings,
    "shelf": _shelf,
    "language": _other_topics,
    "library": _members(*_LIBRARY),
    "layers": _members("torch.nn"),
    **{name: _topic(page) for name, page in _TOPICS.items()},
    **{name: _shipped(name) for name in ("constitution", "novel", "play", "dictionary")},
}
