"""The evaluation of budgets: every stored byte counts, and more of them lose less."""

import pytest
import torch

pytest.importorskip("transformers")

from examples.eval import budget
from sphkv_compile.testing.tiny import tiny


@pytest.fixture
def document(monkeypatch):
    monkeypatch.setattr(budget, "PROMPT", 600)
    monkeypatch.setattr(budget, "STEPS", 40)
    ids = torch.randint(5, 100, (1, 641), generator=torch.Generator().manual_seed(0))
    return budget.Document(tiny("llama", head_dim=64), ids)


def test_more_bytes_lose_less(document):
    found = [document.score(share, budget.METHODS["rdr"]) for share in (0.15, 0.3)]
    assert found[0]["kl"] > 2 * found[1]["kl"] > 0
    for row, share in zip(found, (0.15, 0.3)):
        assert 0.6 < row["total_bytes_per_token"] / (4 * document.model.config.head_dim * share) <= 1


def test_sliding_windows_are_not_counted(document):
    gemma = budget.Document(tiny("gemma3", head_dim=64), document.ids)
    full = [layer for layer in gemma.cache().layers if layer.keys.shape[2] > 600]
    assert 0 < len(full) < len(gemma.cache().layers)
    row = gemma.score(0.15, budget.METHODS["rdr"])
    assert 0.6 < row["total_bytes_per_token"] / (4 * 64 * 0.15) <= 1


def test_methods_differ(document):
    scores = {name: document.score(0.15, options)["kl"] for name, options in budget.METHODS.items()}
    assert len({round(kl, 9) for kl in scores.values()}) == len(scores), scores


def test_means_are_geometric():
    rows = [{"model": "m", "method": "rdr", "budget": b, "kl": kl} for b, kl in ((0.1, 1.0), (0.1, 4.0), (0.2, 3.0))]
    assert budget.means(rows, "m") == {"rdr": {0.2: pytest.approx(3.0), 0.1: pytest.approx(2.0)}}
