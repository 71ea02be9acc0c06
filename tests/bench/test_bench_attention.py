"""The caches that the attention bench makes are right: on a CPU, through the portable path."""

import pytest
import torch

from sphkv_compile.bench import attention as bench
from sphkv_compile.bench.attention import error, lengths, make
from sphkv_compile.bench.kept import Menu
from sphkv_compile.bench.peers import by_sdpa, by_sums, fp8, from_fp8, from_int4, int4
from sphkv_compile.ops.attend import attend
from sphkv_compile.ops.read import dense
from sphkv_compile.spec import Tier
from sphkv_compile.storage.state import LENGTH, SPANS, START
from sphkv_compile.testing import clock

L, D = 1024, 64


def case(tier="K4V2", **how):
    tier = Menu.parse(tier) if ":" in tier else Tier.parse(tier)
    return make(tier, 3, L, 2, 2, D, device="cpu", **how)


@pytest.mark.parametrize(
    "how",
    [{}, {"ragged": True}, {"spread": 8.0}, {"tier": "K4V4:0.1/K4V2:0.4"}],
    ids=["even", "ragged", "wide", "kept"],
)
def test_error_is_small_where_attention_is_right(how):
    c = case(**how)
    found = attend(c.state, c.layout, c.q, c.k, c.v, L, 0, c.columns, None, False, None)
    assert error(c, found) < 5e-3  # the output is rounded to bfloat16
    assert error(c, found.roll(1, -1)) > 0.5


@pytest.mark.parametrize("tier", ["K4V2", "K8V4", "K4V4:0.1/K4V2:0.4"])
def test_logits_have_the_spread_that_a_row_says(tier):
    c = case(tier=tier, spread=8.0)
    state = c.state._replace(exact_k=c.state.exact_k.float(), exact_v=c.state.exact_v.float())
    keys, _ = dense(state, c.layout, c.columns)
    spreads = [
        (c.q[row, 2 * head : 2 * head + 2, 0].float() @ k[k.any(1)].T * D**-0.5).std(-1).mean()
        for row in range(3)
        for head, k in enumerate(keys[row, :, bench.SINK : -bench.WINDOW - bench.SPAN])
    ]
    assert torch.stack(spreads).mean() == pytest.approx(8, rel=0.1)


def test_ragged_rows_hold_what_they_say():
    c = case(ragged=True)
    held = (c.state.rows[:, LENGTH] - c.state.rows[:, START]).tolist()
    assert held == lengths(3, L) == [1024, 640, 256]
    assert c.state.rows[:, SPANS].tolist() == [c.layout.coded_spans(n) for n in held]
    assert c.bytes < case().bytes


def test_a_kept_share_takes_its_share_of_bytes():
    assert 0.35 < case(tier="K4V2:0.4").bytes / case().bytes < 0.85  # the exact window is kept whole
    with pytest.raises(ValueError, match="a share for each tier"):
        Menu.parse("K4V4:0.1/K4V2")
    with pytest.raises(ValueError, match="at most in all"):
        Menu.parse("K4V4:0.7/K4V2:0.4")


@pytest.mark.parametrize("there, back, most", [(fp8, from_fp8, 0.04), (int4, from_int4, 0.12)])
def test_peers_caches_decode(there, back, most):
    x = torch.randn(2, 2, 100, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    gap = (back(*there(x)).float() - x.float()).norm() / x.float().norm()
    assert gap < most


def test_both_ways_to_write_attention_agree():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, generator=generator) for h, n in ((4, 1), (2, 50), (2, 50)))
    torch.testing.assert_close(by_sums(q, k, v), by_sdpa(q, k, v))


def test_a_peer_that_is_not_there_is_listed_with_the_reason(monkeypatch):
    def absent(*shape):
        raise ModuleNotFoundError("No module named 'flash_attn'")

    def refusing(*shape):
        raise ValueError("head_dim 64\nand more")

    monkeypatch.setattr(bench, "PEERS", {"FlashAttention 2": absent, "BitDecoding": refusing})
    monkeypatch.setattr(clock, "timed", lambda calls: 1.0)
    missing = {}
    assert list(bench.peer_rows((1, 1024, 2, 2, 64), 2.0, missing)) == []
    assert missing == {
        "FlashAttention 2": "ModuleNotFoundError: No module named 'flash_attn'",
        "BitDecoding, B 1, L 1024, D 64": "ValueError: head_dim 64",
    }
