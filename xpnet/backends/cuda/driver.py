"""Launches by the CUDA driver that let a kernel begin before the previous one has ended.

Between two kernels of a CUDA graph, a GPU is idle for about 0.5 µs. "Programmatic dependent launch" saves most of that:
the blocks of a kernel are placed on the GPU as soon as those of the previous kernel leave it, and then wait until
everything that it has written is visible (`await_previous_kernel` in kernels.py). CuPy cannot launch kernels like this.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy

from xpnet.backends.cuda.cublas import call

FIRST_CAPABILITY = 9  # the first compute capability with programmatic dependent launch

_PROGRAMMATIC_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Configuration(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("attribute_count", ctypes.c_uint),
    )  # fmt: skip


class Driver:
    """Launches kernels of CuPy on a device of at least `FIRST_CAPABILITY`."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._attribute = _Attribute(id=_PROGRAMMATIC_SERIALIZATION)
        self._attribute.value[0] = 1

    def launch(
        self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], values: Sequence[Any], shared_bytes: int,
        stream: int,
    ) -> None:  # fmt: skip
        """Launch a `RawKernel` that begins with `await_previous_kernel`. values: arrays, numpy scalars and structs."""
        scalars = [a if isinstance(a, numpy.generic | numpy.ndarray) else numpy.uint64(a.data.ptr) for a in values]
        copies = [numpy.array(a) for a in scalars]
        pointers = (ctypes.c_void_p * len(copies))(*[copy.ctypes.data for copy in copies])
        configuration = _Configuration(
            (*grid, 1, 1)[:3], (*block, 1, 1)[:3], shared_bytes, stream, ctypes.pointer(self._attribute), 1
        )
        function = ctypes.c_void_p(kernel.kernel.ptr)
        call(self._library, "cuLaunchKernelEx", ctypes.byref(configuration), function, pointers, None)


@functools.cache
def load() -> ctypes.CDLL:
    """The library of the CUDA driver. Raises if there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
