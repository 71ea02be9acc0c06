"""Other caches through the same door: gpt-fast's buffers, sliding windows, growing caches, generate(), other shapes."""

import gc
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from runs import CACHE, CAPACITY, OPTIONS, Log, assert_same, assert_same_content, owners, prompt
from transformers import CompileConfig, DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile import report
from sphkv_compile.runtime import log as graph_log
from sphkv_compile.runtime.guarded import Guarded, owner_of
from sphkv_compile.runtime.ownership import Owner
from sphkv_compile.runtime.pool import Pool, arena_bytes
from sphkv_compile.storage.state import LENGTH, START, Geometry
from sphkv_compile.testing.oracle import random_tokens
from sphkv_compile.testing.tiny import tiny, tiny_gpt_fast


def graphs():
    return len(graph_log.GRAPHS)


class TestShapes:
    """One compiled model meets caches of other sizes; each is right, and a size that came before costs nothing."""

    @pytest.mark.parametrize("batch, capacity", [(1, CAPACITY), (2, 160)], ids=["batch", "max_cache_len"])
    def test_a_cache_of_another_size(self, compiled, batch, capacity):
        m, (expected, got) = compiled("llama", "static"), (Log(), Log())
        for step, log in ((m.eager, expected), (m.step, got)):
            for sizes in ((batch, capacity), (2, CAPACITY), (batch, capacity)):
                cache = m.cache(sizes[1])
                log.decode(step, cache, log.call(m.eager, cache, prompt(20, batch=sizes[0])), 20)
            if log is got:
                assert report(cache).matched == 2
        assert_same(got, expected)
        before = graphs()
        log = Log()
        log.decode(m.step, cache, log.tokens[-1] if log.tokens else prompt(1, batch=batch), 2)
        assert graphs() == before

    def test_codes_are_seen_in_the_report(self, compiled):
        m, log = compiled("llama", "static", bits=4), Log()
        cache = m.cache()
        log.decode(m.step, cache, log.call(m.eager, cache, prompt(20)), 50)
        seen = report(cache)
        assert seen.matched == 2 and seen.encoded_tokens > 0
        assert seen.page_bytes < seen.dense_bytes / 4


class TestGptFast:
    @pytest.fixture(scope="class")
    def models(self):
        model = tiny_gpt_fast()
        return model, torch.compile(model, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True)

    def generate(self, step, model, log, at=0, ids=None, count=40):
        """Prefill and decode; shapes: ids [1, S]."""
        ids = prompt(20, batch=1) if ids is None else ids
        logits = model(ids, torch.arange(at, at + ids.shape[1]))[:, -1:]
        at += ids.shape[1]
        for p in range(at, at + count):
            token = logits.argmax(-1)
            log.tokens.append(token)
            logits = step(token, torch.tensor([p]))[:, -1:]
            log.logits.append(logits)
        return at + count

    def test_generations_on_the_same_and_on_new_buffers(self, models):
        model, step = models
        logs = Log(), Log()
        for f, log in zip((model, step), logs):
            model.setup_caches(1, 96)
            at = self.generate(f, model, log)
            self.generate(f, model, log, at=at, ids=prompt(5, 3, batch=1), count=15)  # a second turn
            self.generate(f, model, log, at=30, ids=prompt(5, 4, batch=1), count=30)  # back into what is coded
            self.generate(f, model, log, ids=prompt(9, 5, batch=1))  # from the start
        assert_same(logs[1], logs[0])
        assert report(model).matched == 2 and report(model).encoded_tokens > 0

    def test_compiled_prefill(self, models):
        model, step = models
        logs = Log(), Log()
        for f, log in zip((model, step), logs):
            model.setup_caches(1, 96)
            for at, count in ((0, 30), (30, 31)):
                log.logits.append(f(prompt(count, at, batch=1), torch.arange(at, at + count)))
        assert float((logs[0].logits[1] - logs[1].logits[1]).abs().max()) < 2e-5
        assert report(model).encoded_tokens == 2 * 48

    def test_positions_with_a_gap_are_an_error_and_nothing_is_written(self, models):
        model, step = models
        model.setup_caches(1, 96)
        log = Log()
        at = self.generate(step, model, log, count=10)
        before = [o.state.rows.tolist() for o in _gpt_owners(model)]
        with pytest.raises(ValueError, match="holds 30 tokens"):
            step(prompt(1, batch=1), torch.tensor([at + 3]))
        assert [o.state.rows.tolist() for o in _gpt_owners(model)] == before
        step(prompt(1, batch=1), torch.tensor([at]))

    def test_k_and_v_in_one_storage_stay_dense(self):
        model = tiny_gpt_fast(layers=1)
        step = torch.compile(model, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True)
        logs = Log(), Log()
        for f, log in zip((model, step), logs):
            model.setup_caches(1, 96)
            kv = model.layers[0].attention.kv_cache
            kv.k_cache, kv.v_cache = torch.zeros(2, *kv.k_cache.shape).unbind()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.generate(f, model, log, count=8)
        assert_same(logs[1], logs[0])
        assert type(kv.k_cache) is not Guarded or not owner_of(kv.k_cache).holds_codes

    def test_buffers_that_are_set_up_anew_free_the_old(self, models):
        model, step = models
        model.setup_caches(1, 96)
        self.generate(step, model, Log(), count=3)
        refs = [weakref.ref(o) for o in _gpt_owners(model)]
        model.setup_caches(1, 96)
        gc.collect()
        assert [r() for r in refs] == [None, None]


