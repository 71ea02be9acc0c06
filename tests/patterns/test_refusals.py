"""Every reason has a test that gives it; and what happens to a model whose attentions stay dense."""

import copy
import warnings

import pytest
import test_attention
import test_dynamic_cat
import test_slice_copy
import test_sliding
import test_static_index
import torch
from sphkv_compile.patterns import IDIOMS, INSTEAD, REFUSALS, Refusal
from toys import OPTIONS, Cache, Shape, put, sdpa, steps

import sphkv_compile
from sphkv_compile import SiteRefused
from sphkv_compile.runtime import log

MODULES = (test_attention, test_dynamic_cat, test_sliding, test_slice_copy, test_static_index)


def attention(c, x):
    put(c, x)
    return sdpa(x, c.k, c.v, x.mask)


def run(cache, chunks=(1, 1), **options):
    """Outputs of the module as it is and compiled, and every verdict."""
    eager, seen = copy.deepcopy(cache), []
    compiled = torch.compile(cache, backend=sphkv_compile.backend, options={**OPTIONS, **options}, fullgraph=True)
    with log.listening(seen.append):
        pairs = [(compiled(x), eager(x)) for x in steps(chunks, Shape())]
    return pairs, [v for graph in seen for v in graph.verdicts]


def close(pairs):
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_autograd_is_refused():
    class Projected(Cache):
        def __init__(self):
            super().__init__(attention, Shape())
            self.weight = torch.nn.Parameter(torch.eye(16))

        def forward(self, x):
            return super().forward(x._replace(q=x.q @ self.weight))

    pairs, verdicts = run(Projected(), chunks=(1,))
    close(pairs)
    assert pairs[0][0].requires_grad
    assert {v.refusal.code for v in verdicts} == {"grad_mode"}


@torch.no_grad()
def test_shared_storage_runs_dense_with_one_warning():
    """The two halves of one tensor: releasing one would release the other."""
    cache = Cache(attention, Shape())
    both = torch.stack([cache.k, cache.v])
    cache.k, cache.v = both[0], both[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs, _ = run(cache, chunks=(1, 1, 1))
    close(pairs)
    said = [str(w.message) for w in caught if "sphkv" in str(w.message)]
    assert len(said) == 1 and "shares its memory" in said[0]
    assert cache.k.untyped_storage().nbytes() == both.untyped_storage().nbytes() > 0


@torch.no_grad()
def test_an_alias_taken_before_keeps_the_cache_dense():
    cache = Cache(attention, Shape())
    alias = cache.k[:, :1]
    with pytest.warns(UserWarning, match="shares its memory"):
        pairs, _ = run(cache)
    close(pairs)
    assert torch.equal(alias, cache.k[:, :1]) and alias.abs().sum() > 0


ELSEWHERE = {
    "grad_mode": test_autograd_is_refused,
    "shared_storage": test_shared_storage_runs_dense_with_one_warning,
    "rank": test_dynamic_cat.test_caches_without_a_batch_are_refused,
}
"""Reasons that need more than a toy."""


@pytest.mark.parametrize("code", REFUSALS)
def test_every_reason_is_given_by_a_test(code):
    """Fails for a new reason without a test."""
    assert code in ELSEWHERE or any(toy.verdict == code for module in MODULES for toy in module.toys)


def test_every_expected_verdict_exists():
    """Fails for a reason that was renamed or removed, and for an idiom that nothing matches."""
    given = {toy.verdict for module in MODULES for toy in module.toys} | set(ELSEWHERE)
    assert given == {*REFUSALS, *IDIOMS}


def test_a_reason_is_a_sentence_its_cause_and_what_to_do():
    what = "call model.eval(), or pass dropout_p=0.0"
    assert str(Refusal("dropout", "dropout_p=0.5")) == f"dropout_p is not zero [dropout_p=0.5]; {what}"
    assert str(Refusal("grad_mode")) == f"{REFUSALS['grad_mode']}; {INSTEAD['grad_mode']}"
    assert INSTEAD.keys() == REFUSALS.keys()
    with pytest.raises(KeyError):
        str(Refusal("no_such_code"))


@torch.no_grad()
def test_strict_names_each_attention_that_stays_dense():
    def two(c, x):
        put(c, x)
        return sdpa(x, c.k, c.v, None), sdpa(x, x.k, x.v, None)

    with pytest.raises(Exception, match="2 of 2 attentions stay dense") as caught:
        run(Cache(two, Shape()), strict=True)
    message = str(caught.value)
    assert isinstance(caught.value.__cause__ or caught.value, SiteRefused) or "SiteRefused" in message
    assert "toys.py" in message and REFUSALS["other_readers"] not in message
    assert REFUSALS["unmasked_slots"] in message and REFUSALS["no_cache_write"] in message


@torch.no_grad()
def test_strict_is_silent_where_all_match():
    pairs, verdicts = run(Cache(attention, Shape()), strict=True)
    close(pairs)
    assert {v.idiom for v in verdicts} == {"static_index"}


@torch.no_grad()
def test_a_refused_attention_beside_a_matched_one():
    """One graph, one of each: the refused one reads its tensors as they are."""

    def two(c, x):
        put(c, x)
        return sdpa(x, c.k, c.v, x.mask) + sdpa(x, x.k, x.v, None)

    pairs, verdicts = run(Cache(two, Shape()))
    close(pairs)
    found = [v.idiom or v.refusal.code for v in verdicts]  # compiled once or twice, as torch guards a tensor's type
    assert found in (["static_index", "no_cache_write"], 2 * ["static_index", "no_cache_write"])
