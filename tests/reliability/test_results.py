"""The summary of `python -m reliability`, and the table that it writes into docs/reliability.md."""

import types
from pathlib import Path

import pytest

from reliability import __main__ as program
from reliability.processes import run_tests
from reliability.results import Result

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


@pytest.fixture
def attack(monkeypatch):
    """An attack with a good and a bad result."""
    results = [Result("good cases", 1200), Result("bad cases", 3, ["seed 1: 2 instead of 1"], "one of three")]
    part = types.SimpleNamespace(run=lambda scale, seed, folder: results)
    monkeypatch.setattr(program, "PARTS", ("trainings",))
    monkeypatch.setattr(program.importlib, "import_module", lambda name: part)


@pytest.mark.usefixtures("attack")
def test_the_summary_has_all_results_and_the_exit_status_tells_whether_one_is_bad(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("Text\n<!-- results -->\n| a |\n|---|\n| old | 1 | 0 |  | d |\n<!-- end of results -->\nMore\n")
    assert program.main(["--only", "trainings", "--write", str(page)]) == 1
    printed = capsys.readouterr().out
    assert "good cases: 1,200 tried, 0 bad" in printed
    assert "bad cases: 3 tried, 1 bad (one of three)\n    seed 1: 2 instead of 1" in printed
    lines = page.read_text().splitlines()
    assert [line.split(" | ")[:4] for line in lines[4:7]] == [
        ["| old", "1", "0", ""], ["| good cases", "1,200", "0", ""], ["| bad cases", "3", "1", "one of three"],
    ]  # fmt: skip
    assert lines[0] == "Text" and lines[-1] == "More"


def test_the_page_has_a_table_for_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert program.with_results(page, [], "today").count("\n|") == page.count("\n|")


PLANTED = """
import pytest

@pytest.mark.parametrize("row", [1, 2, 3])
def test_row(row):
    assert row != 2, "two"

@pytest.fixture
def broken():
    raise ValueError("no fixture")

def test_fixture(broken):
    pass

@pytest.mark.skip
def test_skipped():
    pass
"""


def test_a_run_of_pytest_counts_its_cases_and_failures(tmp_path):
    (tmp_path / "test_planted.py").write_text(PLANTED)
    arguments = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    result = run_tests("rows", arguments, tmp_path)
    assert (result.tried, result.note) == (4, "1 skipped")
    assert [text.split(" ")[0] for text in result.bad] == [
        "test_planted.py::test_row[2]:", "test_planted.py::test_fixture:",
    ]  # fmt: skip
    assert "two" in result.bad[0] and "no fixture" in result.bad[1]
    result = run_tests("rows", arguments, tmp_path, lambda test, failures: (10, ["a", "b"] * len(failures)))
    assert (result.tried, len(result.bad)) == (40, 4)


def test_a_run_of_pytest_that_does_not_report_is_bad(tmp_path):
    assert "did not report" in run_tests("none", ["--no-such-option"], tmp_path).bad[0]
