"""Matrix products on a GPU, by cuBLAS, or by CuPy if cuBLAS does not accept the matrices.

A captured step computes each product in the way that takes the least time on this device (see products.py).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy

from xpnet._version import __version__
from xpnet.backends.arrays import Array
from xpnet.backends.cuda import choosing, cublas, cublaslt
from xpnet.backends.cuda.choosing import Choices
from xpnet.backends.cuda.cublas import Cublas, HalfMatrix
from xpnet.backends.cuda.cublaslt import CublasLt
from xpnet.backends.cuda.kernels import REALS
from xpnet.backends.cuda.launching import VECTOR, KernelLauncher
from xpnet.backends.cuda.products import Epilogue, Product, StreamProducts

_HALF_PRECISIONS = ("float16", "bfloat16")
_LARGE = 2**27  # multiplications; for fewer, products round float32 matrices faster than another kernel would


class CUDAMatmul(KernelLauncher):
    def __init__(self, name: str, xp: Any) -> None:
        super().__init__(name, xp)
        self._handles: dict[int, Cublas] = {}
        self._products: dict[int, StreamProducts] = {}

    @functools.cached_property
    def cublas_unavailable(self) -> str | None:
        """Why cuBLAS cannot be called directly; None if it can."""
        try:
            with self.device():
                self.cublas()
        except Exception as error:
            return self.log_unavailable("cuBLAS cannot be called", error)
        return None

    def cublas(self) -> Cublas:
        """The handle of the current stream."""
        return self.once_per_stream(
            self._handles, lambda stream: Cublas(self._cublas_library(), stream, self._workspace())
        )

    def _workspace(self) -> Array:
        return self.xp.empty(cublas.WORKSPACE_BYTES, dtype=numpy.uint8)

    def _cublas_library(self) -> Any:
        return cublas.load("cublas")

    def _cublaslt_library(self) -> Any:
        return cublas.load("cublasLt")

    @functools.cached_property
    def choices(self) -> Choices:
        """The fastest way of each product, on devices of this name and with these versions."""
        runtime = self.xp.cuda.runtime
        name = self.properties["name"].decode()
        versions = [runtime.driverGetVersion(), runtime.runtimeGetVersion(), cublaslt.version(self._cublaslt_library())]
        identity = f"{name}, CUDA {versions[0]} and {versions[1]}, cuBLASLt {versions[2]}, xpnet {__version__}"
        return Choices(identity, choosing.cache_file("products.json"))

    def products(self) -> StreamProducts:
        """The products on the current stream."""

        def make(stream: int) -> StreamProducts:
            lt = CublasLt(self._cublaslt_library(), self._workspace())
            return StreamProducts(self.xp, stream, lt, self._multiply, self.launch_kernel)

        return self.once_per_stream(self._products, make)

    @functools.cached_property
    def products_unavailable(self) -> str | None:
        """Why products are computed by cuBLAS only; None if there is a choice."""
        if self.kernels_unavailable or self.cublas_unavailable:
            return self.kernels_unavailable or self.cublas_unavailable
        try:
            self.products()
            self.choices.get("")
        except Exception as error:
            return self.log_unavailable("cuBLASLt cannot be called", error)
        return None

    def fastest(self, ways: Mapping[str, Callable[[], None]]) -> str | None:
        """The name of the way that takes the least time; None if no way works."""
        return choosing.fastest(self.xp, ways)

    @contextmanager
    def matmul_precision(self, precision: str) -> Iterator[None]:
        before, self.thread.precision = self.thread.precision, precision
        try:
            yield
        finally:
            self.thread.precision = before

    def cast(self, a: Array) -> Array:
        precision = self.thread.precision
        if precision not in _HALF_PRECISIONS or isinstance(a, HalfMatrix) or a.dtype != numpy.float32:
            return a
        if not a.flags.c_contiguous and a.T.flags.c_contiguous:
            return self.cast(a.T).T
        a = self.xp.ascontiguousarray(a)
        return self.to_halves(a, HalfMatrix(self.xp.empty(a.shape, dtype=numpy.uint16), precision))

    def to_halves(self, x: Array, out: HalfMatrix) -> HalfMatrix:
        """out = x, for contiguous arrays of one shape."""
        self.launch(f"to_{out.precision}", out.bits, each=VECTOR, x=x)
        return out

    def half_precision_of(self, m: int, k: int, n: int) -> str | None:
        """The precision of 16 bits in which a product (m, k) @ (k, n) should read its matrices; None for float32."""
        precision = self.thread.precision
        large = precision in _HALF_PRECISIONS and m * k * n >= _LARGE
        return precision if large and not self.products_unavailable else None

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        return self._product(a, b, out, Epilogue())

    def matmul_bias(self, a: Array, b: Array, row: Array, relu: bool, out: Array) -> Array:
        return self._product(a, b, out, Epilogue(row=row, relu=relu))

    def matmul_relu_grad(self, a: Array, b: Array, y: Array, out: Array) -> Array:
        return self._product(a, b, out, Epilogue(mask=y))

    def matmul_sum_rows(self, a: Array, b: Array, out: Array, sums: Array) -> Array:
        return self._product(a, b, out, Epilogue(sums=sums))

    def matmul_relu_mask(self, a: HalfMatrix, b: HalfMatrix, row: Any, out: HalfMatrix, mask: Array) -> HalfMatrix:
        """out = max(a @ b + row, 0), and mask = [out > 0], an array of `relu_mask`. RuntimeError if cuBLASLt cannot.

        row: an array of float32, or already rounded as a `HalfMatrix`.
        """
        return self._multiply_with_mask(a, b, row, out, mask)

    def matmul_masked(self, a: HalfMatrix, b: HalfMatrix, mask: Array, out: HalfMatrix) -> HalfMatrix:
        """out = (a @ b) · mask, for a mask of `matmul_relu_mask`. RuntimeError if cuBLASLt cannot."""
        return self._multiply_with_mask(a, b, None, out, mask)

    def relu_mask(self, *products: tuple[HalfMatrix, HalfMatrix, Any, HalfMatrix]) -> Array | None:
        """A new mask for products (a, b, row, out) of one shape of out; None if cuBLASLt cannot compute them with it.

        row: as in `matmul_relu_mask`, or None for `matmul_masked`. Each product is tried, but not into its out.
        """
        mask = self.empty(cublaslt.mask_shape(products[0][3].shape), "uint8")
        for a, b, row, out in products:
            product = self._product_with_mask(a, b, row, HalfMatrix(self.xp.empty_like(out.bits), out.precision), mask)
            if self._way(product) is None:
                return None
        return mask

    def _multiply_with_mask(self, a: Any, b: Any, row: Any, out: HalfMatrix, mask: Array) -> HalfMatrix:
        product = self._product_with_mask(a, b, row, out, mask)
        way = self._way(product)
        if way is None:
            raise RuntimeError("cuBLASLt has no algorithm for a product with a mask of ReLU.")
        self._compute(product, way)
        return out

    def _product_with_mask(self, a: Any, b: Any, row: Any, out: HalfMatrix, mask: Array) -> Product:
        epilogue = Epilogue(bits=mask) if row is None else Epilogue(row=self.cast(row), relu=True, bits=mask)
        return Product(a, b, out, out.precision, epilogue)

    def _product(self, a: Any, b: Any, out: Any, epilogue: Epilogue) -> Any:
        if self._in_chosen_way(a, b, out, epilogue):
            return out
        if isinstance(out, HalfMatrix):
            exact = self.xp.empty(out.shape, dtype=numpy.float32)
            return self.to_halves(self._product(a, b, exact, epilogue), out)
        self._multiply(a, b, out)
        self._finish(b, out, epilogue)
        return out

    def _in_chosen_way(self, a: Any, b: Any, out: Any, epilogue: Epilogue) -> bool:
        """Compute a product while a step is captured, in the way that takes the least time.

        False, without doing anything, elsewhere, and for matrices that only cuBLAS or CuPy accept.
        """
        if self.thread.cells is None:
            return False
        if isinstance(out, HalfMatrix) and epilogue.row is not None:
            epilogue = epilogue._replace(row=self.cast(epilogue.row))
        product = Product(a, b, out, self.thread.precision or "float32", epilogue)
        way = self._way(product)
        if way is None:
            return False
        self._compute(product, way)
        return True

    def _way(self, product: Product) -> Callable[[], Epilogue] | None:
        """The way that takes the least time; None if there is none, and when it is too late for timing."""
        if not product.accepted() or self.products_unavailable:
            return None
        ways, question = self.products().ways(product), product.question()
        chosen = self.choices.get(question)
        if chosen not in ways:
            if self.xp.cuda.get_current_stream().is_capturing():
                return None
            chosen = self.fastest({name: functools.partial(self._compute, product, way) for name, way in ways.items()})
            if chosen is None:
                return None
            self.choices.set(question, chosen)
        return ways[chosen]

    def _compute(self, product: Product, way: Callable[[], Epilogue]) -> None:
        """Compute a product in this way, and by other kernels what that leaves of the epilogue."""
        self._finish(product.b, product.out, way())

    def _finish(self, b: Any, out: Array, epilogue: Epilogue) -> None:
        row, relu, mask, sums, _ = epilogue
        if row is not None and relu:
            self.add_to_rows_relu(out, row, out)
        elif row is not None:
            self.add_to_rows(out, row)
        if mask is not None:
            self.relu_grad(out, mask, out)
        if sums is not None:
            self.sum_rows(b, sums)

    def _multiply(self, a: Array, b: Array, out: Array) -> Array:
        """out = a @ b by cuBLAS, or else by CuPy."""
        if self._matmul(a, b, out, add=False):
            return out
        return super().matmul(a, b, out)

    def add_matmul(self, a: Array, b: Array, out: Array, scratch: Array) -> Array:
        if self._matmul(a, b, out, add=True):
            return out
        return super().add_matmul(a, b, out, scratch)

    def _matmul(self, a: Array, b: Array, out: Array, add: bool) -> bool:
        """out = a @ b, or out += a @ b. False, without doing anything, if cuBLAS does not accept the matrices."""
        if self.cublas_unavailable or out.dtype not in REALS:
            return False
        precision = self.thread.precision
        if precision in _HALF_PRECISIONS:
            a, b = self.cast(a), self.cast(b)
        elif not a.dtype == b.dtype == out.dtype:
            return False
        return self.cublas().matmul(a, b, out, add, tf32=precision == "tf32")

    def batched_matmul(self, a: Array, b: Array, out: Array) -> Array:
        contiguous = all(x.ndim == 2 or x.flags.c_contiguous for x in (a, b, out))
        same_dtype = a.dtype == b.dtype == out.dtype and out.dtype in REALS
        if contiguous and same_dtype and out.size and not self.cublas_unavailable:
            a_stack, b_stack = (x if x.ndim == 2 else x.reshape(-1, *x.shape[-2:]) for x in (a, b))
            out_stack, tf32 = out.reshape(-1, *out.shape[-2:]), self.thread.precision == "tf32"
            if self.cublas().batched_matmul(a_stack, b_stack, out_stack, tf32):
                return out
        return super().batched_matmul(a, b, out)
