"""Arrays of any library: the types of their annotations, and their conversion to host arrays."""

from typing import Any, TypeAlias

import numpy

from xpnet.errors import ArgumentTypeError

Array: TypeAlias = Any  # a numpy.ndarray or a cupy.ndarray: no static type covers both
DType: TypeAlias = Any


def to_host(a: Any) -> Any:
    """An array of any library as an object that `numpy.asarray` accepts. Lists and numbers are returned unchanged.

    Raises ArgumentTypeError for masked arrays, whose mask would be lost.
    """
    refuse_masked(a)
    if isinstance(a, numpy.ndarray):
        return a
    a = detached(a)
    if hasattr(a, "__cuda_array_interface__"):
        for method in ("get", "cpu"):  # CuPy's and PyTorch's; other libraries have __array__ or DLPack
            if hasattr(a, method):
                return getattr(a, method)()
    if not hasattr(a, "__array__") and hasattr(a, "__dlpack__"):
        return numpy.from_dlpack(a)
    return a


def detached(a: Any) -> Any:
    """A PyTorch tensor without its gradient, since other libraries refuse tensors that require one; else `a`."""
    return a.detach() if hasattr(a, "detach") else a


def refuse_masked(a: Any, name: str = "") -> None:
    """Raise ArgumentTypeError for a masked array, or a list of them, because the mask would be lost."""
    masked = numpy.ma.MaskedArray
    if isinstance(a, masked) or (isinstance(a, list | tuple) and any(isinstance(item, masked) for item in a)):
        raise ArgumentTypeError(
            f"{name}{': ' if name else ''}masked arrays are not supported, because what the mask hides would be used "
            "as data: replace it, with x.filled(value), or give these samples the weight 0 in sample_weight."
        )
