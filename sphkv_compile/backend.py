"""The backend: from Dynamo's graph to a callable that keeps its KV cache as spherical codes.

    lift -> AOTAutograd -> normalize -> match -> rewrite -> verify -> Inductor -> runner

Everything before Inductor is pure: Dynamo may call the backend twice for one frame.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from sphkv_compile.lowering import compat
from sphkv_compile.ops import schema
from sphkv_compile.ops.check import check_kernels
from sphkv_compile.passes.lift import count, lift, strip
from sphkv_compile.passes.match import Verdict, match, source_line
from sphkv_compile.passes.normalize import normalize, settle
from sphkv_compile.passes.prologue import prologue_of, snapshot, token_counter
from sphkv_compile.passes.rewrite import geometry, rewrite
from sphkv_compile.passes.text import graph_text
from sphkv_compile.passes.verify import verify
from sphkv_compile.patterns import Refusal
from sphkv_compile.runtime import log
from sphkv_compile.runtime.budget import resolve
from sphkv_compile.runtime.runner import Runner, release_others
from sphkv_compile.spec import COMPILER_OPTIONS, CacheSpec, SiteRefused
from sphkv_compile.storage.layout import Layout


class Given(NamedTuple):
    """What the caller of the backend said of storage.

    Args:
        options: names of the spec's fields that it gave.
        caches: layers that say themselves how they are stored, as those of a SphericalCache do.
    """

    options: frozenset[str]
    caches: int


def backend(gm: GraphModule, example_inputs: list, *, mode: str | None = None, options: dict | None = None) -> Callable:
    """Compile ``gm`` with Inductor, its KV caches stored as spherical codes.

    Use as ``torch.compile(model, backend=sphkv_compile.backend, options={"bits": 4})``, or by name,
    ``backend="sphkv"``.

    Args:
        mode: as for Inductor (``"reduce-overhead"``, ``"max-autotune"``, ...). torch.compile takes no mode beside
            options, so ``options={"mode": ...}`` is the same.
        options: fields of :class:`sphkv_compile.CacheSpec`; ``"inductor"`` may hold Inductor's own options, or False
            to run the rewritten graphs node by node, which compiles in no time and helps to debug.

    Raises:
        TypeError: an unknown option, of Inductor's too; ValueError: a value out of range; RuntimeError: an unknown
        mode; SiteRefused: under ``strict=True``.
    """
    options = options or {}
    spec, inductor = CacheSpec.from_options(options), options.get("inductor", {})
    patches = {
        **compat.mode_patches(options.get("mode", mode)), **compat.inductor_options(inductor), **compat.PATCHES
    }  # fmt: skip
    strip(gm, schema.owned)
    given = Given(frozenset(options) - set(COMPILER_OPTIONS), count(gm, schema.stored))
    grad = torch.is_grad_enabled()
    if grad:
        strip(gm, schema.stored)
    else:
        lift(gm)
    compiler = compat.interpret if inductor is False else compat.compile_fx_inner
    inner: Any = functools.partial(compile_inner, spec=spec, given=given, grad=grad, compiler=compiler)
    with compat.functorch_patches():
        compiled: Any = compat.compile_fx(gm, example_inputs, inner_compile=inner, config_patches=patches)
        return compiled


def compile_inner(
    gm: GraphModule,
    example_inputs: list,
    *,
    spec: CacheSpec,
    given: Given,
    grad: bool,
    compiler: Callable,
    **kwargs: Any,
) -> Callable:
    """The part that sees AOTAutograd's functional graph; stands in for ``compile_fx_inner``."""
    before = graph_text(gm)
    verdicts = [] if grad else _verdicts(gm)
    if grad:
        verdicts = [Verdict(n.name, source_line(n), refusal=Refusal("grad_mode")) for n in _dense_attention(gm)]
    sites = [v.site for v in verdicts if v.site]
    lookout = _lookout(gm, sites)
    _warn(spec, given, verdicts)
    if not sites:
        settle(gm)
        log.compiled(verdicts, spec, before, before)
        _require(spec, verdicts)
        run = compiler(gm, example_inputs, **kwargs)
        return _guarding(run, lookout)
    dense, prologue, count = snapshot(gm), prologue_of(gm, sites), token_counter(gm, sites[0])
    if free := [geometry(site) for site in sites if site.stored is None]:
        spec = resolve(spec, free)
    rewritten = rewrite(gm, sites, spec)
    settle(gm)
    verify(gm, rewritten)
    log.compiled(verdicts, spec, before, graph_text(gm), rewritten)
    _require(spec, verdicts)
    inputs = [example_inputs[i] for i in rewritten.kept] + rewritten.state_inputs
    if "static_input_idxs" in kwargs:
        kwargs["static_input_idxs"] = _static_inputs(kwargs["static_input_idxs"], rewritten)
    run = compiler(gm, inputs, **kwargs)
    with _disable_current_modes():  # here every new tensor would be a fake one
        for site, binding in zip(sites, rewritten.bindings):
            heads, device = int(site.q.meta["val"].shape[1]), site.k_buf.meta["val"].device
            check_kernels(binding.layout, geometry(site), heads, device)
    return Runner(run, dense, prologue, rewritten, count, lookout, spec, is_for_speed=compiler is not compat.interpret)


