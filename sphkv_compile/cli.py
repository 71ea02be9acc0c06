"""The ``sphkv`` command: explain, inspect, doctor, bench, eval."""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from sphkv_compile.bench.app import app as bench
from sphkv_compile.codecs.packing import check_dim
from sphkv_compile.eval.app import evaluate
from sphkv_compile.printing import wide_console
from sphkv_compile.spec import CacheSpec, human


class Commands(TyperGroup):
    """A fault of what was typed ends a command with one sentence: what this package says is wrong, and files that are
    not there. Any other fault keeps its traceback. Raises: typer.BadParameter."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as fault:
            *_, (frame, _) = traceback.walk_tb(fault.__traceback__)
            ours = frame.f_globals["__name__"].startswith("sphkv_compile.")
            if not ours and getattr(fault, "filename", None) is None:
                raise
            raise typer.BadParameter(str(fault)) from None


app = typer.Typer(
    cls=Commands, help="KV caches as spherical codes, for unmodified PyTorch models.", no_args_is_help=True
)
app.add_typer(bench, name="bench")
app.command("eval")(evaluate)
Model = Annotated[str, typer.Option(help="'smollm2', 'gemma3' (bundled), a Hugging Face folder, or a .gguf file.")]


@app.command()
def explain(
    model: Model = "smollm2",
    bits: Annotated[str | None, typer.Option(help="Width of keys and values: 4, or K4V2. Default 4.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="In place of --bits: 64MiB, 0.125 (of the dense bytes), or 64B/token.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens that the cache has room for, and a budget is for.")] = 4096,
    dtype: str = "bfloat16",
) -> None:
    """Say what the backend does with each attention of a model, and from which length on it pays."""
    from sphkv_compile.explain import coded_length
    from sphkv_compile.explain import explain as explain_model
    from sphkv_compile.integrations.models import dtype_of, find, load
    from sphkv_compile.integrations.transformers import decode_step

    options = {"bits": bits, "budget": budget}
    spec, number, console = CacheSpec.from_options(options), dtype_of(dtype), wide_console()
    find(model)  # all that can be wrong, before anything is loaded
    with console.status(f"loading {model}"):
        loaded, _ = load(model, dtype=number)
    filled = min(coded_length(spec), length - 1)
    with console.status("tracing one decode step"):
        console.print(explain_model(loaded, options=options, **decode_step(loaded, filled, length)))


@app.command()
def inspect(
    k_dim: Annotated[int, typer.Option(help="head_dim of keys.")] = 128,
    v_dim: Annotated[int | None, typer.Option(help="head_dim of values; the keys' by default.")] = None,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    layers: Annotated[int, typer.Option(min=1)] = 32,
    length: Annotated[int, typer.Option(min=1, help="Cached tokens.")] = 32768,
    bits: Annotated[str, typer.Option(help="Tiers to show, separated by commas.")] = "K8V4,K4V4,K4V2,K3V2,K2V2",
) -> None:
    """Show where the bytes of a cache go, field by field and tier by tier, beside bfloat16."""
    v_dim = k_dim if v_dim is None else v_dim
    tiers = [CacheSpec(bits=b) for b in bits.split(",")]
    for dim in (k_dim, v_dim):
        check_dim(dim)
    wide_console().print(byte_table(k_dim, v_dim, kv_heads, layers, length, tiers))


def byte_table(k_dim: int, v_dim: int, heads: int, layers: int, length: int, tiers: list[CacheSpec]) -> Table:
    """Bytes by field, a column per tier. Units: bytes per token and kv head; the last rows are the whole cache."""
    from sphkv_compile.storage.layout import Layout

    dense = 2 * (k_dim + v_dim)
    fields = (
        "key codes",
        "value codes",
        "radius",
        "value scale",
        "anchor index",
        "anchor row",
        "position",
        "page table",
    )
    names = (*fields, "total", "metadata", "of bf16", f"cache of {length:,} tokens")
    columns = [[*(["-"] * 8), f"{dense:g}", "0 %", "1", human(layers * heads * length * dense)]]
    for spec in tiers:
        layout = Layout.of(spec)
        f = layout.fields(spec.tier, k_dim, v_dim, (2, 2))
        row = [f.k, f.v, f.radius, f.v_scale, f.anchor, (k_dim + 4) / layout.span, 4, 5 / layout.page]
        total, exact = sum(row), layout.sink + layout.window + layout.span / 2
        cache = layers * heads * (max(0, length - exact) * total + min(length, exact) * dense)
        columns.append([*(f"{x:.2f}".rstrip("0").rstrip(".") for x in row), f"{total:.2f}",
                        f"{100 * (1 - (f.k + f.v) / total):.1f} %", f"{total / dense:.3f}", human(cache)])  # fmt: skip
    table = Table("", "bf16", *(str(s.tier) for s in tiers), title=f"bytes per token and kv head, D {k_dim}/{v_dim}")
    for name, *values in zip(names, *columns):
        table.add_row(name, *values)
    return table


@app.command()
def doctor() -> None:
    """Print what a bug report needs, and run a short self-test; exit code 1 if it fails."""
    from sphkv_compile.doctor import doctor as diagnose

    console = wide_console()
    with console.status("checking"):
        diagnosis = diagnose()
    console.print(diagnosis)
    raise typer.Exit(0 if diagnosis.ok else 1)


def main() -> None:
    """Entry point of the console script."""
    app()
