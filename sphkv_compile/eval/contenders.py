"""Who is measured under a budget: each name, and how its cache is filled from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sphkv_compile.eval import quanto
from sphkv_compile.eval.baselines import Evicted, ExpectedAttention, HeavyHitter, Recency, Recoded, Score, SnapKV
from sphkv_compile.eval.exact import Exact
from sphkv_compile.eval.kivi import Kivi
from sphkv_compile.eval.methods import Method
from sphkv_compile.eval.retention import Cache, Coded, Prompt
from sphkv_compile.eval.turboquant import TurboQuant
from sphkv_compile.policies import POLICIES, Rdr

Fill = Callable[[Prompt, int, int], Cache]
"""Of a prompt, the bytes that it may take, and the tokens that there will be."""
WHOLE = 1.0
"""The budget of a method that keeps all tokens at its own price: none."""


@dataclass(frozen=True)
class Contender:
    """One method.

    Args:
        line: of the plot, where settings of one method stand under several names.
        budgeted: whether it fits any budget; else it is measured once.
        usual: whether it is measured where no method is named; what no cache could do is not.
    """

    fill: Fill
    line: str = ""
    budgeted: bool = True
    usual: bool = True


class EqualHeads(Rdr):
    """The same choice of tokens, every head with the same bytes."""

    shares = False


def coded(**options: Any) -> Contender:
    """The product under a budget, with such options."""
    return Contender(lambda prompt, limit, capacity: Coded(prompt, capacity, limit, **options))


def exact(**options: Any) -> Contender:
    """The same, with exact logits to plan by."""
    return Contender(lambda prompt, limit, capacity: Exact(prompt, capacity, limit, **options), usual=False)


def evicted(score: type[Score]) -> Contender:
    """Exact keys and values of some tokens."""
    return Contender(lambda prompt, limit, capacity: Evicted(prompt, limit, score))


def tier(bits: str) -> Contender:
    """The product with all tokens at one tier."""
    return Contender(lambda prompt, limit, capacity: Coded(prompt, capacity, bits=bits), "one tier, all tokens", False)


def recoded(method: Method, line: str) -> Contender:
    """All tokens, by another codec."""
    return Contender(lambda prompt, limit, capacity: Recoded(prompt, method), line, False)


METHODS: dict[str, Contender] = {
    "rdr": coded(),
    "rdr, equal heads": coded(policy=EqualHeads()),
    "rdr, one tier": coded(tiers="K4V4"),
    "rdr, keep-all heads": coded(keep_all_heads=0.2),
    "rdr, exact logits": exact(),
    "rdr, one tier, exact logits": exact(tiers="K4V4"),
    "4-bit eviction, same utilities": coded(policy=EqualHeads(), tiers="K4V4"),
    **{
        name: coded(policy=policy, tiers="K4V4")
        for name, policy in (
            ("4-bit expected attention", "expected_attention"),
            ("4-bit heavy hitter", "heavy_hitter"),
            ("4-bit SnapKV", "snapkv"),
            ("4-bit window", "window"),
        )
        if policy in POLICIES
    },
    "ExpectedAttention bf16": evicted(ExpectedAttention),
    "H2O bf16": evicted(HeavyHitter),
    "SnapKV bf16": evicted(SnapKV),
    "StreamingLLM bf16": evicted(Recency),
    **{f"{bits}, all tokens": tier(bits) for bits in ("K4V4", "K4V2", "K2V2")},
    **{f"KIVI {bits} bits": recoded(Kivi(bits, bits, 64), "KIVI") for bits in (4, 2)},
    **{f"TurboQuant-style {bits} bits": recoded(TurboQuant(bits, bits), "TurboQuant-style") for bits in (4, 2)},
    **{
        f"HF QuantizedCache {b} bits": recoded(quanto.Quanto(b), "HF QuantizedCache")
        for b in (4, 2)
        if quanto.available()
    },
}
"""In the order of the tables."""
USUAL = [name for name, contender in METHODS.items() if contender.usual]


class Cell(NamedTuple):
    """A method at a budget, a share of the bfloat16 bytes of what grows."""

    method: str
    budget: float

    def fill(self, prompt: Prompt, length: int, more: int) -> Cache:
        """The method's cache of a prompt.

        Args:
            length: tokens that the budget is a share of.
            more: tokens that will be read after the prompt.

        Units: tokens.

        Raises:
            ValueError: a budget that is too small, with the least possible.
        """
        limit = int(self.budget * length * prompt.token_bytes)
        return METHODS[self.method].fill(prompt, limit, prompt.length + more)


def rows(
    todo: list[Cell], prompt: Prompt, length: int, more: int, measure: Callable[[Cell, Cache], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each cell: its bytes once the prompt is in, and what ``measure`` finds; or why there is no such cache.

    Units: bytes per token and kv head; ``length``, ``more`` in tokens, as for :meth:`Cell.fill`.
    """
    for cell in todo:
        row: dict[str, Any] = {**cell._asdict(), "total_bytes_per_token": None}
        try:
            cache = cell.fill(prompt, length, more)
        except ValueError as refusal:
            if "budget=" not in str(refusal):
                raise
            yield row | {"refused": str(refusal)}
        else:
            yield row | sizes(cache) | measure(cell, cache)


def sizes(cache: Cache) -> dict[str, float]:
    """What the budget is for, and what comes on top for tokens that no plan has seen yet.

    Units: bytes per token and kv head.
    """
    tokens = cache.length * cache.prompt.heads
    return {
        "total_bytes_per_token": cache.counted_bytes / tokens,
        "aside_bytes_per_token": cache.aside_bytes / tokens,
    }


def cells(methods: list[str], budgets: list[float]) -> list[Cell]:
    """Every method at every budget, once where it takes what it takes."""
    return [Cell(name, b) for name in methods for b in (budgets if METHODS[name].budgeted else [WHOLE])]
