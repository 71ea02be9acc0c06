"""RoPE is recognised in every family's spelling, and nothing that is almost RoPE passes for it."""

import pytest
import torch
from one_attention import attention_call
from torch.nn.functional import scaled_dot_product_attention

from sphkv_compile.passes.normalize import K, markers
from sphkv_compile.passes.rope import NONE, angles_of, rope_of
from sphkv_compile.passes.text import capture
from sphkv_compile.testing.tiny import FAMILIES, tiny, tiny_gpt_fast

D = 16
IDS = torch.ones(1, 3, dtype=torch.long)
EXPECTED = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma3"), ("half", D)),
    "phi3": ("half", D // 2),
    "glm": ("interleaved", D // 2),
    "cohere": ("interleaved", D),
    "smollm3": ("half", D),
}
IN_BFLOAT16 = [(family, torch.bfloat16) for family in ("llama", "cohere")]
"""One of each layout; cohere rotates in float32 and casts back."""
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=1024)


def seen(function, *args, **kwargs):
    """What is recognised in the one attention of a call."""
    gm, _ = capture(function, *args, **kwargs)
    (marker,) = markers(gm.graph)
    return rope_of(marker.args[K])


@pytest.mark.parametrize("family, dtype", [(family, torch.float32) for family in FAMILIES] + IN_BFLOAT16, ids=str)
def test_families(family, dtype):
    attention, args, kwargs = attention_call(tiny(family, layers=1, dtype=dtype), 0, IDS, use_cache=False)
    assert seen(attention, *args, **kwargs) == EXPECTED[family]


def test_scaled_rope():
    """YaRN scales cos and sin, which changes no pair."""
    model = tiny("llama", layers=1, rope_parameters=YARN)
    attention, args, kwargs = attention_call(model, 0, IDS, use_cache=False)
    assert seen(attention, *args, **kwargs) == ("half", D)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "glm", "cohere"])
