"""The CPU backend without Numba."""

import contextlib

import pytest

from xpnet.backends.cpu.operators import compiled_loops


@contextlib.contextmanager
def formulas_only():
    """A context in which the CPU uses the reference formulas instead of compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XPNET_FAST", "0")
        compiled_loops.cache_clear()
        assert compiled_loops() is None
        try:
            yield
        finally:
            compiled_loops.cache_clear()
