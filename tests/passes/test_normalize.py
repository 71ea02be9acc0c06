"""One spelling for each attention: what folds into the marker, what must not, and that its numbers stay."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sphkv_compile.passes.normalize import COLUMNS, GQA, MASK, K, V, markers, normalize, settle
from sphkv_compile.passes.text import capture

L = 6


def repeat_kv(x, group):
    """transformers' own, with its shortcut for one."""
    if group == 1:
        return x
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, group, n, d).reshape(b, h * group, n, d)


def call(function, heads=2, group=1, batch=1, **kwargs):
    """The normalised marker of an attention over (q, k, v), after a check that its output is the function's."""
    q, k, v = torch.randn(batch, heads * group, 2, 8), *torch.randn(2, batch, heads, L, 8)
    gm, out = capture(function, q, k, v, **kwargs)
    torch.testing.assert_close(out, function(q, k, v), rtol=0, atol=2e-6)
    (marker,) = markers(gm.graph)
    return gm, marker


def inputs(marker):
    """Whether keys and values are read as they come."""
    return [marker.args[i].op == "placeholder" for i in (K, V)]


REPEATS = {
    "repeat_kv": repeat_kv,
    "repeat_interleave": lambda x, group: x.repeat_interleave(group, 1),
    "counted from the end": lambda x, group: x.unsqueeze(-3).expand(-1, -1, group, -1, -1).flatten(1, 2),
}


@pytest.mark.parametrize(
    "how, group",
    [
        *(("repeat_kv", n) for n in (1, 3, 5, 8)),
        *(("repeat_interleave", n) for n in (1, 3)),
        ("counted from the end", 3),
    ],
)
def test_repeated_heads_fold(how, group):
    repeat = REPEATS[how]
    _, marker = call(lambda q, k, v: scaled_dot_product_attention(q, repeat(k, group), repeat(v, group)), group=group)
    assert inputs(marker) == [True, True]
    assert marker.args[GQA] or group == 1  # a repetition by one may have left its views


@pytest.mark.parametrize("heads", [1, 2])
def test_grouped_attention_is_the_form_already(heads):
    _, marker = call(lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), heads, group=4)
    assert inputs(marker) == [True, True] and marker.args[GQA] is True


def test_one_head_repeated():
    """No clone stands between then: the expansion can be viewed."""
    _, marker = call(
        lambda q, k, v: scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4)), heads=1, group=4
    )
    assert inputs(marker) == [True, True] and marker.args[GQA] is True


def test_heads_repeated_and_grouped():
    _, marker = call(
        lambda q, k, v: scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), enable_gqa=True), group=6
    )
    assert inputs(marker) == [True, True] and marker.args[GQA] is True


NOT_FOLDED = {
    "heads tiled": lambda q, k, v: (q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
    "group before heads": lambda q, k, v: (q, *(x[:, None].expand(1, 2, 2, L, 8).flatten(1, 2) for x in (k, v))),
    "tokens repeated": lambda q, k, v: (q, *(x.repeat_interleave(2, 2).repeat(1, 2, 1, 1) for x in (k, v))),
    "dimensions repeated": lambda q, k, v: (
        q,
        *(x[..., ::2].unsqueeze(-1).expand(1, 2, L, 4, 2).flatten(-2).repeat(1, 2, 1, 1) for x in (k, v)),
    ),
    "rows repeated": lambda q, k, v: (
        q.unflatten(1, (2, 2)).transpose(1, 2).flatten(0, 1),
        *(x[:, None].expand(1, 2, 2, L, 8).flatten(0, 1) for x in (k, v)),
    ),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_other_repetitions_stay(name):
    _, marker = call(lambda q, k, v: scaled_dot_product_attention(*NOT_FOLDED[name](q, k, v)), group=2)
    assert inputs(marker) == [False, False] and marker.args[GQA] is False


def test_keys_repeated_and_values_tiled():
    """Folding one side alone would lose which query reads which value."""
    _, marker = call(lambda q, k, v: scaled_dot_product_attention(q, repeat_kv(k, 2), v.repeat(1, 2, 1, 1)), group=2)
    assert inputs(marker) == [False, False] and marker.args[GQA] is False


# ---- columns


def first(n):
    return lambda q, k, v: scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n], enable_gqa=True)


@pytest.mark.parametrize("n, columns", [(4, 4), (1, 1), (-1, L - 1), (L, None), (L + 3, L), (None, None)])
def test_a_read_of_the_first_columns_folds(n, columns):
    """torch drops some slices of everything and keeps others."""
    _, marker = call(first(n))
    assert inputs(marker) == [True, True] and marker.args[COLUMNS] in (columns, None if columns == L else columns)


@pytest.mark.parametrize("order", ["sliced, then repeated", "repeated, then sliced"])
def test_columns_and_heads_fold_in_any_order(order):
    def read(x):
        return repeat_kv(x[:, :, :4], 2) if order.startswith("sliced") else repeat_kv(x, 2)[:, :, :4]

    _, marker = call(lambda q, k, v: scaled_dot_product_attention(q, read(k), read(v)), group=2)
    assert inputs(marker) == [True, True] and (marker.args[GQA], marker.args[COLUMNS]) == (True, 4)


@pytest.mark.parametrize("part", [slice(1, 5), slice(0, 6, 2), slice(-4, None)], ids=["middle", "every second", "last"])
def test_other_columns_stay(part):
    _, marker = call(lambda q, k, v: scaled_dot_product_attention(q, k[:, :, part], v[:, :, part]))
    assert inputs(marker) == [False, False] and marker.args[COLUMNS] is None


def test_a_slice_of_another_dimension_stays():
    _, marker = call(lambda q, k, v: scaled_dot_product_attention(q[..., :4], k[..., :4], v[..., :4]))
    assert inputs(marker) == [False, False] and marker.args[COLUMNS] is None


def test_settled_markers_lose_columns_that_say_nothing():
    gm, marker = call(first(None))
    assert len(marker.args) == COLUMNS + 1
    settle(gm)
    assert len(marker.args) == COLUMNS
    gm, marker = call(first(4))
    settle(gm)
    assert marker.args[COLUMNS] == 4


# ---- masks


@pytest.mark.parametrize("shape", [(2, L), (2, 2, L), (1, 1, 2, L), (1, 1, 1, L)])
def test_masks_get_their_leading_dimensions(shape):
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    gm, marker = call(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask))
    have = marker.args[MASK].meta["val"]
    assert list(have.shape) == [1] * (4 - len(shape)) + list(shape) and have.dtype == torch.bool
    before = len(gm.graph.nodes)
    normalize(gm)
    assert len(gm.graph.nodes) == before, "a second time changes nothing"


def test_masks_of_queries_without_a_batch_stay():
    """Counted from the right, a fourth dimension would make a batch out of heads."""
    q, k, v, mask = torch.randn(2, 3, 8), *torch.randn(2, 2, L, 8), torch.ones(3, L, dtype=torch.bool)
    gm, out = capture(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask), q, k, v)
    (marker,) = markers(gm.graph)
    assert list(marker.args[MASK].meta["val"].shape) == [1, 3, L]
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, mask), rtol=0, atol=2e-6)
