"""The generated parts of README.md, THEORY.md and the bench's NOTES.md: ``make docs`` brings them up to date."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from sphkv_compile.patterns import IDIOMS, INSTEAD, REFUSALS

from sphkv_compile.bench.record import attention_rows, even, short
from sphkv_compile.bench.writes import remark
from sphkv_compile.eval.contenders import METHODS, WHOLE
from sphkv_compile.eval.record import record_of
from sphkv_compile.eval.tables import means
from sphkv_compile.spec import CacheSpec
from sphkv_compile.storage.layout import Layout
from sphkv_compile.testing.families import FAMILIES, try_family


def idiom_table() -> str:
    """What is matched, from the first line of each pattern's docstring."""
    rows = [f"| `{name}` | {(module.__doc__ or '').strip().splitlines()[0]} |" for name, module in IDIOMS.items()]
    return "\n".join(["| idiom | how the model writes its cache |", "|---|---|", *rows])


def refusal_table() -> str:
    """What stays dense, why, and what to do."""
    rows = [f"| `{code}` | {text} | {INSTEAD[code]} |" for code, text in REFUSALS.items()]
    return "\n".join(["| code | the attention stays dense because | what to do |", "|---|---|---|", *rows])


def metadata_table() -> str:
    """Bytes per token and kv head beyond the window. Units: bytes."""
    head = ("tier", "D", "codes", "metadata", "total", "of bf16", "metadata of kept tokens", "of their total")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for bits in ("K8V4", "K4V4", "K4V2", "K3V2", "K2V2"):
        for dim in (64, 128):
            layout = Layout.of(CacheSpec(bits=bits))
            tier, table, anchor = layout.tiers[0], 5 / layout.page, (dim + 4) / layout.span
            f = layout.fields(tier, dim, dim, (2, 2))
            codes, beside = f.k + f.v, f.metadata + 4 + table + anchor
            # positions and statistics lie in the pages, and anchors stay where tokens are dropped
            kept = dataclasses.replace(layout, kept=True).fields(tier, dim, dim, (2, 2)).metadata + table
            row = (bits, dim, codes, f"{beside:.2f}", f"{codes + beside:.2f}", f"{(codes + beside) / (4 * dim):.3f}",
                   f"{kept:.2f}", f"{100 * kept / (codes + kept):.1f} %")  # fmt: skip
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "examples"
BENCH = RECORDS / "bench/records"
sys.path.insert(0, str(ROOT))  # the examples are no installed package


def quality_table() -> str:
    """KL at equal total bits, from the evaluation's records. Units: nats, bits per element."""
    from examples.eval.summary import FAMILIES, geometric_means, reference_at

    lines = ["| K/V bits | model | total bits | ours | KIVI | TurboQuant-style |", "|---|---|---|---|---|---|"]
    for path in sorted(RECORDS.glob("eval/records/*.json")):
        rows = json.loads(path.read_text())
        means = geometric_means(rows, path.stem)
        for (method, k, v), (bits, kl) in sorted(means.items(), key=lambda item: -item[1][0]):
            if method == "sphkv":
                others = [reference_at(means, name, bits) for name in FAMILIES if name != "sphkv"]
                cells = " | ".join("-" if x is None else f"{x:.4f}" for x in others)
                lines.append(f"| {k}/{v} | {path.stem} | {bits:.2f} | **{kl:.4f}** | {cells} |")
    return "\n".join(lines)


def budget_table(task: str = "kl", name: str = "budget.json") -> str:
    """KL under a budget of bytes, geometric mean over documents, from the record of that name. Units: nats."""
    rows = json.loads(record_of(RECORDS / "eval" / name, task).read_text())
    budgets = sorted({row["budget"] for row in rows if row["budget"] != WHOLE}, reverse=True)
    lines = [f"| model | method | {' | '.join(f'{100 * b:g} %' for b in budgets)} |", "|---" * (2 + len(budgets)) + "|"]
    whole = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found, sizes = means(rows, model), means(rows, model, "total_bytes_per_token")
        for method in [method for method in METHODS if method in found]:
            if WHOLE in found[method]:
                kl, size = found[method][WHOLE], sizes[method][WHOLE]
                whole.append(f"{model} {method.removesuffix(', all tokens')} {kl:.4f} ({size:.0f})")
            else:
                cells = " | ".join(f"{found[method][b]:.4f}" if b in found[method] else "-" for b in budgets)
                lines.append(f"| {model} | {method} | {cells} |")
    lines += ["", f"Documents: {', '.join(dict.fromkeys(row['document'] for row in rows))}."]
    if whole:
        lines.append(f"With all tokens, and bytes per token and kv head: {', '.join(whole)}.")
    return "\n".join(lines)


