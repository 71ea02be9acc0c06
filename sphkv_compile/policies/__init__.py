"""Retention policies, one per file."""

from __future__ import annotations

from sphkv_compile.policies.base import DROP, Held, Policy
from sphkv_compile.policies.keep_all import KeepAll
from sphkv_compile.policies.rdr import Rdr

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (KeepAll, Rdr)}

__all__ = ["DROP", "POLICIES", "Held", "KeepAll", "Policy", "Rdr"]