def _gpt_owners(model):
    return [owner_of(layer.attention.kv_cache.k_cache) for layer in model.layers]


class TestSliding:
    """Gemma 3: layers with a window of 16 and full ones in turn."""

    OPTIONS: ClassVar = dict(window=4, span=4, page=4, sink=2)

    def scenario(self, m, step, log):
        cache = m.cache()
        token = log.decode(step, cache, log.call(m.eager, cache, prompt(6)), 40)  # fills, turns over, rolls
        cache.reset()
        token = log.decode(step, cache, log.call(m.eager, cache, prompt(5, 1)), 20)
        token = log.call(m.eager, cache, token)  # an eager step rolls the dense window
        token = log.decode(step, cache, token, 10)
        token = log.call(m.eager, cache, torch.cat([token, prompt(4, 2)], 1))  # a turn that crosses the window
        token = log.decode(step, cache, token, 10)
        cache.reorder_cache(torch.tensor([1, 0]))
        log.decode(step, cache, token[[1, 0]], 10)
        return cache

    def test_through_the_edge_and_on(self, compiled):
        """R4."""
        m = compiled("gemma3", "static", **self.OPTIONS)
        expected, got = Log(), Log()
        dense, cache = self.scenario(m, m.eager, expected), self.scenario(m, m.step, got)
        assert_same(got, expected)
        assert_same_content(cache, dense)
        assert [o.geometry.rolling for o in owners(cache)] == [True, False]
        assert all(site.encoded_tokens > 0 for site in report(cache).sites)


def test_a_growing_cache_passes_its_first_capacity_without_compiling():
    """Room for 1024 columns at first; 200 steps from 900 on need a second layout, and no third graph."""
    model = tiny("llama", layers=1)
    step = torch.compile(model.forward, backend=sphkv_compile.backend, options=OPTIONS, fullgraph=True)
    logs, caches = (Log(), Log()), (DynamicCache(config=model.config), DynamicCache(config=model.config))
    before = graphs()
    for f, log, cache in zip((model.forward, step), logs, caches):
        log.decode(f, cache, log.call(model.forward, cache, prompt(900, batch=1)), 200)
    assert graphs() - before <= 2
    assert_same(logs[1], logs[0])
    owner = owners(caches[1])[0]
    assert owner.geometry.capacity == 2048 and owner.exports == 0
    assert_same_content(caches[1], caches[0])


def test_five_generations_with_five_caches_compile_once():
    """R12; and a cache that its user drops is freed, whatever generate() keeps (R13)."""
    model = tiny("llama", layers=1)
    config = CompileConfig(backend="sphkv", mode=None, options=OPTIONS)
    config._compile_all_devices = True
    counts, arenas = [], []
    for seed in range(5):
        ids = prompt(12, seed, batch=1)
        call = dict(do_sample=False, max_new_tokens=30, attention_mask=torch.ones_like(ids))
        cache = StaticCache(config=model.config, max_cache_len=64)
        expected = model.generate(ids, disable_compile=True, **call)
        got = model.generate(ids, past_key_values=cache, compile_config=config, **call)
        assert torch.equal(got, expected)
        assert report(cache).encoded_tokens > 0
        counts.append(graphs())
        arenas += [weakref.ref(o.pool.arena.data) for o in owners(cache)]
    assert counts[0] == counts[-1] and graph_log.GRAPHS
    del cache
    gc.collect()
    assert [arena() for arena in arenas] == [None] * 5


