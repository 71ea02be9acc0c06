"""Who holds a cache's data: import, export, copies, aliases, other backends, and death."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from runs import (
    CACHE,
    OPTIONS,
    Log,
    assert_codes_equal,
    assert_same,
    assert_same_content,
    codes,
    content,
    owners,
    prompt,
)

import sphkv_compile
from sphkv_compile import report
from sphkv_compile.ops import schema
from sphkv_compile.runtime import log as graph_log
from sphkv_compile.runtime.guarded import Guarded, exclusive, owner_of


def generated(m, count=50):
    """A cache that has decoded ``count`` tokens, and the next one."""
    cache, log = m.cache(), Log()
    token = log.decode(m.step, cache, log.call(m.eager, cache, prompt(20)), count)
    return cache, token


@pytest.fixture(params=["static", "dynamic"])
def m(request, compiled):
    """A compiled model with 4-bit codes, for each kind of cache."""
    return compiled("llama", request.param, bits=4)


class TestImportAndExport:
    def test_a_step_holds_codes_and_releases_the_dense_storage(self, m):
        cache, _ = generated(m)
        seen = report(cache)
        assert seen.matched == 2 and seen.dense_resident_bytes == 0
        assert seen.encoded_tokens == 2 * 2 * 48  # layers, rows; 70 tokens less 4 sinks and 8 to 23 in the window
        for layer in cache.layers:
            assert type(layer.keys) is type(layer.values) is Guarded

    def test_metadata_is_free(self, m):
        cache, _ = generated(m)
        keys = cache.layers[0].keys
        assert keys.dtype == torch.float32 and keys.shape[0] == 2 and keys.dim() == 4 and keys.device.type == "cpu"
        assert len(keys) == 2 and keys.numel() > 0 and keys.element_size() == 4 and not keys.requires_grad
        assert not keys._is_view() and not keys.is_conj() and not keys.is_neg() and keys.is_signed()
        assert owners(cache)[0].exports == 0

    def test_reading_decodes_once(self, m):
        cache, _ = generated(m)
        first, again = cache.layers[0].keys.clone(), cache.layers[0].keys.clone()
        assert torch.equal(first, again) and first.abs().max() > 0
        assert owner_of(cache.layers[0].keys).exports == 1
        assert owner_of(cache.layers[1].keys).exports == 0

    def test_ten_flushes_leave_the_codes_bit_equal(self, m):
        """R9: what was exported and not changed is taken back as it was, never encoded from its decoded value."""
        cache, token = generated(m)
        before = [codes(o) for o in owners(cache)]
        length = cache.get_seq_length()
        for _ in range(10):
            content(cache)
            for layer in cache.layers if m.kind == "static" else ():
                layer.cumulative_length.sub_(1)  # what a crop does, where transformers has one
            Log().call(m.step, cache, token)
        for owner, old in zip(owners(cache), before):
            assert owner.recoded_tokens == 0
            assert m.kind == "dynamic" or owner.imports == 11
            new = codes(owner)
            assert_codes_equal(new, old) if m.kind == "static" else assert_spans_equal(old, new)
        assert int(cache.get_seq_length()) == int(length) + (0 if m.kind == "static" else 10)

    def test_an_eager_turn_keeps_the_codes_of_the_past(self, m):
        cache, token = generated(m)
        before = [codes(o) for o in owners(cache)]
        log = Log()
        token = log.call(m.eager, cache, torch.cat([token, prompt(5, 3)], 1))
        log.decode(m.step, cache, token, 2)
        for owner, old in zip(owners(cache), before):
            assert owner.recoded_tokens == 0
            assert_spans_equal(old, codes(owner))

    def test_a_change_of_the_past_is_seen_and_counted(self, m):
        cache, token = generated(m)
        for layer in cache.layers:
            layer.keys[:, :, 30] = 7.0
        Log().call(m.step, cache, token)
        for layer, owner in zip(cache.layers, owners(cache)):
            assert owner.recoded_tokens > 0
            assert abs(float(layer.keys[:, :, 30].mean()) - 7) < 0.5


def assert_spans_equal(old, new):
    """The codes of ``old`` stand in ``new`` too, which may hold more."""
    positions = old[1]
    spans = int((positions[0, 0] >= 0).any(-1).sum()) // 2
    for name, x, y in zip(("positions", "anchors", "span_scales"), old[1:4], new[1:4]):
        count = 2 * spans if name == "positions" else spans
        assert torch.equal(x[:, :, :count], y[:, :, :count]), name
    assert torch.equal(old[4], new[4])  # pair_scale


class TestCopies:
    def test_a_deepcopy_and_its_original_go_on_alike(self, m):
        """The copy has the original's codes, bit for bit, and room to grow as far."""
        cache, token = generated(m)
        before = [codes(o) for o in owners(cache)]
        twin = copy.deepcopy(cache)
        logs = Log(), Log()
        for one, log in zip((cache, twin), logs):
            log.decode(m.step, one, token, 1)
        for mine, theirs, old in zip(owners(cache), owners(twin), before):
            assert mine is not theirs and mine.pool is not theirs.pool
            assert mine.recoded_tokens == theirs.recoded_tokens == 0
            assert_spans_equal(old, codes(theirs))
            assert_codes_equal(codes(mine), codes(theirs))
        for one, log in zip((cache, twin), logs):
            log.decode(m.step, one, log.tokens[-1], 24)  # to the last column
        assert_same(logs[1], logs[0], tolerance=1e-6)

    def test_a_copy_is_not_touched_by_its_original(self, m):
        cache, token = generated(m)
        twin = copy.deepcopy(cache)
        expected = content(twin)
        log = Log()
        log.decode(m.step, cache, token, 20)
        for a, b in zip(content(twin), expected):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

    def test_layers_of_a_copy_share_one_pool(self, m):
        cache, token = generated(m)
        twin = copy.deepcopy(cache)
        Log().call(m.step, twin, token)
        first, second = (o.pool for o in owners(twin))
        assert first is second and first.arena.nbytes == owners(cache)[0].pool.arena.nbytes

    @pytest.mark.parametrize("save", ["pickle", "torch.save"])
    def test_a_saved_tensor_is_a_plain_one(self, m, save):
        cache, _ = generated(m)
        keys, file = cache.layers[0].keys, io.BytesIO()
        if save == "pickle":
            loaded = pickle.loads(pickle.dumps(keys))
        else:
            torch.save({"keys": keys}, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)["keys"]
        assert type(loaded) is torch.Tensor and torch.equal(loaded, keys.clone())

    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_a_pickled_cache_goes_on(self, compiled, kind):
        """At 16 bits, where a loaded dense cache gives the same codes again."""
        m = compiled("llama", kind)
        cache, token = generated(m)
        loaded, logs = pickle.loads(pickle.dumps(cache)), (Log(), Log())
        assert_same_content(loaded, cache, tolerance=1e-12)
        for log, one in zip(logs, (cache, loaded)):
            log.decode(m.step, one, token, 8)
        assert_same(logs[1], logs[0])


