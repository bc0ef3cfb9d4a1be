"""Matrices on a device in several layouts, for the tests of products."""

import numpy as np

SHAPES = [(1, 1, 1), (3, 5, 7), (1, 8, 5), (8, 1, 5), (8, 5, 1), (64, 128, 10), (33, 17, 65)]
LAYOUTS = ["rows", "transposed", "some columns", "some columns, transposed"]


def in_layout(gpu, a, layout):
    """The matrix a on the device, in this layout."""
    rows, columns = a.shape
    if layout == "rows":
        return gpu.asarray(a)
    if layout == "transposed":
        return gpu.asarray(np.ascontiguousarray(a.T)).T
    wide = np.full((rows, columns + 5) if layout == "some columns" else (columns, rows + 5), 9, a.dtype)
    device_array = gpu.asarray(wide)
    if layout == "some columns":
        device_array[:, 2 : columns + 2] = gpu.asarray(a)
        return device_array[:, 2 : columns + 2]
    device_array[:, 2 : rows + 2] = gpu.asarray(np.ascontiguousarray(a.T))
    return device_array[:, 2 : rows + 2].T
