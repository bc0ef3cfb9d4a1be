"""Misuse: wrong calls of the public interface, in tests/misuse, which must end in errors of xpnet that say what to do.

Most of tests/misuse is one test for each row. test_constructors.py has one test for each class, which counts its own
rows: every parameter with every value.
"""

import importlib
import sys
from pathlib import Path

from reliability.processes import ROOT, run_tests
from reliability.results import Result


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    """All rows; scale and seed do not matter."""
    sys.path.append(str(ROOT / "tests" / "misuse"))
    generated = importlib.import_module("test_constructors")
    test = "tests/misuse/test_constructors.py::test_each_argument_works_or_is_refused_by_name"
    rows = {f"{test}[{target.name}]": generated.rows_in(target) for target in generated.TARGETS}

    def count(name: str, failures: list[str]) -> tuple[int, list[str]]:
        """The message of a test of a class has a line for each bad row, after its first."""
        if name not in rows:
            return 1, failures
        lines = [line for failure in failures for line in failure.split("\n")[1:]]
        return rows[name], [line for line in lines if "=" in line and not line.startswith("assert")] or failures

    return [run_tests("wrong calls", ["tests/misuse"], folder, count)]
