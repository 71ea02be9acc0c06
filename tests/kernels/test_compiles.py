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


def check(rows, capability):
    assert rows
    for row in rows:
        # At head_dim 256 an encoder holds 64 rows of it, a block of queries its sums; the twin holds whole planes. On
        # sm_100 a block of 128 queries is some bytes over; a masked run over two tiers stores one register once a page.
        many = ("append", "encode_spans", "prefill") + (("decode",) if capability < 89 else ())
        two_tiers = row["kernel"] == "decode" and "/" in row["of"] and "True" in row["of"]
        few = 16 if two_tiers or (capability >= 100 and row["kernel"] == "prefill") else 0
        assert row["spilled"] <= (720 if row["kernel"] in many and "256" in row["of"] else few), row
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
