"""The evaluation's attention shows each query exactly what a cache would hold at its step."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from examples.eval import summary
from examples.eval.attention import attend_mixed
from examples.eval.measure import Document
from examples.eval.ours import Ours
from sphkv_compile.codecs.rotation import rotation
from sphkv_compile.codecs.values import decode_values, encode_values
from sphkv_compile.eval import texts
from sphkv_compile.eval.kivi import Kivi
from sphkv_compile.eval.methods import LayerMoments, Method, Passthrough
from sphkv_compile.eval.retention import coded_end
from sphkv_compile.spec import CacheSpec
from sphkv_compile.testing.tiny import tiny

SPEC = CacheSpec(sink=2, window=8, span=8, page=8)
PREFILL, STEPS = 40, 24


def _document(family: str) -> Document:
    ids = torch.randint(128, (1, PREFILL + STEPS + 1))
    return Document(tiny(family, layers=2), ids, SPEC, PREFILL)


def test_spans_leave_the_window_whole():
    """sink 4, span 128, window 128: the first span ends at 132 and is coded when 128 newer tokens stand behind it."""
    spec = CacheSpec()
    ends = [coded_end(length, spec) for length in (0, 132, 259, 260, 387, 388, 2048)]
    assert ends == [4, 4, 4, 132, 132, 260, 1796]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_dense_side_is_the_model(family):
    """Wrong mask, scale, position or head order in our attention would move these logits."""
    ids = torch.randint(128, (1, PREFILL + STEPS + 1))
    model = tiny(family, layers=2)
    with torch.no_grad():
        expected = model(ids[:, :-1]).logits[0, PREFILL:]
    document = Document(model, ids, SPEC, PREFILL)
    torch.testing.assert_close(document.dense, expected.softmax(-1), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_storing_everything_scores_exactly_zero(family):
    document = _document(family)
    score = document.score(Passthrough())
    assert score.kl == 0 and score.ppl == score.dense_ppl


def test_kl_matches_torch():
    document = _document("llama")
    method = Kivi(2, 2, 8)
    with torch.no_grad():
        coded = document._logits(method).double().log_softmax(-1)
        dense = document._logits(Passthrough()).double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(coded, dense, log_target=True, reduction="batchmean")
    score = document.score(method)
    assert score.kl == pytest.approx(expected.item(), rel=1e-5)
    nll = -coded.gather(1, document.targets[:, None]).mean()
    assert score.ppl == pytest.approx(nll.exp().item(), rel=1e-9)


@pytest.mark.parametrize("sliding", [None, 20])
def test_selection_matches_a_loop_over_queries(sliding):
    """One query at a time: build the cache as it stands then, and attend densely."""
    heads, group, length, queries, dim = 2, 3, PREFILL + STEPS, STEPS, 16
    q = torch.randn(heads * group, queries, dim)
    k, v = torch.randn(2, heads, length, dim)
    end = coded_end(length - 1, SPEC)
    k_hat, v_hat = torch.randn(2, heads, end - SPEC.sink, dim)
    out = attend_mixed(q, k, v, k_hat, v_hat, 0.3, sliding, SPEC)
    for i in range(queries):
        held = length - queries + i  # tokens in the cache before this query's own
        k_seen, v_seen = k[:, : held + 1].clone(), v[:, : held + 1].clone()
        start = SPEC.sink
        while start + SPEC.span <= held - SPEC.window:
            stop = start + SPEC.span
            k_seen[:, start:stop] = k_hat[:, start - SPEC.sink : stop - SPEC.sink]
            v_seen[:, start:stop] = v_hat[:, start - SPEC.sink : stop - SPEC.sink]
            start = stop
        first = 0 if sliding is None else max(0, held + 1 - sliding)
        for h in range(heads * group):
            p = (0.3 * k_seen[h // group, first:] @ q[h, i]).softmax(0)
            torch.testing.assert_close(out[h, i], p @ v_seen[h // group, first:], atol=1e-5, rtol=1e-4)


def test_methods_see_the_whole_spans_and_the_moments():
    """A method is handed spans from the sinks on, with the residual moment of the first and the early queries'."""

    class Spy(Passthrough):
        def keys(self, spans, seen: LayerMoments):
            self.spans, self.seen = spans, seen
            return spans

    document, spy = _document("llama"), Spy()
    document.score(spy)
    keys = document.prefill.keys[1]
    assert spy.spans.shape == (2, (coded_end(PREFILL + STEPS - 1, SPEC) - 2) // 8, 8, 16)
    assert torch.equal(spy.spans[:, :4].flatten(1, 2), keys[:, 2:34])
    first = keys[:, 2:10].double()
    torch.testing.assert_close(spy.seen.k, first.var(1, correction=0))
    assert torch.equal(spy.seen.q, document.prefill.q_moments[1])


def test_ours_is_the_package_codec_and_needs_every_part():
    """More bits help, and the values are those of the package's functions."""
    spans = torch.randn(2, 3, 16, 64) + 4 * torch.randn(2, 1, 1, 64)
    seen = LayerMoments(torch.ones(2, 64).double(), spans[:, 0].double().var(1, correction=0))
    errors = [(Ours(bits, bits).keys(spans, seen) - spans).square().mean().item() for bits in (2, 3, 4, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 27 * errors[3]
    rot = rotation(64)
    expected = decode_values(*encode_values(spans, rot, 3), 64, rot, 3)
    assert torch.equal(Ours(4, 3).values(spans), expected)


def test_coded_tokens_move_the_distribution_and_bits_order_it():
    document = _document("gemma3")
    kl = [document.score(Ours(bits, bits)).kl for bits in (2, 4, 8)]
    assert kl[0] > kl[1] > kl[2] > 0


def test_learned_attention_sinks_are_refused():
    from sphkv_compile.eval.attention import attention

    with pytest.raises(NotImplementedError, match="soft cap"):
        attention(None, *[torch.zeros(1, 1, 1, 8)] * 3, None, sphkv_run=None, scaling=1.0, softcap=30.0)


def test_documents_are_long_enough_and_distinct():
    """2497 tokens of some four characters; tuning text is never reported text."""
    assert not set(texts.REPORTED) & set(texts.TUNING)
    pages = [texts.text(name)[:10_000] for name in (*texts.REPORTED, *texts.TUNING)]
    assert min(map(len, pages)) == 10_000 and len(set(pages)) == len(pages)


def test_long_documents_repeat_nothing_of_the_tuning_text():
    """16,000 tokens of some four characters."""
    long = {name: texts.text(name) for name in texts.LONG}
    assert min(map(len, long.values())) > 70_000 and len(set(long.values())) == len(long) >= 3
    for name in texts.TUNING:
        page = " ".join(texts.text(name).split())
        for other in long.values():
            words = " ".join(other.split())
            assert not any(page[i : i + 150] in words for i in range(0, len(page) - 150, 50))


def test_interpolation_follows_the_lower_hull():
    points = [(2.0, 1e-1), (3.0, 9e-2), (4.0, 1e-3)]  # the middle one lies above the line
    assert summary.at_equal_bits(points, 3.0) == pytest.approx(1e-2)
    assert summary.at_equal_bits([(2.0, 1e-1), (3.0, 1e-3), (4.0, 1e-4)], 2.5) == pytest.approx(1e-2)
    assert summary.at_equal_bits(points, 1.5) == pytest.approx(1e-1)
    with pytest.raises(ValueError, match=r"measured up to 4\.000"):
        summary.at_equal_bits(points, 4.1)


def test_verdicts_say_no():
    """Worse than a reference at equal bits, or a ratio above its target, is a miss."""

    def rows(ours: float):
        settings = {("sphkv", 4, 4, 4.2): ours, ("kivi-g64", 4, 4, 4.5): 1e-3, ("kivi-g128", 2, 2, 2.2): 1e-1}
        settings |= {("turboquant", 4, 4, 4.1): 2e-3, ("turboquant", 5, 5, 5.1): 1e-3}
        return [
            dict(model="m", document=d, method=m, k_bits=k, v_bits=v, total_bits=b, kl=kl, ppl_delta=0.0)
            for d in "ab"
            for (m, k, v, b), kl in settings.items()
        ]

    assert [good for _, good in summary.verdicts(rows(7.9e-4), "m")] == [True, True, True]
    assert [good for _, good in summary.verdicts(rows(1.1e-3), "m")] == [False, False, True]
    assert [good for _, good in summary.verdicts(rows(5e-3), "m")] == [False, False, False]


def test_method_interface_is_closed():
    with pytest.raises(TypeError, match="abstract"):
        Method()
