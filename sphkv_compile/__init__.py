"""A torch.compile backend that keeps an unmodified model's KV cache as spherical codes.

    torch.compile(model, backend=sphkv_compile.backend, options={"bits": 4})

Source: SPHERICAL KV, arXiv 2605.18856.
"""

from typing import TYPE_CHECKING, Any

from sphkv_compile.backend import backend
from sphkv_compile.explain import explain
from sphkv_compile.report import report
from sphkv_compile.spec import CacheSpec, SiteRefused, Tier

if TYPE_CHECKING:
    from sphkv_compile.integrations.cache import SphericalCache, adopt

__version__ = "0.1.0"
__all__ = ["CacheSpec", "SiteRefused", "SphericalCache", "Tier", "adopt", "backend", "explain", "report"]


def __getattr__(name: str) -> Any:
    """What needs transformers, which the package does without."""
    if name in ("SphericalCache", "adopt"):
        from sphkv_compile.integrations import cache

        return getattr(cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(__all__)}")
