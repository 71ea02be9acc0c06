"""A budget on a device: plans between replays of a captured graph, and the same tokens as without one."""

import pytest
import torch
from transformers import StaticCache

import sphkv_compile
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.tiny import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")]
PROMPT, STEPS, CAPACITY, BATCH = 1500, 400, 2048, 2


def run(inductor, budget=None, bits=None):
    """Logits of teacher-forced steps behind a compiled prefill, and what the cache says. Shapes: -> float32[STEPS, B,
    vocabulary]."""
    torch._dynamo.reset()
    model = tiny("llama", head_dim=64, dtype=torch.bfloat16, device="cuda")
    keyword, config = cache_keyword(model), model.config
    options = {"inductor": inductor} | ({"bits": bits} if bits else {"budget": budget})
    step = torch.compile(model.forward, backend=sphkv_compile.backend, options=options, fullgraph=True, dynamic=False)
    ids = torch.randint(5, 100, (BATCH, PROMPT + STEPS), generator=torch.Generator().manual_seed(0)).to("cuda")
    cache = StaticCache(config=config, max_cache_len=CAPACITY)
    cache.early_initialization(BATCH, config.num_key_value_heads, 64, torch.bfloat16, torch.device("cuda"))
    out = []
    with torch.no_grad():
        step(ids[:, :PROMPT], **{keyword: cache}, logits_to_keep=1)
        for t in range(PROMPT, PROMPT + STEPS):
            out.append(step(ids[:, t : t + 1], **{keyword: cache}).logits[:, -1].float())
            report = sphkv_compile.report(cache)
            assert budget in (None, 1.0) or report.budgeted_bytes <= report.budget
    return torch.stack(out), report


@pytest.mark.parametrize("budget", [0.06, 0.2])
def test_a_captured_graph_sees_every_plan(budget):
    plain, report = run({"triton.cudagraphs": False}, budget)
    captured, again = run({"triton.cudagraphs": True}, budget)
    assert torch.equal(plain, captured)
    assert report.dropped_tokens == again.dropped_tokens > 0 and report.demoted_tokens > 0
    assert report.plans >= STEPS // 128


def test_more_bytes_lose_less():
    """Down to what the codes of one tier lose that the last budget would pay for all tokens."""
    whole, _ = run(False, 1.0)
    gaps = []
    for options in ({"budget": 0.06}, {"budget": 0.12}, {"budget": 0.24}, {"budget": 0.35}, {"bits": "K4V4"}):
        found, _ = run(False, **options)
        gaps.append(float((found - whole).norm() / whole.norm()))
    *gaps, codes = gaps
    assert gaps[0] > gaps[1] > gaps[2] > 0.98 * gaps[3] and gaps[3] < 1.1 * codes, (gaps, codes)
