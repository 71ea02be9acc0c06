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


WIDE = {"append": 540, "encode_spans": 400, "prefill": 660}
"""Bytes spilled at head_dim 256, where an encoder has 128 registers a thread, and a block of queries its sums: figures to
be brought down, and not to grow."""
MASKED = 200
"""The same of a block of queries at head_dim 128 beside a mask with holes; 16 without."""
TWIN = {"decode": 300}
"""The same where the twin holds whole planes, before sm_89."""
SOME = 16
"""A block of queries, and a masked run over two tiers, which keeps one register outside of its loop."""


def allowed(kernel, configuration, capability):
    """Bytes that may be spilled."""
    tier, dim, _, masked, _ = configuration
    if dim == 256:
        return WIDE.get(kernel, 0) or (TWIN.get(kernel, 0) if capability < 89 else 0)
    if kernel == "prefill":
        return MASKED if masked and dim == 128 else SOME
    return SOME if kernel == "decode" and "/" in tier and masked else 0


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
            assert row["decoded_kwidths"] == ["4"] and row["e4m3"] > 0, row
        else:
            assert row["decoded_kwidths"] == [] and row["e4m3"] == 0, row
        assert (row["dependent"] > 0) == (capability >= 90), row


def test_the_usual_configuration():
    check(facts(90, 0), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_configuration(capability):
    check(facts(capability), capability)
