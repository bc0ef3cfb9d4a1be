"""The benchmarks of xpnet and of the floor on an emulated and a real GPU: they run the same steps as `fit`."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import emulation, peers, profile
from benchmarks.nets import NETS, Net
from benchmarks.peers import floor
from benchmarks.samples import batch_of

SMALL = Net((784,), (("dense", 16), ("relu",), ("dense", 10)), "adam")


@pytest.fixture
def device(gpu, monkeypatch):
    """The device "gpu", for which `get_backend` returns the backend of the fixture `gpu`."""
    emulation.substitute(gpu, monkeypatch.setattr)
    return "gpu"


@pytest.mark.parametrize("name", ["xpnet", "xpnet-tf32", "xpnet-bfloat16", "xpnet-uint8"])
def test_the_peer_xpnet_replays_its_steps(gpu, device, name):
    peer = peers.start(name, SMALL, 32, device)
    for _ in range(6):
        peer.step()
    peer.synchronize()
    assert peer.fallback_reason() is None
    x, y = batch_of(SMALL, 100, peers.KINDS[name].dtype)
    assert peer.epoch(x, y) > 0
    assert peer.predict(x).shape == (100, 10)
    peers.close(peer)


def test_the_peer_xpnet_eager_runs_eagerly(gpu, device, monkeypatch):
    monkeypatch.delenv("XPNET_CAPTURE", raising=False)
    peer = peers.start("xpnet-eager", SMALL, 32, device)
    assert "XPNET_CAPTURE" not in os.environ
    for _ in range(6):
        peer.step()
    assert peer.fallback_reason() is not None
    peers.close(peer)


@pytest.mark.parametrize("name", ["floor", "floor-tf32", "floor-bfloat16"])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_the_floor_is_a_graph_of_matrix_products(gpu, device, monkeypatch, name, net):
    run, launches = floor.Floor._run, []

    def recorded(self):
        before = len(gpu.xp.launches)
        run(self)
        launches.append(gpu.xp.launches[before:])

    if gpu.name == "emulated":
        monkeypatch.setattr(floor.Floor, "_run", recorded)
    peer = peers.start(name, NETS[net], 8, device)
    if gpu.name == "emulated":
        products = {"mlp": 5, "cnn": 8}[net]
        assert launches == [["gemm"] * products, []]  # in the warm-up and in the capture
        gpu.xp.launches.clear()
    peer.step()
    peer.synchronize()
    if gpu.name == "emulated":
        assert gpu.xp.launches == ["graph"]
    peers.close(peer)


def test_the_parts_of_a_profile_add_up(gpu, device, monkeypatch):
    monkeypatch.setitem(profile.NETS, "small", SMALL)
    rows = list(profile.profile_of("small", 16, device, large=1000, wide=16, repeats=2))
    names = [name.removeprefix("small: ").split()[0] for name, _, _ in rows]
    assert names[:-2] == [
        *["gather", "matmul_bias", "gather", "dense_cross_entropy", "matmul_sum_rows", "matmul_sum_rows", "sum_to"],
        *["whole_update"],
    ]
    assert names[-2:] == ["all", "the"] and "one graph" in rows[-1][0]
    np.testing.assert_allclose(rows[-2][1], sum(seconds for _, seconds, _ in rows[:-2]))
    assert all(seconds > 0 and floor > 0 for _, seconds, floor in rows)


def test_the_profile_of_a_step_on_the_cpu_has_the_time_of_each_call(monkeypatch):
    monkeypatch.setitem(profile.NETS, "small", SMALL)
    explained = profile.profile_on_cpu("small", 16)
    assert {"matmul", "cross_entropy"} <= {name for call in explained.replayed for name in call.operator.split(", ")}
    assert all(call.seconds > 0 for call in explained.replayed)