def _verdicts(gm: GraphModule) -> list[Verdict]:
    normalize(gm)
    return match(gm)


def _dense_attention(gm: GraphModule) -> list:
    return [n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target)]


def _require(spec: CacheSpec, verdicts: list[Verdict]) -> None:
    refused = [v for v in verdicts if v.refusal]
    if spec.strict and refused:
        lines = "\n".join(f"  {v.node} ({v.source or 'no source line'}): {v.refusal}" for v in refused)
        raise SiteRefused(f"strict=True, and {len(refused)} of {len(verdicts)} attentions stay dense:\n{lines}")


def _warn(spec: CacheSpec, given: Given, verdicts: list[Verdict]) -> None:
    """Of a SphericalCache that does not get what its user may expect."""
    stored = [Layout.parse(v.site.stored) for v in verdicts if v.site and v.site.stored is not None]
    refused = [v.refusal for v in verdicts if v.refusal]
    prompts = [r for r in refused if r.code in ("no_cache_write", "not_an_input")]  # those that fill a sliding window
    if (dense := given.caches - len(stored) - len(prompts)) > 0:
        why = next((f": {r}" for r in refused if r not in prompts), "")
        log.warn_once(
            "spherical cache stays dense",
            f"{dense} of {given.caches} layers of a SphericalCache are decoded and stay dense in this compiled model, "
            f"whose attention over them was not recognised{why}. Try TORCH_LOGS='sphkv_compile', which names each",
        )
    if stored and (ignored := sorted(given.options & _overruled(spec, stored))):
        log.warn_once(
            "options beside a spherical cache",
            f"{', '.join(f'{name}={getattr(spec, name)!r}' for name in ignored)} of the compiler's options: this cache "
            f"says itself how it is stored ({stored[0]}), and that is what counts. Give such options to SphericalCache",
        )


def _overruled(spec: CacheSpec, stored: list[Layout]) -> set[str]:
    """Fields in which ``spec`` differs from what caches say, as far as they say it: not when and by whom tokens are
    dropped. A budget may also have turned out to hold all tokens, at its widest tier or a wider one."""
    names = "codec", "sink", "window", "span", "page", "seed"
    found = {name for name in names if any(getattr(layout, name) != getattr(spec, name) for layout in stored)}
    kept = [layout.tiers for layout in stored if layout.kept]
    if kept or any(layout.tiers != (spec.tier,) for layout in stored):
        found.add("bits")
    if not kept and spec.chooses and any(layout.tiers[0] < spec.menu[0] for layout in stored):
        found.add("budget")
    if any(tiers != spec.menu for tiers in kept):
        found.add("tiers")
    return found


def _lookout(gm: GraphModule, sites: list) -> list[int]:
    """Inputs that could be some other graph's cache: 4-D tensors that no site of this graph takes over."""
    taken = {buf for site in sites for buf in (site.k_buf, site.v_buf)}
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [i for i, n in enumerate(inputs) if n not in taken and getattr(n.meta.get("val"), "ndim", 0) == 4]


def _guarding(run: Callable, lookout: list[int]) -> Callable:
    if not lookout:
        return run

    def guarded(args: list) -> Any:
        release_others(args, lookout)
        return run(args)

    guarded._boxed_call = True  # type: ignore[attr-defined]
    return guarded


def _static_inputs(static: Any, rewritten: Any) -> list[int]:
    """Positions of inputs whose address never changes, in the rewritten calling convention."""
    new = {old: i for i, old in enumerate(rewritten.kept)}
    state = range(len(rewritten.kept), len(rewritten.kept) + len(rewritten.state_inputs))
    fixed = [] if rewritten.bindings[0].outputs else list(state)
    return [new[i] for i in static if i in new] + fixed