class TestPadding:
    def test_a_left_padded_batch_generates_what_its_rows_do_alone(self, compiled):
        """R3 for tokens; for codes bit for bit, given the same keys: below and in tests/ops."""
        m = compiled("llama", "static")
        ids, padding, count = prompt(30), 11, 40
        mask = torch.ones(2, 30, dtype=torch.int64)
        mask[1, :padding] = 0

        def run(step, rows, first):
            cache, out, seen = m.cache(), [], mask[rows, first:]
            place = (seen.cumsum(1) - 1).clamp(min=0)
            kwargs = {CACHE: cache, "use_cache": True}
            logits = m.eager(ids[rows, first:], attention_mask=seen, position_ids=place, **kwargs).logits
            for _ in range(count):
                out.append(logits[:, -1].argmax(-1))
                seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.int64)], 1)
                full = torch.nn.functional.pad(seen, (0, CAPACITY - seen.shape[1]))
                place = seen.sum(1, keepdim=True) - 1
                logits = step(out[-1][:, None], attention_mask=full, position_ids=place, **kwargs).logits
            return torch.stack(out, 1), cache

        together, cache = run(m.step, slice(0, 2), 0)
        alone, _ = run(m.eager, slice(1, 2), padding)
        assert torch.equal(together[1:], alone)
        rows = owners(cache)[0].state.rows
        assert rows[:, START].tolist() == [0, padding] and rows[:, LENGTH].tolist() == [70, 70]

    @pytest.mark.parametrize("padding", [1, 11, 40])
    def test_an_import_of_a_padded_batch_codes_its_rows_alike(self, padding):
        """From the same dense keys: bit for bit what an import of the row alone gives."""
        layout = _layout()
        both, alone = (_owner(layout, batch) for batch in (2, 1))
        _, k, v = random_tokens(both.geometry, 80)
        both.take(k.clone(), v.clone(), 80, [0, padding])
        alone.take(k[1:, :, padding:].clone(), v[1:, :, padding:].clone(), 80 - padding, [0])
        spans = (80 - padding - layout.sink - layout.window) // layout.span
        assert spans > 0 and int(both.state.rows[1, 2]) == int(alone.state.rows[0, 2]) == spans
        for name in ("anchors", "span_scales"):
            assert torch.equal(getattr(both.state, name)[1, :, :spans], getattr(alone.state, name)[0, :, :spans])
        assert torch.equal(both.state.pair_scale[1], alone.state.pair_scale[0])
        assert torch.equal(_pages(both, 1, spans), _pages(alone, 0, spans))

    def test_an_import_after_a_change_in_a_padded_batch(self):
        """Rows whose spans begin at different positions are cut at the same one."""
        owner = _owner(_layout(16), 2)
        _, k, v = random_tokens(owner.geometry, 90)
        keys, values = k.clone(), v.clone()
        owner.take(keys, values, 90, [0, 7])
        owner.exports = 1
        keys[:, :, 50], keys[1, :, :7], values[1, :, :7] = 3.0, 0, 0
        owner.take(keys, values, 90, [0, 7])
        from sphkv_compile.ops.read import dense

        got = dense(owner.state, owner.layout, 90)
        assert torch.equal(got[0], keys) and torch.equal(got[1], values)
        assert owner.recoded_tokens > 0


def _layout(bits=4):
    from sphkv_compile.spec import CacheSpec
    from sphkv_compile.storage.layout import Layout

    return Layout.of(CacheSpec(bits=bits, window=8, span=16, page=8), "half", 16)


def _owner(layout, batch):

    g = Geometry(batch, 2, 96, 16, 16, torch.float32, torch.float32, False)
    return Owner(layout, g, Pool(arena_bytes(layout, g), 128, torch.device("cpu")))


def _pages(owner, row, spans):
    state, g = owner.state, owner.geometry
    size = owner.layout.page_bytes(owner.layout.tiers[0], g.k_dim, g.v_dim, g.itemsize) // 64
    table = state.table[row, :, : spans * owner.layout.pages_per_span].long()
    return state.arena.view(-1, 64)[table.unsqueeze(-1) + torch.arange(size)]
