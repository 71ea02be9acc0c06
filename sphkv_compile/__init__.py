"""A torch.compile backend that keeps an unmodified model's KV cache as spherical codes.

    torch.compile(model, backend=sphkv_compile.backend, options={"bits": 4})

Source: SPHERICAL KV, arXiv 2605.18856.
"""

from sphkv_compile.backend import SiteRefused, backend
from sphkv_compile.explain import explain
from sphkv_compile.report import report
from sphkv_compile.spec import CacheSpec, Tier

__version__ = "0.1.0"
__all__ = ["CacheSpec", "SiteRefused", "Tier", "backend", "explain", "report"]
