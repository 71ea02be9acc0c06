"""What a cache that is born as codes holds, shares, frees and refuses."""

import gc
import itertools
import weakref

import pytest
import torch
from caches import CAPACITY, SPEC, Run, assert_same, compiled, dense, filled, model, prompt, spherical
from transformers import DynamicCache, StaticCache

import sphkv_compile
from sphkv_compile import SphericalCache, adopt, report
from sphkv_compile.runtime import log
from sphkv_compile.runtime.direct import CodedLayer
from sphkv_compile.testing.tiny import tiny


def owners(cache):
    return [layer.codes.owner for layer in cache.layers]


@pytest.mark.parametrize("spec", [{"bits": 4}, {"bits": "K4V2"}, {"budget": 0.6}, {"budget": "40B/token"}], ids=str)
def test_eager_and_compiled_agree(spec):
    runs = []
    for step in (model().forward, compiled()):
        run = filled(40, step, **spec)
        token = torch.full((2, 1), 7)
        for at in range(60):  # tokens are given, so that the caches hold the same
            run.call(token + at)
        runs.append(run)
    assert_same(*runs)


def test_rows_share_pages_until_one_is_written():
    run = filled()
    pool, before = owners(run.cache)[0].pool, owners(run.cache)[0].pool.arena.used
    pages = int((owners(run.cache)[0].state.table[0] >= 0).sum())
    run.cache.batch_repeat_interleave(4)
    assert pages and pool.arena.used == before
    table = owners(run.cache)[0].state.table
    held = 3 * 2  # spans of 16 behind sinks and the window, in pages of 8
    assert torch.equal(table[0, :, :held], table[3, :, :held])
    run.call(torch.full((8, 1), 7))  # a plan reserves pages for each row
    spare = owners(run.cache)[0].state.table[:, :, held:]
    spare = spare[spare >= 0]
    assert len(spare) == len(spare.unique()) > 0
    for owner in owners(run.cache):
        owner.unshare()
        used = owner.state.table[owner.state.table >= 0]
        assert len(used) == len(used.unique())
    run.cache.batch_select_indices(torch.tensor([5]))
    assert pool.arena.used == sum(int((o.state.table >= 0).sum()) for o in owners(run.cache)) * page_size(run.cache)


def page_size(cache):
    owner = owners(cache)[0]
    g = owner.geometry
    return owner.layout.page_bytes(owner.layout.tiers[0], g.k_dim, g.v_dim, g.itemsize)


def test_a_larger_arena_keeps_what_rows_share():
    run, like = filled(), Run(dense(), model().forward)
    like.call(prompt(60))
    for r in (run, like):
        r.cache.batch_repeat_interleave(2)
    pool = owners(run.cache)[0].pool
    used = pool.arena.used
    pool.resize(pool.arena.nbytes * 2)
    assert pool.arena.used == used
    for r in (run, like):
        r.decode(torch.arange(5, 9).view(4, 1), 30)
    assert_same(run, like)


def test_no_dense_buffer_exists():
    run = filled(100, capacity=4096, bits=4)
    run.decode(torch.full((2, 1), 7), 3)
    one = owners(run.cache)[0].geometry.dense_bytes // 2  # the keys of one layer
    with torch._C.DisableTorchFunctionSubclass():
        assert all(slot.untyped_storage().nbytes() == 0 for layer in run.cache.layers for slot in layer.codes.slots)
    found = report(run.cache)
    assert (found.matched, [site.exports for site in found.sites]) == (2, [0, 0])
    state = [t for owner in owners(run.cache) for t in owner.state[1:]]
    assert max(t.untyped_storage().nbytes() for t in state) < one / 4


def test_one_graph_serves_all_caches_of_a_kind_and_every_length():
    graphs = []
    with log.listening(graphs.append):
        for _ in range(3):
            filled(40, compiled(), bits=16, seed=5).decode(torch.full((2, 1), 7), 40)  # as no other test stores
        assert len(graphs) == 1
        assert [v.idiom for v in graphs[0].verdicts] == ["static_index"] * 2
        filled(40, compiled(), bits=4, seed=5).decode(torch.full((2, 1), 7), 2)
        assert len(graphs) == 2  # stored otherwise


def test_a_cache_dies_with_its_last_reference():
    run = filled()
    run.decode(torch.full((2, 1), 7), 3)
    owner = weakref.ref(owners(run.cache)[0])
    del run
    gc.collect()
    assert owner() is None


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tokens", [1, 24])
def test_an_interrupted_step_can_be_repeated(layer, tokens):
    runs = [Run(spherical(), model().forward), Run(dense(), model().forward)]
    for run in runs:
        run.call(prompt(40))

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model().model.layers[layer].mlp.register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            runs[0].call(prompt(tokens, 1))
    finally:
        hook.remove()
    if layer == 1:  # every layer had taken the tokens in
        assert runs[0].cache.get_seq_length() == 40 + tokens
        runs[0].cache.crop(-tokens)
    for run in runs:
        assert run.cache.get_seq_length() == 40
        run.decode(run.call(prompt(tokens, 1)), 20)
    assert_same(*runs)


