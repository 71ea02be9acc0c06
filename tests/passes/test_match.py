"""Verdicts on whole models' attentions: why each of those that stay dense does, and where it stands in the source."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.passes.match import Verdict, match
from sphkv_compile.passes.text import capture

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    first_k_dense_replace=1, n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, code, detail, extra",
    [
        ("gemma2", "not_sdpa", "soft cap", {}),
        ("gpt_oss", "not_sdpa", "learned sinks", {}),
        ("deepseek_v3", "unknown_write", "slice_scatter", LATENT),
    ],
    ids=["soft cap", "sinks", "latents"],
)
def test_models_that_stay_dense(kind, code, detail, extra):
    config = AutoConfig.for_model(kind, **{**SIZES, **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if extra else "eager").eval()
    ids, cache = (
        torch.ones(1, 4, dtype=torch.long),
        {cache_keyword(model): StaticCache(config=config, max_cache_len=32)},
    )
    with torch.no_grad():
        model(ids[:, :3], **cache)
    (verdict,) = match(capture(model.forward, ids[:, 3:], **cache)[0])
    assert (verdict.idiom, verdict.refusal.code) == (None, code) and detail in verdict.refusal.detail


def test_verdicts_come_in_order_and_name_the_line():
    def two(q, k_buf, v_buf, pos, mask):
        k_buf[:, :, pos] = q
        v_buf[:, :, pos] = q
        y = scaled_dot_product_attention(q, k_buf, v_buf, mask)
        return scaled_dot_product_attention(y, q, q)

    q, mask = torch.randn(1, 2, 1, 8), torch.ones(1, 1, 1, 16, dtype=torch.bool)
    gm, _ = capture(two, q, *torch.zeros(2, 1, 2, 16, 8), torch.tensor([3]), mask)
    matched, plain = match(gm)
    first = inspect.getsourcelines(two)[1]
    for verdict, line in ((matched, first + 3), (plain, first + 4)):
        file, _, number = verdict.source.rpartition(":")
        assert Path(file).name == Path(__file__).name and int(number) == line
    assert matched.idiom == "static_index" and plain.refusal.code == "no_cache_write"


def test_a_verdict_has_no_idiom_without_a_site():
    assert Verdict("sdpa", "").idiom is None
