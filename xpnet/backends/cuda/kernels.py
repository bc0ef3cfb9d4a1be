"""The CUDA kernels of a source: compiled when first needed, launched with arguments that match their signatures."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import DType

SOURCE = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")

REALS = {numpy.dtype("float32"): "float", numpy.dtype("float64"): "double"}

_STATIC_SHARED = 48 * 1024  # bytes; a kernel must ask for more

CELL_SIZE = 8  # numbers in one cell of a captured step, and in `Numbers` of kernels.cu

_SIZES = {"Byte": 1, "unsigned short": 2, "int": 4, "Word": 4, "Index": 8, "unsigned long long": 8}
_FLOATS = {"float": numpy.dtype("float32"), "double": numpy.dtype("float64")}
_SCALARS = {"int": numpy.int32, "Word": numpy.uint32, "Index": numpy.int64, "double": numpy.float64}
_STRUCTS = {"Windows": numpy.int32, "Numbers": numpy.float64}  # all fields have this type
_NULL = numpy.uint64(0)
_FILLED_IN = {"out", "n", "columns", "channels"}  # which `KernelLauncher.launch` gives to every kernel


class KernelArgument(NamedTuple):
    """An argument that a kernel declares: its C type without const and asterisk, whether it is a pointer, its name."""

    type: str
    pointer: bool
    name: str


@functools.cache
def signatures(source: str = SOURCE) -> dict[str, list[KernelArgument]]:
    """{kernel: the arguments it declares}, parsed from the source, by default kernels.cu."""
    kernels = re.findall(r"^KERNEL (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(([^)]*)\)", source, re.MULTILINE)
    return {
        name: [
            KernelArgument(kind, bool(pointer), argument)
            for kind, pointer, argument in re.findall(r"(?:const )?(\w[\w ]*?)(\*?) (\w+)(?:,|$)", declared)
        ]
        for name, declared in kernels
    }


class Kernels:
    """The kernels of one source on one device."""

    def __init__(self, xp: Any, source: str = SOURCE) -> None:
        self._xp, self._source = xp, source
        self._compiled: dict[tuple[str, DType], Any] = {}
        self._modules: dict[DType, Any] = {}

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
        if shared_bytes > _STATIC_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        kernel(grid, block, tuple(arguments), shared_mem=shared_bytes)

    def _kernel(self, name: str, real: DType) -> Any:
        # A kernel without reals is taken from the float32 module, so that float64 is compiled only if it is used.
        compiled = (
            real if any(argument.type == "real" for argument in signatures(self._source)[name]) else next(iter(REALS))
        )
        if compiled not in self._modules:
            options = (f"-DREAL={REALS[compiled]}",)
            self._modules[compiled] = self._xp.RawModule(code=self._source, options=options)
        kernel = self._compiled[name, real] = self._modules[compiled].get_function(name)
        return kernel


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
