"""Convolutions by kernels that gather the patches themselves: which kernel computes what, and its launch.

convolutions.cu has the templates of the kernels. Each instance that a network needs is a module of its own, which is
compiled when it is first used.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.kernels import read_source
from xpnet.backends.cuda.matmul import CUDAMatmul
from xpnet.backends.reference.windows import Windows

TEMPLATES = read_source("instructions.cu", "convolutions.cu")

_FLOAT32 = numpy.dtype("float32")
_ALIGNMENT = 16  # bytes: kernels load four numbers at once
_MANY = 2**31  # elements: the kernels count in 32 bits
_MULTIPROCESSORS = 132  # of an H200
_FIRST_CAPABILITY = 8  # with the tensor cores that instructions.cu uses
_CONVOLVE = (
    "const float* images, const float* weight, const float* bias, int relu, const float* mask, int count, "
    "int channels, int columns, Windows windows, float* out"
)
_WEIGHT_GRAD = (
    "const float* images, const float* grad, int count, int part_rows, int channels, int columns, Windows windows, "
    "float* parts, float* weight_grad, float* sums, int add"
)
_ADD_PARTS = "const float* parts, int count, int depth, int columns, float* weight_grad, float* sums, int add"


class Tile(NamedTuple):
    """What a block computes of the result: each thread (float32) or warp (tensor cores) `tall` by `wide` elements.

    rows, columns: of all of these.  depth, stages: the size of a step along the inner axis, and how many steps are
    in shared memory at a time.  across: the threads of a warp along the columns, or 0 for tensor cores.
    """

    rows: int
    columns: int
    depth: int
    stages: int
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

    def product(self, precision: str, inner_a: bool, inner_b: bool) -> str:
        """The C++ type of the product. inner_a, inner_b: how the operands are stored, see convolutions.cu."""
        kind = "Exact<" if self.across else f"Tensor<{precision.upper()}, "
        numbers = (*self[:4], int(inner_a), int(inner_b), *self[4 : 7 if self.across else 6])
        return f"{kind}{', '.join(map(str, numbers))}>"


@dataclass(frozen=True)
class Kernel:
    """An instance of a template. A block computes `rows` by `columns` of the result, in steps of `depth`."""

    name: str
    arguments: str
    function: str  # of C++, with its template arguments
    block: tuple[int, ...]
    rows: int
    columns: int
    depth: int = 1
    blocks: int = 2  # of a weight gradient, at most, for each multiprocessor

    @property
    def definition(self) -> str:
        """The C++ text that follows the templates."""
        names = ", ".join(argument.split()[-1] for argument in self.arguments.split(","))
        head = f"KERNEL __launch_bounds__({math.prod(self.block)}) {self.name}({self.arguments})"
        return f"\n{head} {{\n    {self.function}({names});\n}}\n"

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """How many blocks compute a result of this size: (along the rows, along the columns)."""
        return -(-rows // self.rows), -(-columns // self.columns)


def forward_kernel(tile: Tile, precision: str, transposed: bool = False) -> Kernel:
    """`convolve`. transposed: for the gradient of the images."""
    name, function = f"convolve_{'transposed_' * transposed}{tile.name}", tile.product(precision, True, transposed)
    return Kernel(name, _CONVOLVE, f"convolve<{function}>", (tile.threads,), *tile[:3])


def weight_grad_kernel(tile: Tile, precision: str, blocks: int = 2) -> Kernel:
    """`convolve_weight_grad`, with at most `blocks` blocks for each multiprocessor."""
    function = f"convolve_weight_grad<{tile.product(precision, False, False)}>"
    return Kernel(f"weight_grad_{tile.name}", _WEIGHT_GRAD, function, (tile.threads,), *tile[:3], blocks)


def few_kernel(precision: str, columns: int, pixels: int, threads: int) -> Kernel:
    """`convolve_few`: each thread computes 4 columns for `pixels` pixels."""
    rows, function = threads // (columns // 4) * pixels, f"convolve_few<{pixels}, {precision.upper()}>"
    return Kernel(f"convolve_few_{pixels}", _CONVOLVE, function, (threads,), rows, columns)


def few_weight_grad_kernel(precision: str, columns: int, cells: int, pixels: int, threads: int) -> Kernel:
    """`convolve_weight_grad_few`, for patches with `cells` columns. Each thread adds `pixels` pixels at a time."""
    name = f"weight_grad_few_{cells}_{pixels}_{threads}"
    function = f"convolve_weight_grad_few<{cells}, {threads}, {pixels}, {precision.upper()}>"
    return Kernel(name, _WEIGHT_GRAD, function, (threads,), cells, columns)


#: Follows the kernel of a weight gradient. A block adds the parts of 32 elements.
ADD_PARTS = Kernel("convolution_parts", _ADD_PARTS, "add_convolution_parts", (8, 32), 1, 32)


# Which kernel computes what ------------------------------------------------------------------------------------------
# From measurements on an H200, with 128 and 512 images of 14 to 28 pixels and 1 to 64 channels and filters. Other
# convolutions are computed by im2col and a product: the more filters share the patches, the less these cost.

_MOST_FILTERS = 64
_FEW = 27  # columns of the patches: 3 × 3 pixels of three colors
_SMALL = 2**15  # rows: for fewer, small tiles occupy more of the device


def choose_forward(
    precision: str, windows: Windows, count: int, channels: int, columns: int, transposed: bool = False
) -> Kernel | None:
    """The kernel for `columns` results of `count` windows on images with these channels."""
    if columns % 4 or (channels if transposed else columns) > _MOST_FILTERS:
        return None
    if channels % 4:
        few = math.prod(windows.kernel) * channels <= _FEW and not transposed
        return few_kernel(precision, columns, 4, 128) if few else None
    if precision == "float32":
        narrow = Tile(64, 16, 32, 2, 4, 4, 4) if count < _SMALL else Tile(128, 16, 16, 2, 4, 4, 4)
        tile = _by_columns(columns, narrow, Tile(64, 32, 32, 2, 4, 4, 8), Tile(64, 64, 32, 2, 8, 4, 8))
    else:
        narrow = Tile(64 if count < _SMALL else 128, 16, 32, 2, 32, 16)
        tile = _by_columns(columns, narrow, Tile(64, 32, 32, 2, 32, 16), Tile(64, 64, 32, 2, 32, 32))
    return forward_kernel(tile, precision, transposed)


def choose_weight_grad(precision: str, windows: Windows, channels: int, columns: int) -> Kernel | None:
    """The kernel for the gradient of a weight (cells · channels, columns)."""
    depth = math.prod(windows.kernel) * channels
    if columns % 4 or columns > _MOST_FILTERS:
        return None
    if channels % 4:
        return few_weight_grad_kernel(precision, columns, depth, 2, 256) if depth <= _FEW else None
    if precision == "float32":
        tile = _by_columns(
            columns, Tile(160, 16, 16, 2, 4, 4, 4), Tile(144, 32, 16, 3, 12, 4, 8), Tile(144, 64, 16, 2, 12, 8, 8)
        )
        return weight_grad_kernel(tile, precision, blocks=4)
    middle = Tile(96, 32, 32, 2, 48, 16) if depth % 96 == 0 else Tile(144, 32, 16, 3, 48, 16)
    tile = _by_columns(columns, Tile(144, 16, 32, 2, 48, 16), middle, Tile(96, 64, 32, 2, 48, 32))
    return weight_grad_kernel(tile, precision, blocks=4 if tile.columns == 16 else 2 if tile.rows == 144 else 3)


def _by_columns(columns: int, narrow: Tile, middle: Tile, wide: Tile) -> Tile:
    return narrow if columns <= narrow.columns else middle if columns <= middle.columns else wide


# The operators -------------------------------------------------------------------------------------------------------


class CUDAConvolutions(CUDAMatmul):
    """A backend on CuPy whose kernels for convolutions gather the patches themselves."""

    def convolve(self, x: Array, weight: Array, bias: Array | None, windows: Windows, relu: bool, out: Array) -> Array:
        kernel = self.convolution_kernel("convolve", x, weight, windows, out)
        if kernel is None or not self._can_load(bias):
            return super().convolve(x, weight, bias, windows, relu, out)
        return self._convolve(kernel, x, weight, windows, out, bias=bias, relu=relu)

    def convolve_input_grad(
        self, grad: Array, weight: Array, windows: Windows, out: Array, y: Array | None = None
    ) -> Array:
        kernel = self.convolution_kernel("convolve_input_grad", grad, weight, windows, out)
        if kernel is None or not self._can_load(y):
            return super().convolve_input_grad(grad, weight, windows, out, y)
        return self._convolve(kernel, grad, weight, _transposed(windows), out, mask=y)

    def convolve_weight_grad(
        self, x: Array, grad: Array, windows: Windows, out: Array, sums: Array | None, add: bool = False
    ) -> Array:
        kernel = self.convolution_kernel("convolve_weight_grad", x, grad, windows, out)
        if kernel is None or not (sums is None or sums.flags.c_contiguous):
            return super().convolve_weight_grad(x, grad, windows, out, sums, add)
        depth, columns = out.shape
        count = grad.size // columns
        tiles = kernel.tiles(depth, columns)
        multiprocessors = int(self.properties.get("multiProcessorCount", _MULTIPROCESSORS))
        most = kernel.blocks * multiprocessors // math.prod(tiles)
        parts = max(1, min(most, -(-count // kernel.depth)))
        part_rows = -(-count // parts)
        part_rows = -(-part_rows // kernel.depth) * kernel.depth
        parts = -(-count // part_rows)
        part_sums = self.xp.empty((parts, depth + 1, columns), dtype=_FLOAT32) if parts > 1 else None
        arrays = {"images": x, "grad": grad, "parts": part_sums, "weight_grad": out, "sums": sums}
        sizes = {"count": count, "part_rows": part_rows, "channels": x.shape[3], "columns": columns}
        self._launch(kernel, (*tiles, parts), {**arrays, **sizes, "windows": windows, "add": int(add)})
        if parts > 1:
            results = {"parts": part_sums, "weight_grad": out, "sums": sums}
            blocks = ADD_PARTS.tiles(1, (depth + 1) * columns)
            sizes = {"count": parts, "depth": depth, "columns": columns}
            self._launch(ADD_PARTS, blocks[1:], {**results, **sizes, "add": int(add)})
        return out

    def convolution_kernel(
        self, operator: str, images: Array, matrix: Array, windows: Windows, out: Array
    ) -> Kernel | None:
        """The kernel for one of the operators above with these arrays; None if another way is faster or needed.

        matrix: its second argument.
        """
        precision = self.thread.precision or "float32"
        sizes = images.size, matrix.size, out.size
        if max(sizes) >= _MANY or not min(sizes) or not self._can_load(images, matrix, out):
            return None
        if precision != "float32" and self.capability < _FIRST_CAPABILITY:
            return None
        channels, columns = images.shape[3], out.shape[-1]
        if operator == "convolve_weight_grad":
            return choose_weight_grad(precision, windows, channels, columns)
        if operator == "convolve":
            return choose_forward(precision, windows, out.size // columns, channels, columns)
        if windows.strides != (1, 1):
            return None
        return choose_forward(precision, _transposed(windows), out.size // columns, channels, columns, transposed=True)

    def _can_load(self, *arrays: Array | None) -> bool:
        """Whether kernels can load four numbers at once from these arrays, which must be contiguous and float32."""
        if self.kernels_unavailable:
            return False
        given = [a for a in arrays if a is not None]
        return all(a.dtype == _FLOAT32 and a.flags.c_contiguous and a.data.ptr % _ALIGNMENT == 0 for a in given)

    def _convolve(
        self,
        kernel: Kernel,
        images: Array,
        weight: Array,
        windows: Windows,
        out: Array,
        bias: Array | None = None,
        relu: bool = False,
        mask: Array | None = None,
    ) -> Array:
        columns = out.shape[-1]
        count = out.size // columns
        arrays = {"images": images, "weight": weight, "bias": bias, "mask": mask, "out": out}
        numbers = {"relu": int(relu), "count": count, "channels": images.shape[3], "columns": columns}
        self._launch(kernel, kernel.tiles(count, columns), {**arrays, **numbers, "windows": windows})
        return out

    def _launch(self, kernel: Kernel, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.instances(kernel, TEMPLATES).launch(kernel.name, _FLOAT32, grid, kernel.block, arguments)


def _transposed(windows: Windows) -> Windows:
    """The windows over the gradient of a convolution (strides 1) whose convolution is the gradient of the images."""
    (a, b), (first, second) = windows.dilation, windows.before
    return Windows(windows.grid, windows.image, windows.kernel, (1, 1), (-a, -b), (-first, -second))
