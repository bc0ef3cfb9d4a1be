"""Random trainings and graphs: captured and eager steps, both stand-ins, stops and resumes, all equal to the bit."""

from pathlib import Path

from reliability.processes import run_tests
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
    variables = {"XPNET_RANDOM_CASES": str(_TIMES * scale), "OPENBLAS_NUM_THREADS": "1"}
    return [
        run_tests(cases, ["-n", "auto", "-m", "not gpu", *arguments], folder, **variables)
        for cases, arguments in _FILES.items()
    ]
