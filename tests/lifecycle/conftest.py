"""The fixtures of these tests; what they run is in ``runs.py``."""

from runs import _fresh, compiled

__all__ = ["_fresh", "compiled"]
