"""How many threads the BLAS has, for tests that are about it."""

from contextlib import AbstractContextManager
from typing import Any

import pytest


def limited_to(threads: int) -> AbstractContextManager[Any]:
    """Inside, it has so many. Skips the test where threadpoolctl, which sets them, is not installed."""
    made: AbstractContextManager[Any] = pytest.importorskip("threadpoolctl").threadpool_limits(threads, user_api="blas")
    return made
