"""How tight the bounds of codecs/THEORY.md are on real keys, and what key geometry does to the codes.

    python examples/eval/tightness.py [--model smollm2] [--tokens 768] [--out examples/eval/tightness.json]

The model reads Python's own language reference (``pydoc_data``). Its queries, keys and values are taken as they enter
attention, after RoPE; one layer in three is measured. Sinks are exact; spans have 128 tokens; scales are fitted on the
first 512 tokens; rows are counted from token 512 on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sphkv_compile.codecs import bounds, get_codec
from sphkv_compile.codecs.keys import decode_keys, encode_keys, rotate_query
from sphkv_compile.codecs.rotation import rotate, rotation
from sphkv_compile.codecs.scales import pair_scale
from sphkv_compile.codecs.values import decode_values, encode_values
from sphkv_compile.integrations.models import load_bundled

SINK, SPAN, FIT = 4, 128, 512


@dataclass
class Layer:
    """One layer's tensors after RoPE. Shapes: q [HKV, G, S, D], k and v [HKV, S, D], visible bool[S, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    softmax_scale: float

    def weights(self, k: Tensor) -> Tensor:
        """Attention of every row to every token. Shapes: [HKV, S, D] -> [HKV, G, S, S]."""
        logits = self.q @ k[:, None].mT * self.softmax_scale
        return logits.masked_fill(~self.visible, -math.inf).softmax(-1)


