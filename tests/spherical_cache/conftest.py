"""The fixture of these tests; what they run is in ``caches.py``."""

from caches import _fresh

__all__ = ["_fresh"]