def needle_table() -> str:
    """Facts found again: the share of cases that are right, with its 95 % interval."""
    rows = json.loads(record_of(RECORDS / "eval/budget.json", "needles").read_text())
    budgets = sorted({row["budget"] for row in rows if row["budget"] != WHOLE}, reverse=True)
    cells = {(r["document"], r["method"], r["budget"]): r for r in rows}
    head = [f"{100 * b:g} %" for b in budgets]
    lines = [f"| what, and who knows the question | method | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    for kind, method in dict.fromkeys((row["document"], row["method"]) for row in rows):
        found = [cells.get((kind, method, b)) or cells[kind, method, WHOLE] for b in budgets]
        shares = " | ".join(f"{r['needle']:.2f} ({r['lower']:.2f} to {r['upper']:.2f})" for r in found)
        lines.append(f"| {kind} | {method} | {shares} |")
    (model,), (cases,) = {r["model"] for r in rows}, {r["cases"] for r in rows}
    full = ", ".join(f"{kind}: {found:.2f}" for kind, found in {r["document"]: r["full"] for r in rows}.items())
    return "\n".join([*lines, "", f"{NAMES[model]}, {cases} cases each; the dense cache finds of them: {full}."])


def coherence_table() -> str:
    """What continuations look like: how much of them was said before, and how likely the dense model finds them."""
    rows = json.loads(record_of(RECORDS / "eval/budget.json", "coherence").read_text())
    lines = ["| method | budget | repeated | nats per token, by the dense model |", "|---|---|---|---|"]
    for r in rows:
        budget = "all" if r["budget"] == WHOLE else f"{100 * r['budget']:g} %"
        lines.append(f"| {r['method']} | {budget} | {r['repeated']:.2f} | {r['nll']:.2f} |")
    (model,) = {NAMES[r["model"]] for r in rows}
    (said, nll) = ({round(r[key], 2) for r in rows}.pop() for key in ("dense_repeated", "dense_nll"))
    return "\n".join([*lines, "", f"{model}; the dense cache: {said:.2f} repeated, {nll:.2f} nats."])


def utilities_table() -> str:
    """What plans read from codes beside the same from dense keys: how both rank tokens, and KL after plans by either.

    Units: nats.
    """
    rows = json.loads(record_of(RECORDS / "eval/budget.json", "utilities").read_text())
    budgets = sorted({row["budget"] for row in rows if "kl" in row}, reverse=True)
    columns = [(method, b) for method in ("rdr", "rdr, one tier") for b in budgets]
    head = ("model", "rank correlation", "lowest head", "top 10 %", *(f"{name}, {100 * b:g} %" for name, b in columns))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        orders = [row for row in rows if row["model"] == model and "correlation" in row]
        alike, common = (sum(r[key] for r in orders) / len(orders) for key in ("correlation", "overlap"))
        lowest, kl = min(r["lowest_correlation"] for r in orders), means(rows, model)
        pairs = " | ".join(f"{kl[name][b]:.4f} / {kl[f'{name}, exact logits'][b]:.4f}" for name, b in columns)
        lines.append(f"| {model} | {alike:.4f} | {lowest:.3f} | {common:.3f} | {pairs} |")
    return "\n".join([*lines, "", f"Documents: {', '.join(dict.fromkeys(row['document'] for row in rows))}."])


def speed_table() -> str:
    """The decode bench's records. Units: milliseconds, MiB."""
    head = ("tokens", "side", "ms/step", "of dense", "compile", "cache MiB", "peak MiB: prefill, first step, decode")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path in sorted(BENCH.glob("decode*.json")):
        record = json.loads(path.read_text())
        for r in record["rows"]:
            side = "dense" if r["what"] == "dense" else str(CacheSpec(bits=_bits(r["what"])).tier)
            peaks = ", ".join(f"{r[k] / 2**20:.0f}" for k in ("prefill_peak", "first_step_peak", "decode_peak"))
            lines.append(
                f"| {record['length']:,} | {side} | {r['ms']:.1f} | {r['ratio']:.2f} | {r['compile_s']:.0f} s | "
                f"{r['resident'] / 2**20:.0f} | {peaks} |"
            )
    return "\n".join(lines)


def plain(r: dict) -> bool:
    """Whether a row is ours at even lengths and the usual logits."""
    return r["what"] == "sphkv" and even(r)


def attention_table() -> str:
    """The records of the attention bench on GPUs, a column for each tier. Units: microseconds."""
    rows = [(card, r) for card, r in attention_rows(BENCH) if r["D"] == 128 and plain(r)]
    tiers = list(dict.fromkeys(r["tier"] for _, r in rows))
    cells = {(card, r["B"], r["L"], r["tier"]): f"{r['us']:.1f} (**{r['speedup']:.2f}**)" for card, r in rows}
    shapes = {(card, r["B"], r["L"]): r["dense_us"] for card, r in rows}
    lines = [f"| card | B | L | dense | {' | '.join(map(tier_name, tiers))} |", "|---" * (4 + len(tiers)) + "|"]
    for (card, b, length), dense in shapes.items():
        ours = " | ".join(cells.get((card, b, length, tier), "-") for tier in tiers)
        lines.append(f"| {card} | {b} | {length:,} | {dense:.1f} | {ours} |")
    worst = max(r["rel_err"] for _, r in rows if r["rel_err"] is not None)
    reads = {card: r["ceiling_tbps"] for card, r in rows}
    ceilings = ", ".join(f"{card} {tbps:.2f} TB/s" for card, tbps in reads.items())
    return "\n".join([*lines, "", f"Largest error {worst:.1e}. A reduction over memory reads: {ceilings}."])


def tier_name(tier: str) -> str:
    """``"K4V4:0.1/K4V2:0.4"`` -> what is kept, in words."""
    if ":" not in tier:
        return tier
    parts = (part.split(":") for part in tier.split("/"))
    return "kept: " + ", ".join(f"{float(share):.0%} {name}" for name, share in parts)


def plan_table() -> str:
    """The records of the plan bench. Units: milliseconds."""
    head = ("card", "layers", "B", "L", "budget", "a plan", "attention of the steps until the next", "share")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    alone = []
    for path in sorted(BENCH.glob("plan*.json")):
        record = json.loads(path.read_text())
        for r in (r for r in record["rows"] if r["what"] == "plan"):
            what = f"{short(record['card'])} | {r['layers']} | {r['B']} | {r['L']:,} | {100 * r['budget']:g} %"
            between = r["every"] * r["attention_ms"]
            lines.append(f"| {what} | {r['ms']:.0f} | {between:.0f} | {100 * r['share']:.0f} % |")
        for r in (r for r in record["rows"] if r["what"] != "plan"):
            kinds = r["what"].removeprefix("allocation, ")
            alone.append(f"{kinds} of token, {r['HKV']} heads of {r['L']:,}, {short(record['card'])}: {r['ms']:.1f} ms")
    return "\n".join([*lines, "", f"The choice alone: {'; '.join(alone)}."])


def uneven_table() -> str:
    """Rows of unequal length, and wide logits. Units: microseconds."""
    ours = [(card, r) for card, r in attention_rows(BENCH) if r["what"] == "sphkv" and r["D"] == 128]
    rows = [(card, r) for card, r in ours if not plain(r)]
    lines = ["| card | tier | B | L | D | case | us | times faster | error |", "|---" * 9 + "|"]
    for card, r in rows:
        case = "rows of unequal length" if r["ragged"] else f"logits' std {r['spread']:g}"
        what = f"{card} | {tier_name(r['tier'])} | {r['B']} | {r['L']:,} | {r['D']} | {case}"
        lines.append(f"| {what} | {r['us']:.1f} | {r['speedup']:.2f} | {r['rel_err']:.1e} |")
    return "\n".join(lines) if rows else NO_RECORD.format("attention --ragged --spread 2,8 --name NAME")


def peers_table() -> str:
    """Other caches and kernels in the runs that have them, beside ours of the same run. Units: microseconds."""
    rows = [(card, r) for card, r in attention_rows(BENCH) if plain(r) or r["what"] != "sphkv"]
    shapes = {(card, r["B"], r["L"], r["D"]): {} for card, r in rows if r["what"] != "sphkv"}
    for card, r in rows:
        name = tier_name(r["tier"]) if r["what"] == "sphkv" else r["what"].removesuffix(", Inductor")
        if (shape := (card, r["B"], r["L"], r["D"])) in shapes:
            shapes[shape][name] = f"{r['us']:.0f} ({r['speedup']:.2f})"
    if not shapes:
        return NO_RECORD.format("attention --peers --name NAME")
    heads = list(dict.fromkeys(name for cells in shapes.values() for name in cells))
    lines = [f"| card | B | L | D | {' | '.join(heads)} |", "|---" * (4 + len(heads)) + "|"]
    for (card, b, length, d), cells in shapes.items():
        lines.append(f"| {card} | {b} | {length:,} | {d} | {' | '.join(cells.get(name, '-') for name in heads)} |")
    absent = {}
    for path in sorted(BENCH.glob("attention*.json")):
        absent |= json.loads(path.read_text()).get("peers_missing", {})
    return "\n".join([*lines, "", *(["Not there to measure: " + ", ".join(sorted(absent)) + "."] if absent else [])])


def writes_table() -> str:
    """A step's append and a prompt's encoding. Units: microseconds."""
    lines = ["| card | what | tier | B | L | us | |", "|---" * 7 + "|"]
    for path in sorted(BENCH.glob("writes*.json")):
        record = json.loads(path.read_text())
        for r in record["rows"]:
            what = f"{short(record['card'])} | {r['what']} | {r['tier']} | {r['B']} | {r['L']:,} | {r['us']:.1f}"
            lines.append(f"| {what} | {remark(r)} |")
    return "\n".join(lines)


GOALS = {
    "H100": (("K4V4", 1, 8192, 1.5), ("K4V4", 1, 131072, 2.9), ("K4V4", 8, 32768, 3.0), ("K4V4", 8, 131072, 3.3),
             ("K4V2", 8, 131072, 4.2)),
    "H200": (("K4V4", 1, 8192, 1.25), ("K4V4", 1, 131072, 2.5), ("K4V4", 8, 32768, 2.6), ("K4V4", 8, 131072, 3.0),
             ("K4V2", 8, 131072, 3.6)),
}  # fmt: skip
"""Card -> tier, B, L, and how many times faster than dense one attention was to be."""


def goals_table() -> str:
    """What was to be reached, and what was."""
    found = {(card, r["tier"], r["B"], r["L"]): r for card, r in attention_rows(BENCH) if r["D"] == 128 and plain(r)}
    lines = ["| card | tier | B | L | goal | measured | |", "|---" * 7 + "|"]
    for card, goals in GOALS.items():
        for tier, b, length, goal in goals:
            got = found[card, tier, b, length]["speedup"]
            verdict = "met" if got >= goal else "**missed**"
            lines.append(f"| {card} | {tier} | {b} | {length:,} | {goal} | {got:.2f} | {verdict} |")
    return "\n".join(lines)


def model_table() -> str:
    """The records of the model bench. Units: milliseconds, GiB, seconds."""
    head = ("card", "B", "L", "side", "tokens/s", "ms/step", "times faster", "cache GiB", "peak GiB", "TTFT s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path in sorted(BENCH.glob("model*.json")):
        record = json.loads(path.read_text())
        for r in record["rows"]:
            side = SIDES.get(r["what"], r["tier"])
            what = f"| {short(record['card'])} | {r['B']} | {r['L']:,} | {side} |"
            if "failed" in r:
                lines.append(f"{what} {r['failed']} | | | | | |")
                continue
            speedup = "-" if r["speedup"] is None else f"**{r['speedup']:.2f}**"
            memory = " | ".join("-" if r[k] is None else f"{r[k] / 2**30:.1f}" for k in ("kv_bytes", "peak_bytes"))
            first = "-" if r["ttft_s"] is None else f"{r['ttft_s']:.1f}"
            lines.append(f"{what} {r['tokens_per_s']:.1f} | {r['ms']:.2f} | {speedup} | {memory} | {first} |")
    return "\n".join(lines) if len(lines) > 2 else NO_RECORD.format("model --ttft --name NAME")


SIDES = {"hf": "transformers", "loop": "plain loop"}
NO_RECORD = "*Not measured yet: `sphkv bench {}` makes the record.*"


def _bits(text: str) -> int | str:
    return int(text) if text.isdigit() else text


BOUNDS = (
    ("B1: mean actual / bound", "b1_mean", ".3f"),
    ("B1: largest", "b1_max", ".2f"),
    ("B2: mean actual / bound", "b2_mean", ".3f"),
    ("B2: largest", "b2_max", ".2f"),
    ("B3: std of dl / law (should be 1)", "b3_std", ".3f"),
    ("B3: largest in units of the law's std", "b3_max", ".1f"),
    ("B4: mean total variation / bound", "b4_variation_mean", ".3f"),
    ("B4: mean output error / bound", "b4_mean", ".3f"),
    ("B4: largest", "b4_max", ".2f"),
    ("B4: times tighter than the usual bound, median", "b4_times_tighter_than_classic", ".3g"),
    ("B6: sqrt(actual / law), keys and values coded", "b6_root_ratio", ".2f"),
    ("KL of an attention row, nats", "kl", ".2g"),
    ("KL / (Var_p(dl) / 2)", "kl_over_half_variance", ".2f"),
)
GEOMETRY = (
    ("no anchor, no scale", "plain_unscaled"),
    ("no anchor, pair scales", "plain_scaled"),
    ("anchor, no scale", "anchor_unscaled"),
    ("**anchor and pair scales**", "anchor_scaled"),
)
NAMES = {"smollm2": "SmolLM2", "gemma3": "Gemma3"}


def _tightness() -> dict:
    return json.loads((RECORDS / "eval/tightness.json").read_text())


def bounds_table() -> str:
    """How tight the bounds are, from the record of examples/eval/tightness.py."""
    found = _tightness()
    lines = [f"| | {' | '.join(f'{NAMES[m]} 4 / 3 / 2 bits' for m in found)} |", "|---" * (1 + len(found)) + "|"]
    for title, key, form in BOUNDS:
        cells = (
            " / ".join(format(r["axis_cosine"][f"{b} bits"][key], form) for b in (4, 3, 2)) for r in found.values()
        )
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def geometry_table() -> str:
    """What a constant added to all keys does, from the same record."""
    found = {m: r["geometry, relative output error at 4 bits"] for m, r in _tightness().items()}
    lines = [f"| | {' | '.join(f'{NAMES[m]} 0x / 3x / 10x' for m in found)} |", "|---" * (1 + len(found)) + "|"]
    for title, key in GEOMETRY:
        cells = (" / ".join(f"{r[f'bias{b}_{key}']:.3f}" for b in (0, 3, 10)) for r in found.values())
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def family_table(rows: list[str]) -> str:
    """What becomes of each family of transformers' models, from the lines of :class:`~.families.Found`."""
    cells = [row.strip("| ").split(" | ") for row in rows]
    whole = sum(matched == of != "0" for matched, of in (row[2].split(" / ") for row in cells))
    (pin,) = re.findall(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    head = "| family | model | matched / of | idiom | refused because |"
    said = f"{len(rows)} families, as transformers {pin} runs them: {whole} matched, {len(rows) - whole} refused."
    return "\n".join([head, "|---" * 5 + "|", *rows, "", said])


PARTS: dict[str, Callable[[], str]] = {"idioms": idiom_table, "refusals": refusal_table, "metadata": metadata_table}
"""From the code alone."""
MEASURED: dict[str, Callable[[], str]] = {
    "quality": quality_table,
    "budget": budget_table,
    "budget_long": lambda: budget_table(name="budget_long.json"),
    "streaming": lambda: budget_table("streaming"),
    "needles": needle_table,
    "coherence": coherence_table,
    "utilities": utilities_table,
    "speed": speed_table,
    "attention": attention_table,
    "peers": peers_table,
    "plan": plan_table,
    "model": model_table,
}
"""From the records of evaluation and bench."""
NOTES: dict[str, Callable[[], str]] = {"goals": goals_table, "writes": writes_table, "uneven": uneven_table}
"""From the bench's records, for the performance note."""
THEORY: dict[str, Callable[[], str]] = {"bounds": bounds_table, "geometry": geometry_table}
"""From the record of how tight the bounds are."""
TRIED: dict[str, Callable[[], str]] = {"families": lambda: family_table([try_family(f).row() for f in FAMILIES])}
"""From running models, which takes minutes: a test for each row holds it against its model."""
FILES = {
    "README.md": PARTS | MEASURED,
    "examples/bench/NOTES.md": NOTES,
    "sphkv_compile/codecs/THEORY.md": THEORY,
}


def rendered(text: str, parts: dict[str, Callable[[], str]]) -> str:
    """``text`` with every generated part brought up to date.

    Raises:
        ValueError: a part has no place in the text.
    """
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise ValueError(f"no place for the part {name!r}: expected '<!-- {name} -->' and '<!-- /{name} -->'")
        text = text[: found.end(1)] + part() + "\n" + text[found.start(2) :]
    return text


if __name__ == "__main__":
    for name, parts in FILES.items():
        path = ROOT / name
        path.write_text(rendered(path.read_text(), parts | (TRIED if name == "README.md" else {})))
