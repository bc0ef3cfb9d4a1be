"""kernels.cu on a device: compiled where first needed, its arguments held to the signatures in its text."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import DType

SOURCE = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")

REALS = {numpy.dtype("float32"): "float", numpy.dtype("float64"): "double"}

NUMBERS = 8  # that one set of a step's numbers has room for, as set_numbers has

_SIZES = {"Byte": 1, "unsigned short": 2, "int": 4, "Word": 4, "Index": 8, "unsigned long long": 8}
_SCALARS = {"int": numpy.int32, "Word": numpy.uint32, "Index": numpy.int64, "double": numpy.float64}
_NULL = numpy.uint64(0)


class Parameter(NamedTuple):
    """One parameter of a kernel: its C type without const and asterisk, and whether it is a pointer."""

    type: str
    pointer: bool
    name: str


@functools.cache
def signatures() -> dict[str, list[Parameter]]:
    """{kernel: its parameters}, read from the text of kernels.cu."""
    windows = re.search(r"#define WINDOWS(.*?)\n\n", SOURCE, re.DOTALL)
    assert windows is not None
    geometry = windows[1].replace("\\\n", " ")
    found = {}
    for name, parameters in re.findall(r"^KERNEL (\w+)\(([^)]*)\)", SOURCE, re.MULTILINE):
        text = re.sub(r"\bWINDOWS\b", geometry, parameters)
        found[name] = [_parameter(part) for part in text.split(",")]
    return found


def _parameter(text: str) -> Parameter:
    kind, name = re.fullmatch(r"\s*(?:const )?(.*?)\s*(\w+)\s*", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return Parameter(kind.rstrip("* "), "*" in kind, name)


class Kernels:
    """The kernels of one device."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._compiled: dict[tuple[str, DType], Any] = {}
        self._modules: dict[DType, Any] = {}

    def launch(self, name: str, real: DType, grid: Sequence[int], block: Sequence[int], *given: Any) -> None:
        """Run the kernel `name` with `real` for its REAL: arrays for pointers, or an address or None; numbers for the
        others.

        Raises TypeError for an argument that does not fit, which on a device would be read as something else.
        """
        kernel = self._compiled.get((name, real)) or self._kernel(name, real)
        parameters = signatures()[name]
        if len(given) != len(parameters):
            raise TypeError(f"{name} takes {len(parameters)} arguments, not {len(given)}.")
        kernel(
            tuple(grid),
            tuple(block),
            tuple([_argument(name, p, a, real) for p, a in zip(parameters, given, strict=True)]),
        )

    def _kernel(self, name: str, real: DType) -> Any:
        if real not in self._modules:
            self._modules[real] = self._xp.RawModule(code=SOURCE, options=(f"-DREAL={REALS[real]}",))
        kernel = self._compiled[name, real] = self._modules[real].get_function(name)
        return kernel


def _argument(kernel: str, parameter: Parameter, given: Any, real: DType) -> Any:
    kind, pointer, name = parameter
    if not pointer:
        scalar = real.type if kind == "real" else _SCALARS[kind]
        return scalar(given)
    if given is None or isinstance(given, numpy.uint64):  # an address, whose caller knows what lies there
        return _NULL if given is None else given
    dtype = given.dtype
    if kind in ("real", "float", "double"):
        fits = dtype == (real if kind == "real" else numpy.dtype(f"float{32 if kind == 'float' else 64}"))
    else:
        fits = dtype.itemsize == _SIZES[kind]
    if not (fits and given.flags.c_contiguous):
        raise TypeError(f"{kernel}: {name} must be a contiguous array of {kind}, not {dtype} {given.shape}.")
    return given
