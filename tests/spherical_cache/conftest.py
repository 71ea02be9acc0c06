"""The fixture of these tests; what they run is in ``runs.py``."""

from runs import _fresh

__all__ = ["_fresh"]
