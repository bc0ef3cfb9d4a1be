"""The number of BLAS threads, for tests of the thread pool."""

from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import threadpool_limits


def blas_threads(threads: int) -> AbstractContextManager[Any]:
    """A context in which the BLAS uses this number of threads."""
    limits: AbstractContextManager[Any] = threadpool_limits(threads, user_api="blas")
    return limits
