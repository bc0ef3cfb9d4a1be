"""Random samples; the times do not depend on their contents."""

import numpy

from benchmarks.nets import CLASSES, Net


def batch_of(net: Net, count: int, dtype: str = "float32") -> tuple[numpy.ndarray, numpy.ndarray]:
    """(x, labels), the same for every library: x from 0 to 1 in float32, or from 0 to 255 in uint8."""
    rng = numpy.random.default_rng(0)
    if dtype == "uint8":
        x = rng.integers(256, size=(count, *net.input_shape), dtype=numpy.uint8)
    else:
        x = rng.random((count, *net.input_shape), dtype=numpy.float32)
    return x, rng.integers(CLASSES, size=count)
