"""Products of matrices by cuBLAS, through a handle of our own.

CuPy's own products refuse to be recorded into a CUDA graph. This handle has a fixed workspace, is bound to one stream,
and can add to what is there (beta = 1). Called by ctypes: five functions of a stable C interface are less than another
package to install. https://docs.nvidia.com/cuda/cublas/#cublasgemmex
"""

import ctypes
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array

_PLAIN, _TRANSPOSED = 0, 1  # cublasOperation_t
_FLOAT32, _FLOAT64, _FLOAT16, _BFLOAT16 = 0, 1, 2, 14  # cudaDataType_t
_IN_FLOAT32, _IN_FLOAT64, _IN_TF32 = 68, 70, 77  # cublasComputeType_t
_BY_ITSELF = -1  # cublasGemmAlgo_t
_LARGEST = 2**31 - 1  # sizes are C ints

WORKSPACE_BYTES = 32 * 2**20  # what NVIDIA advises for Hopper; elsewhere 4 MiB would do


class Half(NamedTuple):
    """A matrix of 16-bit numbers, which only products can read. `T` is its transpose."""

    bits: Array  # of uint16
    precision: str

    @property
    def T(self) -> "Half":
        return Half(self.bits.T, self.precision)

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.bits.shape
        return shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, key: Any) -> "Half":
        return Half(self.bits[key], self.precision)


class Operand(NamedTuple):
    """How a matrix of rows lies in memory: whether transposed, and how far its rows (or columns) are apart."""

    operation: int
    leading: int


def laid_out(a: Array) -> Operand | None:
    """How cuBLAS is to read the matrix a, or None where it cannot: neither rows nor columns lie in one piece."""
    rows, columns = a.shape
    down, across = (stride // a.itemsize for stride in a.strides)
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return Operand(_PLAIN, max(down, columns, 1) if rows > 1 else max(columns, 1))
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return Operand(_TRANSPOSED, max(across, rows, 1) if columns > 1 else max(rows, 1))
    return None


class Cublas:
    """One handle on one stream of one device."""

    def __init__(self, library: Any, stream: int, workspace: Array) -> None:
        self._library, self._workspace = library, workspace
        self._handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
        # After the stream, for setting that forgets the workspace.
        address, size = ctypes.c_void_p(workspace.data.ptr), ctypes.c_size_t(workspace.nbytes)
        self._call("cublasSetWorkspace_v2", self._handle, address, size)
        self._scalars = {
            kind: [kind(value) for value in (0.0, 1.0)] for kind in (ctypes.c_float, ctypes.c_double)
        }  # alpha and beta are read from the host

    def product(self, a: Array, b: Array, out: Array, add: bool, tf32: bool) -> bool:
        """out = a @ b, or out += a @ b. False, and nothing is done, for matrices that cuBLAS does not take.

        a, b: matrices or transposed views, both of out's dtype, or both `Half` beside an out of float32.

        cuBLAS counts by columns, and sees the transposes of what lies by rows: outᵀ = bᵀ aᵀ. So b goes first, and a
        matrix of ours that is not transposed is not transposed for it either.
        """
        half = a.precision if isinstance(a, Half) else None
        first, second = (b.bits, a.bits) if half else (b, a)
        by_b, by_a, by_out = laid_out(first), laid_out(second), laid_out(out)
        if by_a is None or by_b is None or by_out is None or by_out.operation != _PLAIN or out.dtype.kind != "f":
            return False
        sizes = (out.shape[1], out.shape[0], second.shape[1])
        if max(*sizes, by_a.leading, by_b.leading, by_out.leading) > _LARGEST or 0 in sizes:
            return False
        double = out.dtype == numpy.float64
        kind = _FLOAT64 if double else _FLOAT32
        kind_in = {"float16": _FLOAT16, "bfloat16": _BFLOAT16, None: kind}[half]
        zero, one = self._scalars[ctypes.c_double if double else ctypes.c_float]
        self._call(
            "cublasGemmEx", self._handle, by_b.operation, by_a.operation, *sizes, ctypes.byref(one),
            ctypes.c_void_p(first.data.ptr), kind_in, by_b.leading,
            ctypes.c_void_p(second.data.ptr), kind_in, by_a.leading, ctypes.byref(one if add else zero),
            ctypes.c_void_p(out.data.ptr), kind, by_out.leading,
            _IN_FLOAT64 if double else _IN_TF32 if tf32 else _IN_FLOAT32, _BY_ITSELF,
        )  # fmt: skip
        return True

    def product_each(self, a: Array, b: Array, out: Array, tf32: bool) -> bool:
        """out[i] = a[i] @ b[i] of stacks (N, rows, columns), or matrices that serve for all; otherwise as `product`."""
        by_a, by_b = (laid_out(x if x.ndim == 2 else x[0]) for x in (a, b))
        sizes = (out.shape[2], out.shape[1], a.shape[-1], len(out))
        if by_a is None or by_b is None or 0 in sizes or max(*sizes, by_a.leading, by_b.leading) > _LARGEST:
            return False
        double = out.dtype == numpy.float64
        kind = _FLOAT64 if double else _FLOAT32
        zero, one = self._scalars[ctypes.c_double if double else ctypes.c_float]
        apart_a, apart_b = (0 if x.ndim == 2 else x.shape[1] * x.shape[2] for x in (a, b))
        self._call(
            "cublasGemmStridedBatchedEx", self._handle, by_b.operation, by_a.operation, *sizes[:3], ctypes.byref(one),
            ctypes.c_void_p(b.data.ptr), kind, by_b.leading, ctypes.c_longlong(apart_b),
            ctypes.c_void_p(a.data.ptr), kind, by_a.leading, ctypes.c_longlong(apart_a), ctypes.byref(zero),
            ctypes.c_void_p(out.data.ptr), kind, sizes[0], ctypes.c_longlong(sizes[0] * sizes[1]), sizes[3],
            _IN_FLOAT64 if double else _IN_TF32 if tf32 else _IN_FLOAT32, _BY_ITSELF,
        )  # fmt: skip
        return True

    def _call(self, name: str, *given: Any) -> None:
        status = getattr(self._library, name)(*given)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")


def load() -> ctypes.CDLL:
    """NVIDIA's cuBLAS, where CuPy finds it too. Raises where there is none."""
    from cuda import pathfinder  # comes with CuPy

    path = pathfinder.load_nvidia_dynamic_lib("cublas").abs_path
    if path is None:
        raise OSError("the file of libcublas is not known")
    return ctypes.CDLL(path)
