"""Why a GPU cannot be used, with the command that fixes it. The only module that imports CuPy."""

import ctypes
import importlib
import importlib.util
import sys
from typing import Any

import numpy


def load_cupy() -> Any:
    return importlib.import_module("cupy")


def device_count() -> int:
    """The number of GPUs that CUDA finds."""
    return int(load_cupy().cuda.runtime.getDeviceCount())


def device_name(index: int) -> str:
    """The backend's name of GPU `index`."""
    return f"gpu:{index}" if index else "gpu"


def unavailable_reason(index: int = 0) -> str | None:
    """Why GPU `index` cannot be used, with the command that fixes it if there is one; None if it can be used."""
    # First, because "auto" asks this on every machine without a GPU, and listing the wheels takes 0.1 s.
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed. {_driver_sentence()}Run: {_install_command()}"
    wheels = _installed_wheels()
    if len(wheels) > 1:
        return (
            f"{len(wheels)} CuPy wheels are installed ({', '.join(wheels)}) and overwrite each other. "
            f"Run: pip uninstall -y {' '.join(wheels)} && {_install_command()}"
        )
    try:
        cupy = load_cupy()
    except Exception as error:  # CuPy's import fails in many ways, which are all worth showing
        installed = " ".join(wheels) or "cupy"
        return f"importing CuPy failed: {error}. Run: pip uninstall -y {installed} && {_install_command()}"
    return _device_unavailable_reason(cupy, index)


def _device_unavailable_reason(cupy: Any, index: int) -> str | None:
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError; ImportError if the runtime library is missing
        if "cudaErrorNoDevice" in str(error):
            return f"the NVIDIA driver finds no GPU ({error}). Check `nvidia-smi` and CUDA_VISIBLE_DEVICES."
        if "InsufficientDriver" in str(error):
            version = driver_cuda_version()
            if version is None:
                return f"there is no NVIDIA driver on this machine ({error}). Install the driver, or use backend='cpu'."
            return (
                f"the NVIDIA driver supports CUDA {format_version(version)}, too old for this CuPy ({error}). "
                f"Update it, or run: {_install_command()}"
            )
        return f"CUDA could not count its devices: {error}"
    if index >= count:
        names = ", ".join(device_name(i) for i in range(count)) or "none"
        return f"there is no GPU number {index}; CUDA finds {count}: {names}. Check CUDA_VISIBLE_DEVICES."
    try:
        with cupy.cuda.Device(index):
            cupy.ones((2, 2), dtype=numpy.float32) @ cupy.ones((2, 2), dtype=numpy.float32)
            cupy.cuda.get_current_stream().synchronize()
    except Exception as error:
        libraries = isinstance(error, ImportError) or "libcu" in str(error) or "libnv" in str(error)
        advice = (
            f"Install CUDA's libraries: {_install_command('-ctk')}"
            if libraries
            else "Does another program use all its memory?"
        )
        return f"the first allocation and matrix product on GPU {index} failed: {error}. {advice}"
    return None


def _installed_wheels() -> list[str]:
    import importlib.metadata  # here, because it is slow to import

    names = {str(d.metadata["Name"]).lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return sorted(n for n in names if n == "cupy" or n.startswith(("cupy-cuda", "cupy-rocm")))


def driver_cuda_version() -> int | None:
    """The newest CUDA version that the NVIDIA driver supports, as 1000 * major + 10 * minor; None without a driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def format_version(version: int) -> str:
    """ "13.2" from 13020."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _install_command(suffix: str = "") -> str:
    version = driver_cuda_version()
    extra = "cuda12" if version is not None and version < 13000 else "cuda13"
    return f'pip install "xpnet[{extra}{suffix}]"'


def _driver_sentence() -> str:
    version = driver_cuda_version()
    if version is None:
        return "This machine has no NVIDIA driver either; install that first. "
    return f"The NVIDIA driver supports CUDA {format_version(version)}. "
