"""Decoding and comparing, against hand-made logits."""

import math

import pytest
import torch

from sphkv_compile.testing.compare import Run, decode, first_divergence, token_kl


def one_hot(token, size=8):
    return torch.nn.functional.one_hot(torch.tensor([[token]]), size).float()


def counting(calls):
    """A model that says the token after the one it was given."""

    def step(token, position):
        calls.append((int(token), position))
        return one_hot((int(token) + 1) % 8)

    return step


def test_greedy_feeds_back_its_own_tokens_at_the_next_positions():
    calls = []
    run = decode(counting(calls), one_hot(3), start=10, count=4)
    assert run.tokens == [3, 4, 5, 6] and calls == [(3, 10), (4, 11), (5, 12)]
    assert run.logits.argmax(-1).tolist() == run.tokens and len(run.seconds) == 3


def test_a_stop_token_ends_and_is_kept():
    assert decode(counting([]), one_hot(3), 0, 8, stop={5}).tokens == [3, 4, 5]


def test_feed_overrides_choice_and_stop():
    calls = []
    run = decode(counting(calls), one_hot(3), 0, 3, feed=[7, 1, 7], stop={7})
    assert run.tokens == [7, 1, 7] and [c[0] for c in calls] == [7, 1]
    assert run.logits.argmax(-1).tolist() == [3, 0, 2]


@pytest.mark.parametrize("kw", [dict(count=0), dict(count=3, feed=[1, 2])])
def test_decode_refuses(kw):
    with pytest.raises(ValueError, match="count="):
        decode(counting([]), one_hot(0), 0, **kw)


@pytest.mark.parametrize(
    "a, b, at", [([1, 2], [1, 2], None), ([1, 2, 3], [1, 4, 3], 1), ([1], [1, 2], 1), ([2], [1, 2], 0), ([], [], None)]
)
def test_first_divergence(a, b, at):
    assert first_divergence(a, b) == at


def test_token_kl_by_hand_and_its_direction():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    torch.testing.assert_close(token_kl(p + 3.0, q), torch.tensor([0.0, expected]).double(), rtol=0, atol=1e-6)
    assert token_kl(q, p)[1] > token_kl(p, q)[1] + 0.1


def test_compiling_steps_count_apart():
    run = Run([1] * 6, torch.zeros(6, 1), [90.0, 30.0, 0.5, 0.5, 0.5])
    assert run.tokens_per_second == 2 and run.extra_seconds == 119
    assert math.isnan(Run([1], torch.zeros(1, 1), []).tokens_per_second)
    assert Run([1], torch.zeros(1, 1), []).extra_seconds == 0
