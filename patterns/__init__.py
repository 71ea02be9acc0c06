"""One file per way in which models write a KV cache: each has ``PATTERN``, ``check(match)`` and ``site(match)``.

They are tried in this order, the more specific first.
"""

from __future__ import annotations

from . import dynamic_cat, slice_copy, sliding, static_index
from .site import INSTEAD, REFUSALS, Refusal, Site

IDIOMS = {module.__name__.rpartition(".")[2]: module for module in (sliding, static_index, slice_copy, dynamic_cat)}

__all__ = ["IDIOMS", "INSTEAD", "REFUSALS", "Refusal", "Site"]
