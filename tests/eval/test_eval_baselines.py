"""What others score tokens by, against what their papers say, a token at a time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from sphkv_compile.eval.baselines import ExpectedAttention, HeavyHitter, Recency, Seen, SnapKV, turned
from sphkv_compile.eval.retention import Prompt
from sphkv_compile.testing.tiny import tiny

H, G, C, D = 2, 3, 48, 16


def no_angles(positions: range) -> tuple[torch.Tensor, torch.Tensor]:
    """No rotation."""
    return torch.ones(len(positions), D), torch.zeros(len(positions), D)


def seen(first: int = 0, end: int = C, held: torch.Tensor | None = None, angles=no_angles) -> Seen:
    """The queries of positions ``first``.., and all keys before ``end``."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, H, G, C, D, generator=generator)
    k, v = torch.randn(2, 1, H, C, D, generator=generator)
    held = torch.ones(1, H, end, dtype=torch.bool) if held is None else held
    return Seen(q[..., first:end, :], k[:, :, :end], v[:, :, :end], held, 0.3, angles)


def weights(at: Seen, h: int, g: int, row: int) -> torch.Tensor:
    """One query's softmax weights over what is held and not after it."""
    position = at.length - at.q.shape[3] + row
    logits = at.scale * at.k[0, h] @ at.q[0, h, g, row]
    there = at.held[0, h] & (torch.arange(at.length) <= position)
    return logits.masked_fill(~there, -torch.inf).softmax(0)


def test_weights_are_those_of_a_causal_softmax():
    held = torch.rand(1, H, C) > 0.3
    held[:, :, :5] = True
    at = seen(20, held=held)
    (found,) = at.attention(10)
    for row in range(10):
        torch.testing.assert_close(found[0, 1, 2, row], weights(at, 1, 2, row + 18))


def test_heavy_hitters_are_means_over_the_queries_that_see_a_token():
    whole = HeavyHitter().worth(seen())
    sums = sum(weights(seen(), 1, g, row) for g in range(G) for row in range(C))
    torch.testing.assert_close(whole[0, 1], sums / torch.arange(C, 0, -1))
    score = HeavyHitter()
    score.worth(seen(0, 30))
    torch.testing.assert_close(score.worth(seen(30)), whole)


def test_snapkv_pools_what_the_newest_queries_pay(monkeypatch):
    monkeypatch.setattr(SnapKV, "QUERIES", 8)
    found = SnapKV().worth(seen())[0, 0]
    paid = sum(weights(seen(), 0, g, row) for g in range(G) for row in range(C - 8, C)) / (8 * G)
    torch.testing.assert_close(found[10], paid[7:14].mean())


def test_recency():
    assert torch.equal(Recency().worth(seen())[0, 0], torch.arange(C).float())


def test_expected_attention_is_the_gaussian_integral():
    """E exp(s q.k) over the queries seen, drawn from their Gaussian, by formula against a large sample."""
    at = seen()
    found = ExpectedAttention().worth(at)[0, 1] / at.v[0, 1].norm(dim=-1)
    total = torch.zeros(C)
    for g in range(G):
        q = at.q[0, 1, g, 4:].double()
        centred = q - q.mean(0)
        root = torch.linalg.cholesky(centred.T @ centred / len(q) + 1e-9 * torch.eye(D))
        generator = torch.Generator().manual_seed(1)
        drawn = q.mean(0) + torch.randn(200_000, D, generator=generator, dtype=torch.float64) @ root.T
        expected = (at.scale * drawn @ at.k[0, 1].double().T).exp().mean(0)
        expected[:4] = 0
        total += (expected / expected.sum()).float() / G
    torch.testing.assert_close(found, total, atol=2e-3, rtol=0.1)


def test_expected_attention_learns_a_stream_as_a_whole():
    score = ExpectedAttention()
    score.worth(seen(0, 30))
    torch.testing.assert_close(score.worth(seen(30)), ExpectedAttention().worth(seen()))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_queries_are_turned_back(family):
    """Of one token again and again the first layer's queries differ by their rotation alone."""
    prompt = Prompt(
        tiny(family, layers=2, layer_types=["full_attention"] * 2) if family == "gemma3" else tiny(family),
        torch.full((1, 40), 7),
    )
    cos, sin = prompt.angles(range(40))
    q = prompt.sites[0].q
    back = turned(q, cos, -sin)
    assert not torch.allclose(q[:, :, 3], q[:, :, 30], atol=1e-2)
    torch.testing.assert_close(back[:, :, 3], back[:, :, 30], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(turned(back, cos, sin), q, atol=1e-5, rtol=1e-4)
