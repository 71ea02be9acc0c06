# ruff: noqa: E501
"""Snapshots: an attention over a cache as it arrives, and what it becomes. ``EXPECTTEST_ACCEPT=1`` writes them anew."""

import torch
from expecttest import TestCase
from one_attention import attention_call
from transformers import DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.runtime import log
from sphkv_compile.testing.gpt_fast import SliceCopy
from sphkv_compile.testing.tiny import WINDOW, tiny, tiny_gpt_fast

OPTIONS = {"bits": "K4V2", "sink": 2, "window": 4, "span": 8, "page": 8, "inductor": False}


def snapshot(function, *calls):
    """The graph of the last call that compiled, before and after."""
    torch._dynamo.reset()
    compiled, seen = torch.compile(function, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True), []
    with torch.no_grad(), log.listening(seen.append):
        for args, kwargs in calls:
            compiled(*args, **kwargs)
    return f"{seen[-1].before}\n---\n{seen[-1].after}"


def decode_step(family, layer=0, layers=1, filled=3, make=lambda config: StaticCache(config=config, max_cache_len=32)):
    """One layer's attention, on the token after ``filled`` eager ones."""
    model = tiny(family, layers=layers)
    keyword, cache, ids = cache_keyword(model), make(model.config), torch.ones(1, filled + 1, dtype=torch.long)
    with torch.no_grad():
        model(ids[:, :filled], **{keyword: cache})
    attention, args, kwargs = attention_call(model, layer, ids[:, filled:], **{keyword: cache})
    return attention, (args, kwargs)


