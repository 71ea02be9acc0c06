"""What the fused step does not serve on a device, the portable path must do right: here pages of 16 tokens."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.tiny import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")]
GEOMETRY = {"window": 8, "span": 16, "page": 16}


def decode(step, keyword, cache, ids, steps=40):
    tokens = []
    for _ in range(steps):
        ids = step(ids, use_cache=True, **{keyword: cache}).logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("inductor", [{}, False], ids=["inductor", "nodes"])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("bits", [16, 4])
def test_decode(kind, bits, inductor):
    """16 bits: the tokens of the dense model. 4 bits: the counters."""
    model = tiny("llama", head_dim=64, dtype=torch.float32, device="cuda")
    keyword = cache_keyword(model)
    options = {"bits": bits, "inductor": inductor, **GEOMETRY}
    step = torch.compile(model.forward, backend=sphkv_compile.backend, options=options, fullgraph=True)
    prompt = torch.randint(5, 100, (2, 60), device="cuda")
    runs = []
    with torch.no_grad():
        for forward in (model.forward, step):
            cache = kind(config=model.config, **({"max_cache_len": 128} if kind is StaticCache else {}))
            first = model(prompt, use_cache=True, **{keyword: cache}).logits[:, -1:].argmax(-1)
            runs.append(decode(forward, keyword, cache, first))
    report = sphkv_compile.report(cache)
    assert report.matched == 2 and report.encoded_tokens > 0
    if bits == 16:
        assert torch.equal(*runs)
