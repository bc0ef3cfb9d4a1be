"""Matrix products of a captured step: several ways to compute each of them, of which the fastest is chosen.

The ways are cuBLAS, the algorithms of cuBLASLt, and our own kernels (products.cu) with several tilings. The kernels
can also compute what follows the product (`Epilogue`), and cuBLASLt a part of it. In a precision of 16 bits, matrices
are float32, and each way rounds them to that precision or to TF32, or they have been rounded before.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.cublas import HalfMatrix, elements, matrix_layout
from xpnet.backends.cuda.cublaslt import CublasLt, LtEpilogue, LtProduct, alignment, mask_shape
from xpnet.backends.cuda.kernels import Kernels, Launch

SOURCE = Path(__file__).with_name("products.cu").read_text(encoding="utf-8")

_FLOAT32 = numpy.dtype("float32")
_PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # by their numbers in products.cu
_PART_BYTES = 4 * 2**20  # of the memory for the parts of sums
_TICKETS = 2**10
_LARGEST = 2**30  # sizes and their sums are C ints
_ALGORITHMS = 6  # of cuBLASLt for a product


class Epilogue(NamedTuple):
    """What follows out = a @ b: out += row and out = relu(out); or out *= [mask ≠ 0]; and sums[j] = Σ_i b[i, j].

    bits: a mask of cuBLASLt, which is written with relu, and multiplies out without. Nothing else can compute that.
    """

    row: Array | None = None
    relu: bool = False
    mask: Array | None = None
    sums: Array | None = None
    bits: Array | None = None


class Product(NamedTuple):
    """A product: its matrices, the precision to which it rounds them, and the epilogue.

    a, b: both float32 or both a `HalfMatrix`; out may be a `HalfMatrix` if they are, and epilogue.row is one if out is.
    """

    a: Any
    b: Any
    out: Any
    precision: str
    epilogue: Epilogue

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(m, k, n) for a (m, k) and b (k, n)."""
        return (*self.a.shape, self.b.shape[1])

    @property
    def in_halves(self) -> bool:
        """Whether the matrices have been rounded to 16 bits, so that only cuBLAS and cuBLASLt can multiply them."""
        return isinstance(self.a, HalfMatrix)

    def accepted(self) -> bool:
        """Whether the kernels or cuBLASLt accept these matrices."""
        if self.in_halves != isinstance(self.b, HalfMatrix) or not all(map(_is_known, self[:3])):
            return False
        layouts = [layout for x in self[:3] if (layout := matrix_layout(elements(x))) is not None]
        if len(layouts) < 3 or layouts[2].operation:
            return False
        others = [x for x in (self.epilogue.row, self.epilogue.mask, self.epilogue.sums) if x is not None]
        if not all(_is_known(x) and elements(x).flags.c_contiguous for x in others):
            return False
        bits = self.epilogue.bits
        if bits is not None and not (self.in_halves and isinstance(self.out, HalfMatrix) and _is_mask(bits, self.out)):
            return False
        return min(self.sizes) > 0 and max(*self.sizes, *(layout.leading for layout in layouts)) < _LARGEST

    def question(self) -> str:
        """A key for `Choices`: sizes, layouts, alignments, precision, which are in 16 bits, and epilogue."""
        m, k, n = self.sizes
        stored = [f"{'T' if operation else 'N'}{leading}" for operation, leading in map(_layout, self[:3])]
        aligned = [str(alignment(elements(x))) for x in (*self[:3], self.epilogue.bits) if x is not None]
        halves = [name for name, x in zip(("a and b", "out"), self[1:3], strict=True) if isinstance(x, HalfMatrix)]
        follows = [name for name, value in self.epilogue._asdict().items() if value is not None and value is not False]
        return " ".join([f"{m}x{k}x{n}", *stored, *aligned, self.precision, *halves, *follows])


def _is_known(a: Any) -> bool:
    return isinstance(a, HalfMatrix) or a.dtype == _FLOAT32


def _is_mask(bits: Array, out: HalfMatrix) -> bool:
    return bool(bits.shape == mask_shape(out.shape) and bits.dtype == "uint8" and bits.flags.c_contiguous)


