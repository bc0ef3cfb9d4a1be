"""Convolutions whose kernels gather the patches themselves: which kernel computes which convolution, and its launch.

The kernels are templates in convolutions.cu. This file instantiates them for the tiles that `_choose` uses, in one module
for each precision, which is compiled when it is first needed.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.kernels import Kernels
from xpnet.backends.reference.windows import Windows

TEMPLATES = Path(__file__).with_name("convolutions.cu").read_text(encoding="utf-8")

FLOAT32 = numpy.dtype("float32")

_CONVOLVE = (
    "const float* images, const float* weight, const float* bias, int relu, int count, int channels, int columns, "
    "Windows windows, float* out"
)
_WEIGHT_GRAD = (
    "const float* images, const float* grad, int count, int part_rows, int channels, int columns, Windows windows, "
    "float* parts, int* tickets, float* weight_grad, float* sums"
)


class Tile(NamedTuple):
    """What a block computes, of which each thread (float32), or each warp (tensor cores), has `tall` by `wide`.

    rows, columns: of the result.  depth: the step along the inner axis.  across: the threads of a warp along the columns.
    """

    rows: int
    columns: int
    depth: int
    tall: int
    wide: int
    across: int = 0

    @property
    def threads(self) -> int:
        units = self.rows // self.tall * (self.columns // self.wide)
        return units if self.across else 32 * units

    @property
    def name(self) -> str:
        return "_".join(str(number) for number in self if number)

    def type(self, precision: str, inner_a: bool, inner_b: bool) -> str:
        """The C++ type of the product."""
        if self.across:
            return "Exact<{}, {}, {}, {}, {}, {}>".format(*self)
        numbers = ", ".join(str(number) for number in self[:5])
        return f"Tensor<{precision.upper()}, {numbers}, {str(inner_a).lower()}, {str(inner_b).lower()}>"


def forward_kernel(tile: Tile, precision: str, transposed: bool = False) -> str:
    """The text of the kernel that convolves with this tile."""
    name = f"{'convolve_transposed' if transposed else 'convolve'}_{tile.name}"
    call = f"convolve<{tile.type(precision, True, transposed)}, {str(transposed).lower()}>"
    return _kernel(name, tile.threads, _CONVOLVE, call)


def weight_grad_kernel(tile: Tile, precision: str) -> str:
    return _kernel(
        f"weight_grad_{tile.name}", tile.threads, _WEIGHT_GRAD,
        f"convolve_weight_grad<{tile.type(precision, False, False)}>",
    )  # fmt: skip


def few_kernel(pixels: int) -> str:
    return _kernel(f"convolve_few_{pixels}", 1024, _CONVOLVE, f"convolve_few<{pixels}>")


def weight_grad_few_kernel(cells: int, threads: int) -> str:
    call = f"convolve_weight_grad_few<{cells}, {threads}>"
    return _kernel(f"weight_grad_few_{cells}_{threads}", threads, _WEIGHT_GRAD, call)


def _kernel(name: str, threads: int, arguments: str, function: str) -> str:
    names = ", ".join(argument.split()[-1] for argument in arguments.split(","))
    return f"KERNEL __launch_bounds__({threads}) {name}({arguments}) {{\n    {function}({names});\n}}\n"
