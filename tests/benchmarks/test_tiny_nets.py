"""`python -m benchmarks.tiny_nets`: its NumPy script makes the same training as `fit`, and it compares source trees."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import xpnet
from xpnet import layers, optimizers

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import tiny_nets
from benchmarks.numpy_script import train
from benchmarks.rounds import Measurement
from benchmarks.tiny_worker import problem
from benchmarks.versions import ROOT

SHORT = ["--nets", "2-3-2", "--epochs", "3", "--threads", "1", "--rounds", "2", "--restarts", "2"]


class InOrder:
    """A generator that does not shuffle."""

    permutation = staticmethod(np.arange)


@pytest.mark.parametrize("widths", [(2, 8, 2), (10, 16, 4)])
def test_the_script_makes_the_training_of_fit(widths):
    x, y, weights = problem(widths, 100)
    model = xpnet.Sequential([layers.Dense(widths[1]), layers.ReLU(), layers.Dense(widths[2])], widths[:1], "cpu")
    model.load_state_dict(dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), weights, strict=True)))
    own = model.fit(x, y, optimizer=optimizers.SGD(0.1), epochs=5, batch_size=32, shuffle=False, verbose=0)
    history, trained = train(x, y, weights, 0.1, 5, 32, InOrder)
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    np.testing.assert_allclose(history["loss"], own["loss"], rtol=1e-5)
    np.testing.assert_allclose(history["accuracy"], own["accuracy"], atol=1e-12)
    for parameter, array in zip(model.parameters, trained, strict=True):
        np.testing.assert_allclose(parameter.value, array, rtol=1e-4, atol=1e-6)
        assert array.dtype == "float32"


def test_a_comparison_has_every_source_tree(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "rounds.json"
    assert tiny_nets.main([*SHORT, "--root", str(ROOT), "--root", str(ROOT), "--out", str(out)]) == 0
    names = [line.split(" | ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 2-3-2")]
    assert names == ["numpy", "xpnet A", "xpnet B"]
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    for name in names:
        assert len(row["measurements"][name]["values"]) == 4  # two rounds of each start
        assert min(row["measurements"][name]["values"]) > 0
        assert row["losses"][name] == pytest.approx(row["losses"]["numpy"], rel=1e-4)  # one batch: no order


def test_xpnet_comes_from_the_source_tree(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="xpnet ended with exit status 1"):
        tiny_nets.main([*SHORT, "--root", str(tmp_path)])
    assert "there is no xpnet in" in capfd.readouterr().err
    (tmp_path / "xpnet.py").write_text("raise SystemExit('imported from the tree')")
    with pytest.raises(SystemExit, match="xpnet ended with exit status 1"):
        tiny_nets.main([*SHORT, "--root", str(tmp_path)])
    assert "imported from the tree" in capfd.readouterr().err


def test_a_source_tree_that_changes_is_noticed(monkeypatch, tmp_path, capsys):
    root = tmp_path.resolve()
    file = root / "xpnet" / "layers" / "dense.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    equal = {"numpy": 1.0, "xpnet": 1.0}
    result = tiny_nets.Result({name: Measurement([1.0]) for name in equal}, equal, equal)
    monkeypatch.setattr(tiny_nets, "compare", lambda *_: result)
    assert tiny_nets.main([*SHORT, "--root", str(tmp_path)]) == 0

    def edit(*_):
        os.utime(file, ns=(1, 1))
        return result

    monkeypatch.setattr(tiny_nets, "compare", edit)
    assert tiny_nets.main([*SHORT, "--root", str(tmp_path)]) == 1
    assert f"{root} has changed" in capsys.readouterr().err


def test_different_results_are_noticed(monkeypatch, capsys):
    same = tiny_nets.Result(
        {"numpy": Measurement([2e-5, 1e-5]), "xpnet": Measurement([3e-5, 3e-5])},
        {"numpy": 0.100, "xpnet": 0.105},
        {"numpy": 0.95, "xpnet": 0.96},
    )
    assert not same.differ()
    assert same._replace(losses={"numpy": 0.100, "xpnet": 0.120}).differ()
    other = same._replace(accuracies={"numpy": 0.95, "xpnet": 0.92})
    assert other.differ()
    monkeypatch.setattr(tiny_nets, "compare", lambda *_: other)
    assert tiny_nets.main(SHORT) == 1
    captured = capsys.readouterr()
    assert "| 2-3-2, 200, 1 | xpnet | 30.0 | 2.25 | 30.0 | 3.00 | 0.1050 | 0.920 |" in captured.out
    assert "differ" in captured.err
