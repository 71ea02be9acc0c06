"""What a compressed cache is made of: tiers, the cache specification, and the arithmetic of its bytes.

No tensor is touched here, so every other floor of the package may import this one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

PASSTHROUGH = 16
"""Bits value that means *keep the model dtype*; exact, whatever the dtype's real width."""

BITS = (2, 3, 4, 8, PASSTHROUGH)
CODECS = ("axis_cosine", "pair_polar", "chain", "tree")
POLICIES = ("keep_all", "rdr", "uniform", "window", "heavy_hitter", "snapkv", "expected_attention")
SHARING = ("rdr",)
"""Policies under which heads get bytes by what they would lose."""
COMPILER_OPTIONS = ("mode", "inductor")
"""Keys of the backend's ``options`` that say how graphs are compiled; every other is a field of CacheSpec."""
_CAPACITY = "give max_cache_len to the cache, StaticCache or SphericalCache."
_NO_SUCH = "nothing is grouped along an axis here; give bits, and span for how many tokens share an anchor."
HINTS = {
    **dict.fromkeys(("max_cache_len", "max_cache_length", "max_length", "cache_len"), _CAPACITY),
    **dict.fromkeys(("q_group_size", "group_size", "axis_key", "axis_value"), _NO_SUCH),
    **dict.fromkeys(("nbits", "n_bits", "num_bits", "kv_bits"), "did you mean 'bits'?"),
    **dict.fromkeys(("residual_length", "recent_size", "window_length"), "did you mean 'window'?"),
    **dict.fromkeys(("n_sink", "num_sink_tokens", "sink_size", "start_size"), "did you mean 'sink'?"),
    **dict.fromkeys(("press", "eviction", "method"), "did you mean 'policy'?"),
    "compression_ratio": "did you mean 'budget'? It is the share of bytes that stays: 0.25 for a ratio of 0.75.",
    "compile_config": "did you mean CompileConfig(backend='sphkv', mode=None, options={'bits': 4}), for generate()?",
    "block_size": "did you mean 'page'?",
}
"""Names of other tools for an option, or for what is none here, and what to give instead."""


class SiteRefused(RuntimeError):
    """Raised under ``strict=True`` where a site stays dense."""


@dataclass(frozen=True, order=True)
class Tier:
    """Precision class of a page: bits per key element and per value element.

    Raises:
        ValueError: a width outside 2, 3, 4, 8, 16.
    """

    k_bits: int
    v_bits: int

    def __post_init__(self) -> None:
        for side, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if bits not in BITS or isinstance(bits, bool):
                raise ValueError(f"{side}={bits!r}: expected one of {BITS}; the nearest is {_nearest_width(bits)}")

    def __str__(self) -> str:
        return f"K{self.k_bits}V{self.v_bits}"

    @classmethod
    def parse(cls, text: str) -> Tier:
        """``"K4V2"`` -> ``Tier(4, 2)``.

        Raises:
            ValueError: any other form.
        """
        found = re.fullmatch(r"[Kk](\d+)[Vv](\d+)", text.strip())
        if not found:
            near = [_nearest_width(int(n)) for n in re.findall(r"\d{1,9}", text)[:2]] or [4]
            raise ValueError(
                f"tier {text!r}: expected the form 'K4V2' (key bits, value bits); did you mean 'K{near[0]}V{near[-1]}'?"
            )
        return cls(int(found[1]), int(found[2]))


def _nearest_width(bits: Any) -> int:
    return min(BITS, key=lambda b: abs(b - bits)) if isinstance(bits, (int, float)) else 4