class Tiling(NamedTuple):
    """How products.cu divides a product: see its macros, which have these names."""

    tile_m: int
    tile_n: int
    tile_k: int
    lane_m: int
    lane_n: int
    warps: int
    stages: int
    tensor: int = 0  # 1 for tensor cores

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_bytes(self, a_by_columns: int, b_by_columns: int) -> int:
        """The bytes of MEMORY in products.cu."""
        padding, pitch = (8 if self.tensor else 0), self.tile_k + 4
        a = self.tile_k * (self.tile_m + padding) if a_by_columns else self.tile_m * pitch
        b = self.tile_n * pitch if b_by_columns else self.tile_k * (self.tile_n + padding)
        return 4 * self.warps * max(self.stages * (a + b), (self.tile_m + 1) * self.tile_n)


#: By name. Each was the fastest for some product of a small net on an H200.
TILINGS = {
    "8x16": Tiling(8, 16, 16, 2, 2, 8, 4),
    "16x32": Tiling(16, 32, 16, 4, 4, 4, 4),
    "32x32": Tiling(32, 32, 16, 8, 4, 4, 3),
    "32x64": Tiling(32, 64, 16, 8, 8, 4, 3),
    "tensor 16x16": Tiling(16, 16, 32, 0, 0, 4, 2, tensor=1),
    "tensor 16x32": Tiling(16, 32, 16, 0, 0, 8, 3, tensor=1),
    "tensor 32x32": Tiling(32, 32, 16, 0, 0, 4, 3, tensor=1),
}

_BLOCKS = 132  # enough to occupy an H200
_TRIED = 2  # tilings for a product, since each takes 0.4 s to compile on a new machine
_MOST_PADDING = 2.0  # elements that a tiling computes, per element of out
_LONG_K = 1024  # a shorter k is not divided, because adding the parts would take longer


