"""The names of what no static type covers on both devices."""

from typing import Any, TypeAlias

Array: TypeAlias = Any  # a numpy.ndarray or a cupy.ndarray
DType: TypeAlias = Any
