"""Keys with a large constant part, as k_proj biases make them: the trap of codes of norm and direction.

In real models such biases sit in RoPE's slow pairs, where they stay nearly constant over a span; so they do here. A
bias in a fast pair turns within the span and is no constant any more: an anchor cannot hold it.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from examples.eval.measure import Document
from examples.eval.ours import Ours
from sphkv_compile.eval.methods import Method
from sphkv_compile.eval.turboquant import TurboQuant
from sphkv_compile.spec import CacheSpec
from sphkv_compile.testing.tiny import tiny

PREFILL, STEPS = 640, 128
SLOW = 16  # of 32 pairs: at theta 1e6 these turn by less than a seventh of a radian in a span


def _kl(bias: float, seed: int, method: Method) -> float:
    """KL of a tiny Qwen2 whose k_proj biases have ``bias`` times the spread of its keys."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = tiny("qwen2", layers=3, heads=2, kv_heads=1, head_dim=64, seed=seed, rope_parameters=rope)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(128, (1, PREFILL + STEPS + 1), generator=generator)
    with torch.no_grad():
        for layer in model.model.layers:
            projection = layer.self_attn.k_proj
            spread = projection.weight.norm(dim=1).mean()  # the input is normed: each entry has size one
            drawn = torch.randn(2, 32, generator=generator) * spread
            drawn[:, :SLOW] = 0
            projection.bias.copy_(bias * drawn.flatten())
    return Document(model, ids, CacheSpec(), PREFILL).score(method).kl


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_large_biases_cost_less_than_ten_times(seed):
    """Fails on every seed without span anchors (ratios above 50), and on the first without pair scales."""
    assert _kl(300, seed, Ours(4, 4)) < 10 * _kl(1, seed, Ours(4, 4))


def test_the_biases_are_a_trap():
    """The bound above has teeth: norm and direction alone fall into it."""
    assert _kl(300, 0, TurboQuant(4, 4)) > 30 * _kl(1, 0, TurboQuant(4, 4))
