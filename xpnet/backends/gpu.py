"""A CUDA GPU through CuPy: finding out whether it can be used, and if not, precisely why."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import sys
from contextlib import AbstractContextManager
from typing import Any

import numpy

from xpnet.backends.arrays import Array, DType
from xpnet.backends.base import Backend
from xpnet.backends.cpu import detached, to_host
from xpnet.errors import BackendError

_DLPACK_CUDA = 2  # DLDeviceType kDLCUDA


class GPUBackend(Backend):
    """CuPy on one CUDA device. Raises BackendError, with the reason and the mend, where it cannot be used."""

    def __init__(self, index: int = 0) -> None:
        reason = why_unusable(index)
        if reason is not None:
            raise BackendError(f'the backend "{_name(index)}" cannot be used: {reason}')
        super().__init__(_name(index), importlib.import_module("cupy"))
        self.index = index

    def device(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.xp.cuda.Device(self.index)
        return context

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        with self.device():
            a = detached(a)
            if not isinstance(a, self.xp.ndarray) and not hasattr(a, "__cuda_array_interface__"):
                a = self.xp.from_dlpack(a) if _on_cuda(a) else numpy.asarray(to_host(a))
            return self.xp.asarray(a, dtype=dtype)

    def to_numpy(self, a: Any) -> numpy.ndarray[Any, Any]:
        with self.device():
            return self.xp.asnumpy(a) if isinstance(a, self.xp.ndarray) else numpy.asarray(to_host(a))

    def synchronize(self) -> None:
        with self.device():
            self.xp.cuda.get_current_stream().synchronize()

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
