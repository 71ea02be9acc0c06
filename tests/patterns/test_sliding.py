"""A full window that shifts by one: what is taken, and every way in which it is almost that."""

import pytest
import torch
from toys import OPTIONS, D, L, Toys, sdpa

import sphkv_compile
from sphkv_compile.runtime import log

toys = Toys()
FULL = dict(held=L)


@pytest.mark.parametrize("toy", toys, ids=str)
def test_verdict_numbers_and_contents(toy):
    toy.check()


def shift(c, x, by=1, column=-1):
    """transformers' StaticSlidingWindowLayer.update for one token."""
    order = (torch.arange(L) + by) % L
    k, v = c.k[:, :, order], c.v[:, :, order]
    at = torch.tensor([column])
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return k, v


# ---- taken


@toys("sliding", (1,) * 12, **FULL)
def a_full_window(c, x):
    """Twelve steps: the span that was partly out of sight is reused."""
    return sdpa(x, *shift(c, x), None)


@toys("sliding", **FULL, batch=2)
def the_buffer_read_instead(c, x):
    shift(c, x)
    return sdpa(x, c.k, c.v, None)


@toys("sliding", **FULL)
def under_a_mask(c, x):
    """Only the newer half may be seen."""
    return sdpa(x, *shift(c, x), (torch.arange(L) >= L // 2).view(1, 1, 1, L))


@toys("sliding", **FULL)
def last_column_counted_from_the_left(c, x):
    return sdpa(x, *shift(c, x, column=L - 1), None)


# ---- refused


@toys("unknown_write", detail="not rolled by one", **FULL)
def rolled_by_two(c, x):
    return sdpa(x, *shift(c, x, by=2), None)


@toys("unknown_write", detail="not rolled by one", **FULL)
def rolled_backwards(c, x):
    return sdpa(x, *shift(c, x, by=L - 1), None)


@toys("unknown_write", detail="elsewhere", **FULL)
def written_in_another_column(c, x):
    return sdpa(x, *shift(c, x, column=-2), None)


@toys("unknown_write", detail="elsewhere", **FULL)
def written_where_the_caller_says(c, x):
    order = (torch.arange(L) + 1) % L
    k, v = c.k[:, :, order], c.v[:, :, order]
    at = x.pos - L
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return sdpa(x, k, v, None)


@toys("unknown_write", detail="permuted", **FULL)
def shuffled_by_a_table(c, x):
    order = torch.tensor([*range(1, L), 0])
    k, v = c.k[:, :, order], c.v[:, :, order]
    at = torch.tensor([-1])
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return sdpa(x, k, v, None)


@toys("partial_read", detail="24 columns", **FULL)
def a_part_of_the_window(c, x):
    k, v = shift(c, x)
    return sdpa(x, k[:, :, :24], v[:, :, :24], None)


@toys("other_readers", **FULL)
def the_shifted_window_read_before_the_write(c, x):
    order = (torch.arange(L) + 1) % L
    k, v = c.k[:, :, order], c.v[:, :, order]
    stale, at = k.sum(), torch.tensor([-1])
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    c.v.copy_(v)
    return sdpa(x, k, v, None) + stale


@toys("not_stored", **FULL)
def shifted_but_not_kept(c, x):
    order, at = (torch.arange(L) + 1) % L, torch.tensor([-1])
    k, v = c.k[:, :, order], c.v[:, :, order]
    k[:, :, at], v[:, :, at] = x.k, x.v
    c.k.copy_(k)
    return sdpa(x, k, v, None)


@torch.no_grad()
@pytest.mark.parametrize(
    "roll, verdict",
    [(lambda x: x.roll(-1, 2), "sliding"), (lambda x: x.roll(-2, 2), "unknown_write")],
    ids=["by one", "by two"],
)
@pytest.mark.filterwarnings("error:Raw SymInt")
def test_a_window_of_symbolic_size(roll, verdict):
    """Guards fix its sizes; then it is known by how much the columns are rolled."""

    def step(q, new, *buffers):
        last = torch.tensor([-1])
        for buffer in buffers:
            moved = roll(buffer)
            moved[:, :, last] = new
            buffer.copy_(moved)
        return torch.nn.functional.scaled_dot_product_attention(q, *buffers)

    q, new, eager = torch.randn(1, 2, 1, D), torch.randn(1, 2, 1, D), [torch.randn(1, 2, L, D) for _ in range(2)]
    ours, seen = [buffer.clone() for buffer in eager], []
    compiled = torch.compile(step, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True, dynamic=True)
    with log.listening(seen.append):
        found = compiled(q, new, *ours)
    torch.testing.assert_close(found, step(q, new, *eager), rtol=0, atol=2e-6)
    assert [v.idiom or v.refusal.code for graph in seen for v in graph.verdicts] == [verdict]
    assert all(v.idiom or "not rolled by one" in v.refusal.detail for graph in seen for v in graph.verdicts)
    assert all(torch.equal(a + 0, b) for a, b in zip(ours, eager))
