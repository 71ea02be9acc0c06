"""What is specific to Hugging Face transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def cache_keyword(model: Any) -> str:
    """The name under which this version's models take their cache."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def decode_step(model: Any, filled: int = 4, capacity: int = 4096) -> dict[str, Any]:
    """Inputs of one decode step over a StaticCache that holds ``filled`` random tokens and has room for ``capacity``.

    Units: tokens.
    """
    from transformers import StaticCache

    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=capacity)
    device = next(model.parameters()).device
    keyword = cache_keyword(model)
    ids = torch.randint(config.vocab_size, (1, filled + 1), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        model(ids[:, :filled], use_cache=True, **{keyword: cache})
    return {"input_ids": ids[:, filled:], "use_cache": True, keyword: cache}
