"""A CUDA GPU through CuPy: whether it can be used, and if not, precisely why; its memory, streams and transfers."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy

from xpnet.backends.arrays import Array, DType
from xpnet.backends.base import Memory, Uploads
from xpnet.backends.cpu import detached, to_host
from xpnet.backends.gpu_graphs import Recorder
from xpnet.backends.gpu_primitives import FusedPrimitives
from xpnet.errors import BackendError

_DLPACK_CUDA = 2  # DLDeviceType kDLCUDA
_TENSOR_CORES = {"tf32": 8, "bfloat16": 8, "float16": 7}  # from which compute capability on there are such
_PARTS_ON_THE_DEVICE = 2  # of data that comes in parts: one that is trained on, one on its way


class GPUBackend(FusedPrimitives):
    """CuPy on one CUDA device. Raises BackendError, with the reason and the mend, where it cannot be used."""

    def __init__(self, index: int = 0) -> None:
        reason = why_unusable(index)
        if reason is not None:
            raise BackendError(f'the backend "{_name(index)}" cannot be used: {reason}')
        super().__init__(_name(index), importlib.import_module("cupy"))
        self.index = index
        self._threads_own = threading.local()

    def device(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.xp.cuda.Device(self.index)
        return context

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        with self.device():
            a = detached(a)
            if not isinstance(a, self.xp.ndarray) and not hasattr(a, "__cuda_array_interface__"):
                a = self.xp.from_dlpack(a) if _on_cuda(a) else numpy.asarray(to_host(a))
                uploads = getattr(self._threads_own, "uploads", None)
                if uploads is not None and isinstance(a, numpy.ndarray) and a.dtype.isnative and a.size:
                    a = uploads.through_pinned_memory(a)
            return self.xp.asarray(a, dtype=dtype)

    def to_numpy(self, a: Any) -> numpy.ndarray[Any, Any]:
        with self.device():
            return self.xp.asnumpy(a) if isinstance(a, self.xp.ndarray) else numpy.asarray(to_host(a))

    def synchronize(self) -> None:
        with self.device():
            self.xp.cuda.get_current_stream().synchronize()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """This thread's own stream: a default stream can be neither recorded nor overlapped with."""
        cuda = self.xp.cuda
        with self.device():
            own = getattr(self._threads_own, "stream", None)
            if own is None:
                own = self._threads_own.stream = cuda.Stream(non_blocking=True)
            callers = cuda.get_current_stream()
            own.wait_event(callers.record())
            try:
                with own:
                    yield
            finally:
                callers.wait_event(own.record())

    def uploads(self) -> Uploads:
        with self.device():
            return OverlappedUploads(self)

    def recorder(self) -> Recorder | None:
        if os.environ.get("XPNET_CUDA_GRAPHS") == "0" or self.why_no_kernels or self.why_no_cublas:
            return None
        return Recorder(self)

    def why_no_precision(self, precision: str) -> str | None:
        if precision == "float32":
            return None
        major = int(self.xp.cuda.runtime.getDeviceProperties(self.index)["major"])
        if major < _TENSOR_CORES[precision]:
            return f"it takes compute capability {_TENSOR_CORES[precision]}.0, and this device has {major}"
        return self.why_no_cublas or self.why_no_kernels

    def memory(self) -> Memory:
        pool = self.xp.get_default_memory_pool()
        with self.device():
            free, total = self.xp.cuda.runtime.memGetInfo()
            graphs = list(self.graphs)
            used = pool.used_bytes() + sum(graph.used_bytes for graph in graphs)
            held = pool.total_bytes() + sum(graph.total_bytes for graph in graphs)
            return Memory(used, held, free, total)

    def free_memory(self) -> None:
        with self.device():
            self.xp.get_default_memory_pool().free_all_blocks()
            self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self.xp.cuda.memory.OutOfMemoryError)

    def describe(self) -> list[tuple[str, str]]:
        runtime = self.xp.cuda.runtime
        properties = runtime.getDeviceProperties(self.index)
        with self.device():
            free, total = runtime.memGetInfo()
        return [
            (
                "device",
                f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}",
            ),
            ("memory", f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"),
            ("driver", f"for CUDA {_cuda(runtime.driverGetVersion())}; runtime {_cuda(runtime.runtimeGetVersion())}"),
        ]