def test_angles_are_found(family):
    """What they are is tests/runtime's to say."""
    gm, _ = capture(tiny(family, layers=1), input_ids=IDS, use_cache=False)
    (marker,) = markers(gm.graph)
    node = angles_of(marker.args[K])
    assert node is not None and tuple(node.meta["val"].shape[:2]) == (1, 3)
    assert node.meta["val"].shape[-1] in (EXPECTED[family][1], EXPECTED[family][1] // 2)


def test_layer_without_rope():
    attention, args, kwargs = attention_call(tiny("smollm3"), 1, IDS, use_cache=False)
    assert seen(attention, *args, **kwargs) == NONE


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_gpt_fast(layout):
    model = tiny_gpt_fast(layers=1, rope_layout=layout)
    model.setup_caches(1, 8)
    model.layers[0].attention.kv_cache = None  # the key itself, not the cache that it is written to
    x, mask = torch.randn(1, 3, 64), torch.ones(3, 3, dtype=torch.bool)
    assert seen(model.layers[0].attention, x, model.freqs_cis[:3], mask, torch.arange(3)) == (layout, D)


# ---- spellings. x, y [B, H, T, D]; c, s: cosines and sines [T, D]; C, S: the same [T, D / 2]


def halves(x):
    return x[..., : D // 2], x[..., D // 2 :]


def turn(x):
    a, b = halves(x)
    return torch.cat([-b, a], -1)


def in_turn(a, b):
    return torch.stack([a, b], -1).flatten(-2)


def pairs(x, C, S, join=in_turn, part=lambda x: (x[..., ::2], x[..., 1::2])):
    a, b = part(x)
    return join(a * C - b * S, b * C + a * S)


def side_by_side(a, b):
    return torch.cat([a, b], -1)


RIGHT = {
    "operands the other way round": ("half", D, lambda x, y, c, s, C, S: s * turn(x) + c * x),
    "joined after a cast": ("half", D, lambda x, y, c, s, C, S: (x.double() * c + turn(x.double()) * s).float()),
    "chunks": ("half", D, lambda x, y, c, s, C, S: pairs(x, C, S, side_by_side, lambda x: x.chunk(2, -1))),
    "pairs of halves": ("half", D, lambda x, y, c, s, C, S: pairs(x, C, S, side_by_side, halves)),
    "pairs of neighbours": ("interleaved", D, lambda x, y, c, s, C, S: pairs(x, C, S)),
    "neighbours by unbinding": (
        "interleaved",
        D,
        lambda x, y, c, s, C, S: pairs(x, C, S, part=lambda x: x.unflatten(-1, (-1, 2)).unbind(-1)),
    ),
    "neighbours by selecting": (
        "interleaved",
        D,
        lambda x, y, c, s, C, S: pairs(
            x, C, S, part=lambda x: (x.view(1, 2, 3, 8, 2)[..., 0], x.view(1, 2, 3, 8, 2)[..., 1])
        ),
    ),
    "neighbours turned": (
        "interleaved",
        D,
        lambda x, y, c, s, C, S: x * c + in_turn(-x[..., 1::2], x[..., ::2]) * s,
    ),
    "tokens before heads": (
        "half",
        D,
        lambda x, y, c, s, C, S: (lambda z: z * c[:, None] + turn(z) * s[:, None])(x.transpose(1, 2)).transpose(1, 2),
    ),
    "the first half of the head": (
        "interleaved",
        D // 2,
        lambda x, y, c, s, C, S: torch.cat([pairs(x[..., :8], C[:, :4], S[:, :4]), x[..., 8:]], -1),
    ),
}

WRONG = {
    "no rotation": lambda x, y, c, s, C, S: x,
    "no turn": lambda x, y, c, s, C, S: x * c + x * s,
    "difference": lambda x, y, c, s, C, S: x * c - turn(x) * s,
    "turn without a sign": lambda x, y, c, s, C, S: x * c + side_by_side(*reversed(halves(x))) * s,
    "turn with the other sign": lambda x, y, c, s, C, S: x * c + side_by_side(halves(x)[1], -halves(x)[0]) * s,
    "turn of quarters": lambda x, y, c, s, C, S: x * c + torch.cat([-x[..., 4:], x[..., :4]], -1) * s,
    "turn of another tensor": lambda x, y, c, s, C, S: x * c + turn(y) * s,
    "half of another tensor": lambda x, y, c, s, C, S: x * c + torch.cat([-y[..., 8:], x[..., :8]], -1) * s,
    "the other half of another": lambda x, y, c, s, C, S: x * c + torch.cat([-x[..., 8:], y[..., :8]], -1) * s,
    "neighbours joined side by side": lambda x, y, c, s, C, S: x * c + torch.cat([-x[..., 1::2], x[..., ::2]], -1) * s,
    "halves joined in turn": lambda x, y, c, s, C, S: x * c + in_turn(-x[..., 8:], x[..., :8]) * s,
    "pairs of halves joined in turn": lambda x, y, c, s, C, S: pairs(x, C, S, in_turn, halves),
    "pairs joined the other way round": lambda x, y, c, s, C, S: pairs(x, C, S, lambda a, b: in_turn(b, a)),
    "pairs with the wrong sign": lambda x, y, c, s, C, S: pairs(x, C, -S, lambda a, b: in_turn(a, b.neg())),
    "pairs with two differences": lambda x, y, c, s, C, S: in_turn(
        x[..., ::2] * C - x[..., 1::2] * S, x[..., 1::2] * C - x[..., ::2] * S
    ),
    "the same pair twice": lambda x, y, c, s, C, S: in_turn(
        x[..., ::2] * C - x[..., 1::2] * S, x[..., ::2] * C + x[..., 1::2] * C
    ),
    "pairs of two tensors": lambda x, y, c, s, C, S: pairs(x, C, S, part=lambda x: (x[..., ::2], y[..., 1::2])),
    "shuffled afterwards": lambda x, y, c, s, C, S: (x * c + turn(x) * s).unflatten(-1, (2, -1)).mT.flatten(-2),
    "tokens and dimensions exchanged": lambda x, y, c, s, C, S: (x * c + turn(x) * s).mT.reshape(1, 2, 3, D),
    "a rotation of the first half, then a sum": lambda x, y, c, s, C, S: (
        y + torch.cat([pairs(x[..., :8], C[:, :4], S[:, :4]), x[..., 8:]], -1)
    ),
}


@pytest.fixture(scope="module")
def recognised():
    """What is seen in each spelling: one graph with an attention for each, in order."""
    torch.manual_seed(0)
    spellings = {**{name: spelling for name, (*_, spelling) in RIGHT.items()}, **WRONG}

    def attentions(*args):
        return [scaled_dot_product_attention(args[1], spelling(*args), args[1]) for spelling in spellings.values()]

    gm, out = capture(attentions, *torch.randn(2, 1, 2, 3, D), *torch.randn(2, 3, D), *torch.randn(2, 3, D // 2))
    found = markers(gm.graph)
    assert len(found) == len(out) == len(spellings)
    return dict(zip(spellings, (rope_of(marker.args[K]) for marker in found)))


@pytest.mark.parametrize("name", RIGHT)
def test_spelling(recognised, name):
    assert recognised[name] == RIGHT[name][:2]


@pytest.mark.parametrize("name", WRONG)
def test_almost(recognised, name):
    assert recognised[name] == NONE
