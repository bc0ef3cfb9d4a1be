"""The CUDA kernels of a source: compiled when first needed, launched with arguments that match their signatures."""

import functools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import DType


def read_source(*names: str) -> str:
    """The text of these files of this folder, one after the other."""
    return "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)


SOURCE = read_source("random.cu", "kernels.cu", "recurrent.cu")

REALS = {numpy.dtype("float32"): "float", numpy.dtype("float64"): "double"}

BLOCK = 256  # threads
_STATIC_SHARED = 48 * 1024  # bytes, of which a kernel declares `shared_size_bytes`; it must ask for more

CELL_SIZE = 8  # numbers in one cell of a captured step, and in `Numbers` of kernels.cu

_SIZES = {"Byte": 1, "unsigned short": 2, "int": 4, "Word": 4, "Index": 8, "unsigned long long": 8}
_FLOATS = {"float": numpy.dtype("float32"), "double": numpy.dtype("float64")}
_SCALARS = {"int": numpy.int32, "Word": numpy.uint32, "Index": numpy.int64, "double": numpy.float64}
_STRUCTS = {  # all fields have this type
    "Axes": numpy.uint32, "Heads": numpy.int64, "Numbers": numpy.float64, "Operations": numpy.int64,
    "Sizes": numpy.int32, "Step": numpy.int64, "Windows": numpy.int32,
}  # fmt: skip
_KERNEL = r"KERNEL (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(([^)]*)\)"  # its name and its arguments
_NULL = numpy.uint64(0)
_FILLED_IN = {"out", "n", "columns", "copy", "bfloat16"}  # which `KernelLauncher.launch` gives to every kernel


class KernelArgument(NamedTuple):
    """An argument that a kernel declares: its C type without const and asterisk, whether it is a pointer, its name."""

    type: str
    pointer: bool
    name: str


@functools.cache
def signatures(source: str = SOURCE) -> dict[str, list[KernelArgument]]:
    """{kernel: the arguments it declares}, parsed from a source file."""
    kernels = re.findall(rf"^{_KERNEL}", source, re.MULTILINE)
    return {
        name: [
            KernelArgument(kind, bool(pointer), argument)
            for kind, pointer, argument in re.findall(r"(?:const )?(\w[\w ]*?)(\*?) (\w+)(?:,|$)", declared)
        ]
        for name, declared in kernels
    }


#: The first statement of every kernel: see driver.py. A kernel that is not launched by the driver does not wait.
_WAIT = "await_previous_kernel();"
_PRELUDE = """\
__device__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
"""

Launch = Callable[[Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...], int], None]


@functools.cache
def with_waits(source: str) -> str:
    """The source with a wait for the previous kernel at the beginning of each kernel."""
    return _PRELUDE + re.sub(rf"^({_KERNEL} {{)", rf"\1 {_WAIT}", source, flags=re.MULTILINE)


class Kernels:
    """The kernels of one source file on one device, compiled with these options.

    launch: a function that launches a kernel of CuPy, given (kernel, grid, block, arguments, shared_bytes).
    """

    def __init__(self, xp: Any, launch: Launch, source: str = SOURCE, options: Sequence[str] = ()) -> None:
        self._xp, self._launch, self._source, self._options = xp, launch, with_waits(source), tuple(options)
        self._compiled: dict[tuple[str, DType], Any] = {}
        self._modules: dict[DType, Any] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        name: str,
        real: DType,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        given: Mapping[str, Any],
        shared_bytes: int = 0,
    ) -> None:
        """Launch the kernel `name`, with `real` as its type REAL. It takes its arguments from `given`, by their names.

        A pointer takes an array, an address (numpy.uint64) or None; a struct takes its fields; any other argument a
        number. TypeError for an array of another dtype or layout, which the kernel would misread.  shared_bytes: the
        shared memory of a block, besides what the kernel declares.
        """
        kernel = self._compiled.get((name, real)) or self._kernel(name, real)
        declared = signatures(self._source)[name]
        missing = [argument.name for argument in declared if argument.name not in given]
        unknown = given.keys() - {argument.name for argument in declared} - _FILLED_IN
        if missing or unknown:
            raise TypeError(f"{name}: missing arguments {missing}, unknown arguments {sorted(unknown)}.")
        arguments = [_convert(name, argument, given[argument.name], real) for argument in declared]
        if shared_bytes and shared_bytes + kernel.shared_size_bytes > _STATIC_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        self._launch(kernel, grid, block, tuple(arguments), shared_bytes)

    def _kernel(self, name: str, real: DType) -> Any:
        # A kernel without reals is taken from the float32 module, so that float64 is compiled only if it is used.
        has_reals = any(argument.type == "real" for argument in signatures(self._source)[name])
        compiled = real if has_reals else next(iter(REALS))
        with self._lock:  # so that threads do not compile the same module
            if compiled not in self._modules:
                options = (f"-DREAL={REALS[compiled]}", *self._options)
                self._modules[compiled] = self._xp.RawModule(code=self._source, options=options)
            kernel = self._compiled[name, real] = self._modules[compiled].get_function(name)
        return kernel


def axes(*sizes: int) -> list[list[int]]:
    """The fields of a struct Axes with these last axes, at most five."""
    return [_divisor(size) for size in (*[1] * (5 - len(sizes)), *sizes)]


def _divisor(n: int) -> list[int]:
    """The fields of a struct Divisor: i // n = (i · multiplier // 2^32 + i) >> shift for any i below 2^31.

    Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
    """
    shift = (n - 1).bit_length()
    return [n, 2**32 * (2**shift - n) // n + 1, shift]


def _convert(kernel: str, argument: KernelArgument, given: Any, real: DType) -> Any:
    kind, pointer, name = argument
    if kind in _STRUCTS:
        fields = numpy.array(given, dtype=_STRUCTS[kind]).reshape(-1)
        return fields.view(f"V{fields.nbytes}")  # an array of one element, which CuPy passes by value
    if not pointer:
        scalar = real.type if kind == "real" else _SCALARS[kind]
        return scalar(given)
    if given is None or isinstance(given, numpy.uint64):  # an address, whose caller has checked the array
        return _NULL if given is None else given
    wanted = real if kind == "real" else _FLOATS.get(kind)
    size = _SIZES.get(kind, given.dtype.itemsize)  # void accepts any
    fits = given.dtype.itemsize == size if wanted is None else given.dtype == wanted
    if not (fits and given.flags.c_contiguous):
        raise TypeError(f"{kernel}: {name} must be a contiguous array of {kind}, not {given.dtype} {given.shape}.")
    return given
