"""Matrix products on a GPU, by cuBLAS, or by CuPy if cuBLAS does not accept the matrices."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda import cublas
from xpnet.backends.cuda.cublas import Cublas, HalfMatrix
from xpnet.backends.cuda.kernels import REALS
from xpnet.backends.cuda.launching import KernelLauncher

_HALF_PRECISIONS = ("float16", "bfloat16")


class CUDAMatmul(KernelLauncher):
    def __init__(self, name: str, xp: Any) -> None:
        super().__init__(name, xp)
        self._handles: dict[int, Cublas] = {}

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
        stream = self.xp.cuda.get_current_stream().ptr
        handle = self._handles.get(stream)
        if handle is None:
            with self.lasting_memory():
                workspace = self.xp.empty(cublas.WORKSPACE_BYTES, dtype=numpy.uint8)
            handle = self._handles[stream] = Cublas(self._cublas_library(), stream, workspace)
        return handle

    def _cublas_library(self) -> Any:
        return cublas.load()

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
        bits = self.xp.empty(a.shape, dtype=numpy.uint16)
        return HalfMatrix(self.launch(f"to_{precision}", bits, x=a), precision)

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
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
