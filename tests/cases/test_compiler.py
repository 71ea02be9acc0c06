"""What torch.compile makes of it: nothing is copied, nothing is compiled twice, nothing stale is served."""

import re

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.functional import scaled_dot_product_attention
from toys import HQ, D, H

import sphkv_compile
from sphkv_compile.ops import schema
from sphkv_compile.runtime.guarded import owner_of
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.state import Geometry
from sphkv_compile.testing.oracle import Pair, random_tokens

OPTIONS = {"bits": 4, "sink": 2, "window": 8, "span": 16, "page": 8}
COLUMNS, HELD = 256, 100


class Buffers(torch.nn.Module):
    """One attention, and around it nothing for which Inductor would have to write a kernel."""

    def __init__(self):
        super().__init__()
        for name in "kv":
            content = torch.zeros(2, H, COLUMNS, D)
            content[:, :, :HELD] = torch.randn(2, H, HELD, D)
            self.register_buffer(name, content, persistent=False)

    def forward(self, q, k, v, pos, mask):
        self.k[:, :, pos], self.v[:, :, pos] = k, v
        return scaled_dot_product_attention(q, self.k, self.v, mask, enable_gqa=True)


def new(at):
    tokens = [torch.randn(2, heads, 1, D) for heads in (HQ, H, H)]
    return *tokens, torch.tensor([at]), (torch.arange(COLUMNS) <= at).view(1, 1, 1, -1)


def compiled(buffers, **options):
    options = {**OPTIONS, **options}
    return torch.compile(buffers, backend=sphkv_compile.backend, options=options, fullgraph=True, dynamic=False)


@torch.no_grad()
def test_r11_nothing_is_copied():
    """Inductor's code gives the ops the state as it came in, and allocates nothing of a cache's size; a hundred steps
    later all of it lies where it lay.

    Bug: an op that does not say what it mutates, or mutates a view, so that the whole cache is copied at each step.
    """
    buffers = Buffers()
    step = compiled(buffers)
    step(*new(HELD))
    _, (code,) = run_and_get_code(step, *new(HELD + 1))  # compiled anew: the buffers are of another class by now
    body = code[code.index("def call(") : code.index("def get_args()")]
    for op in ("attend", "append"):
        (call,) = re.findall(rf"torch\.ops\.sphkv\.{op}\.default\(([^\n]*)", body)
        names = call.split(", ")[: len(owner_of(buffers.k).state)]
        assert names == [f"sphkv0_{name}" for name in owner_of(buffers.k).state._fields], op
    shapes = re.findall(r"empty_strided_\w+\(\(([\d, ]*)\)", body)
    made = [torch.Size(int(n) for n in shape.split(",") if n.strip()).numel() for shape in shapes]
    smallest = min(t.numel() for t in (owner_of(buffers.k).state.exact_k, buffers.k))
    assert all(size < smallest for size in made), made
    assert ".copy_(" not in body and "clone" not in body

    def places():
        state = owner_of(buffers.k).state
        return id(buffers.k), id(buffers.v), *(t.data_ptr() for t in state)

    before = places()
    for at in range(HELD + 2, HELD + 102):
        step(*new(at))
    assert places() == before and int(owner_of(buffers.k).state.rows[0, 2]) >= 10


@torch.no_grad()
def test_r11_a_clone_that_is_written_leaves_the_original():
    """pytorch#198031: a clone and an op that mutates it became one tensor."""
    layout = Layout("axis_cosine", (Tier(4, 4),), 2, 8, 16, 8, 0, "half", 16)
    g = Geometry(2, 2, 96, 16, 16, torch.float32, torch.float32, False)
    state, tokens = Pair(layout, g).chunks(random_tokens(g, 60), (60,), [0, 0]).state, random_tokens(g, 1, seed=3)
    before = [t.clone() for t in state]

    def function(*state):
        twin = [t.clone() for t in state]
        schema.append(*twin, *tokens, torch.tensor([60]), None, None, str(layout), False)
        return twin

    twin = torch.compile(function, backend="inductor", fullgraph=True)(*state)
    for name, now, was in zip(state._fields, state, before):
        assert torch.equal(now, was), name
    for name, got, expected in zip(state._fields, twin, function(*state)):
        assert torch.equal(got, expected), name
    assert int(twin[state._fields.index("rows")][0, 1]) == 61


@torch.no_grad()
def test_r12_the_cache_of_graphs_tells_options_apart():
    """Compiled anew with the same options, Inductor's cache serves; with another option it does not, and the result is
    that option's.

    Bug: a pass whose result is cached under a key that does not know of it.
    """

    def run(**options):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        buffers = Buffers()
        step = compiled(buffers, **options)
        out = [step(*new(HELD + i)) for i in range(2)]
        found = counters["inductor"]
        return torch.stack(out), found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]

    with fresh_cache():
        first, missed, _ = run()
        again, missed_again, hit = run()
        assert missed > 0 and missed_again == 0 and hit > 0
        assert torch.equal(first, again)
        for options in ({"bits": "K4V2"}, {"window": 24}, {"seed": 7}, {"sink": 0}):
            other, missed, _ = run(**options)
            assert missed > 0, f"{options}: served from a graph with other options"
            assert not torch.equal(other, first), options
