"""The program that measures imports, the time until the first epoch, and kinds of inputs."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import xpnet
from xpnet import layers

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import startup

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits the cores of its processes before they start")


def test_every_kind_of_input_is_measured_in_each_round():
    measured = startup.epochs_of_inputs(2, samples=1500)
    assert measured.keys() == {"first epoch", "second epoch", "fit"}
    assert {"float32", "uint8", "float32, memmap", "uint8, memmap"} <= measured["fit"].keys()
    for name, seconds in measured["fit"].items():
        epochs = np.array([measured["first epoch"][name], measured["second epoch"][name]])
        assert epochs.shape == (2, 2) and (epochs > 0).all() and (epochs.sum(axis=0) < seconds).all()


def test_a_process_is_measured_until_the_line_of_its_first_epoch(capfd):
    x, y = np.zeros((8, 3)), np.zeros(8, int)
    model = xpnet.Sequential([layers.Dense(2)], (3,), backend="cpu")
    model.fit(x, y, epochs=12, verbose=2)
    lines = capfd.readouterr().out.splitlines()
    assert [bool(re.match(startup.FIRST_EPOCH, line)) for line in lines] == [True] + 11 * [False]
    program = f"import time; print('device'); print({lines[0]!r}); time.sleep(60)"
    measured = startup.processes({"a": ["-c", program], "b": ["-c", program]}, 1, 2, startup.FIRST_EPOCH)
    assert measured.keys() == {"a", "b"}
    assert all(len(one.values) == 2 and 0 < max(one.values) < 50 for one in measured.values())


@pytest.mark.parametrize(("program", "until"), [("raise SystemExit(3)", None), ("print('epoch 10/12')", "epoch +1/")])
def test_a_process_that_fails_or_has_no_epoch_ends_the_program(program, until):
    with pytest.raises(SystemExit, match="broken ended with exit status"):
        startup.processes({"broken": ["-c", program]}, 1, 1, until)


def test_the_cost_of_an_import_is_the_difference_of_two_processes(capsys):
    startup.main(["--measure", "import", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    milliseconds = [float(line.split()[-3]) for line in lines if line.endswith(tuple("0123456789"))]
    numpy_only, both, difference = milliseconds
    assert both - numpy_only == pytest.approx(difference, abs=0.2)
