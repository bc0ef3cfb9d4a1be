"""The number of BLAS threads, for tests of the thread pool."""

from contextlib import AbstractContextManager
from typing import Any

import pytest


def blas_threads(threads: int) -> AbstractContextManager[Any]:
    """A context in which the BLAS uses this number of threads. Skips the test if threadpoolctl is not installed."""
    limits: AbstractContextManager[Any] = pytest.importorskip("threadpoolctl").threadpool_limits(
        threads, user_api="blas"
    )
    return limits
