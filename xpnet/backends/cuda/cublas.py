"""Matrix products by cuBLAS, through a handle of our own.

CuPy's own products refuse to be captured into a CUDA graph. This handle has a fixed workspace, is bound to one stream,
and can add to the output (beta = 1). It is called through ctypes, because it has a stable C interface.
https://docs.nvidia.com/cuda/cublas/#cublasgemmex
"""

import ctypes
import functools
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array

_NOT_TRANSPOSED, _TRANSPOSED = 0, 1  # cublasOperation_t
_FLOAT32, _FLOAT64, _FLOAT16, _BFLOAT16 = 0, 1, 2, 14  # cudaDataType_t
_COMPUTE_FLOAT32, _COMPUTE_FLOAT64, _COMPUTE_TF32 = 68, 70, 77  # cublasComputeType_t
_DEFAULT_ALGORITHM = -1  # cublasGemmAlgo_t
_LARGEST = 2**31 - 1  # sizes are C ints

WORKSPACE_BYTES = 32 * 2**20  # which NVIDIA recommends for Hopper; other GPUs need 4 MiB


class HalfMatrix(NamedTuple):
    """A matrix of 16-bit numbers, which only matrix products can read. `T` is its transpose."""

    bits: Array  # uint16
    precision: str

    @property
    def T(self) -> "HalfMatrix":
        return HalfMatrix(self.bits.T, self.precision)

    @property
    def as_copy(self) -> dict[str, Any]:
        """The arguments of a kernel that writes it."""
        return {"copy": self.bits, "bfloat16": self.precision == "bfloat16"}

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.bits.shape
        return shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, key: Any) -> "HalfMatrix":
        return HalfMatrix(self.bits[key], self.precision)


#: cudaDataType_t by the precision of a `HalfMatrix`
HALF_TYPES = {"float16": _FLOAT16, "bfloat16": _BFLOAT16}


def elements(matrix: Any) -> Array:
    """The array with the elements of a matrix, which are bits if it is a `HalfMatrix`."""
    return matrix.bits if isinstance(matrix, HalfMatrix) else matrix


class MatrixLayout(NamedTuple):
    """How a matrix is stored: whether transposed, and the elements from one row (or column) to the next."""

    operation: int
    leading: int


