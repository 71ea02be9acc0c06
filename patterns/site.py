"""What a match is: one attention over one KV cache, everything that a rewrite needs, and the reasons for saying no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sphkv_compile.codecs.rotation import rotation
from sphkv_compile.ops import schema
from sphkv_compile.storage.state import DTYPES

aten = torch.ops.aten

REFUSALS: dict[str, str] = {
    "grad_mode": "autograd is on; codes are for inference",
    "not_sdpa": "attention is written as matmul and softmax (soft cap, learned sinks, attn_implementation='eager')",
    "no_cache_write": "K and V do not come from a cache: plain attention, or the first prefill of a growing cache",
    "unknown_write": "K and V come from an operation that no idiom describes (a window, a latent or quantised cache)",
    "rank": "queries and cache are not both [batch, heads, tokens, head_dim] with one batch size",
    "dropout": "dropout_p is not zero",
    "head_counts": "query heads are not a whole multiple of the cache's heads",
    "head_dim": "no rotation is known for this head_dim",
    "dtype": "the cache is not float32, float16 or bfloat16",
    "shared_buffer": "K and V are one tensor",
    "not_an_input": "the cache is computed inside the graph, so it cannot be replaced by codes",
    "not_stored": "the write is not stored back to the cache whole, exactly once",
    "other_readers": "something besides this attention reads the cache",
    "value_shape": "the written value is not one token per query, whole and in the cache's dtype",
    "scattered": "the cache is written by a mask or a table, not by one integer position per token",
    "unmasked_slots": "no mask hides the slots after the newest token",
    "partial_read": "the attention reads a part of the cache that may lack the newest tokens",
    "shared_storage": "K and V share memory with each other or with another tensor, which freeing would break",
}
"""Why a site stays dense: code -> sentence. The README's table is generated from this."""

INSTEAD: dict[str, str] = {
    "grad_mode": "call the model under torch.inference_mode() or torch.no_grad()",
    "not_sdpa": "load the model with attn_implementation='sdpa'; soft caps and learned sinks have no way yet",
    "no_cache_write": "pass a cache, such as transformers' StaticCache, and look at a decode step",
    "unknown_write": "keep keys and values in StaticCache, DynamicCache, or buffers written as buf[:, :, pos] = new",
    "rank": "store [batch, kv heads, tokens, head_dim], with as many rows as the queries have",
    "dropout": "call model.eval(), or pass dropout_p=0.0",
    "head_counts": "store heads that divide the query heads, as many for V as for K, and pass enable_gqa=True",
    "head_dim": "expected a multiple of 8 such as 64, 128 or 256; pad head_dim to the next one",
    "dtype": "give the cache the model's dtype, bfloat16 or float16, or float32",
    "shared_buffer": "keep K and V in two tensors",
    "not_an_input": "hold the cache as a buffer or an argument of what is compiled, and write into it in place",
    "not_stored": "write into the buffer in place (buf[:, :, pos] = new), once a step",
    "other_readers": "let only the attention read the cache in the compiled function, and read it in eager code",
    "value_shape": "write exactly the step's keys and values, cast to the cache's dtype",
    "scattered": "write at an int64 tensor of consecutive positions, one for each new token",
    "unmasked_slots": "pass an attn_mask of as many columns as are read, which hides those not written yet",
    "partial_read": "read the columns up to the newest token, or all under a mask",
    "shared_storage": "give K and V storage of their own (.clone())",
}
"""What a user can do about it: code -> the nearest way of writing it that is matched."""


@dataclass(frozen=True)
class Refusal:
    """A reason for leaving a site dense.

    Args:
        code: a key of :data:`REFUSALS`.
        detail: the node or number at fault.
    """

    code: str
    detail: str = ""

    def __str__(self) -> str:
        return REFUSALS[self.code] + (f" [{self.detail}]" if self.detail else "") + f"; {INSTEAD[self.code]}"


