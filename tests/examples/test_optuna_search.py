"""The example of a search with Optuna, run as a program; skipped if Optuna is not installed."""

import re
from pathlib import Path

import pytest
from programs import run_program

pytest.importorskip("optuna", reason="Optuna is not installed")

PROGRAM = Path(__file__).parents[2] / "examples" / "optuna_search.py"

if not PROGRAM.exists():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)


def test_the_search_prunes_trials_and_finds_an_accurate_network(tmp_path):
    done = run_program(PROGRAM, tmp_path, "--trials", 12)
    assert (done.returncode, done.stderr) == (0, "")
    trials, settings, accuracy = done.stdout.splitlines()
    total, pruned = map(int, re.findall(r"\d+", trials))
    assert total == 12 and 0 < pruned < 12
    assert settings.startswith("best settings: learning_rate")
    validation, test = map(float, re.findall(r"\d\.\d+", accuracy))
    assert validation > 0.9 and test > 0.9