def capture(name: str, tokens: int) -> tuple[list[Layer], Tensor | None]:
    """Every third layer of a bundled model on the reference text, and its RoPE frequencies if all layers share them."""
    from pydoc_data.topics import topics

    model, tokenizer = load_bundled(name)
    text = "\n".join(topics[key] for key in sorted(topics))
    ids = tokenizer(text[: tokens * 12], return_tensors="pt").input_ids[:, :tokens]
    with torch.no_grad(), _recorded() as calls:
        model(ids)
    return [_layer(*call) for call in calls[::3]], getattr(model.model.rotary_emb, "inv_freq", None)


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple]]:
    calls: list[tuple] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        calls.append((q[0], k[0], v[0], attn_mask, options.get("scale")))
        return original(q, k, v, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = record
    try:
        yield calls
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def _layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Layer:
    k, v = (_without_repeats(x) for x in (k, v))
    size = k.shape[1]
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    if mask is not None:
        visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    return Layer(q.unflatten(0, (k.shape[0], -1)), k, v, visible, scale or q.shape[-1] ** -0.5)


def _without_repeats(x: Tensor) -> Tensor:
    """Heads that repeat the one before them (repeat_kv) are dropped."""
    new = [0] + [h for h in range(1, len(x)) if not torch.equal(x[h], x[h - 1])]
    return x[new]


def scales(layer: Layer, scaled: bool, centred: bool = True) -> Tensor:
    """Per-pair scales from the first FIT tokens. Shapes: -> [HKV, D]."""
    k, q = layer.k[:, SINK:FIT].double(), layer.q[:, :, SINK:FIT].double()
    if centred:
        k = torch.cat([part - part.mean(1, keepdim=True) for part in k.split(SPAN, 1)], 1)
    dim = k.shape[-1]
    return pair_scale((k**2).mean(1), (q**2).mean((1, 2)), "half" if scaled else None, dim)


def coded_keys(layer: Layer, codec_name: str, bits: int, scale: Tensor, rot: Tensor, anchor: bool = True) -> Tensor:
    """Keys after a round trip through codes, span by span; sinks exact."""
    codec, dim = get_codec(codec_name), layer.k.shape[-1]
    parts = [layer.k[:, :SINK]]
    for part in layer.k[:, SINK:].split(SPAN, 1):
        span = encode_keys(part, scale, rot, codec, bits, use_anchor=anchor)
        parts.append(decode_keys(span, dim, scale, rot, codec, bits))
    return torch.cat(parts, 1)


def tightness(layer: Layer, codec_name: str, bits: int) -> dict[str, float]:
    """Each bound against what happened, over all rows from FIT on and all tokens they see."""
    dim, rot = layer.k.shape[-1], rotation(layer.k.shape[-1])
    scale = scales(layer, True)
    k_hat = coded_keys(layer, codec_name, bits, scale, rot)
    q = rotate_query(layer.q, scale[:, None, None], rot)[:, :, FIT:] * layer.softmax_scale
    error = rotate((layer.k - k_hat) / scale[:, None], rot)[:, None]
    dl = q @ error.mT  # [HKV, G, rows, S]
    seen = layer.visible[FIT:].clone()
    coded = seen.clone()
    coded[:, :SINK] = False
    coded = coded.expand_as(dl)

    by_pair = _pair_lengths(q) @ _pair_lengths(error).mT
    by_norm = q.norm(dim=-1)[..., None] * error.norm(dim=-1)[:, :, None]
    b1, b2 = (dl.abs() / by_pair)[coded], (dl.abs() / by_norm)[coded]
    z = (dl / by_norm * math.sqrt(dim))[coded]
    out = {"b1_mean": b1.mean(), "b1_max": b1.max(), "b2_mean": b2.mean(), "b2_max": b2.max()}
    out |= {"b3_std": z.std(), "b3_max": z.abs().max()}
    return {key: float(value) for key, value in (out | _rows(layer, k_hat, dl, seen, q, error, rot, bits)).items()}


def _pair_lengths(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.hypot(first, second)


def _rows(
    layer: Layer, k_hat: Tensor, dl: Tensor, seen: Tensor, q: Tensor, error: Tensor, rot: Tensor, bits: int
) -> dict[str, Tensor]:
    """B4 and B6 per attention row, and the precision law KL = Var(dl) / 2."""
    p, p_hat = layer.weights(layer.k)[:, :, FIT:], layer.weights(k_hat)[:, :, FIT:]
    v = layer.v[:, None]
    moved = ((p_hat - p) @ v).norm(dim=-1)
    width = dl.masked_fill(~seen, -math.inf).amax(-1) - dl.masked_fill(~seen, math.inf).amin(-1)
    far = dl.masked_fill(~seen, 0).abs().amax(-1)
    diameter = torch.stack([torch.cdist(head, head).max() for head in layer.v])[:, None, None]
    b4 = moved / bounds.output_bound(width, diameter)
    classic = ((2 * far).exp() - 1) * layer.v.norm(dim=-1).amax(-1)[:, None, None]
    variation = (p - p_hat).abs().sum(-1) / 2 / bounds.variation_bound(width)
    spread = (p * dl**2).sum(-1) - (p * dl).sum(-1) ** 2
    kl = (p * (p.clamp_min(1e-30) / p_hat.clamp_min(1e-30)).log()).sum(-1)

    v_hat = decode_values(*encode_values(layer.v, rot, bits), v.shape[-1], rot, bits)
    v_hat[:, :SINK] = layer.v[:, :SINK]
    actual = ((p_hat @ v_hat[:, None] - p @ v) ** 2).sum(-1)
    predicted = bounds.output_mse(p, q.norm(dim=-1), error.norm(dim=-1), v, v_hat[:, None], q.shape[-1])
    return {
        "b4_mean": b4.mean(),
        "b4_max": b4.max(),
        "b4_variation_mean": variation.mean(),
        "b4_times_tighter_than_classic": (classic / bounds.output_bound(width, diameter)).median(),
        "b6_root_ratio": (actual.mean() / predicted.mean()).sqrt(),
        "kl": kl.mean(),
        "kl_over_half_variance": kl.mean() / (spread.mean() / 2),
    }


def output_error(layer: Layer, k_hat: Tensor) -> Tensor:
    """Attention output error from keys alone, relative to the output: root of summed squares."""
    o = layer.weights(layer.k)[:, :, FIT:] @ layer.v[:, None]
    o_hat = layer.weights(k_hat)[:, :, FIT:] @ layer.v[:, None]
    return ((o_hat - o).square().sum() / o.square().sum()).sqrt()


def value_rules(layer: Layer, bits: int) -> dict[str, float]:
    """Output error from coded values under the two scale rules: keep the length, or least squares."""
    rot = rotation(layer.v.shape[-1])
    kept = decode_values(*encode_values(layer.v, rot, bits), layer.v.shape[-1], rot, bits)
    shrink = (layer.v * kept).sum(-1, keepdim=True) / kept.square().sum(-1, keepdim=True)
    p = layer.weights(layer.k)[:, :, FIT:, SINK:]
    o = layer.weights(layer.k)[:, :, FIT:] @ layer.v[:, None]
    out = {}
    for name, v_hat in (("kept_length", kept), ("least_squares", shrink * kept)):
        moved = p @ (v_hat - layer.v)[:, None, SINK:]
        out[f"{bits} bits, {name}"] = float((moved.square().sum() / o.square().sum()).sqrt())
    return out


def geometry(layer: Layer, inv_freq: Tensor | None) -> dict[str, float]:
    """What anchors and scales buy at 4 bits, at home, with a large constant in the keys, and 30000 tokens away."""
    dim, rot, ones = layer.k.shape[-1], rotation(layer.k.shape[-1]), torch.ones(layer.k.shape[0], layer.k.shape[-1])
    k = layer.k[:, SINK:]
    constant = k.mean(1, keepdim=True)
    out = {"constant_energy": constant.square().sum() * k.shape[1] / k.square().sum()}
    bias = torch.randn(k.shape[0], 1, dim, generator=torch.Generator().manual_seed(0))
    bias = bias / bias.norm(dim=-1, keepdim=True) * k.norm(dim=-1).mean()
    for times in (0, 3, 10):
        biased = Layer(layer.q, layer.k + times * bias, layer.v, layer.visible, layer.softmax_scale)
        for anchor in (False, True):
            for scaled in (False, True):
                scale = scales(biased, scaled, anchor) if scaled else ones
                name = f"bias{times}_{'anchor' if anchor else 'plain'}_{'scaled' if scaled else 'unscaled'}"
                out[name] = output_error(biased, coded_keys(biased, "axis_cosine", 4, scale, rot, anchor))
    scale = scales(layer, True)
    for offset in () if inv_freq is None else (0, 30000):
        there = shifted(layer, inv_freq, offset)
        mean = k[:, : FIT - SINK].mean(1, keepdim=True)  # of the keys at home, used there
        fixed = Layer(there.q, there.k - mean, there.v, there.visible, there.softmax_scale)
        out[f"offset{offset}_fixed_mean"] = output_error(
            fixed, coded_keys(fixed, "axis_cosine", 4, scale, rot, anchor=False)
        )
        out[f"offset{offset}_span_anchor"] = output_error(there, coded_keys(there, "axis_cosine", 4, scale, rot))
    return {key: float(value) for key, value in out.items()}


def shifted(layer: Layer, inv_freq: Tensor, offset: int) -> Layer:
    """The same layer as if the text began ``offset`` tokens later: RoPE turns queries and keys alike (half layout)."""
    turn = torch.cat([inv_freq, inv_freq]).double() * offset
    cos, sin = turn.cos().float(), turn.sin().float()

    def rope(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return Layer(rope(layer.q), rope(layer.k), layer.v, layer.visible, layer.softmax_scale)


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean over layers; the largest where the name says max."""
    columns = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            columns[key].append(value)
    return {key: round(max(c) if key.endswith("_max") else sum(c) / len(c), 5) for key, c in columns.items()}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "gemma3"])
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tightness.json"))
    args = parser.parse_args()
    layers, inv_freq = capture(args.model, args.tokens)
    record: dict = json.loads(args.out.read_text()) if args.out.exists() else {}
    result: dict = {"tokens": args.tokens, "layers": len(layers), "head_dim": layers[0].k.shape[-1]}
    for codec in ("axis_cosine", "pair_polar"):
        result[codec] = {f"{bits} bits": summary([tightness(x, codec, bits) for x in layers]) for bits in (4, 3, 2)}
    result["geometry, relative output error at 4 bits"] = summary([geometry(layer, inv_freq) for layer in layers])
    rules = [{k: v for bits in (4, 3, 2) for k, v in value_rules(layer, bits).items()} for layer in layers]
    result["values, relative output error"] = summary(rules)
    record[args.model] = result
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
