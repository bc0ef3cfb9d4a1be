"""Random trainings and graphs: captured and eager steps, both stand-ins, stops and resumes, all equal to the bit."""

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

from reliability.results import Result

_FILES = {
    "random trainings, captured and eager, on the CPU and the emulated GPU": [
        "tests/training/test_random_trainings.py"
    ],
    "random programs and their replays": ["tests/capture/test_random_programs.py"],
    "random graph models: strict stand-in, replays, stops and resumes": ["tests/test_graph_models.py", "-k", "random"],
}
_TIMES = 2.0  # the cases of `nox -s tests-slow`


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    """Run the tests of random cases with more seeds. `seed` is not used: their cases are numbered from 0."""
    environment = {**os.environ, "XPNET_RANDOM_CASES": str(_TIMES * scale), "OPENBLAS_NUM_THREADS": "1"}
    return [tested(cases, arguments, environment, folder) for cases, arguments in _FILES.items()]


def tested(cases: str, arguments: list[str], environment: dict[str, str], folder: Path) -> Result:
    """The result of these tests, in a process of their own; each test that ran counts as a case."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-m", "not gpu", f"--junitxml={report}", *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not report.exists():
        return Result(cases, 0, [f"pytest {' '.join(arguments)} ended without a report: {finished.stdout[-500:]}"])
    tests = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    bad = [
        f"pytest {' '.join(arguments)}: {test.get('name')}: {failure.get('message', '')[:200]}"
        for test in tests
        for failure in (*test.findall("failure"), *test.findall("error"))
    ]
    skipped = sum(test.find("skipped") is not None for test in tests)
    return Result(cases, len(tests) - skipped, bad, f"{skipped} skipped" if skipped else "")