class OverlappedUploads(Uploads):
    """Parts of the data on a stream of their own, through pinned memory, while the parts before are trained on.

    Memory that a part has had is free for the next one as soon as Python lets it go, whatever the device has still to
    do with it. So a part is kept until the stream of the uploads has waited for all training on it.
    """

    def __init__(self, backend: GPUBackend) -> None:
        self._backend, self._cuda = backend, backend.xp.cuda
        self._stream = self._cuda.Stream(non_blocking=True)
        self._in_use: deque[tuple[Any, Any]] = deque()  # (the last training on a part, its arrays)
        self._pinned: list[Any] = []  # until it has been read

    @contextmanager
    def ahead(self) -> Iterator[None]:
        training, own = self._cuda.get_current_stream(), self._backend._threads_own
        while len(self._in_use) >= _PARTS_ON_THE_DEVICE:
            trained, arrays = self._in_use.popleft()
            self._stream.wait_event(trained)
            del arrays
        own.uploads = self
        try:
            with self._stream:
                yield
        finally:
            own.uploads = None
            training.wait_event(self._stream.record())
            self._stream.synchronize()  # which the checks of the part have done already
            self._pinned.clear()

    def used(self, *arrays: Any) -> None:
        self._in_use.append((self._cuda.get_current_stream().record(), arrays))

    def through_pinned_memory(self, a: numpy.ndarray[Any, Any]) -> Array:
        """A host array on the device: only from pinned memory is a copy made beside other work."""
        memory = self._cuda.alloc_pinned_memory(a.nbytes)
        self._pinned.append(memory)
        pinned = numpy.frombuffer(memory, dtype=a.dtype, count=a.size).reshape(a.shape)
        pinned[...] = a
        there = self._backend.xp.empty(a.shape, dtype=a.dtype)
        there.set(pinned, stream=self._stream)
        return there


def device_count() -> int:
    """How many GPUs CUDA sees."""
    return int(importlib.import_module("cupy").cuda.runtime.getDeviceCount())


def _on_cuda(a: Any) -> bool:
    """Whether this array lies on a CUDA device, as DLPack tells."""
    return hasattr(a, "__dlpack_device__") and a.__dlpack_device__()[0] == _DLPACK_CUDA


def why_unusable(index: int = 0) -> str | None:
    """The reason why GPU `index` cannot be used, with the command that mends it where there is one; None if it can."""
    wheels = _installed_wheels()
    if len(wheels) > 1:
        return (
            f"{len(wheels)} CuPy wheels are installed ({', '.join(wheels)}) and overwrite each other. "
            f"Run: pip uninstall -y {' '.join(wheels)} && {_install_command()}"
        )
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed. {_driver_sentence()}Run: {_install_command()}"
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # CuPy's import fails in many ways, all of them worth showing
        installed = " ".join(wheels) or "cupy"
        return f"importing CuPy failed: {error}. Run: pip uninstall -y {installed} && {_install_command()}"
    return _why_device_unusable(cupy, index)


def _why_device_unusable(cupy: Any, index: int) -> str | None:
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError; an ImportError when the runtime library is missing
        if "cudaErrorNoDevice" in str(error):
            return f"the NVIDIA driver finds no GPU ({error}). Check `nvidia-smi` and CUDA_VISIBLE_DEVICES."
        if "InsufficientDriver" in str(error):
            version = driver_cuda_version()
            if version is None:
                return f"there is no NVIDIA driver on this machine ({error}). Install the driver, or use backend='cpu'."
            return (
                f"the NVIDIA driver is for CUDA {_cuda(version)}, too old for this CuPy ({error}). "
                f"Update it, or run: {_install_command()}"
            )
        return f"asking CUDA for its devices failed: {error}"
    if index >= count:
        names = ", ".join(_name(i) for i in range(count)) or "none"
        return f"there is no GPU number {index}; CUDA sees {count}: {names}. Check CUDA_VISIBLE_DEVICES."
    try:
        with cupy.cuda.Device(index):
            cupy.ones((2, 2), dtype=numpy.float32) @ cupy.ones((2, 2), dtype=numpy.float32)
            cupy.cuda.get_current_stream().synchronize()
    except Exception as error:
        libraries = isinstance(error, ImportError) or "libcu" in str(error) or "libnv" in str(error)
        mend = (
            f" Install CUDA's libraries with it: {_install_command('-ctk')}"
            if libraries
            else " Is another program holding its memory?"
        )
        return f"the first allocation and product on GPU {index} failed: {error}.{mend}"
    return None


def _installed_wheels() -> list[str]:
    names = {str(d.metadata["Name"]).lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return sorted(n for n in names if n == "cupy" or n.startswith(("cupy-cuda", "cupy-rocm")))


def driver_cuda_version() -> int | None:
    """The CUDA version that the NVIDIA driver is for, as 1000 * major + 10 * minor; None without a driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _install_command(suffix: str = "") -> str:
    version = driver_cuda_version()
    extra = "cuda12" if version is not None and version < 13000 else "cuda13"
    return f'pip install "xpnet[{extra}{suffix}]"'


def _driver_sentence() -> str:
    version = driver_cuda_version()
    if version is None:
        return "There is no NVIDIA driver on this machine either, and it comes first. "
    return f"The NVIDIA driver is for CUDA {_cuda(version)}. "


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _name(index: int) -> str:
    return f"gpu:{index}" if index else "gpu"
