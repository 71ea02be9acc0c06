"""A :class:`~sphkv_compile.integrations.cache.SphericalCache` in a safetensors file: no pickle, nothing is executed.

The header's metadata holds the version of the format, the specification, what tells the model from others, the layers
and a digest of all tensors. A file
that is damaged, foreign or of another version is refused before anything is allocated from its numbers; the cache is
handed out when all of it is there, and a file is replaced when all of the new one is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sphkv_compile.integrations.checks import config_of, facts_of
from sphkv_compile.runtime import saved
from sphkv_compile.runtime.direct import CodedCache
from sphkv_compile.runtime.guarded import owner_of
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool
from sphkv_compile.spec import CacheSpec, check_whole
from sphkv_compile.storage.layout import UNIT

if TYPE_CHECKING:
    from sphkv_compile.integrations.cache import SphericalCache

FORMAT, VERSION = "sphkv-cache", 2
COUNTERS = ("cumulative_length_int", "max_cache_len", "sliding_window")
"""Of transformers' sliding layers, what is a number."""


def save(cache: SphericalCache, path: str | os.PathLike) -> None:
    """Write ``cache`` to ``path``. What stood there is replaced once the new file is whole.

    Raises:
        TypeError: its policy is an object of the user's, which no file can hold.
        ValueError: it holds no token, or other layers than of attention, or nobody said of which model it is.
        OSError: no file can be written there; what stood there stays.
    """
    path, coded = Path(path), cache.coded
    if path.is_dir() or not path.parent.is_dir():
        kind, what = (IsADirectoryError, "is a folder") if path.is_dir() else (FileNotFoundError, "is in no folder")
        raise kind(f"{path} {what}; expected the name of a file, in a folder that exists")
    if not isinstance(coded.spec.policy, (str, type(None))):
        raise TypeError(
            f"policy {type(coded.spec.policy).__name__} is an object, which a file of tensors cannot hold; expected "
            "one of sphkv's by name"
        )
    if not cache.get_seq_length():
        raise ValueError("this SphericalCache holds no token yet; expected one after a prompt")
    if cache.model is None:
        raise ValueError(
            "this cache was adopted without the model's configuration, by which its file is told from one of another "
            "model; expected adopt(cache, model.config, ...)"
        )
    if others := sorted({type(x).__name__ for x in cache.layers if not isinstance(x, CacheLayerMixin)}):
        raise ValueError(
            f"{', '.join(others)}: of no attention, and no file holds such a state; expected attention only"
        )
    tensors: dict[str, Tensor] = {}
    layers = []
    for i, layer in enumerate(cache.layers):
        own, facts = _layer(layer)
        layers.append(facts)
        tensors |= {f"{i}.{name}": x for name, x in own.items()}
    pool = next(iter(coded.pools.values()), None)
    head = {
        "model": cache.model,
        "spec": dataclasses.asdict(coded.spec),
        "group": coded.group,
        "max_cache_len": cache.capacity,
        "pool": saved.pool_facts(pool),
        "layers": layers,
    }
    meta = {"format": FORMAT, "version": str(VERSION), "cache": json.dumps(head), "digest": _digest(tensors)}
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode  # as any new file's; safetensors would leave one that only its owner may read
        save_file(tensors, part, metadata=meta)
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as fault:
        raise OSError(
            f"{path} was not written; expected a folder with room, where files may be made: {fault}"
        ) from fault
    finally:
        part.unlink(missing_ok=True)


