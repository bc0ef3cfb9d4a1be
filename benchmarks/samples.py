"""Made-up samples: what they show is all the same to the time that they take."""

import numpy

from benchmarks.nets import CLASSES, Net


def batch_of(net: Net, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(x in float32, class numbers), the same for every library."""
    rng = numpy.random.default_rng(0)
    x = rng.random((count, *net.input_shape), dtype=numpy.float32)
    return x, rng.integers(CLASSES, size=count)
