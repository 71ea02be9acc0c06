"""A transformers cache that is codes from its first token on: ``generate(cache=SphericalCache(model.config, bits=4))``.

Its layers do for eager code what the compiler does for a compiled model (:mod:`sphkv_compile.runtime.direct`). Layers
with a sliding window do not grow, and are transformers' own; a compiled model keeps them as codes too.
"""

from __future__ import annotations

import copy
import itertools
import operator
import os
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from sphkv_compile.integrations import saved
from sphkv_compile.integrations.checks import config_of, facts_of, full_layers, group_of
from sphkv_compile.integrations.sliding import SlidingLayer
from sphkv_compile.lowering import compat
from sphkv_compile.ops import schema
from sphkv_compile.runtime.direct import CodedCache, CodedLayer, fits, holds
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.views import GRADIENT
from sphkv_compile.spec import CacheSpec, check_whole
from sphkv_compile.storage.layout import Layout

GROWS = (
    "sphkv: a compiled model met a SphericalCache that grows, whose graph would change with every token; expected "
    "SphericalCache(config, max_cache_len=...), its capacity in tokens"
)
_TICKETS = itertools.count()
_eagerly = torch.compiler.disable(reason="a SphericalCache opens, grows and decodes in eager code")


class SphericalLayer(CacheLayerMixin):
    """One layer of a :class:`SphericalCache`, without dense keys and values.

    Args:
        coded: what it shares with the other layers.
        max_cache_len: its capacity in tokens; None grows.
    """

    is_sliding = False
    cumulative_length: Tensor  # type: ignore[assignment]
    codes: Any  # a CodedLayer once the layer is initialised

    def __init__(self, coded: CodedCache, max_cache_len: int | None = None):
        self.coded, self.max_cache_len, self.codes = coded, max_cache_len, None
        super().__init__()
        with torch.inference_mode(False):
            self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self._draw_ticket()

    @torch.inference_mode(False)
    def _draw_ticket(self) -> None:
        """By which a compiled graph that meets a cache without tokens knows this layer."""
        number = next(_TICKETS)
        self.ticket = torch.tensor(number)
        schema.TICKETS[number] = self

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether masks must show the whole capacity: inside a graph. generate() is not to compile on its own accord,
        with a backend that knows nothing of codes."""
        return torch.compiler.is_compiling()

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the newest tokens can be taken back without a trace: under a budget as many as the window holds, more
        than assisted decoding drafts. Behind it the budget lets go of tokens, and crop says so."""
        return self.coded.spec.budget is None or self.coded.spec.window > 0

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A decoded copy of all keys. Shapes: -> [B, H, length, D]; None before the first."""
        return None if self.codes is None else self.codes.read()[0]

    @keys.setter
    def keys(self, value: Any) -> None:
        _read_only(value)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A decoded copy of all values. Shapes: -> [B, H, length, Dv]; None before the first."""
        return None if self.codes is None else self.codes.read()[1]

    @values.setter
    def values(self, value: Any) -> None:
        _read_only(value)

    @_eagerly
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Shapes: [B, H, any, D], [B, H, any, Dv].

        Raises:
            ValueError: the budget is too small, with the least possible one.
        """
        self.restore(self.coded.owner(key_states, value_states, self.max_cache_len), 0)

    def restore(self, owner: Owner, length: int) -> None:
        """Go on with codes that hold ``length`` tokens."""
        self.device, self.dtype = owner.state.table.device, owner.geometry.k_dtype
        with torch.inference_mode(False):
            self.cumulative_length = torch.full((), length, dtype=torch.int64, device=self.device)
        torch._dynamo.mark_static_address(self.cumulative_length)
        self.codes = CodedLayer(self.coded, owner, self.max_cache_len, self.cumulative_length)
        self._lay()
        self.is_initialized = True

    def _lay(self) -> None:
        """What a compiled graph reads."""
        self.k_slot, self.v_slot = self.codes.slots
        self.batch_size, self.num_heads = self.k_slot.shape[:2]
        self.misfit = (
            f"sphkv: keys and values of another model for {holds(*self.codes.slots)}; expected the same; give each "
            "model a cache of its own"
        )
        self.stored = str(self.codes.owner.layout.stored)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New tokens; what stands for all keys and values with them.

        Shapes: [B, H, T, D], [B, H, T, Dv] -> [B, H, length, D], [B, H, length, Dv].
        """
        if not torch.compiler.is_compiling():
            return self._update(key_states, value_states)
        if not self._open:
            if torch.is_grad_enabled() and key_states.requires_grad:
                compat.refuse(GRADIENT)
            return schema.opens(key_states, value_states, self.ticket), value_states  # attended to as they are
        if not (fits(self.k_slot, key_states) and fits(self.v_slot, value_states)):
            compat.refuse(self.misfit)
        # as transformers' StaticLayer writes, which is what the compiler looks for
        at = torch.arange(key_states.shape[2], device=key_states.device) + self.cumulative_length
        self.cumulative_length.add_(key_states.shape[2])
        self.k_slot.index_copy_(2, at, schema.stored(key_states, self.stored))
        self.v_slot.index_copy_(2, at, value_states)
        return self.k_slot, self.v_slot

    @_eagerly
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        views = self.codes.update(key_states, value_states)
        if self.codes.slots[0] is not self.k_slot:
            self._lay()
        return views

    def open(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take in the first tokens, while a compiled graph runs that attends to them as they are."""
        self._update(key_states, value_states)
        self.codes.settle()

    @property
    def _open(self) -> bool:
        """Whether a compiled graph finds codes: all layers have taken their first tokens in."""
        return len(self.coded.layers) == self.coded.sites

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first one's position."""
        if torch.compiler.is_compiling() and self._open:
            return self.max_cache_len or 0, 0
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens held: an int, inside a graph a tensor."""
        if not torch.compiler.is_compiling():
            return self.coded.length
        if self.max_cache_len is None:
            compat.refuse(GROWS)
        return self.cumulative_length if self._open else 0

    def get_max_length(self) -> int:
        """Tokens that there is room for; -1 where it grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    get_max_cache_shape = get_max_length  # its name in older transformers

    def reset(self) -> None:
        """Begin anew with the same shapes and budget."""
        if self.codes is not None:
            self.codes.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: exact inside the window, as far as assisted decoding takes back; behind it a span
        that is cut is decoded.

        Args:
            tokens_to_remove: their number, negative, as transformers has it.

        Raises:
            ValueError: no whole number, a positive one, or more than there are.
            RuntimeError: under a budget, behind the window.
        """
        count = _to_remove(tokens_to_remove, int(self.cumulative_length))  # its own: others may be cropped already
        if count:
            self.codes.crop(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; pages stay where they are. Shapes: int64[B]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order. Shapes: int64[rows], or bool[B]."""
        if self.codes is not None:
            self.codes.select(torch.as_tensor(indices))
            self._lay()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; they share its pages."""
        if self.codes is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        """Raises: NotImplementedError: codes stay on their device."""
        raise NotImplementedError(
            "sphkv: a SphericalCache stays on its device; for less memory there give fewer bits, or a budget"
        )

    prefetch = offload

    def __deepcopy__(self, memo: dict[int, Any]) -> SphericalLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {"codes", "k_slot", "v_slot", "coded", "cumulative_length"}
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        twin.coded, twin.codes = copy.deepcopy(self.coded, memo), copy.deepcopy(self.codes, memo)
        if twin.codes is None:
            twin.cumulative_length = copy.deepcopy(self.cumulative_length, memo)
        else:
            twin.cumulative_length = twin.codes.length
            twin._lay()
        twin._draw_ticket()
        return twin


def _to_remove(given: Any, length: int) -> int:
    """Of ``crop(given)`` on a cache of ``length`` tokens, how many go."""
    number = None if isinstance(given, bool) or not hasattr(given, "__index__") else operator.index(given)
    if number is None:
        raise ValueError(f"crop({given!r}): expected a whole number, negative: crop(-3) removes the newest 3 tokens")
    if number > 0:
        keep = f"; to keep {number}, as older transformers took it: crop({number - length})" if number < length else ""
        raise ValueError(
            f"crop({number}): expected the tokens to remove, negative: crop({-number}) removes {number}{keep}"
        )
    if -number > length:
        raise ValueError(f"sphkv: crop of {-number} tokens from a cache of {length}; expected crop({-length}) at most")
    return -number


def _read_only(value: Any) -> None:
    if value is not None:
        raise AttributeError(
            "keys and values of a SphericalCache are decoded copies; expected new ones to go through update()"
        )


class SphericalCache(Cache):
    """A cache of spherical codes for any decoder of transformers.

    Args:
        config: the model's; the model itself will do.
        max_cache_len: capacity in tokens. Without it the cache grows as it is used, in eager code; a compiled model and
            a budget need it.
        spec: fields of :class:`sphkv_compile.CacheSpec`: ``bits=4`` or ``budget="512MiB"``, ...

    Raises:
        TypeError: an unknown field, or no configuration; ValueError: a value out of range, a budget without
            ``max_cache_len``, heads for which there are no codes, or the configuration of an encoder-decoder.
    """

    coded: CodedCache
    capacity: int | None
    model: dict[str, Any] | None  # what is known of it, by which a saved cache is told from one of another model

    def __init__(self, config: Any, max_cache_len: int | None = None, **spec: Any):
        config = config_of(config)
        like: Cache = DynamicCache(config=config)
        if max_cache_len is not None:
            check_whole("max_cache_len", max_cache_len, 1)
            like = StaticCache(config, max_cache_len=max_cache_len)
        _adopt(like, config, spec)
        super().__init__(layers=like.layers)
        self.coded, self.capacity, self.model = like.coded, max_cache_len, like.model  # type: ignore[attr-defined]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' own.

        Raises:
            RuntimeError: the model has more layers than the cache.
        """
        if layer_idx >= len(self.layers):
            compat.refuse(
                f"sphkv: a model of {layer_idx + 1} layers or more with a cache of {len(self.layers)}; expected the "
                "one that it was made for. Give this model a cache of its own, made with its config"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, as :meth:`SphericalLayer.crop` does; a number that is wrong changes no layer."""
        super().crop(-_to_remove(tokens_to_remove, int(self.get_seq_length())))

    def reset(self) -> None:
        """Begin anew with the same shapes and budget."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):  # older transformers fill it with zeros, which stay
                layer.keys = layer.values = None
                layer.is_initialized = False

    def save(self, path: str | os.PathLike) -> None:
        """Write all of it to a safetensors file, from which a model goes on as if nothing had happened.

        Raises: as :func:`sphkv_compile.integrations.saved.save`.
        """
        saved.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any, device: torch.device | str = "cpu") -> SphericalCache:
        """What :meth:`save` wrote, for the same model: layers, heads and sizes are compared, no weights.

        Raises: as :func:`sphkv_compile.integrations.saved.load`.
        """
        return saved.load(cls, path, config, device)


def adopt(cache: Cache, config: Any = None, **spec: Any) -> SphericalCache:
    """Make ``cache`` hold codes from here on; what it holds already is encoded.

    Args:
        cache: a StaticCache, or a DynamicCache that was made with a config or has been used.
        config: the model's; a budget needs it, for the number of query heads, and :meth:`SphericalCache.save`.
        spec: as of :class:`SphericalCache`.

    Returns:
        The same object, which is a SphericalCache now.

    Raises:
        TypeError, ValueError: as of :class:`SphericalCache`; or a layer that is none of transformers' static and
            dynamic ones: nothing has changed.
    """
    _adopt(cache, None if config is None else config_of(config), spec)
    cache.__class__ = SphericalCache
    return cache  # type: ignore[return-value]


def _adopt(cache: Any, config: Any, spec: dict[str, Any]) -> None:
    wanted = CacheSpec.from_options(spec)
    full = full_layers(cache, config, wanted)
    facts = None if config is None else facts_of(config)
    coded = CodedCache(wanted, len(full), group_of(facts) if facts else 1)
    if facts and full:
        coded.check(facts["head_dim"], getattr(config.get_text_config(decoder=True), "dtype", None))
    new = {i: _spherical(coded, cache.layers[i]) for i in full}  # all or none
    cache.coded, cache.model, cache.layer_class_to_replicate = coded, facts, None
    cache.capacity = max(
        (layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)), default=None
    )
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            _sliding(coded, layer)
        cache.layers[i] = new.get(i, layer)


def _sliding(coded: CodedCache, layer: Any) -> None:
    layer.__class__, layer.coded = SlidingLayer, coded
    layer.texts = {name: str(Layout.of(coded.spec, packing=name)) for name in ("rows", "tiles")}
    if layer.is_initialized:
        layer.stored = str(coded.layout(layer.k_head_dim, layer.v_head_dim, layer.device, False))


def _spherical(coded: CodedCache, layer: Any) -> SphericalLayer:
    new = SphericalLayer(coded, getattr(layer, "max_cache_len", None))
    if layer.is_initialized:
        new.lazy_initialization(layer.keys, layer.values)
        if length := int(layer.get_seq_length()):
            new.update(layer.keys[:, :, :length], layer.values[:, :, :length])
            new.codes.settle()
    return new
