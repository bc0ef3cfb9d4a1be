"""The benchmarks' own peers on a GPU, emulated too, where no time means anything: they run what `fit` runs."""

import sys
from pathlib import Path

import numpy as np
import pytest

import xpnet

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import peers, profile
from benchmarks.nets import NETS, Net
from benchmarks.samples import batch_of

SMALL = Net((784,), (("dense", 16), ("relu",), ("dense", 10)), "adam")


@pytest.fixture
def device(gpu, monkeypatch):
    """What `get_backend` gives for "gpu" there."""
    real = xpnet.get_backend
    monkeypatch.setattr(xpnet, "get_backend", lambda name: gpu if name == "gpu" else real(name))
    for module in ("model", "layers.base", "data"):
        if hasattr(sys.modules.get(f"xpnet.{module}"), "get_backend"):
            monkeypatch.setattr(sys.modules[f"xpnet.{module}"], "get_backend", xpnet.get_backend)
    return "gpu"


@pytest.mark.parametrize("name", ["xpnet", "xpnet-tf32", "xpnet-bfloat16", "xpnet-uint8"])
def test_xpnet_plays_its_steps(gpu, device, name):
    peer = peers.start(name, SMALL, 32, device)
    for _ in range(6):
        peer.step()
    peer.synchronize()
    assert peer.player.recorded == 1 and peer.player.why_not is None
    x, y = batch_of(SMALL, 100, peers.KINDS[name].dtype)
    assert peer.epoch(x, y) > 0
    assert peer.predict(x).shape == (100, 10)


@pytest.mark.parametrize("name", ["floor", "floor-tf32", "floor-bfloat16"])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_the_floor_is_products_alone(gpu, device, name, net):
    peer = peers.start(name, NETS[net], 8, device)
    if gpu.name == "emulated":
        gpu.xp.launches.clear()
    peer.step()
    peer.synchronize()
    if gpu.name == "emulated" and net == "mlp":
        assert gpu.xp.launches == ["gemm"] * 5


def test_the_profile_of_a_step_adds_up(gpu, device, monkeypatch):
    monkeypatch.setattr(profile, "REPEATS", 2)
    monkeypatch.setitem(profile.NETS, "small", SMALL)
    rows = list(profile.profile_of("small", 16, device, large=1000, wide=16))
    names = [what.removeprefix("small: ").split()[0] for what, _, _ in rows]
    assert names.count("product") == 5 and {"relu", "cross_entropy", "adam", "sum_rows"} <= set(names)
    assert names[-2:] == ["all", "the"] and "one graph" in rows[-1][0]
    np.testing.assert_allclose(rows[-2][1], sum(seconds for _, seconds, _ in rows[:-2]))
    assert all(seconds > 0 and floor > 0 for _, seconds, floor in rows)