class TestAliases:
    @pytest.fixture
    def static(self, compiled):
        return compiled("llama", "static")

    def test_an_alias_taken_before_the_import_keeps_the_cache_dense(self, static):
        """Releasing the storage would leave the alias reading garbage: refused, said once, and right."""
        m, logs = static, (Log(), Log())
        caches = m.cache(), m.cache()
        tokens = [log.call(m.eager, cache, prompt(20)) for log, cache in zip(logs, caches)]
        alias = caches[1].layers[1].values.view(-1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            logs[1].decode(m.step, caches[1], tokens[1], 5)
        logs[0].decode(m.eager, caches[0], tokens[0], 5)
        assert_same(logs[1], logs[0])
        assert sum("shares its memory" in str(w.message) for w in seen) == 1  # not once a graph, nor once a step
        assert report_or_none(caches[1]) is None
        assert torch.equal(alias, caches[1].layers[1].values.view(-1))
        del alias
        logs[1].decode(m.step, caches[1], logs[1].tokens[-1], 1)
        assert report(caches[1]).matched == 2  # and once the alias is gone, codes hold the data

    def test_an_alias_taken_later_does_too(self, static):
        m, log = static, Log()
        cache = m.cache()
        token = log.decode(m.step, cache, log.call(m.eager, cache, prompt(20)), 30)
        row = cache.layers[0].keys[0]
        before = row.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log.decode(m.step, cache, token, 1)
        assert torch.equal(row[:, :50], before[:, :50]) and not torch.equal(row, before)  # a view sees the new token

    @pytest.mark.parametrize("why", ["shared", "offset", "view", "numpy", "larger storage", "alias", "subclass"])
    def test_exclusive_says_no(self, why):
        k, v = torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)
        keep = []
        if why == "shared":
            k, v = torch.zeros(2, 2, 2, 8, 8).unbind()
        elif why == "offset":
            k = torch.zeros(2 * 2 * 8 * 8 + 4)[4:].view(2, 2, 8, 8)
        elif why == "view":
            k = torch.zeros(2, 8, 2, 8).transpose(1, 2)
        elif why == "numpy":
            keep.append(k.numpy())
        elif why == "larger storage":
            k = torch.zeros(4, 2, 8, 8)[:2]
        elif why == "alias":
            keep.append(v.view(-1))
        elif why == "subclass":
            v = torch.nn.Parameter(v, requires_grad=False)
        assert not exclusive(k, v)

    def test_exclusive_says_yes(self):
        assert exclusive(torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8))


def report_or_none(cache):
    try:
        return report(cache)
    except (TypeError, ValueError):
        return None