class StreamProducts:
    """The kernels, the algorithms and the memory for the products on one stream.

    multiply: a function (a, b, out) that computes a product by cuBLAS.  launch: as for `Kernels`.
    """

    def __init__(
        self, xp: Any, stream: int, lt: CublasLt, multiply: Callable[[Array, Array, Array], Any], launch: Launch
    ) -> None:
        self._xp, self._stream, self._lt, self._multiply = xp, stream, lt, multiply
        self._parts = xp.empty(_PART_BYTES // 4, dtype=numpy.float32)
        self._tickets = xp.zeros(_TICKETS, dtype=numpy.uint32)
        self._kernels = functools.cache(functools.partial(_compiled, xp, launch))
        self._lt_products: dict[str, LtProduct] = {}

    def ways(self, product: Product) -> dict[str, Callable[[], Epilogue]]:
        """The ways to compute a product, by name. Each returns what it has not computed of the epilogue."""
        ways: dict[str, Callable[[], Epilogue]] = {}
        if not isinstance(product.out, HalfMatrix):  # so that there is no mask of bits either
            ways["cublas"] = functools.partial(self._by_cublas, product)
        for name, epilogue in _lt_epilogues(product).items():
            for i in range(self._lt_product(product, epilogue).count):
                ways[f"{name} {i}"] = functools.partial(self._by_lt, product, epilogue, i)
        for name, parts in [] if product.in_halves else _tilings(product):
            ways[f"{name} / {parts}"] = functools.partial(self.by_kernel, product, TILINGS[name], parts)
        return ways

    def _by_cublas(self, product: Product) -> Epilogue:
        self._multiply(product.a, product.b, product.out)
        return product.epilogue

    def _lt_product(self, product: Product, epilogue: LtEpilogue) -> LtProduct:
        question = f"{product.question()}: {epilogue.number}"
        if question not in self._lt_products:
            a, b, out, precision, _ = product
            self._lt_products[question] = LtProduct(self._lt, a, b, out, epilogue, precision, _ALGORITHMS)
        return self._lt_products[question]

    def _by_lt(self, product: Product, epilogue: LtEpilogue, algorithm: int) -> Epilogue:
        a, b, out, *_ = product
        self._lt_product(product, epilogue)(algorithm, a, b, out, epilogue, self._stream)
        return Epilogue(mask=product.epilogue.mask, sums=None if epilogue.sums is not None else product.epilogue.sums)

    def by_kernel(self, product: Product, tiling: Tiling, parts: int) -> Epilogue:
        """Compute a product by products.cu, with k divided into at most this many parts."""
        a, b, out, _, epilogue = product
        (m, k, n), (across_m, across_n) = product.sizes, _tiles(product, tiling)
        part_k = 4 * -(-k // (4 * parts))
        parts = -(-k // part_k)
        layout_a, layout_b, layout_out = map(_layout, (a, b, out))
        address = numpy.uint64
        kernels = self._kernels(tiling, product.precision, layout_a.operation, layout_b.operation)
        shared = tiling.shared_bytes(layout_a.operation, layout_b.operation)
        kernels.launch("product", _FLOAT32, (across_m, across_n, parts), (tiling.threads,), shared_bytes=shared, given={
            "a": address(a.data.ptr), "b": address(b.data.ptr), "out": address(out.data.ptr), "m": m, "n": n, "k": k,
            "a_step": layout_a.leading, "b_step": layout_b.leading, "out_step": layout_out.leading,
            "wide_a": _wide(a), "wide_b": _wide(b),
            "wide_out": _wide(out) and (epilogue.mask is None or _wide(epilogue.mask)),
            "part_k": part_k, "parts": self._parts, "tickets": self._tickets,
            "row": epilogue.row, "relu": epilogue.relu, "mask": epilogue.mask, "sums": epilogue.sums,
        })  # fmt: skip
        return Epilogue()


def _lt_epilogues(product: Product) -> dict[str, LtEpilogue]:
    """What cuBLASLt may compute of the epilogue, by the names of the ways."""
    row, relu, _, sums, bits = product.epilogue
    epilogues = {"cublasLt": LtEpilogue(row, relu, bits)}
    if sums is not None and product.in_halves and not isinstance(product.out, HalfMatrix):
        epilogues["cublasLt with sums"] = LtEpilogue(sums=sums)
    return epilogues


def _layout(a: Any) -> Any:
    return matrix_layout(elements(a))


def _tilings(product: Product) -> list[tuple[str, int]]:
    """The tilings to try for a product, the smallest first, each with the number of parts of k."""
    m, k, n = product.sizes
    tilings: list[tuple[str, int]] = []
    for name, tiling in TILINGS.items():
        across_m, across_n = _tiles(product, tiling)
        tiles = across_m * across_n
        padded = tiles > 1 and tiles * tiling.tile_m * tiling.tile_n > _MOST_PADDING * m * n
        if bool(tiling.tensor) == (product.precision != "float32") and tiles <= 2 * _BLOCKS and not padded:
            tilings.append((name, max(1, _BLOCKS // tiles) if k >= _LONG_K else 1))
    return tilings[:_TRIED]


def _tiles(product: Product, tiling: Tiling) -> tuple[int, int]:
    return -(-product.a.shape[0] // tiling.tile_m), -(-product.b.shape[1] // tiling.tile_n)


def _wide(a: Array) -> bool:
    """Whether each line of a matrix begins at a multiple of 16 bytes."""
    return bool(_layout(a).leading % 4 == 0 and a.data.ptr % 16 == 0)


def macros(tiling: Tiling, precision: str, a_by_columns: int, b_by_columns: int) -> list[str]:
    """The options that define the macros of products.cu."""
    sizes = [f"-D{name.upper()}={value}" for name, value in tiling._asdict().items() if name != "tensor"]
    layouts = [f"-DA_BY_COLUMNS={a_by_columns}", f"-DB_BY_COLUMNS={b_by_columns}"]
    return [*sizes, f"-DPRECISION={_PRECISIONS.index(precision)}", *layouts]


def _compiled(xp: Any, launch: Launch, *given: Any) -> Kernels:
    return Kernels(xp, launch, SOURCE, macros(*given))
