"""What the compiler did, kept for ``explain``, for TORCH_LOGS and for tests."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
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
        logger.info("%s %s: %s", v.node, v.source, v.idiom or f"dense: {v.refusal}")
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "sphkv_rewrite", "encoding": "string"},
        payload_fn=lambda: f"{before}\n---\n{after}",
    )
