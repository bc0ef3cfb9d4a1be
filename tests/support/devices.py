"""What devices do differently, for tests that have to know."""

import numpy as np

from xpnet.backends import Backend


def flushes_subnormals(backend: Backend, dtype: str) -> bool:
    """Whether numbers below the smallest normal one become 0: CuPy compiles all float32 kernels with -ftz=true."""
    return backend.name.startswith("gpu") and np.dtype(dtype) == np.float32