@pytest.mark.parametrize("capacity", [CAPACITY, None])
def test_a_first_prompt_may_be_interrupted(capacity):
    runs = [Run(spherical(capacity=capacity), model().forward), Run(dense(), model().forward)]
    with torch.enable_grad(), pytest.raises(RuntimeError, match="autograd is on"):
        runs[0].call(prompt(70))
    assert runs[0].cache.get_seq_length() == 0
    for run in runs:
        run.decode(run.call(prompt(70)), 20)
    assert_same(*runs)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("tokens", [0, 5, 60])
def test_adopt(kind, tokens):
    config = model().config
    cache = StaticCache(config, max_cache_len=CAPACITY) if kind == "static" else DynamicCache(config=config)
    runs = [Run(cache, model().forward), Run(dense(), model().forward)]
    if tokens:
        for run in runs:
            run.call(prompt(tokens))
    assert adopt(cache, config, bits=16, window=8, span=16, page=8) is cache
    for run in runs:
        run.decode(run.call(prompt(7, 1)), 30)
    assert_same(*runs)
    assert sum(owner.imports for owner in owners(cache)) == 0


def test_attention_of_another_kind_reads_decoded_keys(monkeypatch):
    decodings, right = [], CodedLayer.decoded
    monkeypatch.setattr(CodedLayer, "decoded", lambda self, columns: decodings.append(self) or right(self, columns))
    other = tiny("llama")
    other.set_attn_implementation("eager")
    runs = [Run(spherical(), other.forward), Run(dense(), model().forward)]
    for run, step in zip(runs, (other.forward, model().forward)):
        run.decode(run.call(prompt(40), step=step), 20)
    assert_same(*runs)
    assert len(decodings) == 2 * 21  # once in each layer and call, for keys and values together


def test_a_graph_that_leaves_the_attention_dense_gets_the_data():
    other = tiny("llama")
    other.set_attn_implementation("eager")
    step = torch.compile(other.forward, backend=sphkv_compile.backend, options={"inductor": False}, fullgraph=True)
    run, like = filled(40, step), Run(dense(), model().forward)
    like.call(prompt(40))
    log.WARNED.clear()
    with pytest.warns(UserWarning, match=r"2 of 2 layers .* stay dense .*attn_implementation='sdpa'") as told:
        run.decode(torch.full((2, 1), 7), 3)
    assert len(told) == 1
    like.decode(torch.full((2, 1), 7), 3)
    run.step = model().forward  # and takes it back
    for r in (run, like):
        r.decode(torch.full((2, 1), 9), 3)
    assert_same(run, like)
    assert all(owner.holds_codes for owner in owners(run.cache))


def test_a_budget_holds_and_what_it_dropped_is_said():
    run = filled(40, budget="18B/token", plan_every=16)
    for at in range(80):
        run.call(torch.full((2, 1), 7) + at % 40)
        found = report(run.cache)
        assert found.budgeted_bytes <= found.budget
    assert found.dropped_tokens > 0
    with pytest.raises(RuntimeError, match="were dropped"):
        _ = run.cache.layers[0].keys
    with pytest.raises(RuntimeError, match=r"crop of 90 .* behind"):
        run.cache.crop(-90)
    assert run.cache.get_seq_length() == 120
    run.cache.reset()
    assert run.cache.get_seq_length() == 0 and run.cache.layers[0].keys.shape[2] == 0
    run.call(prompt(20, 1))


def test_the_model_will_do_for_its_config():
    assert len(SphericalCache(model(), max_cache_len=CAPACITY, budget=0.9)) == 2
    assert adopt(StaticCache(model().config, max_cache_len=CAPACITY), model(), budget=0.9).coded.group == 2


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_an_adopted_cache_is_saved_as_any(kind, tmp_path):
    config = model().config
    cache = StaticCache(config, max_cache_len=CAPACITY) if kind == "static" else DynamicCache(config=config)
    run = Run(adopt(cache, config, bits=4, window=8, span=16, page=8), model().forward)
    run.call(prompt(60))
    run.cache.save(tmp_path / "cache")
    other = Run(SphericalCache.load(tmp_path / "cache", config), run.step)
    assert other.cache.capacity == (CAPACITY if kind == "static" else None)
    for r in (run, other):
        r.decode(torch.full((2, 1), 7), 20)
    assert all(torch.equal(a, b) for a, b in zip(run.logits[1:], other.logits))


def test_under_a_budget_what_the_window_holds_can_be_taken_back():
    assert spherical(bits=4, window=0).is_croppable
    assert not spherical(budget=0.5, window=0).is_croppable
    run = filled(40, budget="18B/token", plan_every=16)
    assert run.cache.is_croppable
    for _ in range(40):
        run.call(torch.full((2, 1), 7))
    run.cache.crop(-SPEC["window"])
    assert run.cache.get_seq_length() == 72


def test_two_caches_of_one_model_do_not_meet():
    a, b, c, d = spherical(), spherical(), dense(), dense()
    runs = [Run(x, model().forward) for x in (a, b, c, d)]
    for run, seed in zip(runs, itertools.cycle((0, 1))):
        run.call(prompt(40, seed))
    for at in range(20):
        for run in runs:
            run.call(torch.full((2, 1), 7 + at))
    assert_same(runs[0], runs[2])
    assert_same(runs[1], runs[3])
