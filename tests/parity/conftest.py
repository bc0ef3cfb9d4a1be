"""Parity with PyTorch: `nox -s parity`, or `pytest tests/parity` where PyTorch is. A plain `pytest` passes it by."""

from pathlib import Path

import pytest
from blas import limited_to

from xpnet.backends import cpu_primitives, get_backend


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if any("parity" in argument for argument in config.args) else True


@pytest.fixture(params=["formulas", "compiled", "threads"], autouse=True)
def way_of_working(request, monkeypatch):
    """Every test three times: by the plain formulas, by the compiled loops, and by those in several threads."""
    monkeypatch.setenv("XPNET_FAST", "0" if request.param == "formulas" else "1")
    cpu_primitives.kernels.cache_clear()
    if request.param != "formulas" and cpu_primitives.kernels() is None:
        pytest.skip("Numba is not installed")
    threads = 3 if request.param == "threads" else 1
    with limited_to(threads), get_backend("cpu").working():
        yield
    cpu_primitives.kernels.cache_clear()
