"""Compiled matrix products: the second matrix is packed, and each tile of the result stays in registers.

The packed matrix consists of panels: the first columns of all rows, then the next columns, and so on. The product is
computed in tiles of some rows by one panel. A BLAS packs both matrices in every call; here, a matrix that is used many
times, such as the recurrent weight in each step, is packed once.

Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
"""

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic

from xpnet.backends.cpu.compiling import compiled

_FEATURES = get_host_cpu_features()
_REGISTER_BYTES = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx") else 16
# A tile has two registers per row. These, two for a row of the panel and one for an element must fit into 32 or 16.
_ROWS = 8 if _FEATURES.get("avx512f") or platform.machine() in ("aarch64", "arm64") else 6
_HALF = _ROWS // 2
_REGISTERS = 2  # of a tile's row
_BLOCK_ELEMENTS = 2**16  # of the rows of the first matrix that stay in the level-2 cache for all panels
#: For fewer rows, packing takes longer than it saves.
ROWS_TO_PACK = 32 if _REGISTER_BYTES == 64 else 128


def panel_columns(itemsize: int) -> int:
    """The columns of a panel, for elements of so many bytes."""
    return _REGISTERS * _REGISTER_BYTES // itemsize


def _tile(rows: int) -> Callable[..., None]:
    """A function (a, i, packed, p, out) that computes this number of rows of out, from i on, in the columns of panel p.

    It is written as LLVM IR, because Numba would keep the sums in memory, not in registers. a must have columns.
    """

    @intrinsic
    def tile(_: Any, a: Any, i: Any, packed: Any, p: Any, out: Any) -> Any:
        signature = types.void(a, types.intp, packed, types.intp, out)
        return signature, generate

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, packed, out = (context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 2, 4))
        i, p = arguments[1], arguments[3]
        itemsize = signature.args[0].dtype.bitwidth // 8
        lanes = _REGISTER_BYTES // itemsize
        element = ir.FloatType() if itemsize == 4 else ir.DoubleType()
        register, index, byte = ir.VectorType(element, lanes), ir.IntType(64), ir.IntType(8).as_pointer()
        vectors, columns = range(_REGISTERS), _REGISTERS * lanes

        def at(base: Any, offset: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())

        def times(x: Any, y: Any) -> Any:
            return builder.mul(x, y if isinstance(y, ir.Value) else index(y))

        depth = builder.extract_value(a.shape, 1)
        row_stride, stride = (builder.extract_value(a.strides, axis) for axis in (0, 1))
        out_stride = builder.extract_value(out.strides, 0)
        base = builder.bitcast(a.data, byte)
        starts = [builder.gep(base, [times(builder.add(i, index(r)), row_stride)]) for r in range(rows)]
        panel = builder.gep(builder.bitcast(packed.data, byte), [times(times(p, depth), columns * itemsize)])

        # for k in range(depth): tile[r] += a[i + r, k] * panel[k]
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        sums = [[builder.phi(register) for _ in vectors] for _ in range(rows)]
        fma_type = ir.FunctionType(register, [register] * 3)
        fma = builder.module.declare_intrinsic(f"llvm.fmuladd.v{lanes}f{8 * itemsize}", (), fma_type)
        row = builder.gep(panel, [times(k, columns * itemsize)])
        of_panel = [builder.load(at(row, index(v * lanes * itemsize), register), align=itemsize) for v in vectors]
        nothing, all_first = ir.Constant(register, ir.Undefined), ir.VectorType(ir.IntType(32), lanes)([0] * lanes)
        new = []
        for r in range(rows):
            one = builder.insert_element(nothing, builder.load(at(starts[r], times(k, stride), element)), index(0))
            of_a = builder.shuffle_vector(one, nothing, all_first)
            new.append([builder.call(fma, [of_a, of_panel[v], sums[r][v]]) for v in vectors])
        following = builder.add(k, index(1))
        k.add_incoming(index(0), before)
        k.add_incoming(following, loop)
        for r in range(rows):
            for v in vectors:
                sums[r][v].add_incoming(ir.Constant(register, [0.0] * lanes), before)
                sums[r][v].add_incoming(new[r][v], loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)

        builder.position_at_end(after)
        base = builder.gep(builder.bitcast(out.data, byte), [times(p, columns * itemsize)])
        for r in range(rows):
            start = builder.gep(base, [times(builder.add(i, index(r)), out_stride)])
            for v in vectors:
                builder.store(new[r][v], at(start, index(v * lanes * itemsize), register), align=itemsize)
        return context.get_dummy_value()

    return tile


_whole_tile, _half_tile, _row_tile = _tile(_ROWS), _tile(_HALF), _tile(1)


@compiled
def pack(matrix: Any, packed: Any) -> None:
    """packed (panels, rows, columns of a panel) = matrix, with zeros in the columns beyond its last."""
    rows, columns = matrix.shape
    panels, _, width = packed.shape
    zero = packed.dtype.type(0)
    for p in range(panels):
        first = p * width
        if first + width <= columns:
            for k in range(rows):
                for j in range(width):
                    packed[p, k, j] = matrix[k, first + j]
        else:
            for k in range(rows):
                for j in range(columns - first):
                    packed[p, k, j] = matrix[k, first + j]
                for j in range(columns - first, width):
                    packed[p, k, j] = zero


@compiled
def packed_product(a: Any, packed: Any, out: Any) -> None:
    """out = a @ matrix, given the packed matrix; out has the columns of all panels.

    A row of out does not depend on the number of rows.
    """
    samples, depth = a.shape
    if depth == 0:  # as in the weight gradient of an empty batch
        out[:] = out.dtype.type(0)
        return
    block = max(_BLOCK_ELEMENTS // depth // _ROWS, 1) * _ROWS
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        for p in range(len(packed)):
            i = start
            while i + _ROWS <= stop:
                _whole_tile(a, i, packed, p, out)
                i += _ROWS
            if i + _HALF <= stop:
                _half_tile(a, i, packed, p, out)
                i += _HALF
            while i < stop:
                _row_tile(a, i, packed, p, out)
                i += 1
