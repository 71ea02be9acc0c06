"""Facts stand where the evaluation says, are asked for as it says, and are counted as statistics has it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from sphkv_compile.eval import coherence, needles
from sphkv_compile.eval.contenders import Cell
from sphkv_compile.eval.retention import SPEC, coded_end

LENGTH = 1500


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", list(needles.KINDS))
def test_facts_stand_where_the_case_says(name, known, letters):
    kind = needles.KINDS[name]
    found = needles.cases(letters, ["novel", "play"], kind, known, LENGTH, 8)
    assert len({case.number for case in found}) == 8
    for case in found:
        prompt, fact, cue = ("".join(map(chr, x)) for x in (case.prompt, case.prompt[case.fact], case.cue))
        assert len(prompt) == LENGTH and prompt.count(case.number) == 1 and case.number in fact
        assert sum(prompt.count(f"{word}: ") for word in needles.NAMES) == (8 if name == "pairs" else 0)
        assert SPEC.sink <= case.fact.start and case.fact.stop <= coded_end(LENGTH)
        asked = prompt[-(fact.index(case.number) - 2) :] + cue if known else cue
        assert fact.startswith(asked) and fact[len(asked) :].strip().startswith(case.number)
    depths = [case.fact.start / LENGTH for case in found]
    assert depths == sorted(depths) or kind.count > 1
    assert min(depths) < 0.2 and max(depths) > 0.7


def test_documents_take_turns_and_cases_repeat(letters):
    kind = needles.KINDS["needle"]
    found = [needles.cases(letters, ["novel", "play"], kind, False, LENGTH, 8) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0][0].prompt[:50] == found[0][2].prompt[:50] != found[0][1].prompt[:50]


def test_batches_are_of_one_length(letters):
    found = needles.cases(letters, ["novel"], needles.KINDS["needle"], False, LENGTH, 20)
    groups = needles.batches(found, 3)
    assert sum(map(len, groups)) == 20 and max(map(len, groups)) == 3
    assert all(len({len(case.cue) for case in group}) == 1 for group in groups)


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (48, 48, (0.9259, 1.0)), (1, 2, (0.0945, 0.9055))],
)
def test_wilson(right, count, interval):
    assert needles.wilson(right, count) == pytest.approx(interval, abs=1e-4)


def test_tally():
    tally, cell = needles.Tally(), Cell("rdr", 0.1)
    tally.add(None, 4, 4)
    tally.add(None, 2, 4)
    tally.add(cell, 3, 4)
    row = tally.row(cell)
    assert (row["needle"], row["cases"], row["full"]) == (0.75, 4, 0.75) and row["lower"] < 0.75 < row["upper"]


def test_repeats():
    assert coherence.repeated([1, 2, 3, 4, 5, 6]) == 0
    assert coherence.repeated([7] * 10) == pytest.approx(1 - 1 / 7)
    assert coherence.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_numbers_are_counted_in_what_is_said(monkeypatch, letters):
    batch = [needles.Case([0], [0], "123", slice(0)), needles.Case([0], [0], "456", slice(0))]
    said = torch.tensor([[*b" 123.\n"], [*b" 465.\n"]])
    monkeypatch.setattr(needles, "continue_greedily", lambda cache, cue, count: said)
    cache = type("Any", (), {"prompt": type("Any", (), {"model": torch.nn.Linear(1, 1)})})
    cache.prompt.model.device = "cpu"
    assert needles.count_right(letters, cache, batch) == 1
