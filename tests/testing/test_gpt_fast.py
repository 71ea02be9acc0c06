"""The plain PyTorch decoders: right in themselves, and with the graph inputs and ops they stand for."""

import pytest
import torch
import torch.nn.functional as F

from sphkv_compile.testing.gpt_fast import ModelArgs, SliceCopy, from_llama
from sphkv_compile.testing.tiny import tiny, tiny_gpt_fast

CACHES = ("k_cache", "v_cache")


class Recorder:
    """A torch.compile backend that keeps the graphs and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm.graph)
        return gm.forward

    def count(self, target):
        return sum(node.target is target for node in self.graphs[-1].nodes)


def is_cache(node):
    return node.op == "placeholder" and str(node.target).rstrip("_").endswith(CACHES)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@torch.no_grad()
def test_same_logits_as_the_llama_it_came_from(layout):
    """Catches a wrong permutation, rotation, mask, GQA order or name."""
    llama = tiny("llama", heads=6, kv_heads=2)
    model, ids = from_llama(llama, layout), torch.randint(0, 128, (2, 20))
    model.setup_caches(max_batch=2, max_seq=24)
    parts = [model(ids[:, :12], torch.arange(12))]
    parts += [model(ids[:, i : i + 1], torch.tensor([i])) for i in range(12, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), llama(ids, use_cache=False).logits, rtol=0, atol=1e-4)


def test_from_llama_refuses_what_it_would_drop():
    with pytest.raises(ValueError, match="biases"):
        from_llama(tiny("qwen2"))
    scaled = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
    with pytest.raises(ValueError, match="'linear' RoPE"):
        from_llama(tiny("llama", rope_parameters=scaled))


@torch.no_grad()
def test_gpt_fast_buffers_are_graph_inputs():
    model, recorder = tiny_gpt_fast(layers=3), Recorder()
    model.setup_caches(max_batch=1, max_seq=16)
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    for i in range(3):
        compiled(torch.tensor([[5]]), torch.tensor([i]))
    assert len(recorder.graphs) == 1, "a position must not recompile"
    assert sum(map(is_cache, recorder.graphs[0].nodes)) == 6
    assert not any(node.op == "get_attr" for node in recorder.graphs[0].nodes)
    assert recorder.count(torch._C._nn.scaled_dot_product_attention) == 3


@torch.no_grad()
def test_slice_copy_equals_one_shot_and_its_graph_reads_slices():
    model, recorder, x = SliceCopy(max_batch=2), Recorder(), torch.randn(2, 20, 64)
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    parts = [compiled(x[:, :12], 0)] + [compiled(x[:, i : i + 1], i) for i in range(12, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x, 0), rtol=0, atol=1e-5)
    assert len(recorder.graphs) == 2, "prefill, and one for every start"
    caches = [node for node in recorder.graphs[-1].nodes if is_cache(node)]
    assert [len(node.users) for node in caches] == [2, 2], "a slice to write and a slice to read"


@torch.no_grad()
def test_slice_copy_attends_causally():
    model, x = SliceCopy(heads=2, kv_heads=1, head_dim=4), torch.randn(1, 5, 8)
    changed = x.clone()
    changed[:, 3:] += 1
    a, b = model(x, 0), model(changed, 0)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3:], b[:, 3:])
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (model.q, model.k, model.v))
    plain = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
    torch.testing.assert_close(a, model.o(plain.transpose(1, 2).flatten(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("args", [dict(n_head=4, n_local_heads=3), dict(rope_layout="both")])
def test_model_args_refuse(args):
    with pytest.raises(ValueError):
        ModelArgs(**args)