@dataclass
class Site:
    """One attention over one KV cache.

    Args:
        node: the marker ``sphkv.sdpa``.
        pos: node of the int64[T] columns written, or None.
        start: first column written, where a slice says it; a node or an int.
        columns: how many columns the attention reads.
        rolling: each write shifts the columns by one.
        stores: nodes that put the written buffers back; they die with the dense write.
        outputs: where the written buffers are graph outputs instead.
        stored: how the cache says that it is stored (:mod:`sphkv_compile.integrations.cache`), as a layout's string.
        rope, angles: layout, rotated dimensions and angles of the rotary embedding (:mod:`sphkv_compile.passes.rope`).

    Shapes: q [B, HQ, T, D], k [B, H, T, D], v [B, H, T, Dv], k_buf [B, H, L, D], v_buf [B, H, L, Dv].
    """

    idiom: str
    node: Node
    q: Node
    k: Node
    v: Node
    k_buf: Node
    v_buf: Node
    mask: Node | None
    is_causal: bool
    scale: float | None
    pos: Node | None = None
    start: Node | int | None = None
    columns: Node | int | None = None
    rolling: bool = False
    stores: tuple[Node, ...] = ()
    outputs: tuple[Node, ...] = ()
    stored: str | None = None
    rope: tuple[str, int] = ("none", 0)
    angles: Node | None = None


def attention(k: PatternExpr, v: PatternExpr) -> CallFunction:
    """The normalised attention whose keys and values are ``k`` and ``v``; every argument is captured."""
    names = ("mask", "dropout_p", "is_causal", "scale", "enable_gqa", "columns")
    return CallFunction(schema.sdpa, KeywordArg("q"), k, v, *map(KeywordArg, names), _users=MULTIPLE)


def call(target: Any, *args: Any) -> CallFunction:
    """An inner node of a pattern, with any number of users: who else may read it is for ``check`` to say."""
    return CallFunction(target, *args, _users=MULTIPLE)


def base_site(idiom: str, match: Match, **extra: Any) -> Site:
    """A site from what every pattern captures."""
    c = match.kwargs
    return Site(
        idiom, match.output_node(), c["q"], c["k"], c["v"], c["k_buf"], c["v_buf"],
        c["mask"], c["is_causal"], c["scale"], columns=c["columns"], **extra,
    )  # fmt: skip


def writes(match: Match) -> tuple[Node, Node]:
    """The nodes that the attention reads as keys and values."""
    return match.output_node().args[1], match.output_node().args[2]


def shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def size(x: Any) -> Any:
    """A size as a number, be it in the graph as a node or as it is."""
    return x.meta["val"] if isinstance(x, Node) else x


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal in every call. ``==`` may ask for less: it compiles anew once they are not."""
    return statically_known_true(a == b)


def check_attention(match: Match) -> Refusal | None:
    """The conditions on the attention itself, whatever the idiom."""
    c = match.kwargs
    k_buf, v_buf, q = c["k_buf"], c["v_buf"], c["q"]
    if refusal := _check_rank(q, k_buf, v_buf):
        return refusal
    if c["dropout_p"] != 0:
        return Refusal("dropout", f"dropout_p={c['dropout_p']}")
    if k_buf is v_buf:
        return Refusal("shared_buffer", k_buf.name)
    for buf in (k_buf, v_buf):
        if buf.op != "placeholder":
            return Refusal("not_an_input", buf.name)
        if buf.meta["val"].dtype not in DTYPES.values():
            return Refusal("dtype", f"{buf.name}: {buf.meta['val'].dtype}")
    heads, group_heads = shape(k_buf)[1], shape(q)[1]
    grouped = c["enable_gqa"] or heads == 1  # torch broadcasts a single kv head to all query heads, as a group of them
    if shape(v_buf)[1] != heads or group_heads % heads or (group_heads != heads and not grouped):
        return Refusal("head_counts", f"{group_heads} query heads, {heads} and {shape(v_buf)[1]} in the cache")
    return _check_head_dim(k_buf) or _check_head_dim(v_buf) or _check_mask(match) or _check_values(match)


def _check_rank(q: Node, k_buf: Node, v_buf: Node) -> Refusal | None:
    """Patterns count dimensions from the left, so that a cache without batch would be written along another."""
    shapes = [shape(x) for x in (q, k_buf, v_buf)]
    if any(len(s) != 4 or s[0] != shapes[0][0] for s in shapes):
        return Refusal("rank", f"queries {list(shapes[0])}, keys {list(shapes[1])}, values {list(shapes[2])}")
    return None


def _check_head_dim(buf: Node) -> Refusal | None:
    dim = int(shape(buf)[-1])  # a symbolic size is fixed by a guard
    try:
        rotation(dim)
    except ValueError as error:
        return Refusal("head_dim", f"{buf.name}: {error}")
    return Refusal("head_dim", f"{buf.name}: {dim} is no multiple of 8") if dim % 8 else None


def _check_mask(match: Match) -> Refusal | None:
    """A mask must say something of each column: one that is broadcast over the columns cannot hide a slot."""
    mask, columns = match.kwargs["mask"], match.kwargs["columns"]
    read = shape(match.kwargs["k_buf"])[2] if columns is None else size(columns)
    if mask is not None and same(shape(mask)[-1], 1) and not same(read, 1):
        return Refusal("unmasked_slots", f"{mask.name} says the same of every column")
    return None


def _check_values(match: Match) -> Refusal | None:
    """The written values must be the whole new tokens, in the cache's dtype."""
    c, t = match.kwargs, tokens(match)
    for value, buf in ((c["k"], c["k_buf"]), (c["v"], c["v_buf"])):
        b, h, _, d = shape(buf)
        have = value.meta["val"]
        whole = tuple(have.shape) == (b, h, t, d)
        # Item assignment squeezes leading ones away; as many elements are left, so nothing is broadcast.
        squeezed = 0 < have.dim() < 4 and have.shape[-1] == d and have.numel() == b * h * t * d
        if have.dtype != buf.meta["val"].dtype or not (whole or squeezed):
            return Refusal("value_shape", f"{value.name}: {have.dtype} {list(have.shape)} for {t} tokens")
    return None


def tokens(match: Match) -> Any:
    """New tokens of this step: queries and written values agree on it."""
    return shape(match.kwargs["q"])[2]


def check_shown(match: Match, end: Any = None) -> Refusal | None:
    """The attention reads up to the newest token, and what lies behind that is hidden from it.

    Args:
        end: columns written so far, where the graph says it.
    """
    c = match.kwargs
    columns = size(c["columns"])
    read = shape(c["k_buf"])[2] if columns is None else columns
    detail = f"{read} columns are read" + ("" if end is None else f", {end} are written")
    if c["mask"] is None and not c["is_causal"] and not same(read, end):
        return Refusal("unmasked_slots", detail)
    # Without a position in the graph, the mask's own width is the user's word that it covers the newest token.
    if columns is not None and (c["mask"] is None if end is None else not statically_known_true(columns >= end)):
        return Refusal("partial_read", detail)
    return None


def check_stored(match: Match, allowed: dict[Node, tuple[Node, ...]] | None = None) -> Refusal | None:
    """Each write goes back to its buffer by exactly one ``copy_``, and nobody else reads buffer or write.

    Args:
        allowed: further readers of a buffer that the idiom itself brings.
    """
    node = match.output_node()
    for buf, write in zip((match.kwargs["k_buf"], match.kwargs["v_buf"]), writes(match)):
        stores = [u for u in buf.users if u.target is aten.copy_.default and u.args[0] is buf]
        if len(stores) != 1 or stores[0].args[1] is not write:
            return Refusal("not_stored", buf.name)
        known = {write, stores[0], node, *(allowed or {}).get(buf, ())}
        if others := {*buf.users, *write.users} - known:
            return Refusal("other_readers", f"{buf.name}: {', '.join(sorted(n.name for n in others))}")
    return None


def stores(match: Match) -> tuple[Node, ...]:
    """The ``copy_`` nodes that :func:`check_stored` proved."""
    bufs = match.kwargs["k_buf"], match.kwargs["v_buf"]
    return tuple(u for buf in bufs for u in buf.users if u.target is aten.copy_.default and u.args[0] is buf)