class TestOtherGraphs:
    def test_a_graph_of_ours_without_a_site_reads_the_truth(self, m):
        cache, token = generated(m)
        layer = cache.layers[0]
        expected = layer.keys.clone().sum()
        Log().call(m.step, cache, token)
        summed = torch.compile(lambda x: x[:, :, :70].sum(), backend=sphkv_compile.backend, options={"inductor": False})
        torch.testing.assert_close(summed(layer.keys), layer.keys[:, :, :70].sum())
        assert expected.isfinite()

    def test_a_graph_of_ours_that_changes_the_cache(self, compiled):
        """Codes, then a graph that declines and writes, then codes again."""
        m = compiled("llama", "static", bits=4)
        cache, token = generated(m)
        layer = cache.layers[0]
        before = layer.values.clone()
        Log().call(m.step, cache, token)

        def double(x):
            x.mul_(2)

        torch.compile(double, backend=sphkv_compile.backend, options={"inductor": False})(layer.values)
        torch.testing.assert_close(layer.values[:, :, :4], 2 * before[:, :, :4])  # sinks: exact
        log = Log()
        log.decode(m.step, cache, token, 2)
        torch.testing.assert_close(layer.values[:, :, :4], 2 * before[:, :, :4])

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_another_backend_gets_a_clear_message(self, m, backend):
        cache, _ = generated(m)
        keys = cache.layers[0].keys
        read = torch.compile(lambda x: x.sum(), backend=backend)
        with pytest.raises(RuntimeError, match="held as codes by sphkv_compile"):
            read(keys)
        copied = keys.clone()  # what the message advises
        torch.testing.assert_close(read(copied), copied.sum())


class TestDeath:
    def test_a_cache_that_is_dropped_frees_its_arena(self, m):
        cache, _ = generated(m)
        owner = owners(cache)[0]
        refs = weakref.ref(owner), weakref.ref(owner.pool), weakref.ref(owner.pool.arena.data)
        del cache, owner
        gc.collect()
        assert [r() for r in refs] == [None, None, None]

    def test_a_reset_or_a_copy_leaves_no_owner_behind(self, m):
        cache, token = generated(m)
        twin = copy.deepcopy(cache)
        Log().call(m.step, twin, token)
        refs = [weakref.ref(o) for o in owners(twin)]
        del twin
        gc.collect()
        assert [r() for r in refs] == [None, None]
        assert len(owners(cache)[0].pool.owners) == 2

    def test_pages_of_a_dead_layer_return_to_the_arena(self, m):
        cache, _ = generated(m)
        pool = owners(cache)[0].pool
        used = pool.arena.used
        cache.layers.pop()
        gc.collect()
        assert pool.arena.used == used // 2


def test_an_exception_inside_a_step_leaves_a_usable_cache(compiled, monkeypatch):
    """The first layer has taken the token in, the second has not; the step is done again."""
    for kind in ("static", "dynamic"):
        m, logs = compiled("llama", kind), (Log(), Log())
        caches = m.cache(), m.cache()
        tokens = [log.call(m.eager, cache, prompt(20)) for log, cache in zip(logs, caches)]
        attend, calls = schema.decode.attend, []

        def failing(*args, attend=attend, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise ArithmeticError("in the second layer")
            return attend(*args)

        for _ in (0, 7):  # the step that imports, and one in the middle
            calls.clear()
            monkeypatch.setattr(schema.decode, "attend", failing)
            with pytest.raises(ArithmeticError):
                m.step(tokens[1], use_cache=True, **{CACHE: caches[1]})
            monkeypatch.setattr(schema.decode, "attend", attend)
            tokens = [log.decode(f, c, t, 7) for log, f, c, t in zip(logs, (m.eager, m.step), caches, tokens)]
        assert_same(logs[1], logs[0])
        assert_same_content(caches[1], caches[0])


def test_two_threads_with_a_cache_each(compiled):
    """One compiled model; what a call remembers is the thread's own."""
    m = compiled("llama", "static")
    expected = []
    for seed in (1, 2):
        log, cache = Log(), m.cache()
        log.decode(m.eager, cache, log.call(m.eager, cache, prompt(20, seed)), 40)
        expected.append(log)
    generated(m, 3)  # compiled before the threads start
    graphs = len(graph_log.GRAPHS)
    results, failures = {}, []

    def work(seed):
        try:
            with torch.no_grad():
                log, cache = Log(), m.cache()
                log.decode(m.step, cache, log.call(m.eager, cache, prompt(20, seed)), 40)
                results[seed] = log, report(cache).matched
        except Exception as problem:
            failures.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for seed in (1, 2):
        assert_same(results[seed][0], expected[seed - 1])
        assert results[seed][1] == 2
    assert len(graph_log.GRAPHS) == graphs


assert OPTIONS["bits"] == 16
