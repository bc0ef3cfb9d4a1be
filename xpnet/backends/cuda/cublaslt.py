"""Matrix products by cuBLASLt, which proposes several algorithms for a product, and can add a bias and apply ReLU.

https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

import ctypes
import functools
import logging
from typing import Any

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.cublas import call, matrix_layout

_log = logging.getLogger(__name__)

#: cublasComputeType_t. For float32 matrices, TF32 is the precision that is at least as exact as 16 bits.
_COMPUTE_TYPES = {"float32": 68, "tf32": 77, "bfloat16": 77, "float16": 77}
_FLOAT32 = 0  # cudaDataType_t
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
_MOST_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t; of A, B, C and D
_MOST_ALIGNMENT = 256  # bytes that cuBLASLt asks for
_EPILOGUES = {(False, False): 1, (True, False): 4, (True, True): 6}  # cublasLtEpilogue_t by (bias, relu)


class _Heuristic(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
        ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    )  # fmt: skip


class CublasLt:
    """One handle, with a workspace that products of one stream share."""

    def __init__(self, library: Any, workspace: Array) -> None:
        self.call, self.workspace = functools.partial(call, library), workspace
        self.handle = ctypes.c_void_p()
        self.call("cublasLtCreate", ctypes.byref(self.handle))


class LtProduct:
    """out = a @ b, or relu(a @ b + row), or a @ b + row, for float32 matrices like these. RuntimeError if it cannot.

    cuBLASLt stores matrices by columns, so it computes outᵀ = bᵀ aᵀ, like `Cublas`.

    a (m, k), b (k, n), out (m, n), row (n,) or None: arrays with the sizes, layouts and alignments of all later calls.
    precision: of the model.  most: how many algorithms to ask for; count: how many there are, perhaps none.
    """

    def __init__(
        self, lt: CublasLt, a: Array, b: Array, out: Array, row: Array | None, relu: bool, precision: str, most: int
    ) -> None:
        self._lt = lt
        self._description = ctypes.c_void_p()
        lt.call("cublasLtMatmulDescCreate", ctypes.byref(self._description), _COMPUTE_TYPES[precision], _FLOAT32)
        operations = [self._layout(x) for x in (a, b, out)]
        (self._a, operation_a), (self._b, operation_b), (self._out, _) = operations
        self._set(_TRANSPOSE_A, ctypes.c_int32(operation_b))
        self._set(_TRANSPOSE_B, ctypes.c_int32(operation_a))
        self._set(_EPILOGUE, ctypes.c_int32(_EPILOGUES[row is not None, relu]))
        if row is not None:
            self._set(_BIAS_POINTER, ctypes.c_void_p(row.data.ptr))
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        alignments = [alignment(x) for x in (b, a, out, out)]
        self._algorithms = self._heuristics(dict(zip(_ALIGNMENTS, alignments, strict=True)), most)
        self.count = len(self._algorithms)

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._lt.call("cublasLtMatmulDescSetAttribute", self._description, attribute, ctypes.byref(value), size)

    def _layout(self, matrix: Array) -> tuple[ctypes.c_void_p, int]:
        """The description of a matrix that is stored by columns, and whether it is transposed."""
        operation, leading = matrix_layout(matrix) or (0, 0)
        rows, columns = matrix.shape if operation else matrix.shape[::-1]
        layout, given = ctypes.c_void_p(), (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(leading))
        self._lt.call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), _FLOAT32, *given)
        return layout, operation

    def _heuristics(self, alignments: dict[int, int], most: int) -> list[_Heuristic]:
        preference = ctypes.c_void_p()
        self._lt.call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        numbers: list[tuple[int, Any]] = [(_MOST_WORKSPACE, ctypes.c_uint64(self._lt.workspace.nbytes))]
        numbers += [(attribute, ctypes.c_uint32(n)) for attribute, n in alignments.items()]
        for attribute, number in numbers:
            size = ctypes.c_size_t(ctypes.sizeof(number))
            self._lt.call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, ctypes.byref(number), size)
        found, count = (_Heuristic * most)(), ctypes.c_int()
        try:
            self._lt.call(
                "cublasLtMatmulAlgoGetHeuristic", self._lt.handle, self._description, self._b, self._a, self._out,
                self._out, preference, most, found, ctypes.byref(count),
            )  # fmt: skip
        except RuntimeError as error:
            _log.info("cuBLASLt has no algorithm for a product: %s", error)
            return []
        finally:
            self._lt.call("cublasLtMatmulPreferenceDestroy", preference)
        return [found[i] for i in range(count.value) if found[i].state == 0]

    def __call__(self, number: int, a: Array, b: Array, out: Array, row: Array | None, stream: int) -> None:
        """Compute the product on a stream by the algorithm of this number, from 0 to count - 1."""
        if row is not None:
            self._set(_BIAS_POINTER, ctypes.c_void_p(row.data.ptr))
        address, workspace = ctypes.c_void_p, self._lt.workspace
        self._lt.call(
            "cublasLtMatmul", self._lt.handle, self._description, ctypes.byref(self._one), address(b.data.ptr), self._b,
            address(a.data.ptr), self._a, ctypes.byref(self._zero), address(out.data.ptr), self._out,
            address(out.data.ptr), self._out, ctypes.byref(self._algorithms[number].algorithm),
            address(workspace.data.ptr), ctypes.c_size_t(workspace.nbytes), address(stream),
        )  # fmt: skip


def alignment(a: Array) -> int:
    """The largest power of two, up to 256, that divides the address of an array."""
    address: int = a.data.ptr
    return min(address & -address, _MOST_ALIGNMENT) if address else _MOST_ALIGNMENT


def version(library: Any) -> int:
    """The version of the library, such as 130100."""
    return int(library.cublasLtGetVersion())
