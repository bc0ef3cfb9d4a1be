"""GPUBackend: a CUDA GPU through CuPy, with its transfers, streams and memory."""

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy

from xpnet.backends.arrays import Array, DType, detached, to_host
from xpnet.backends.base import Memory, Uploads
from xpnet.backends.cuda.graphs import GraphCapture
from xpnet.backends.cuda.operators import CUDAOperators
from xpnet.backends.cuda.probe import device_name, format_version, load_cupy, unavailable_reason
from xpnet.backends.cuda.uploads import OverlappedUploads
from xpnet.errors import BackendError

_DLPACK_CUDA = 2  # DLDeviceType kDLCUDA
_TENSOR_CORES = {"tf32": 8, "bfloat16": 8, "float16": 7}  # the first compute capability with tensor cores for it


class GPUBackend(CUDAOperators):
    """CuPy on one CUDA device. Raises BackendError with the reason if it cannot be used."""

    has_streams = True

    def __init__(self, index: int = 0) -> None:
        reason = unavailable_reason(index)
        if reason is not None:
            raise BackendError(f'the backend "{device_name(index)}" cannot be used: {reason}')
        super().__init__(device_name(index), load_cupy())
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return gpu_backend, (self.index,)

    def device(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.xp.cuda.Device(self.index)
        return context

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        with self.device():
            a = detached(a)
            if not isinstance(a, self.xp.ndarray) and not hasattr(a, "__cuda_array_interface__"):
                a = self.xp.from_dlpack(a) if _on_cuda(a) else numpy.asarray(to_host(a))
                uploads = self.thread.uploads
                if uploads is not None and isinstance(a, numpy.ndarray) and a.dtype.isnative and a.size:
                    a = uploads.upload(a)
            return self.xp.asarray(a, dtype=dtype)

    def to_numpy(self, a: Any) -> numpy.ndarray[Any, Any]:
        with self.device():
            return self.xp.asnumpy(a) if isinstance(a, self.xp.ndarray) else numpy.asarray(to_host(a))

    def synchronize(self) -> None:
        with self.device():
            self.xp.cuda.get_current_stream().synchronize()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """This thread's own stream, since a default stream can neither be captured nor overlap with another."""
        thread = self.thread
        with self.device():
            if thread.stream is None:
                thread.stream = self.xp.cuda.Stream(non_blocking=True)
            with self._ordered(thread.stream):
                yield

    @contextmanager
    def shared_stream(self) -> Iterator[None]:
        """A stream that threads share, one at a time. Unlike a thread's own stream, it outlives the thread."""
        with self.device(), self.shared_stream_lock:
            if self._shared_stream is None:
                self._shared_stream = self.xp.cuda.Stream(non_blocking=True)
            with self._ordered(self._shared_stream):
                yield

    @contextmanager
    def _ordered(self, stream: Any) -> Iterator[None]:
        """A context for work in this stream, after the work so far in the current stream and before its later work."""
        callers = self.xp.cuda.get_current_stream()
        stream.wait_event(callers.record())
        try:
            with stream:
                yield
        finally:
            callers.wait_event(stream.record())

    def current_stream(self) -> Any:
        return self.xp.cuda.get_current_stream()

    def side_streams(self, count: int) -> list[Any]:
        """`count` streams of this thread besides its own, for independent parts of a captured step."""
        streams = self.thread.side_streams
        while len(streams) < count:
            streams.append(self.xp.cuda.Stream(non_blocking=True))
        return streams[:count]

    def wait_for(self, stream: Any) -> None:
        own, other = self._two_streams(stream)
        if own.ptr != other.ptr:
            own.wait_event(other.record())

    @contextmanager
    def in_turn(self, stream: Any) -> Iterator[None]:
        own, other = self._two_streams(stream)
        if own.ptr == other.ptr:
            yield
            return
        own.wait_event(other.record())
        try:
            yield
        finally:
            other.wait_event(own.record())

    def _two_streams(self, stream: Any) -> tuple[Any, Any]:
        """The stream of this thread and the given one."""
        cuda = self.xp.cuda
        return cuda.get_current_stream(), cuda.Stream.null if stream is None else stream

    def uploads(self) -> Uploads:
        with self.device():
            return OverlappedUploads(self, self.thread)

    def graph_capture(self) -> GraphCapture | None:
        if os.environ.get("XPNET_CAPTURE") == "0" or self.kernels_unavailable or self.cublas_unavailable:
            return None
        _ = self.driver  # checks it, which is not possible during a capture
        return GraphCapture(self)

    def precision_unavailable(self, precision: str) -> str | None:
        if precision == "float32":
            return None
        if self.capability < _TENSOR_CORES[precision]:
            return f"it needs compute capability {_TENSOR_CORES[precision]}.0, and this device has {self.capability}"
        return self.cublas_unavailable or self.kernels_unavailable

    def memory(self) -> Memory:
        with self.device():
            free, total = self.xp.cuda.runtime.memGetInfo()
            pools = [self.xp.get_default_memory_pool(), *(graph.pool for graph in self.graphs)]
            used, held = sum(pool.used_bytes() for pool in pools), sum(pool.total_bytes() for pool in pools)
            return Memory(used, held, free, total)

    def free_memory(self) -> None:
        with self.device():
            self.xp.get_default_memory_pool().free_all_blocks()
            self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self.xp.cuda.memory.OutOfMemoryError)

    def describe(self) -> list[tuple[str, str]]:
        runtime = self.xp.cuda.runtime
        capability = f"{self.properties['major']}.{self.properties['minor']}"
        driver, own = (format_version(ask()) for ask in (runtime.driverGetVersion, runtime.runtimeGetVersion))
        with self.device():
            free, total = runtime.memGetInfo()
        return [
            ("device", f"{self.properties['name'].decode()}, compute capability {capability}"),
            ("memory", f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"),
            ("driver", f"for CUDA {driver}; runtime {own}"),
        ]


@functools.cache
def gpu_backend(index: int) -> GPUBackend:
    """The one backend of GPU `index` in this process. A failure is not cached."""
    return GPUBackend(index)


def _on_cuda(a: Any) -> bool:
    """Whether an array is on a CUDA device, according to DLPack."""
    return hasattr(a, "__dlpack_device__") and a.__dlpack_device__()[0] == _DLPACK_CUDA