def matrix_layout(a: Array) -> MatrixLayout | None:
    """How cuBLAS has to read the matrix a; None if it cannot, since neither rows nor columns are contiguous."""
    rows, columns = a.shape
    row_stride, column_stride = (stride // a.itemsize for stride in a.strides)
    if (column_stride == 1 or columns == 1) and (row_stride >= columns or rows == 1):
        return MatrixLayout(_NOT_TRANSPOSED, max(row_stride, columns, 1) if rows > 1 else max(columns, 1))
    if (row_stride == 1 or rows == 1) and (column_stride >= rows or columns == 1):
        return MatrixLayout(_TRANSPOSED, max(column_stride, rows, 1) if columns > 1 else max(rows, 1))
    return None


class Cublas:
    """One handle on one stream of one device.

    cuBLAS stores matrices by columns. It reads ours, which are stored by rows, as their transposes, and computes
    outᵀ = bᵀ aᵀ. So b is passed first, and the flags for transposed matrices stay the same.
    """

    def __init__(self, library: Any, stream: int, workspace: Array) -> None:
        self._call, self._workspace = functools.partial(call, library), workspace
        self._handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
        # After the stream, because setting the stream resets the workspace.
        address, size = ctypes.c_void_p(workspace.data.ptr), ctypes.c_size_t(workspace.nbytes)
        self._call("cublasSetWorkspace_v2", self._handle, address, size)
        # alpha and beta, which cuBLAS reads from the host
        self._scalars = {kind: (kind(0.0), kind(1.0)) for kind in (ctypes.c_float, ctypes.c_double)}

    def matmul(self, a: Array, b: Array, out: Array, add: bool, tf32: bool) -> bool:
        """out = a @ b, or out += a @ b. False, without doing anything, for matrices that cuBLAS does not accept.

        a, b: matrices or transposed views in out's dtype, or `HalfMatrix` both, with a float32 out.
        """
        half = a.precision if isinstance(a, HalfMatrix) else None
        a, b = (a.bits, b.bits) if half else (a, b)
        layout_a, layout_b, layout_out = matrix_layout(a), matrix_layout(b), matrix_layout(out)
        if layout_a is None or layout_b is None or layout_out is None:
            return False
        if layout_out.operation != _NOT_TRANSPOSED or out.dtype.kind != "f":
            return False
        sizes = (out.shape[1], out.shape[0], a.shape[1])
        if max(*sizes, layout_a.leading, layout_b.leading, layout_out.leading) > _LARGEST or 0 in sizes:
            return False
        kind, compute, zero, one = self._types(out, tf32)
        kind_in = HALF_TYPES[half] if half else kind
        self._call(
            "cublasGemmEx", self._handle, layout_b.operation, layout_a.operation, *sizes, ctypes.byref(one),
            ctypes.c_void_p(b.data.ptr), kind_in, layout_b.leading,
            ctypes.c_void_p(a.data.ptr), kind_in, layout_a.leading, ctypes.byref(one if add else zero),
            ctypes.c_void_p(out.data.ptr), kind, layout_out.leading, compute, _DEFAULT_ALGORITHM,
        )  # fmt: skip
        return True

    def batched_matmul(self, a: Array, b: Array, out: Array, tf32: bool) -> bool:
        """out[i] = a[i] @ b[i], for stacks (N, rows, columns); a or b may be one matrix. Otherwise like `matmul`."""
        layout_a, layout_b = (matrix_layout(x if x.ndim == 2 else x[0]) for x in (a, b))
        sizes = (out.shape[2], out.shape[1], a.shape[-1], len(out))
        if layout_a is None or layout_b is None or 0 in sizes:
            return False
        if max(*sizes, layout_a.leading, layout_b.leading) > _LARGEST:
            return False
        kind, compute, zero, one = self._types(out, tf32)
        stride_a, stride_b = (0 if x.ndim == 2 else x.shape[1] * x.shape[2] for x in (a, b))
        self._call(
            "cublasGemmStridedBatchedEx", self._handle, layout_b.operation, layout_a.operation, *sizes[:3],
            ctypes.byref(one), ctypes.c_void_p(b.data.ptr), kind, layout_b.leading, ctypes.c_longlong(stride_b),
            ctypes.c_void_p(a.data.ptr), kind, layout_a.leading, ctypes.c_longlong(stride_a), ctypes.byref(zero),
            ctypes.c_void_p(out.data.ptr), kind, sizes[0], ctypes.c_longlong(sizes[0] * sizes[1]), sizes[3],
            compute, _DEFAULT_ALGORITHM,
        )  # fmt: skip
        return True

    def _types(self, out: Array, tf32: bool) -> tuple[int, int, Any, Any]:
        """(data type of out, compute type, 0 and 1 as scalars of that type)."""
        double = out.dtype == numpy.float64
        zero, one = self._scalars[ctypes.c_double if double else ctypes.c_float]
        if double:
            return _FLOAT64, _COMPUTE_FLOAT64, zero, one
        return _FLOAT32, _COMPUTE_TF32 if tf32 else _COMPUTE_FLOAT32, zero, one


def call(library: Any, name: str, *given: Any) -> None:
    """Call a function of a library. RuntimeError if its status is not success."""
    status = getattr(library, name)(*given)
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """NVIDIA's library "cublas" or "cublasLt", found as CuPy finds it. Raises if there is none."""
    from cuda import pathfinder  # a dependency of CuPy

    path = pathfinder.load_nvidia_dynamic_lib(name).abs_path
    if path is None:
        raise OSError(f"the file of lib{name} is not known")
    return ctypes.CDLL(path)
