"""The check that runs on each device before a cache is entrusted to its kernels."""

from dataclasses import replace

import pytest
import torch

from sphkv_compile.kernels.gpu import bulk, launch
from sphkv_compile.ops.check import check_device
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import Layout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no device")
LAYOUT = Layout("axis_cosine", (Tier(4, 4),), 4, 32, 128, 64, 0, "half", 64, "tiles")


@pytest.fixture(autouse=True)
def afresh():
    check_device.cache_clear()


def run(layout=LAYOUT):
    check_device(layout, 64, 2, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("tier", [Tier(4, 4), Tier(8, 4)], ids=str)
def test_sound_kernels_pass(tier):
    run(replace(LAYOUT, tiers=(tier,)))


def test_sound_kernels_pass_over_pages_of_kept_tokens():
    run(replace(LAYOUT, tiers=(Tier(8, 4), Tier(4, 4), Tier(4, 2)), kept=True))


def test_a_wrong_answer_is_refused(monkeypatch):
    attend = launch.attend
    monkeypatch.setattr(launch, "attend", lambda *arguments: attend(*arguments).roll(1, -1))
    with pytest.raises(RuntimeError, match=r"fused kernels for K4V4.*attention by"):
        run()


@pytest.mark.parametrize(("module", "name"), [(launch, "append"), (bulk, "encode")], ids=["one token", "many spans"])
def test_wrong_codes_are_refused(monkeypatch, module, name):
    """Of either encoder: both sides through the same one would agree with each other, and be wrong."""
    encode = getattr(module, name)

    def moved(state, *arguments):
        encode(state, *arguments)
        state.arena.copy_(state.arena.roll(16))

    monkeypatch.setattr(module, name, moved)
    with pytest.raises(RuntimeError, match="of the codes"):
        run()


def test_a_wrong_prefill_is_refused(monkeypatch):
    attend = bulk.attend
    monkeypatch.setattr(bulk, "attend", lambda *arguments: attend(*arguments).roll(1, 2))
    with pytest.raises(RuntimeError, match="attention by"):
        run()


def test_not_a_number_is_refused(monkeypatch):
    attend = launch.attend
    monkeypatch.setattr(launch, "attend", lambda *arguments: attend(*arguments) * float("nan"))
    with pytest.raises(RuntimeError, match="attention by nan"):
        run()
