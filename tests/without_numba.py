"""The CPU as it is where Numba is not installed."""

import contextlib

import pytest

from xpnet.backends import cpu_primitives


@contextlib.contextmanager
def formulas_only():
    """The CPU without its compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XPNET_FAST", "0")
        cpu_primitives.kernels.cache_clear()
        assert cpu_primitives.kernels() is None
        yield
    cpu_primitives.kernels.cache_clear()
