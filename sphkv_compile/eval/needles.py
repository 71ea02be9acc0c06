"""Facts that are found again: one sentence, or one of many ``key: value`` lines, somewhere in a long text.

The question is either known, the last thing in the prompt, so that a plan sees its queries; or unknown, and comes when
the plan is made. Its words are those of the fact up to the number, which a model that still sees the fact repeats. A
case counts as right if the number is in the few tokens that the model then finds likeliest.

Cases of one length are the rows of one cache, under one budget, and share one dense prefill for all methods.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sphkv_compile.eval import contenders, texts
from sphkv_compile.eval.contenders import Cell
from sphkv_compile.eval.retention import SPEC, Cache, Prompt, coded_end, continue_greedily

NAMES = (
    *("lantern", "garden", "bridge", "window", "river", "castle", "hammer", "piano"),
    *("rabbit", "engine", "pepper", "violin", "anchor", "candle", "mirror", "tiger"),
)


@dataclass(frozen=True)
class Kind:
    """How facts are written and asked for, and how many of them stand in one prompt."""

    line: str
    cue: str
    count: int


KINDS = {
    "needle": Kind("\n\nThe secret code of the {name} is {number}.\n\n", "\n\nThe secret code of the {name} is", 1),
    "pairs": Kind("\n\n{name}: {number}\n\n", "\n\n{name}:", 8),
}


@dataclass(frozen=True)
class Case:
    """A prompt, the tokens that are read after it, and what should come then.

    Args:
        fact: where in the prompt the fact stands.
    """

    prompt: list[int]
    cue: list[int]
    number: str
    fact: slice


def cases(tokenizer: Any, documents: list[str], kind: Kind, known: bool, length: int, count: int) -> list[Case]:
    """``count`` cases of ``length`` tokens each: facts evenly over the text, in each document in turn, always the same.

    Units: ``length`` in tokens.
    """
    filler = {name: texts.tokens(tokenizer, name, length)[0].tolist() for name in documents}
    numbers = random.Random(0)
    found = []
    for i in range(count):
        names = [NAMES[(i + j) % len(NAMES)] for j in range(kind.count)]
        facts = [(name, str(numbers.randrange(10_000, 100_000))) for name in names]
        text = filler[documents[i % len(documents)]]
        # the asked one moves on by a step that meets all of them
        found.append(_case(tokenizer, text, kind, facts, 3 * i % kind.count, (i + 0.5) / count, known))
    return found


def _case(
    tokenizer: Any, text: list[int], kind: Kind, facts: list[tuple[str, str]], asked: int, depth: float, known: bool
) -> Case:
    """One case as long as ``text``: facts at even distances where tokens may be dropped, the first ``depth`` of one
    distance behind the sinks."""
    lines = [_encode(tokenizer, kind.line.format(name=name, number=number)) for name, number in facts]
    name, number = facts[asked]
    cue = _encode(tokenizer, kind.cue.format(name=name))
    before, after = (cue[:-1], cue[-1:]) if known else ([], cue)
    room = coded_end(len(text)) - SPEC.sink - sum(map(len, lines)) - len(before)
    cuts = [SPEC.sink + int((j + depth) / len(lines) * room) for j in range(len(lines))]
    rest = len(text) - sum(map(len, lines)) - len(before)
    prompt, at = list[int](), []
    for line, begin, end in zip(lines, [0, *cuts], cuts):
        prompt += text[begin:end]
        at.append(slice(len(prompt), len(prompt) + len(line)))
        prompt += line
    return Case(prompt + text[cuts[-1] : rest] + before, after, number, at[asked])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def batches(found: list[Case], size: int) -> list[list[Case]]:
    """Cases whose questions are as long, at most ``size`` together."""
    found = sorted(found, key=lambda case: len(case.cue))
    groups = (list(group) for _, group in itertools.groupby(found, key=lambda case: len(case.cue)))
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@dataclass
class Tally:
    """How many cases were right so far, by cell; None stands for the full cache."""

    right: Counter[Cell | None] = field(default_factory=Counter)
    cases: Counter[Cell | None] = field(default_factory=Counter)

    def add(self, cell: Cell | None, right: int, cases: int) -> None:
        """Counts a batch."""
        self.right[cell] += right
        self.cases[cell] += cases

    def row(self, cell: Cell) -> dict[str, Any]:
        """The share of right cases, with a 95 % interval, beside the full cache's."""
        right, count = self.right[cell], self.cases[cell]
        lower, upper = wilson(right, count)
        full = self.right[None] / self.cases[None]
        return {"needle": right / count, "lower": lower, "upper": upper, "cases": count, "full": full}


def rows(model: Any, tokenizer: Any, batch: list[Case], todo: list[Cell], tally: Tally) -> Iterator[dict[str, Any]]:
    """A row for each cell, of all cases that the tally knows by then."""
    prompt = Prompt(model, torch.tensor([case.prompt for case in batch], device=model.device))
    tally.add(None, count_right(tokenizer, Cache(prompt), batch), len(batch))

    def measure(cell: Cell, cache: Cache) -> dict[str, Any]:
        tally.add(cell, count_right(tokenizer, cache, batch), len(batch))
        return tally.row(cell)

    yield from contenders.rows(todo, prompt, prompt.length, len(batch[0].cue) + steps(tokenizer), measure)


def count_right(tokenizer: Any, cache: Cache, batch: list[Case]) -> int:
    """Asks, and looks for the numbers."""
    cue = torch.tensor([case.cue for case in batch], device=cache.prompt.model.device)
    tokens = continue_greedily(cache, cue, steps(tokenizer))
    said = tokenizer.batch_decode(tokens, clean_up_tokenization_spaces=False)
    return sum(case.number in text for case, text in zip(batch, said))


def steps(tokenizer: Any) -> int:
    """Tokens in which a number is said, with two to spare."""
    return len(_encode(tokenizer, " 10000")) + 2


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share: which true shares would give such a count within ``z`` standard deviations.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    share, pull = right / count, z * z / count
    middle = (share + pull / 2) / (1 + pull)
    half = z * math.sqrt(share * (1 - share) / count + pull / count / 4) / (1 + pull)
    return max(0.0, middle - half), min(1.0, middle + half)