class Snapshots(TestCase):
    def test_llama_static(self):
        self.assertExpectedInline(
            snapshot(*decode_step("llama")),
            """\
%0 = aten.index_put($0, [None, None, $1], $2)  # f32[1, 2, 32, 16]
%1 = aten.index_put($3, [None, None, $1], $4)  # f32[1, 2, 32, 16]
%2 = %0.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%3 = %1.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%4 = sphkv.sdpa($5, %2, %3, $6, 0.0, False, 0.25, False)  # f32[1, 4, 1, 16]
aten.copy_($0, %0)
aten.copy_($3, %1)
---
%0 = sphkv.attend(<state>, $0, $1, $2, $3, None, 32, $4, False, 0.25, <K4V2, half RoPE 16>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, $3, None, $4, <K4V2, half RoPE 16>, False)""",
        )

    def test_qwen2_static(self):
        self.assertExpectedInline(
            snapshot(*decode_step("qwen2")),
            """\
%0 = aten.index_put($0, [None, None, $1], $2)  # f32[1, 2, 32, 16]
%1 = aten.index_put($3, [None, None, $1], $4)  # f32[1, 2, 32, 16]
%2 = %0.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%3 = %1.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%4 = sphkv.sdpa($5, %2, %3, $6, 0.0, False, 0.25, False)  # f32[1, 4, 1, 16]
aten.copy_($0, %0)
aten.copy_($3, %1)
---
%0 = sphkv.attend(<state>, $0, $1, $2, $3, None, 32, $4, False, 0.25, <K4V2, half RoPE 16>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, $3, None, $4, <K4V2, half RoPE 16>, False)""",
        )

    def test_gemma3_window_that_fills(self):
        self.assertExpectedInline(
            snapshot(*decode_step("gemma3")),
            """\
%0 = aten.index_put($0, [None, None, $1], $2)  # f32[1, 2, 16, 16]
%1 = aten.index_put($3, [None, None, $1], $4)  # f32[1, 2, 16, 16]
%2 = %0.unsqueeze(2).expand([1, 2, 2, 16, 16]).clone().view([1, 4, 16, 16])  # f32[1, 4, 16, 16]
%3 = %1.unsqueeze(2).expand([1, 2, 2, 16, 16]).clone().view([1, 4, 16, 16])  # f32[1, 4, 16, 16]
%4 = sphkv.sdpa($5, %2, %3, $6, 0.0, False, 0.204124, False)  # f32[1, 4, 1, 16]
aten.copy_($0, %0)
aten.copy_($3, %1)
---
%0 = sphkv.attend(<state>, $0, $1, $2, $3, None, 16, $4, False, 0.204124, <K4V2, half RoPE 16>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, $3, None, $4, <K4V2, half RoPE 16>, False)""",
        )

    def test_gemma3_full_window(self):
        self.assertExpectedInline(
            snapshot(*decode_step("gemma3", filled=WINDOW)),
            """\
%0 = aten.index($0, [None, None, fmod(add(iota(16, start=0, step=1), 1), 16)])  # f32[1, 2, 16, 16]
%1 = aten.index($1, [None, None, fmod(add(iota(16, start=0, step=1), 1), 16)])  # f32[1, 2, 16, 16]
%2 = aten.index_put(%0, [None, None, full([1], -1)], $2)  # f32[1, 2, 16, 16]
%3 = aten.index_put(%1, [None, None, full([1], -1)], $3)  # f32[1, 2, 16, 16]
%4 = %2.unsqueeze(2).expand([1, 2, 2, 16, 16]).clone().view([1, 4, 16, 16])  # f32[1, 4, 16, 16]
%5 = %3.unsqueeze(2).expand([1, 2, 2, 16, 16]).clone().view([1, 4, 16, 16])  # f32[1, 4, 16, 16]
%6 = sphkv.sdpa($4, %4, %5, $5, 0.0, False, 0.204124, False)  # f32[1, 4, 1, 16]
aten.copy_($0, %2)
aten.copy_($1, %3)
---
%0 = sphkv.attend(<state>, $0, $1, $2, None, None, 16, $3, False, 0.204124, <K4V2, half RoPE 16>, True)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, None, None, $3, <K4V2, half RoPE 16>, True)""",
        )

    def test_gemma3_full_attention(self):
        self.assertExpectedInline(
            snapshot(*decode_step("gemma3", layer=1, layers=2)),
            """\
%0 = aten.index_put($0, [None, None, $1], $2)  # f32[1, 2, 32, 16]
%1 = aten.index_put($3, [None, None, $1], $4)  # f32[1, 2, 32, 16]
%2 = %0.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%3 = %1.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%4 = sphkv.sdpa($5, %2, %3, $6, 0.0, False, 0.204124, False)  # f32[1, 4, 1, 16]
aten.copy_($0, %0)
aten.copy_($3, %1)
---
%0 = sphkv.attend(<state>, $0, $1, $2, $3, None, 32, $4, False, 0.204124, <K4V2, half RoPE 16>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, $3, None, $4, <K4V2, half RoPE 16>, False)""",
        )

    def test_llama_dynamic(self):
        step = decode_step("llama", make=lambda config: DynamicCache(config=config))
        self.assertExpectedInline(
            snapshot(*step),
            """\
%0 = aten.cat([$0, $1], -2)  # f32[1, 2, 5, 16]
%1 = aten.cat([$2, $3], -2)  # f32[1, 2, 5, 16]
%2 = sphkv.sdpa($4, %0, %1, None, 0.0, False, 0.25, True)  # f32[1, 4, 1, 16]
---
%0 = sphkv.attend(<state>, $0, $1, $2, None, 4, 5, None, False, 0.25, <K4V2, half RoPE 16>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, None, 4, None, <K4V2, half RoPE 16>, False)""",
        )

    def test_llama_dynamic_at_any_length(self):
        attention, call = decode_step("llama", make=lambda config: DynamicCache(config=config))
        self.assertExpectedInline(
            snapshot(attention, call, call),
            """\
%0 = aten.cat([$0, $1], -2)  # f32[1, 2, s0 + 1, 16]
%1 = aten.cat([$2, $3], -2)  # f32[1, 2, s1 + 1, 16]
%2 = sphkv.sdpa($4, %0, %1, None, 0.0, False, 0.25, True)  # f32[1, 4, 1, 16]
---
%0 = sphkv.attend(<state>, $0, $1, $2, None, $3, $4, None, False, 0.25, <K4V2, half RoPE 16>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, None, $3, None, <K4V2, half RoPE 16>, False)""",
        )

    def test_slice_copy(self):
        x = torch.randn(1, 1, 64)
        self.assertExpectedInline(
            snapshot(SliceCopy(), ((x, 3), {}), ((x, 4), {})),
            """\
%0 = aten.slice($0, 2, $1, $2)  # f32[1, 2, 1, 16]
%1 = aten.copy(%0, $3)  # f32[1, 2, 1, 16]
%2 = aten.slice_scatter($0, %1, 2, $1, $2)  # f32[1, 2, 64, 16]
%3 = aten.slice($4, 2, $1, $2)  # f32[1, 2, 1, 16]
%4 = aten.copy(%3, $5)  # f32[1, 2, 1, 16]
%5 = aten.slice_scatter($4, %4, 2, $1, $2)  # f32[1, 2, 64, 16]
%6 = aten.slice(%2, 2, 0, $2)  # f32[1, 2, s0 + 1, 16]
%7 = aten.slice(%5, 2, 0, $2)  # f32[1, 2, s0 + 1, 16]
%8 = sphkv.sdpa($6, %6, %7, $7, 0.0, False, None, True)  # f32[1, 4, 1, 16]
aten.copy_($0, %2)
aten.copy_($4, %5)
---
%0 = sphkv.attend(<state>, $0, $1, $2, None, $3, $4, $5, False, None, <K4V2, no RoPE>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, None, $3, $5, <K4V2, no RoPE>, False)""",
        )

    def test_gpt_fast(self):
        model = tiny_gpt_fast(layers=1)
        model.setup_caches(1, 32)
        ids, pos = torch.ones(1, 1, dtype=torch.long), torch.tensor([0])
        self.assertExpectedInline(
            snapshot(model, ((ids, pos), {})),
            """\
%0 = aten.index_put($0, [None, None, $1], $2)  # f32[1, 2, 32, 16]
%1 = aten.index_put($3, [None, None, $1], $4)  # f32[1, 2, 32, 16]
%2 = %0.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%3 = %1.unsqueeze(2).expand([1, 2, 2, 32, 16]).clone().view([1, 4, 32, 16])  # f32[1, 4, 32, 16]
%4 = sphkv.sdpa($5, %2, %3, $6, 0.0, False, None, False)  # f32[1, 4, 1, 16]
aten.copy_($0, %0)
aten.copy_($3, %1)
---
%0 = sphkv.attend(<state>, $0, $1, $2, $3, None, 32, $4, False, None, <K4V2, interleaved RoPE 16>, False)  # f32[1, 4, 1, 16]
sphkv.append(<state>, $0, $1, $2, $3, None, $4, <K4V2, interleaved RoPE 16>, False)""",
        )

    def test_refused(self):
        """Nothing changes."""

        def attention(q, k_buf, v_buf, pos):
            k_buf[:, :, pos] = q
            v_buf[:, :, pos] = q
            return torch.nn.functional.scaled_dot_product_attention(q, k_buf, v_buf)

        call = (torch.randn(1, 2, 1, 16), *torch.zeros(2, 1, 2, 32, 16), torch.tensor([3])), {}
        self.assertExpectedInline(
            snapshot(attention, call),
            """\
%0 = aten.index_put($0, [None, None, $1], $2)  # f32[1, 2, 32, 16]
%1 = aten.index_put($3, [None, None, $1], $4)  # f32[1, 2, 32, 16]
%2 = sphkv.sdpa($5, %0, %1, None, 0.0, False, None, False)  # f32[1, 2, 1, 16]
aten.copy_($0, %0)
aten.copy_($3, %1)
---
%0 = aten.index_put($0, [None, None, $1], $2)  # f32[1, 2, 32, 16]
%1 = aten.index_put($3, [None, None, $1], $4)  # f32[1, 2, 32, 16]
%2 = sphkv.sdpa($5, %0, %1, None, 0.0, False, None, False)  # f32[1, 2, 1, 16]
aten.copy_($0, %0)
aten.copy_($3, %1)""",
        )
