"""The model bench: its verdicts, and a run of every side on a CPU."""

import pytest
import torch

from sphkv_compile.bench.loop import Loop, caches
from sphkv_compile.bench.model import compare, faults, measure, rows
from sphkv_compile.bench.record import MODEL_ROW, missing
from sphkv_compile.bench.sides import Job, build, filled, side
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.testing.gpt_fast import from_llama

JOB = Job(shape="tiny", batch=2, length=640, steps=16, device="cpu", dtype="float32")
GOOD = {"what": "sphkv", "tier": "K4V4", "cudagraphs": {"recorded": 1, "replaying": True, "skips": 0}}


@pytest.mark.parametrize(
    "row, device, count",
    [
        (GOOD, "cuda", 0),
        (GOOD | {"cudagraphs": {"recorded": 0, "replaying": False, "skips": 0}}, "cuda", 1),
        (GOOD | {"cudagraphs": {"recorded": 1, "replaying": True, "skips": 1}}, "cuda", 1),
        (GOOD | {"cudagraphs": {"recorded": 0, "replaying": False, "skips": 1}}, "cpu", 0),
        ({"what": "hf", "tier": "dense", "failed": "CUDA out of memory."}, "cuda", 0),
        ({"what": "sphkv", "tier": "K4V4", "failed": "CUDA out of memory."}, "cuda", 1),
        ({"what": "loop", "tier": "dense", "failed": "KeyError: x"}, "cuda", 1),
    ],
)
def test_faults(row, device, count):
    assert len(faults(row, device)) == count


def test_speedup_is_over_the_faster_dense_side_of_the_same_shape():
    found = [
        {"what": what, "B": b, "L": 1, "ms": ms}
        for what, b, ms in (("hf", 1, 4.0), ("loop", 1, 2.0), ("sphkv", 1, 1.0), ("sphkv", 8, 1.0), ("hf", 8, None))
    ]
    compare(found)
    assert [row["speedup"] for row in found] == [0.5, 1.0, 2.0, None, None]


def test_the_loop_is_the_same_model():
    """Over a cache that this step fills, where no mask is needed."""
    job = Job(shape="tiny", batch=2, length=40, steps=40 - 1 - 16, device="cpu", dtype="float32")
    assert job.start == 1
    with torch.no_grad():
        model = build(job)
        cache, loop = filled(job, model), from_llama(model, "half", Loop)
        loop.setup_caches(job.batch, job.length)
        for ours, layer in zip(caches(loop), cache.layers):
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(job.length - 1)
            ours.k_cache.copy_(layer.keys)
            ours.v_cache.copy_(layer.values)
        token = torch.tensor([[3], [5]])
        expected = model(token, use_cache=True, **{cache_keyword(model): cache}).logits
        torch.testing.assert_close(loop(token, torch.tensor([job.length - 1])), expected, rtol=1e-4, atol=1e-4)


def test_ours_without_a_code_is_no_measurement():
    """Sinks, window and a span are 260 tokens: no span has left the window yet."""
    job = Job(shape="tiny", length=250, steps=16, layers=1, device="cpu", dtype="float32", fill="layers")
    with torch.no_grad():
        ours = side("K4V4", job, build(job))
        with pytest.raises(RuntimeError, match="0 tokens are encoded"):
            ours.check()


@pytest.mark.slow
def test_every_side_runs_on_a_cpu():
    def here(job, name):
        torch._dynamo.reset()
        return measure(job, name)

    found = list(rows(JOB, ["K4V4", "loop", "hf"], run=here))
    assert [row["what"] for row in found] == ["hf", "loop", "sphkv"]
    assert not any(missing(row, MODEL_ROW) or faults(row, "cpu") for row in found)
    assert found[1]["kl"] < 1e-4 and 0 < found[2]["kl"] < 0.5
    assert found[2]["kv_bytes"] < found[0]["kv_bytes"]


@pytest.mark.slow
def test_layer_by_layer_makes_the_same_codes():
    kls = []
    for fill in ("cache", "layers"):
        torch._dynamo.reset()
        job = Job(shape="tiny", length=640, steps=16, device="cpu", dtype="float32", fill=fill)
        kls.append(measure(job, "K4V2")["logits"])
    assert (kls[0] == kls[1]).all()