@dataclass(frozen=True)
class CacheSpec:
    """How a KV cache is stored. One number suffices; every other field has a default that was measured.

    Args:
        bits: one width for keys and values, or ``(k_bits, v_bits)``; ``"K4V2"`` is understood too.
        budget: bytes of one cache over all rows and layers: pages, anchors, positions, statistics and page tables
            (``"512MiB"``, bytes as int, a fraction of the model dtype's bytes as float <= 1, or ``"64B/token"``, for
            each token of the capacity in each row and kv head). Sinks, window and the remembered queries come on top.
        tiers: the menu of a policy that chooses, ``"K8V4,K4V4,K4V2"``: keys and values of a wider tier are no narrower.
        sink: first real tokens of a row, kept exact.
        window: newest tokens, kept exact.
        span: consecutive tokens that share one anchor and leave the window together.
        page: tokens in a page.
        codec: how a key's direction is coded.
        policy: which tokens stay, and at which tier: ``"rdr"`` where a budget is given, else ``"keep_all"``, which
            with a budget picks the widest tier that all tokens fit at. Or a policy object of the user's
            (:class:`sphkv_compile.policies.Policy`).
        keep_all_heads: of all heads, the share that keeps every token from the first plan on that sees 128 queries:
            those that would lose most by dropping, or as many of them as the budget holds, at the narrowest tier of 4
            bits or more. The others share what is left.
        plan_every: steps between two plans.
        seed: of the rotation's signs.
        strict: raise where a site cannot be rewritten, instead of leaving it dense.

    Raises:
        ValueError: a value out of range; the message names the nearest valid one.
        TypeError: an unknown key (:meth:`from_options`).
    """

    bits: int | str | tuple[int, int] | None = None
    budget: int | float | str | None = None
    sink: int = 4
    window: int = 128
    span: int = 128
    page: int = 64
    codec: str = "axis_cosine"
    policy: Any = None
    tiers: str | tuple[str, ...] = "K8V4,K4V4,K4V2"
    keep_all_heads: float = 0.0
    plan_every: int = 128
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, str) and self.bits.strip().isdecimal():
            object.__setattr__(self, "bits", int(self.bits))
        if self.bits is not None and self.budget is not None:
            raise ValueError("bits and budget both given: bits fixes the tier, a budget chooses it; give one")
        for name, least in (("sink", 0), ("window", 0), ("span", 1), ("page", 1), ("plan_every", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r}: expected True or False")
        if self.span % self.page or self.span > 256:
            page = min(self.page, 256)
            near = f"span={max(page, min(self.span, 256) // page * page)}, page={page}"
            raise ValueError(
                f"span={self.span}, page={self.page}: a span must be a whole number of pages, at most 256 tokens; "
                f"the nearest is {near}"
            )
        _one_of("codec", self.codec, CODECS)
        if self.policy is None:
            object.__setattr__(self, "policy", "keep_all" if self.budget is None else "rdr")
        if isinstance(self.policy, str):
            _one_of("policy", self.policy, POLICIES)
        elif not callable(getattr(self.policy, "plan", None)):
            raise ValueError(
                f"policy={self.policy!r}: expected one of {', '.join(POLICIES)}, or an object with plan(); "
                "the default under a budget is 'rdr'"
            )
        if self.chooses:
            if self.budget is None:
                raise ValueError(f"policy={self.policy!r} needs a budget, such as budget=0.25 or budget='512MiB'")
            self._check_menu()
        self._check_heads()
        if self.budget is None:
            _ = self.tier  # a bad width is named here, not at the first step
        else:
            _check_percent(self.budget)
            parse_bytes(self.budget, 1 << 62, 1 << 62)  # the form is checked here, the size where the cache is known

    @property
    def chooses(self) -> bool:
        """Whether the policy drops tokens and chooses among tiers."""
        return self.policy != "keep_all"

    @property
    def menu(self) -> tuple[Tier, ...]:
        """The tiers among which a policy chooses, widest first."""
        names = self.tiers.replace("/", ",").split(",") if isinstance(self.tiers, str) else self.tiers
        if not names or not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"tiers={self.tiers!r}: expected names of tiers, widest first, such as 'K8V4,K4V4,K4V2'")
        return tuple(map(Tier.parse, names))

    def _check_menu(self) -> None:
        menu = self.menu
        if len(menu) > 1 and self.codec != "axis_cosine":
            raise ValueError(
                f"codec={self.codec!r} with tiers {self.tiers!r}: only 'axis_cosine' is demoted; give one tier, such "
                f"as tiers='{menu[0]}', or codec='axis_cosine'"
            )
        if any(PASSTHROUGH in (tier.k_bits, tier.v_bits) for tier in menu):
            near = ",".join(dict.fromkeys(f"K{min(tier.k_bits, 8)}V{min(tier.v_bits, 8)}" for tier in menu))
            raise ValueError(
                f"tiers={self.tiers!r}: expected 8 bits or less in all; no code is made from 16 bits; the nearest is "
                f"{near!r}"
            )
        for wide, narrow in itertools.pairwise(menu):
            if narrow.k_bits > wide.k_bits or narrow.v_bits > wide.v_bits or narrow == wide:
                raise ValueError(
                    f"tiers={self.tiers!r}: {narrow} follows {wide}; expected the widest first, keys and values no "
                    f"wider than before; did you mean {_descending(menu)!r}?"
                )
        if self.page % 4:
            least = max(4, self.page // 4 * 4)
            raise ValueError(
                f"page={self.page} with policy {self.policy!r}: expected a multiple of 4; the nearest is {least}"
            )

    def _check_heads(self) -> None:
        number = isinstance(self.keep_all_heads, (int, float))
        if not number or not 0 <= self.keep_all_heads <= 1:
            near = min(max(self.keep_all_heads, 0), 1) if number else 0
            raise ValueError(
                f"keep_all_heads={self.keep_all_heads!r}: expected a share in [0, 1]; the nearest is {near}"
            )
        shares = self.policy in SHARING if isinstance(self.policy, str) else getattr(self.policy, "shares", False)
        if self.keep_all_heads and not shares:
            raise ValueError(
                f"keep_all_heads={self.keep_all_heads!r} with policy {self.policy!r}: its heads do not share a budget "
                f"by what they lose; expected one of {', '.join(SHARING)}, or a policy object with shares = True"
            )

    @property
    def tier(self) -> Tier:
        """The tier that ``bits`` asks for; K4V4 when nothing was asked."""
        bits = 4 if self.bits is None else self.bits
        if isinstance(bits, str):
            return Tier.parse(bits)
        if isinstance(bits, int):
            return Tier(bits, bits)
        if isinstance(bits, (tuple, list)) and len(bits) == 2:
            return Tier(*bits)
        near = _nearest_width(bits)
        raise ValueError(
            f"bits={bits!r}: expected a width, a pair (k_bits, v_bits) or a form like 'K4V2'; the nearest is {near}"
        )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> CacheSpec:
        """A spec from ``torch.compile``'s ``options``, of which :data:`COMPILER_OPTIONS` are not the cache's.

        Raises:
            TypeError: no dict, or an unknown key; the message names the nearest valid one.
        """
        if not isinstance(options, dict):
            raise TypeError(f"options={options!r}: expected a dict, such as {{'bits': 4}}")
        known = option_names()
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                hint = HINTS.get(key, f"did you mean {near!r}?")
                raise TypeError(f"unknown option {key!r}; {hint} These are expected: {', '.join(known)}")
        return cls(**{key: value for key, value in options.items() if key not in COMPILER_OPTIONS})

    @property
    def uuid(self) -> str:
        """Identity of the spec, for compile-cache keys and saved files."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def option_names() -> list[str]:
    """Keys of the backend's ``options``."""
    return [*(f.name for f in dataclasses.fields(CacheSpec)), *COMPILER_OPTIONS]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}; did you mean {near!r}?")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises: ValueError: no whole number, or less than ``least``; the message names the nearest."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return
    try:
        near = max(least, round(float(value)))
    except (TypeError, ValueError, OverflowError):
        near = least
    raise ValueError(f"{name}={value!r}: expected a whole number >= {least}; the nearest is {near}")


