"""What a :class:`~sphkv_compile.integrations.cache.SphericalCache` is made of: a model's configuration, and a cache of
transformers'. A wrong one is named here, before anything has changed."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from sphkv_compile.spec import CacheSpec

KINDS = (Cache, StaticCache, DynamicCache)
LAYERS = (StaticLayer, DynamicLayer, StaticSlidingWindowLayer, DynamicSlidingWindowLayer)
FACTS = (
    "model_type", "num_hidden_layers", "num_key_value_heads", "head_dim", "num_attention_heads", "hidden_size",
    "sliding_window",
)  # fmt: skip
"""Of a configuration, what tells one model from another by the shape of its cache."""


def config_of(given: Any) -> Any:
    """The configuration of a decoder: ``given`` itself, or that of the model which was given in its place.

    Raises:
        TypeError: it is neither. ValueError: an encoder-decoder.
    """
    config = given if hasattr(given, "get_text_config") else getattr(given, "config", None)
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"{type(given).__name__} in place of a configuration; expected the model's, model.config")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(config).__name__} is an encoder-decoder, whose cross-attention reads a cache that no decoder "
            "step writes; expected the configuration of a decoder. Use transformers' EncoderDecoderCache"
        )
    return config


def facts_of(config: Any) -> dict[str, Any]:
    """:data:`FACTS`, as far as the configuration says them; what it leaves out follows from the rest."""
    text = config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in FACTS}
    heads = found["num_attention_heads"]
    found["num_key_value_heads"] = found["num_key_value_heads"] or heads
    if found["head_dim"] is None and heads and found["hidden_size"]:
        found["head_dim"] = found["hidden_size"] // heads
    return found


def group_of(facts: dict[str, Any]) -> int:
    """Query heads of a kv head, from :func:`facts_of`."""
    return (facts["num_attention_heads"] or 1) // (facts["num_key_value_heads"] or 1)


def full_layers(cache: Any, config: Any, spec: CacheSpec) -> list[int]:
    """Which layers of ``cache`` are to become codes; the others slide.

    Raises:
        TypeError: no cache of transformers'. ValueError: it cannot be stored as ``spec`` says, or has other layers than
            the model.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(f"{type(cache).__name__} is no cache to adopt; expected a StaticCache or a DynamicCache")
    if any(hasattr(layer, "coded") for layer in cache.layers):
        raise ValueError(
            "this cache holds codes already, and goes on as it is; expected a StaticCache or a DynamicCache. Give "
            "another storage a cache of its own"
        )
    _check_kinds(cache)
    if config is not None and len(cache.layers) != (count := len(DynamicCache(config=config).layers)):
        raise ValueError(
            f"{type(cache).__name__} has {len(cache.layers)} layers, the model {count}; expected a cache of this model"
        )
    full = [i for i, layer in enumerate(cache.layers) if type(layer) in (StaticLayer, DynamicLayer)]
    if spec.budget is not None and any(type(cache.layers[i]) is DynamicLayer for i in full):
        raise ValueError(
            f"budget={spec.budget!r} for a cache that grows without limit; expected max_cache_len, its capacity in "
            "tokens: SphericalCache(config, max_cache_len=...), or a StaticCache to adopt; or bits instead"
        )
    if spec.budget is not None and config is None:
        raise ValueError(
            f"budget={spec.budget!r} without the model's configuration; expected adopt(cache, model.config, "
            "budget=...): a policy learns from queries, and a cache does not say how many heads these have"
        )
    return full


def _check_kinds(cache: Cache) -> None:
    """Of a class of the user's, methods would be lost; of another layer, we do not know what it holds."""
    attention = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]  # a linear one keeps its state
    others = sorted({type(layer).__name__ for layer in attention if type(layer) not in LAYERS})
    what = ", ".join(others) or ("offloaded layers" if getattr(cache, "offloading", False) else "")
    if not cache.layers:
        what = "no layers yet"
    elif not what and type(cache) not in KINDS:
        what = "methods of its own"
    if what:
        raise ValueError(
            f"{type(cache).__name__} has {what}; expected StaticLayer, DynamicLayer or their sliding windows, on their "
            "device: StaticCache(config, max_cache_len=...) or DynamicCache(config=config)"
        )
