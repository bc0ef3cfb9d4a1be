"""Matrix products by kernels of our own (products.cu), for sizes at which cuBLAS is slow."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.cublas import MatrixLayout, matrix_layout
from xpnet.backends.cuda.kernels import Kernels

SOURCE = Path(__file__).with_name("products.cu").read_text(encoding="utf-8")

_FLOAT32 = numpy.dtype("float32")
_PART_BYTES = 8 * 2**20  # of the memory for the parts of sums
_MOST_TILES = 2**14
_LARGEST = 2**31 - 1  # sizes are C ints


class Tiling(NamedTuple):
    """How products.cu divides a product: see its macros, which have these names."""

    tile_m: int
    tile_n: int
    tile_k: int
    share_m: int
    share_n: int
    slices: int
    stages: int
    cluster: int = 0
    tf32: int = 0

    @property
    def threads(self) -> int:
        return self.tile_m // self.share_m * (self.tile_n // self.share_n) * self.slices * (32 if self.tf32 else 1)

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        return -(-m // self.tile_m), -(-n // self.tile_n)


class Epilogue(NamedTuple):
    """What a product does besides: out = relu(a @ b + row), or (a @ b) · [mask ≠ 0]; sums[j] = Σ_i b[i, j]."""

    row: Array | None = None
    relu: bool = False
    mask: Array | None = None
    sums: Array | None = None


class ProductKernels:
    """The kernels of products.cu on one device, and the memory that they use on one stream."""

    def __init__(self, xp: Any) -> None:
        self._parts = xp.empty(_PART_BYTES // 4, dtype=numpy.float32)
        self._tickets = xp.zeros(_MOST_TILES, dtype=numpy.uint32)
        self.kernels = functools.cache(functools.partial(_kernels, xp))

    def product(self, tiling: Tiling, parts: int, a: Array, b: Array, out: Array, epilogue: Epilogue) -> bool:
        """out = a @ b with this epilogue, k divided into parts. False, without doing anything, if it cannot be done."""
        layouts = matrix_layout(a), matrix_layout(b), matrix_layout(out)
        if None in layouts or not _accepted(a, b, out, layouts):
            return False
        layout_a, layout_b, layout_out = layouts
        (m, k), n = a.shape, b.shape[1]
        across = tiling.tiles(m, n)
        part_k = _up_to(4, -(-k // parts))
        parts = _up_to(max(1, tiling.cluster), -(-k // part_k))
        part_size = (tiling.tile_m + 1) * tiling.tile_n
        tiles = across[0] * across[1]
        if parts > 1 and (tiles * max(1, tiling.cluster) > _MOST_TILES or tiles * parts * part_size > self._parts.size):
            return False
        if across[1] >= 2**16 or parts >= 2**16:
            return False
        address = numpy.uint64
        kernels = self.kernels(tiling, layout_a.operation, layout_b.operation)
        kernels.launch("product", _FLOAT32, (*across, parts), (tiling.threads,), {
            "a": address(a.data.ptr), "b": address(b.data.ptr), "out": address(out.data.ptr), "m": m, "n": n, "k": k,
            "a_step": layout_a.leading, "b_step": layout_b.leading, "out_step": layout_out.leading,
            "wide_a": _wide(a, layout_a), "wide_b": _wide(b, layout_b), "wide_out": _wide(out, layout_out),
            "part_k": part_k, "parts": self._parts, "tickets": self._tickets,
            "row": epilogue.row, "relu": epilogue.relu, "mask": epilogue.mask, "sums": epilogue.sums,
        })  # fmt: skip
        return True


def _accepted(a: Array, b: Array, out: Array, layouts: Any) -> bool:
    sizes = (*a.shape, *b.shape, *(layout.leading for layout in layouts))
    return all(x.dtype == _FLOAT32 for x in (a, b, out)) and 0 < min(sizes) and max(sizes) < _LARGEST // 2


def _wide(a: Array, layout: MatrixLayout) -> bool:
    """Whether each line of the matrix begins at a multiple of 16 bytes."""
    return bool(layout.leading % 4 == 0 and a.data.ptr % 16 == 0)


def _up_to(multiple: int, n: int) -> int:
    return -(-n // multiple) * multiple


def _kernels(xp: Any, tiling: Tiling, a_by_columns: int, b_by_columns: int) -> Kernels:
    options = [f"-D{name.upper()}={value}" for name, value in tiling._asdict().items()]
    layouts = [f"-DA_BY_COLUMNS={a_by_columns}", f"-DB_BY_COLUMNS={b_by_columns}"]
    return Kernels(xp, SOURCE, [*options, *layouts])


def tilings() -> Iterator[Tiling]:
    yield from ()