_PERCENT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*")


def _check_percent(budget: Any) -> None:
    """Raises: ValueError: per cent, or a number that they were meant by: no cache has so few bytes."""
    found = _PERCENT.fullmatch(budget if isinstance(budget, str) else repr(budget))
    number = float(found[1]) if found else 0.0
    if not found or not number or (not found[2] and (number > 100 or (number <= 1 and "." in found[1]))):
        return
    near = number / 100 if number <= 100 and (found[2] or number >= 2) else 1.0
    raise ValueError(
        f"budget {budget!r}: expected a fraction of the dense bytes, in (0, 1], or bytes with a unit, such as "
        f"'512MiB'; did you mean {near}, {'all of them' if near == 1 else f'for {number:g} %'}?"
    )


def _descending(menu: tuple[Tier, ...]) -> str:
    """The tiers of ``menu`` from the widest on, without those that fit nowhere among them."""
    fitting: list[Tier] = []
    for tier in sorted(set(menu), reverse=True):
        if not fitting or tier.v_bits <= fitting[-1].v_bits:
            fitting.append(tier)
    return ",".join(map(str, fitting))


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SPELLED = {unit.lower(): unit for unit in _UNITS}
_AMOUNT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)(/token)?\s*")


def parse_bytes(value: int | float | str, dense: int = 0, tokens: int = 0) -> int:
    """A budget in bytes.

    Args:
        value: bytes, as a text in any unit (``"512MiB"``); a float in (0, 1], which a text with a point and no unit is
            too: a fraction of ``dense``; or a text with ``/token`` behind its unit: bytes for each of ``tokens``.
        dense: bytes of the same cache in model dtype.
        tokens: how many it has room for, over rows, kv heads and layers.

    Raises:
        ValueError: not positive, or not understood.
    """
    number = _amount(value, tokens) if isinstance(value, str) else value
    if isinstance(number, float):
        if not 0 < number <= 1:
            near = f"1.0, or {math.floor(number)} for bytes" if 1 < number < math.inf else "0.125, for an eighth"
            raise ValueError(f"budget {value!r}: expected a fraction of the dense bytes, in (0, 1], such as {near}")
        number = math.floor(number * dense)
    if not isinstance(number, int) or isinstance(number, bool) or number <= 0:
        raise ValueError(
            f"budget {value!r}: expected a positive number of bytes, such as '512MiB', or a fraction such as 0.125"
        )
    return number


def _amount(text: str, tokens: int) -> int | float:
    found = _AMOUNT.fullmatch(text)
    unit = _SPELLED.get(found[2].lower() or "b") if found else None
    if not found or not unit or (found[3] and not found[2]):
        raise ValueError(
            f"budget {text!r}: expected bytes with a unit, such as '512MiB', or bytes per token and kv head, such as "
            f"'64B/token'; did you mean {_nearest_amount(text)!r}?"
        )
    if "." in found[1] and not found[2]:
        return float(found[1])
    return math.floor(float(found[1]) * _UNITS[unit] * (tokens if found[3] else 1))


def _nearest_amount(text: str) -> str:
    """What may have been meant: the first number in it, the unit most like its first word, per token if divided."""
    amount, divided, _ = text.partition("/")
    number, word = re.search(r"\d+\.?\d*|\.\d+", amount), re.search(r"[A-Za-z]+", amount)
    unit = difflib.get_close_matches(word[0].lower() if word else "b", _SPELLED, n=1, cutoff=0.0)[0]
    return (number[0] if number else "64") + _SPELLED[unit] + ("/token" if divided else "")


def human(nbytes: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return ""
