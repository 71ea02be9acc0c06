"""One file per way in which models write a KV cache: each has ``PATTERN``, ``check(match)`` and ``site(match)``.

The order is that in which they are tried; no two of them match the same graph.
"""

from __future__ import annotations

from . import dynamic_cat, slice_copy, sliding, static_index
from .site import REFUSALS, Refusal, Site

IDIOMS = {module.__name__.rpartition(".")[2]: module for module in (static_index, sliding, slice_copy, dynamic_cat)}

__all__ = ["IDIOMS", "REFUSALS", "Refusal", "Site"]
