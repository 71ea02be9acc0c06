"""Retention policies, one per file."""

from __future__ import annotations

from sphkv_compile.policies.base import DROP, Held, Policy
from sphkv_compile.policies.expected_attention import ExpectedAttention
from sphkv_compile.policies.heavy_hitter import HeavyHitter
from sphkv_compile.policies.keep_all import KeepAll
from sphkv_compile.policies.rdr import Rdr
from sphkv_compile.policies.snapkv import SnapKV
from sphkv_compile.policies.uniform import Uniform
from sphkv_compile.policies.window import Window

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (KeepAll, Rdr, Uniform, Window, HeavyHitter, SnapKV, ExpectedAttention)
}

__all__ = [
    "DROP", "POLICIES", "ExpectedAttention", "HeavyHitter", "Held", "KeepAll", "Policy", "Rdr", "SnapKV", "Uniform",
    "Window",
]  # fmt: skip