def _layer(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a layer: its codes, or the dense window of a sliding one."""
    facts: dict[str, Any] = {"kind": type(layer).__name__}
    if (codes := getattr(layer, "codes", None)) is not None:
        codes.settle()
        codes.hold()
        return saved.tensors_of(codes.owner), facts | saved.facts_of(codes.owner) | {"length": int(codes.length)}
    facts |= {name: getattr(layer, name) for name in COUNTERS if isinstance(getattr(layer, name, None), int)}
    facts["length"] = int(layer.cumulative_length)
    owner = owner_of(layer.keys)
    if owner is not None and owner.holds_codes:
        return saved.tensors_of(owner), facts | saved.facts_of(owner)
    return {"keys": layer.keys.cpu().contiguous(), "values": layer.values.cpu().contiguous()}, facts


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load(kind: type[SphericalCache], path: str | os.PathLike, config: Any, device: Any) -> SphericalCache:
    """The cache that :func:`save` wrote. Of the model, what tells it from others is compared, no weights.

    Raises:
        FileNotFoundError: no such file.
        TypeError: no configuration.
        ValueError: it is no file of a cache, is damaged, of another version, for another model, or written on a device
            that stores pages otherwise; or there is no such device.
    """
    path, config, device = Path(path), config_of(config), _device(device)
    if not path.is_file():
        raise FileNotFoundError(f"no saved cache at {path}; expected a file that SphericalCache.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ValueError(f"its header says format {meta.get('format')!r}, expected {FORMAT!r}")
            if meta.get("version") != str(VERSION):
                raise ValueError(f"it is of version {meta.get('version')}, expected {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(tensors) != meta.get("digest"):
            raise ValueError("its tensors are damaged: expected those that were written")
        head = json.loads(meta["cache"])
        return _cache(kind, head, tensors, config, device)
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as fault:
        raise ValueError(
            f"{path} is no file of a saved cache, or it is damaged; expected one that SphericalCache.save wrote: "
            f"{type(fault).__name__}: {fault}"
        ) from None
    except ValueError as fault:
        raise ValueError(f"{path}: expected a saved cache for this model: {fault}") from None


def _device(given: Any) -> torch.device:
    try:
        device = torch.empty(0, device=given).device
    except (RuntimeError, AssertionError, TypeError) as fault:  # torch without CUDA asserts
        why = str(fault).splitlines()[0]
        raise ValueError(f"device={given!r}: expected one that torch has here, such as 'cpu': {why}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={given!r}: expected 'cpu' or 'cuda', where there are kernels")
    return device


def _check_model(saved_with: dict[str, Any], model: dict[str, Any]) -> None:
    for name, ours in model.items():
        if saved_with[name] != ours:
            raise ValueError(f"it was saved for a model with {name} {saved_with[name]!r}, expected {ours!r}")


def _cache(
    kind: type[SphericalCache], head: dict[str, Any], tensors: dict[str, Tensor], config: Any, device: torch.device
) -> SphericalCache:
    _check_model(head["model"], facts_of(config))
    spec, capacity = CacheSpec(**head["spec"]), head["max_cache_len"]
    if capacity is not None:
        check_whole("max_cache_len", capacity, 1)
    cache = kind(config, capacity, **{n: v for n, v in head["spec"].items() if v != getattr(CacheSpec(), n)})
    names = [type(layer).__name__ for layer in cache.layers]
    if [facts["kind"] for facts in head["layers"]] != names:
        raise ValueError(
            f"it is of {len(head['layers'])} layers ({_kinds(x['kind'] for x in head['layers'])}), expected "
            f"{len(names)} as this model has ({_kinds(names)})"
        )
    cache.coded.spec, cache.coded.group = spec, int(head["group"])
    parts: list[dict[str, Tensor]] = [{} for _ in names]
    for name, x in tensors.items():
        number, _, field = name.partition(".")
        parts[int(number)][field] = x
    for facts, part in zip(head["layers"], parts):  # all of it, before the first allocation
        if "layout" in facts:
            layout, g = saved.parse(facts)
            expected = cache.coded.layout(g.k_dim, g.v_dim, device, layout.kept).stored
            if layout.stored != expected:
                raise ValueError(f"its pages are stored as {layout.stored}, expected {expected} on {device}")
            saved.check(layout, g, part)
            facts["parsed"] = layout, g
    windows = Pool(UNIT, spec.plan_every, device)
    for layer, facts, part in zip(cache.layers, head["layers"], parts):
        _restore(cache.coded, layer, facts, part, windows, device)
    for pool in cache.coded.pools.values():
        owners = [o for o in pool.members if o.holds_codes]
        pool.reserve(owners, spec.plan_every)
        saved.continue_pool(pool, head["pool"])
    return cache


def _kinds(names: Any) -> str:
    return ", ".join(sorted(set(names)))


def _restore(
    coded: CodedCache, layer: Any, facts: dict, part: dict[str, Tensor], windows: Pool, device: torch.device
) -> None:
    if "parsed" not in facts:
        like = part["keys"].to(device), part["values"].to(device)
        layer.lazy_initialization(*like)
        layer.keys, layer.values = like
        _count(layer, facts)
        return
    layout, g = facts["parsed"]
    full = facts["kind"] == "SphericalLayer"
    owner = Owner(layout, g, coded.pool(layout, g, device) if full else windows, scale=facts["scale"])
    saved.restore_pages(owner, part)
    if full:
        layer.restore(owner, int(facts["length"]))
    else:
        layer.restore(owner)
        _count(layer, facts)


def _count(layer: Any, facts: dict) -> None:
    """What a sliding layer knows of its length."""
    for name in COUNTERS:
        if name in facts and hasattr(layer, name):
            setattr(layer, name, int(facts[name]))
    if isinstance(layer.cumulative_length, int):
        layer.cumulative_length = int(facts["length"])
    else:
        layer.cumulative_length.fill_(int(facts["length"]))
