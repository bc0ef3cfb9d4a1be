"""Matrix products by cuBLASLt, which proposes several algorithms for a product, and can compute what follows it.

https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

import ctypes
import functools
import logging
from typing import Any, NamedTuple

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.cublas import HALF_TYPES, HalfMatrix, call, elements, matrix_layout

_log = logging.getLogger(__name__)

_COMPUTE_FLOAT32, _COMPUTE_TF32 = 68, 77  # cublasComputeType_t
_FLOAT32 = 0  # cudaDataType_t
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
_MASK_POINTER, _MASK_LEADING = 11, 12  # of "epilogue aux", cublasLtMatmulDescAttributes_t
_MOST_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t; of A, B, C and D
_MOST_ALIGNMENT = 256  # bytes that cuBLASLt asks for
_DEFAULT, _RELU, _BIAS, _RELU_GRAD, _AUX, _BIAS_GRAD_A = 1, 2, 4, 8, 128, 256  # bits of cublasLtEpilogue_t
_MASK_BITS = 128  # the bits of a row of a mask are padded to a multiple of this


class LtEpilogue(NamedTuple):
    """What follows out = a @ b: out += row and out = relu(out), or out *= mask; and sums[j] = Σ_i b[i, j].

    row: a row of out, in its dtype.  mask: an array of `mask_shape`, with a bit for each element of out; with relu,
    these bits are set to [out > 0].  sums: in out's dtype.  cuBLASLt computes sums only without all others.
    """

    row: Any = None
    relu: bool = False
    mask: Array | None = None
    sums: Array | None = None

    @property
    def number(self) -> int:
        """The cublasLtEpilogue_t."""
        if self.sums is not None:
            return _BIAS_GRAD_A  # A is bᵀ
        activation = _RELU if self.relu else _RELU_GRAD if self.mask is not None else 0
        number = activation | (_BIAS if self.row is not None else 0) | (_AUX if self.mask is not None else 0)
        return number or _DEFAULT


def mask_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the mask of a result (rows, columns), in bytes."""
    rows, columns = shape
    return rows, -(-columns // _MASK_BITS) * _MASK_BITS // 8


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
    """out = a @ b and an epilogue, for matrices like these. RuntimeError if it cannot.

    cuBLASLt stores matrices by columns, so it computes outᵀ = bᵀ aᵀ, like `Cublas`.

    a (m, k), b (k, n), out (m, n), epilogue: matrices with the sizes, layouts and alignments of all later calls. a and
    b are both float32 or both a `HalfMatrix`; out may be a `HalfMatrix` if they are.  precision: "float32", or a lower
    one, in which float32 matrices are multiplied in TF32.  most: how many algorithms to ask for; count: how many there
    are, perhaps none.
    """

    def __init__(self, lt: CublasLt, a: Any, b: Any, out: Any, epilogue: LtEpilogue, precision: str, most: int) -> None:
        self._lt = lt
        self._description = ctypes.c_void_p()
        exact = precision == "float32" or isinstance(a, HalfMatrix)
        compute = _COMPUTE_FLOAT32 if exact else _COMPUTE_TF32
        lt.call("cublasLtMatmulDescCreate", ctypes.byref(self._description), compute, _FLOAT32)
        operations = [self._layout(x) for x in (a, b, out)]
        (self._a, operation_a), (self._b, operation_b), (self._out, _) = operations
        self._set(_TRANSPOSE_A, ctypes.c_int32(operation_b))
        self._set(_TRANSPOSE_B, ctypes.c_int32(operation_a))
        self._set(_EPILOGUE, ctypes.c_int32(epilogue.number))
        if epilogue.mask is not None:
            self._set(_MASK_LEADING, ctypes.c_int64(8 * epilogue.mask.shape[1]))
        self._point_to(epilogue)
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        alignments = [alignment(elements(x)) for x in (b, a, out, out)]
        self._algorithms = self._heuristics(dict(zip(_ALIGNMENTS, alignments, strict=True)), most)
        self.count = len(self._algorithms)

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._lt.call("cublasLtMatmulDescSetAttribute", self._description, attribute, ctypes.byref(value), size)

    def _point_to(self, epilogue: LtEpilogue) -> None:
        vector = epilogue.row if epilogue.sums is None else epilogue.sums
        if vector is not None:
            self._set(_BIAS_POINTER, _address(vector))
        if epilogue.mask is not None:
            self._set(_MASK_POINTER, _address(epilogue.mask))

    def _layout(self, matrix: Any) -> tuple[ctypes.c_void_p, int]:
        """The description of a matrix that is stored by columns, and whether it is transposed."""
        operation, leading = matrix_layout(elements(matrix)) or (0, 0)
        kind = HALF_TYPES[matrix.precision] if isinstance(matrix, HalfMatrix) else _FLOAT32
        rows, columns = matrix.shape if operation else matrix.shape[::-1]
        layout, given = ctypes.c_void_p(), (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(leading))
        self._lt.call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), kind, *given)
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

    def __call__(self, number: int, a: Any, b: Any, out: Any, epilogue: LtEpilogue, stream: int) -> None:
        """Compute the product on a stream by the algorithm of this number, from 0 to count - 1."""
        self._point_to(epilogue)
        workspace = self._lt.workspace
        self._lt.call(
            "cublasLtMatmul", self._lt.handle, self._description, ctypes.byref(self._one), _address(b), self._b,
            _address(a), self._a, ctypes.byref(self._zero), _address(out), self._out, _address(out), self._out,
            ctypes.byref(self._algorithms[number].algorithm), _address(workspace), ctypes.c_size_t(workspace.nbytes),
            ctypes.c_void_p(stream),
        )  # fmt: skip


def _address(a: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(elements(a).data.ptr)


def alignment(a: Array) -> int:
    """The largest power of two, up to 256, that divides the address of an array."""
    address: int = a.data.ptr
    return min(address & -address, _MOST_ALIGNMENT) if address else _MOST_ALIGNMENT


def version(library: Any) -> int:
    """The version of the library, such as 130100."""
    return int(library.cublasLtGetVersion())
