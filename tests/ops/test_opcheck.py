"""The operators keep torch.library's contract: schemas tell what is mutated, fakes tell shapes, AOTAutograd agrees."""

import pytest
import torch

from sphkv_compile.ops import schema
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry
from sphkv_compile.testing.oracle import Pair, random_tokens

LAYOUT = Layout("axis_cosine", (Tier(4, 2),), 2, 8, 16, 8, 0, "half", 16)


def filled(count=60, v_dim=16, rolling=False):
    g = Geometry(2, 2, 64, 16, v_dim, torch.float32, torch.float32, rolling)
    return g, Pair(LAYOUT, g).chunks(random_tokens(g, count), (count,), [0, 7]).state


def causal(first, count, columns=64):
    return (torch.arange(columns) <= (first + torch.arange(count)).unsqueeze(1)).expand(2, 1, count, columns)


def as_models_have_them(q, k, v):
    """Heads split off the hidden size: dense along tokens, strided along heads."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


CALLS = {
    "pos": (60, 1, False, dict(pos=torch.tensor([60]))),
    "start": (60, 2, False, dict(start=60)),
    "next": (60, 1, False, dict()),
    "chunk_that_encodes": (24, 20, False, dict(start=24)),
    "rolling": (64, 1, True, dict()),
}


@pytest.mark.parametrize("name", CALLS)
def test_attend(name):
    first, count, rolling, where = CALLS[name]
    g, state = filled(first, rolling=rolling)
    mask = causal(min(first, 63), count)
    place = where.get("pos"), where.get("start")
    args = (*state, *as_models_have_them(*random_tokens(g, count)), *place, 64, mask, False, None, str(LAYOUT), rolling)
    torch.library.opcheck(schema.attend, args)


@pytest.mark.parametrize("name", CALLS)
def test_append(name):
    first, count, rolling, where = CALLS[name]
    g, state = filled(first, rolling=rolling)
    place = where.get("pos"), where.get("start")
    args = (
        *state,
        *as_models_have_them(*random_tokens(g, count)),
        *place,
        causal(min(first, 63), count),
        str(LAYOUT),
        rolling,
    )
    torch.library.opcheck(schema.append, args)


@pytest.mark.parametrize("gqa", [False, True])
def test_sdpa(gqa):
    q, k, v = torch.randn(2, 4, 3, 16), *torch.randn(2, 2, 2 if gqa else 4, 9, 16)
    torch.library.opcheck(schema.sdpa, (q, k, v, None, 0.0, False, None, gqa))
    torch.library.opcheck(schema.sdpa, (q, k, v, torch.ones(3, 7, dtype=torch.bool), 0.0, False, 0.3, gqa, 7))


def test_owned_is_only_for_graphs():
    """Its kernel raises; the schema and the fake are all that a graph needs."""
    fake = torch.library.opcheck(schema.owned, (torch.randn(2),), test_utils="test_autograd_registration")
    assert fake == {"test_autograd_registration": "SUCCESS"}
    with pytest.raises(RuntimeError, match="held as codes"):
        schema.owned(torch.randn(2))


def test_the_fakes_tell_dtype_and_shape():
    """Values narrower than keys: the output is as wide as values, in the queries' dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    g, state = filled(v_dim=8)
    q, k, v = random_tokens(g, 3)
    real = (*state, q, k, v, None, 50, 64, causal(50, 3), False, None, str(LAYOUT), False)
    expected = schema.attend(*real)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = schema.attend(*real)
    assert fake.shape == expected.shape == (2, 4, 3, 8)
    assert (fake.dtype, fake.stride()) == (expected.dtype, expected.stride())
