"""What the compiler did, kept for ``explain`` and for tests, and told to who asks: TORCH_LOGS, TORCH_TRACE, warnings.

TORCH_LOGS="sphkv_compile"      each attention's verdict
TORCH_LOGS="+sphkv_compile"     each graph before and after as well
TORCH_TRACE=<folder>            the same for tlparse: the artifacts sphkv_verdicts and sphkv_graphs
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch._logging import trace_structured

from sphkv_compile.spec import CacheSpec

logger = logging.getLogger("sphkv_compile")


@dataclass
class Compiled:
    """One graph that the backend compiled: verdicts on its attentions, its text before and after."""

    verdicts: list
    spec: CacheSpec
    before: str
    after: str
    rewritten: Any = None


GRAPHS: deque[Compiled] = deque(maxlen=64)
"""The graphs of this process, newest last."""


_LISTENERS: list[Callable[[Compiled], None]] = []


@contextlib.contextmanager
def listening(listener: Callable[[Compiled], None]) -> Iterator[None]:
    """Call ``listener`` for every graph that is compiled meanwhile."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def compiled(verdicts: list, spec: CacheSpec, before: str, after: str, rewritten: Any = None) -> None:
    """Keep a record, and tell TORCH_LOGS and tlparse."""
    record = Compiled(verdicts, spec, before, after, rewritten)
    GRAPHS.append(record)
    for listener in list(_LISTENERS):
        listener(record)
    for v in verdicts:
        logger.info("%s (%s): %s", v.node, v.source or "no source line", v.idiom or f"dense: {v.refusal}")
    logger.debug("before:\n%s\nafter:\n%s", before, after)
    _artifact("sphkv_verdicts", "json", lambda: json.dumps([_row(v) for v in verdicts], indent=1))
    _artifact("sphkv_graphs", "string", lambda: f"before:\n{before}\nafter:\n{after}")


def _artifact(name: str, encoding: str, text: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=text)


def _row(verdict: Any) -> dict[str, str]:
    """One attention for tlparse: its idiom, or why it stays dense."""
    found = {"node": verdict.node, "source": verdict.source}
    if verdict.idiom:
        return found | {"idiom": verdict.idiom}
    return found | {"refusal": verdict.refusal.code, "detail": verdict.refusal.detail}


WARNED: set[Hashable] = set()
"""What this process was warned of."""


def warn_once(key: Hashable, message: str) -> None:
    """Warn of ``key`` once in this process, however many layers, graphs and calls it is true of."""
    if key not in WARNED:
        WARNED.add(key)
        warnings.warn(f"sphkv: {message}", stacklevel=3)
