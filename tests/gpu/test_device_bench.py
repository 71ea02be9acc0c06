"""The benches on a device, small: attention is right in every kind of row, and a step is a replayed CUDA graph."""

import pytest
import torch

from sphkv_compile.bench import attention, writes
from sphkv_compile.bench.model import faults, measure
from sphkv_compile.bench.record import missing
from sphkv_compile.bench.sides import Job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")]


def test_attention_rows():
    absent = {}
    rows = list(attention.run([2], [4096], [64, 128], ["K4V4", "K4V2"], [2.0, 8.0], True, True, 2, 4, absent))
    assert not any(missing(row) for row in rows)
    ours = [row for row in rows if row["what"] == "sphkv"]
    assert len(ours) == 12 and max(row["rel_err"] for row in ours) < 5e-3
    peers = {row["what"] for row in rows} - {"sphkv"}
    assert {"fp8 cache, Inductor", "int4 cache, Inductor", "FlexAttention"} <= peers, absent


def test_writes_rows():
    rows = list(writes.run([1, 2], [4096], [64], ["K4V2"]))
    assert [row["what"] for row in rows] == ["append", "append", "encode", "prefill"]
    assert all(row["longest_us"] > 0.5 * row["us"] for row in rows[:2])
    assert rows[3]["us"] > 0.9 * rows[3]["dense_us"] > 0
    assert writes.table(rows).row_count == 4


@pytest.mark.parametrize("name", ["hf", "loop", "K4V4"])
def test_a_step_is_a_replayed_graph(name):
    torch._dynamo.reset()
    row = {"what": name, "tier": name} | measure(Job(shape="tiny", batch=2, length=1024, steps=16, ttft=True), name)
    assert "failed" not in row and not faults(row, "cuda")
