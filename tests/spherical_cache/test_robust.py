"""What goes wrong around a cache must not go wrong inside it."""

import gc
import multiprocessing
import threading
import tracemalloc

import pytest
import torch
from caches import CAPACITY, Run, assert_same, dense, model, prompt, spherical

from sphkv_compile import report
from sphkv_compile.runtime import pool
from sphkv_compile.storage.arena import Arena


def keys_and_values(rows, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, count, 16, generator=generator) for _ in range(2)]


def attend(cache, k, v):
    """Both layers get the same tokens. Shapes: -> [layers, rows, 4, T, 16]."""
    out = []
    length = cache.get_seq_length()
    mask = torch.ones(k.shape[2], length + k.shape[2], dtype=torch.bool).tril(length)[None, None]
    for layer in range(2):
        q = k.repeat_interleave(2, 1)
        views = cache.update(k, v, layer)
        out.append(torch.nn.functional.scaled_dot_product_attention(q, *views, attn_mask=mask, enable_gqa=True))
    return torch.stack(out)


@pytest.mark.parametrize("bits", [16, 8, 4, "K8V2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_one_head_is_poisoned_with_stays_there(value, bits):
    outs = []
    for poison in (False, True):
        cache, found = spherical(bits=bits), []
        for step in range(4):
            k, v = keys_and_values(3, 20, step)
            if poison and step == 1:
                k[1, 0, 5], v[1, 0, 7] = value, value
            found.append(attend(cache, k, v))
        outs.append(torch.cat(found, 3))
    clean, poisoned = outs
    assert torch.equal(clean[:, [0, 2]], poisoned[:, [0, 2]])
    assert torch.equal(clean[:, 1, 2:], poisoned[:, 1, 2:])
    cache.reset()
    again = attend(cache, *keys_and_values(3, 20))
    assert torch.equal(again, outs[0][:, :, :, :20])


@pytest.mark.parametrize("spec", [{"bits": 4}, {"budget": 0.5, "plan_every": 16}], ids=["bits", "budget"])
def test_without_memory_for_pages_the_cache_stays_usable(spec, monkeypatch):
    runs = [Run(spherical(capacity=None if "bits" in spec else CAPACITY, **spec), model().forward) for _ in range(2)]

    def no_memory(nbytes, device="cpu"):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for run in runs:
        run.call(prompt(60))
    held = runs[0].cache.layers[0].codes.owner.pool
    with monkeypatch.context() as patch:
        patch.setattr(pool, "Arena", no_memory)
        with pytest.raises(MemoryError, match=r"no memory for .* bytes of pages"):
            held.resize(held.arena.nbytes * 2)
        if "bits" in spec:
            with pytest.raises(MemoryError, match="the cache is as it was"):
                runs[0].call(prompt(1500, 1))
    assert runs[0].cache.get_seq_length() == 60
    for run in runs:
        run.decode(torch.full((2, 1), 7), 40)
    assert_same(*runs)


def test_an_arena_is_taken_whole_or_not_at_all():
    arena = Arena(64 * 10)
    with pytest.raises(MemoryError):
        arena.take(64, 11)
    assert arena.used == 0 and len(arena.take(64, 10)) == 10


def test_an_empty_prompt_and_one_of_thousands():
    cache, like = spherical(capacity=None), dense()
    k, v = keys_and_values(2, 0)
    for layer in range(2):
        assert [tuple(x.shape) for x in cache.update(k, v, layer)] == [(2, 2, 0, 16)] * 2
    runs = [Run(cache, model().forward), Run(like, model().forward)]
    for run in runs:
        run.decode(run.call(prompt(3000)), 3)
    assert_same(*runs)


def test_caches_in_two_threads():
    expected = []
    for seed in range(4):
        run = Run(spherical(bits=4), model().forward)
        run.decode(run.call(prompt(40, seed)), 30)
        expected.append(run)
    found = [Run(spherical(bits=4), model().forward) for _ in range(4)]

    def work(seed):
        with torch.no_grad():
            found[seed].decode(found[seed].call(prompt(40, seed)), 30)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected):
        assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits)) and len(got.logits) == 31


def _child(run, pipe):
    torch.set_num_threads(1)
    with torch.no_grad():
        run.decode(torch.full((2, 1), 7), 30)
        pipe.send([x.tolist() for x in run.logits[-30:]])


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system does not fork")
def test_a_forked_process_goes_on_by_itself():
    run = Run(spherical(bits=4), model().forward)
    run.call(prompt(60))
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(run, theirs))
    child.start()
    run.decode(torch.full((2, 1), 7), 30)
    assert ours.poll(60)
    assert ours.recv() == [x.tolist() for x in run.logits[-30:]]
    child.join()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [{"bits": 4}, {"budget": 0.4, "plan_every": 16}], ids=["bits", "budget"])
def test_ten_thousand_steps_in_flat_memory(spec):
    run = Run(spherical(capacity=512, **spec), model().forward)
    tracemalloc.start()
    sizes = []
    for step in range(10_000):
        if step % 400 == 0:
            run.cache.reset()
            run.call(prompt(50, step % 7))
        elif step % 97 == 0:
            run.cache.crop(-3)
            run.cache.reorder_cache(torch.tensor([1, 0]))
        run.call(torch.full((2, 1), 7 + step % 50))
        run.logits.clear()
        if step % 2000 == 1999:
            gc.collect()
            tensors = sum(t.numel() * t.element_size() for o in owners(run.cache) for t in o.state)
            sizes.append((tracemalloc.get_traced_memory()[0], tensors, report(run.cache).resident_bytes))
    tracemalloc.stop()
    _, (python, tensors, resident), *later = sizes  # what is kept from call to call is all there by then
    for now in later:
        assert sum(now[:2]) <= (python + tensors) * 1.01 and now[2] <= resident * 1.01


def owners(cache):
    return [layer.codes.owner for layer in cache.layers]
