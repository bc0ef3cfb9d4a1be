"""Parity with PyTorch: run by `nox -s parity`, or by `pytest tests/parity` if PyTorch is installed, not by `pytest`."""

from pathlib import Path

import pytest
from blas import blas_threads

from xpnet.backends import get_backend
from xpnet.backends.cpu import operators


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if any("parity" in argument for argument in config.args) else True


@pytest.fixture(params=["formulas", "compiled", "threads"], autouse=True)
def operators_of_the_cpu(request, monkeypatch):
    """Runs every test three times: with the reference formulas, with compiled loops, and with these in threads."""
    monkeypatch.setenv("XPNET_FAST", "0" if request.param == "formulas" else "1")
    operators.compiled_loops.cache_clear()
    if request.param != "formulas" and operators.compiled_loops() is None:
        pytest.skip("Numba is not installed")
    threads = 3 if request.param == "threads" else 1
    with blas_threads(threads), get_backend("cpu").parallel_region():
        yield
    operators.compiled_loops.cache_clear()
