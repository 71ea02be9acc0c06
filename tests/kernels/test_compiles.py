"""Every shipped configuration compiles for every device without one: no spill, and the layouts that results rest on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ALL = Path(__file__).with_name("compile_all.py")


def facts(capability, *chosen):
    """In a process of its own: here kernels are interpreted."""
    command = [sys.executable, ALL, str(capability), *map(str, chosen)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


DECODE = {80: 224, 90: 40, 100: 40}
"""Bytes spilled by ``decode`` where it has a mask, planes of head_dim 256, eight bits or, by the twin, two tiers; most
of them before and after its loop. Figures to be brought down, and not to grow."""
THREE = 368
"""The same of three tiers by the twin, at head_dim 256."""
WIDE = {"append": 140, "encode_spans": 192, "prefill": 720}
"""The same at head_dim 256, of 64 rows of it that are encoded, once a span, or of a block of queries and its sums, in
every page."""
HOLES = 160
"""The same of a block of queries at head_dim 128 beside a mask with holes."""
SINGLE = 544
"""The same of a span in float32, of whose rows a load leaves half to each of two threads."""
SOME = {"prefill": 24, "append": 52, "encode_spans": 48, "page_attention": 12}
"""The same elsewhere: a block of queries, or three-bit codes."""
EIGHT = {
    90: {"append": 284, "encode_spans": 72, "prefill": 796},
    100: {"append": 360, "encode_spans": 256, "prefill": 1136},
}
"""The same at eight bits, whose levels and borders are looked up by addresses of two registers each; the most of
``prefill`` is that of head_dim 256."""
THREE_EIGHT = 1268
"""The same of ``prefill`` over kept tokens of three tiers, one of eight bits, at head_dim 256, beside a mask with
holes; 776 without one."""
MANY = 132
"""The same of ``append`` where a program has several kv heads, whose spans it encodes one after the other."""
BLACKWELL = {"append": 400, "encode_spans": 304, "prefill": 64}
"""The same by sm_100's own assembler, below head_dim 256. No such device has been measured."""


def allowed(kernel, configuration, capability):
    """Bytes that may be spilled."""
    tier, dim, dtype, masked = configuration[:4]
    heads = configuration[5] if len(configuration) > 5 else 8
    if kernel == "decode":
        if dim == 256 and tier.count("/") == 2 and capability < 89:
            return THREE
        crowded = masked or dim == 256 or "8" in tier or ("/" in tier and capability < 89)
        return DECODE[capability] if crowded else 0
    if kernel == "prefill" and dim == 256 and tier.count("/") == 2 and capability == 90:
        return THREE_EIGHT
    if "8" in tier and capability >= 89:
        return EIGHT[capability].get(kernel, 0)
    if dim == 256:
        return WIDE.get(kernel, 0)
    if capability >= 100:
        return BLACKWELL.get(kernel, 0)
    if kernel == "append" and heads > 132:  # multiprocessors
        return MANY
    if kernel == "prefill" and dim == 128 and masked:
        return HOLES
    if kernel == "encode_spans" and dtype == "torch.float32":
        return SINGLE
    if kernel in ("append", "encode_spans") and "3" not in tier:
        return 0
    return SOME.get(kernel, 0)


def check(rows, capability):
    assert rows
    for row in rows:
        assert row["overhanging"] == [], row
        assert row["spilled"] <= allowed(row["kernel"], row["of"], capability), row
        if row["kernel"] != "decode":
            continue
        assert row["wgmma"] == 0 and row["mma"] > 0, row  # wgmma reads codes in another layout, and gives other results
        if capability >= 89:
            # a register of inline assembly must be four bytes of one row: any other width decodes to garbage
            assert row["decoded_kwidths"] == ["4"] and row["transposed"] == [["2", "16, 8"]], row
            assert (row["e4m3"] > 0) == (row["of"][0] != "K8V8"), row  # of which every level is looked up
        else:
            assert row["decoded_kwidths"] == [] and row["e4m3"] == 0, row
        assert (row["dependent"] > 0) == (capability >= 90), row


def test_the_usual_configuration():
    check(facts(90, 0), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_configuration(capability):
    check(facts(capability), capability)
