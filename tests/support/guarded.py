"""Arrays between guards, which show whether a kernel writes outside of its arrays."""

import numpy as np

GUARD = 64


class Guarded:
    """Makes arrays on the device with guards before and after, and checks the guards.

    An array of floats contains NaN until it is filled, so that a test finds what a kernel leaves out.
    """

    def __init__(self, backend):
        self.backend, self._whole = backend, []

    def __call__(self, shape, dtype="float32", fill=None):
        size = int(np.prod(shape))
        values = np.full(size + 2 * GUARD, 77, dtype=dtype)
        if fill is None and values.dtype.kind == "f":
            fill = np.nan
        if fill is not None:
            values[GUARD : GUARD + size] = np.asarray(fill).ravel()
        whole = self.backend.asarray(values)
        self._whole.append((whole, size))
        return whole[GUARD : GUARD + size].reshape(shape)

    def check(self):
        for whole, size in self._whole:
            values = self.backend.to_numpy(whole)
            guards = np.concatenate([values[:GUARD], values[GUARD + size :]])
            assert (guards == np.array(77).astype(values.dtype)).all(), "a kernel wrote outside of the array"
