"""examples/names.py as a program, and that padding has no effect on it."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from programs import run_program

EXAMPLES = Path(__file__).parents[2] / "examples"

if not EXAMPLES.exists():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)


@pytest.fixture
def names(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("names_example", EXAMPLES / "names.py")  # `names` is a test helper
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_words_are_spelled_better_than_by_the_frequencies_of_letters_and_new_ones_invented(tmp_path):
    done = run_program(EXAMPLES / "names.py", tmp_path, "--epochs", 3)
    assert done.returncode == 0, done.stderr
    invented, loss = done.stdout.splitlines()[-2:]
    assert float(re.fullmatch(r"test loss per letter: (\d\.\d{4})", loss)[1]) < 2.5  # 2.9 for the frequencies
    assert len(re.fullmatch(r"invented: ([a-z ]+)", invented)[1].split()) == 20


def test_a_file_of_names_is_read_and_a_missing_one_named(tmp_path):
    (tmp_path / "list.txt").write_text("Ada\nGrace\nÉmilie\n\n Ada\n" * 7 + "\n".join("BCDFGHJKLM"), encoding="utf-8")
    done = run_program(EXAMPLES / "names.py", tmp_path, "--file", "list.txt", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "test loss per letter" in done.stdout
    done = run_program(EXAMPLES / "names.py", tmp_path, "--file", "missing.txt")
    assert done.returncode == 1 and "names.py: " in done.stderr and "missing.txt" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has 0 different words"), (b"Ada\nGrace\n" * 9, "has 2 different words"), (b"\xff\xfe", "UTF-8")],
    ids=["empty", "few words", "not a text"],
)
def test_a_file_without_enough_words_is_a_one_line_error(names, monkeypatch, tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["names.py", "--file", str(path)])
    with pytest.raises(SystemExit, match=f"^names.py: .*list.txt.* {message}"):
        names.main()


def test_padding_changes_neither_loss_nor_update(names):
    x, y = names.sequences(["ab", "bcb", "c"], names.vocabulary(["abc"]))
    results = []
    for more in (0, 3):
        wide = [np.pad(a, [(0, 0), (0, more)]) for a in (x, y)]
        model = names.build(3, "cpu")
        loss = model.train_on_batch(*wide, loss="softmax_cross_entropy", optimizer="sgd")["loss"]
        results.append([loss, *(value for value in model.state_dict().values())])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
