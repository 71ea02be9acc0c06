"""Codes depend on a row's own tokens, and on nothing else: not on batch mates, chunks, or how often they were read."""

import pytest
import torch
from runs import assert_codes_equal, codes
from torch.nn.functional import scaled_dot_product_attention
from toys import HQ, D, H

import sphkv_compile
from sphkv_compile.codecs.codebook import mse
from sphkv_compile.runtime.guarded import owner_of
from sphkv_compile.testing.oracle import attention, float32_bound

OPTIONS = {"bits": 4, "sink": 2, "window": 8, "span": 16, "page": 8, "inductor": False}
COLUMNS, HELD, STEPS = 96, 50, 20


class Buffers(torch.nn.Module):
    """A cache of one attention. Shapes: k, v [B, H, COLUMNS, D]; mask bool[B, 1, T, COLUMNS]."""

    def __init__(self, batch):
        super().__init__()
        for name in "kv":
            self.register_buffer(name, torch.zeros(batch, H, COLUMNS, D), persistent=False)

    def forward(self, q, k, v, pos, mask):
        self.k[:, :, pos], self.v[:, :, pos] = k, v
        return scaled_dot_product_attention(q, self.k, self.v, mask, enable_gqa=True)


def causal(first, count, padding):
    column, row = torch.arange(COLUMNS), torch.arange(first, first + count)[:, None]
    return torch.stack([(column <= row) & (column >= p) for p in padding])[:, None]


def decoded(tokens, padding, chunks):
    """The buffers after the compiled model has read ``tokens`` in ``chunks``, and its outputs.

    Shapes: tokens q [B, HQ, N, D], k and v [B, H, N, D]; padding: each row's first real column.
    """
    buffers, at, out = Buffers(len(padding)), 0, []
    step = torch.compile(buffers, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for count in chunks:
            q, k, v = (x[:, :, at : at + count] for x in tokens)
            out.append(step(q, k, v, torch.arange(at, at + count), causal(at, count, padding)))
            at += count
    assert owner_of(buffers.k).holds_codes and int(owner_of(buffers.k).state.rows[:, 2].min()) > 0
    return buffers, torch.cat(out, 2)


def drawn(batch, count, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, count, D, generator=make) for h in (HQ, H, H)]


PREFILL = (HELD, *[1] * STEPS)


def test_r3_a_row_in_a_batch_is_the_row_alone():
    """Bit for bit, outputs and codes, beside a padded row, a row without padding, and one of a thousand times the size.

    Bug: a scale over the batch, padding that is stored or attended to, a mask that is dropped.
    """
    padding = [11, 0, 29]
    tokens = drawn(3, HELD + STEPS)
    tokens[1][1] *= 1000
    tokens[2][1] *= 1000
    together, outputs = decoded(tokens, padding, PREFILL)
    for row in (0, 2):
        alone, output = decoded([x[row : row + 1] for x in tokens], padding[row : row + 1], PREFILL)
        assert torch.equal(outputs[row : row + 1, :, padding[row] :], output[:, :, padding[row] :])
        for name in "kv":
            assert torch.equal(getattr(together, name)[row], getattr(alone, name)[0])


def test_r3_a_padded_row_is_the_row_without_its_padding():
    """Another position in the buffer, the same codes; the window lies otherwise, so sums are equal to rounding."""
    padding, tokens = 11, drawn(1, HELD + STEPS)
    padded, outputs = decoded(tokens, [padding], PREFILL)
    short = [x[:, :, padding:] for x in tokens]
    alone, output = decoded(short, [0], (HELD - padding, *[1] * STEPS))
    count = HELD + STEPS - padding
    for name in "kv":
        assert torch.equal(getattr(padded, name)[:, :, padding : padding + count], getattr(alone, name)[:, :, :count])
    bound = float32_bound(short[0], alone.k[:, :, :count], alone.v[:, :, :count], None)
    assert float((outputs[:, :, padding:] - output).abs().max()) <= bound


def test_r3_a_key_larger_than_all_before_it_is_not_clipped():
    """Ten times the largest of the prefill, then coded. Clipped to what the prefill had, it would lose nine tenths of
    its length; the codes of a direction at 4 bits err by a tenth in the mean (a mean square of mse(4)).

    Bug: a scale that is frozen by the first tokens.
    """
    first, large = 36, slice(40, 44)
    tokens = drawn(1, 70)
    keys = tokens[1]
    keys[:, :, large] *= 10 * keys[:, :, :first].abs().max() / keys[:, :, large].abs().max()
    buffers, _ = decoded(tokens, [0], (first, *[1] * 34))
    error = ((buffers.k[:, :, :70] - keys).norm(dim=-1) / keys.norm(dim=-1))[:, :, large]
    assert bool((error > 0).all()), "they are not coded yet"
    assert float(error.square().mean()) < 4 * mse(4)  # 8 keys of 16 dimensions, where mse is of a large number


@pytest.mark.parametrize(
    "chunks",
    [
        (30, 30, 10),
        (1,) * 70,
        pytest.param((7, 1, 1, 40, 21), marks=pytest.mark.slow),
        pytest.param((64, 6), marks=pytest.mark.slow),
    ],
    ids=lambda c: f"{len(c)} chunks",
)
def test_r9_chunks_give_the_codes_of_one_shot(chunks):
    """Through the compiled model: what is stored depends on the tokens, never on the calls that brought them.

    Bug: decode tokens that are never coded, groups of one token, a prompt that is coded whole.
    """
    tokens, padding = drawn(2, 70), [0, 7]
    one, _ = decoded(tokens, padding, (70,))
    other, _ = decoded(tokens, padding, chunks)
    assert_codes_equal(codes(owner_of(one.k)), codes(owner_of(other.k)))


def test_r9_what_is_read_ten_times_is_never_coded_again():
    """As eager code reads it, and as it goes on after each time; the past decodes to the same, bit for bit."""
    tokens = drawn(2, HELD + 12)
    buffers, _ = decoded([x[:, :, : HELD + 2] for x in tokens], [0, 7], (HELD, 1, 1))
    step = torch.compile(buffers, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True, dynamic=False)
    first = buffers.k[:, :, :34].clone()
    for at in range(HELD + 2, HELD + 12):
        with torch.no_grad():
            q, k, v = (x[:, :, at : at + 1] for x in tokens)
            step(q, k, v, torch.arange(at, at + 1), causal(at, 1, [0, 7]))
        assert torch.equal(buffers.k[:, :, :34], first)
    assert owner_of(buffers.k).exports >= 10 and owner_of(buffers.k).recoded_tokens == 0


def test_the_outputs_are_those_of_the_decoded_cache():
    """That the comparisons above are of something right: against attention in float64 over what the buffers hold."""
    tokens = drawn(2, HELD + 1)
    buffers, outputs = decoded(tokens, [0, 7], (HELD, 1))
    k, v = buffers.k.clone(), buffers.v.clone()
    q = tokens[0][:, :, HELD:]
    expected = attention(q, k, v, causal(HELD, 1, [0, 7]), False, None)
    assert float((outputs[:, :, HELD:] - expected).abs().max()) <= float32_bound(q, k, v, None)
