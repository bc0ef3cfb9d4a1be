"""CUDA graphs: a training step captured once and replayed with one launch, instead of dozens.

The arguments of a captured kernel never change. So what changes from step to step is read from device memory: the cells
of the step (`StepCells`). Cells are filled from a table with a row of numbers for each step (learning rates, words that
noise is hashed from), and counters hold the row, the samples and the column of the current step. The first kernel of a
step fills the cells and gathers the samples; the last one stores the sums of the step and advances the counters.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.kernels import CELL_SIZE
from xpnet.errors import CaptureError

_CELLS = 64  # the most cells of a step
_TABLE_STEPS = 256  # rows of the table


class GraphCapture:
    """Makes the cells and the graphs of one training run."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def cells(self, samples: int, rows: int, batches: int, batch_sums: Array) -> "StepCells":
        return StepCells(self.backend, samples, rows, batches, batch_sums)

    def graph(self) -> "CapturedGraph":
        return CapturedGraph(self.backend)


class CapturedGraph:
    """A CUDA graph and the memory that it uses.

    A graph uses the addresses that it was captured with, so their memory must not be given to other arrays. What the
    captured work allocates and frees comes from the graph's own memory pool, from which only its warm-up run and its
    capture allocate. Every other array that the work uses is passed to `hold`, and lives as long as the graph. Arrays
    that are kept from step to step are allocated outside of the pool (`Device.lasting_memory`).
    """

    def __init__(self, backend: Any) -> None:
        self._backend, self._xp = backend, backend.xp
        self.pool = self._xp.cuda.MemoryPool()
        self._graph: Any = None
        self._held: list[Any] = []
        backend.graphs.add(self)

    def memory_pool(self) -> AbstractContextManager[Any]:
        """A context in which arrays come from this graph's pool, for the warm-up run."""
        context: AbstractContextManager[Any] = self._backend.temporary_memory(self.pool)
        return context

    def capture(self, work: Callable[[], None]) -> None:
        """Capture the device calls of `work`, without executing them. Raises for a call that cannot be captured."""
        stream = self._xp.cuda.get_current_stream()
        with self.memory_pool():
            stream.begin_capture()
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):  # the capture may be invalid already
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
        self._graph.upload(stream)

    def hold(self, arrays: Iterable[Array]) -> None:
        """Keep these arrays alive as long as the graph."""
        self._held.extend(arrays)

    def replay(self) -> None:
        self._graph.launch()


class StepCells:
    """The device memory through which captured steps of one kind get what changes from step to step.

    order: (samples,), the order of all samples in this epoch.  indices: (rows,), the samples of the current step.
    staged_sums: (3, batches), where the captured step writes its sums; its last kernel copies them to
    batch_sums (3, capacity), see `EpochMetrics`.

    gathers: (array, out) pairs: the first kernel stores in each `out` the rows of the array that `indices` names.
    ends_with_update: whether the update of the weights is the last kernel; otherwise end_step is.
    """

    def __init__(self, backend: Any, samples: int, rows: int, batches: int, batch_sums: Array) -> None:
        self._backend = backend
        self._rows, self._batches, self._batch_sums = rows, batches, batch_sums
        self.order = backend.empty((samples,), "int64")
        self.indices = backend.empty((rows,), "int64")
        self.staged_sums = backend.zeros((3, batches), "float64")
        self._table = backend.zeros((_TABLE_STEPS, _CELLS * CELL_SIZE), "float64")
        self._cells = backend.zeros((_CELLS, CELL_SIZE), "float64")
        self._counters = backend.zeros((3,), "int64")  # row of the table, first sample, column of batch_sums
        self.gathers: list[tuple[Array, Array]] = []
        self.ends_with_update = False
        addresses = [a.data.ptr for a in (self.staged_sums, batch_sums, self._counters)]
        #: The struct StepEnd of kernels.cu.
        self.end = backend.asarray(numpy.array([*addresses, batches, batch_sums.shape[1], rows]))
        self._functions: list[Callable[[int], Sequence[float]]] = []  # of the step: one per cell
        self._next_cell = 0
        self._first_step, self._host_table = 0, numpy.zeros((0, 0))  # the table, on the host
        self._host_counters = (0, 0, 0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for the work of a step, between its first and its last kernel."""
        size, self._next_cell = self._cells.size, 0
        self._backend.launch(
            "begin_step", self.indices, n=max(size, self._rows, *[out.size for _, out in self.gathers]),
            table=self._table, width=size, cells=self._cells, order=self.order, rows=self._rows, indices=self.indices,
            counters=self._counters, gathers=_gathers(self.gathers),
        )  # fmt: skip
        with self._backend.step_cells(self):
            yield
        if not self.ends_with_update:
            self._backend.launch("end_step", self._counters, blocks=1, end=self.end)

    def cell(self, of_step: Callable[[int], Sequence[float]], step: int) -> Array:
        """The next cell of the step, which will hold the numbers of_step(step) in each step."""
        number, self._next_cell = self._next_cell, self._next_cell + 1
        if number == _CELLS:
            raise CaptureError(f"more than {_CELLS} operators of a step need numbers that change from step to step")
        if number == len(self._functions):
            self._functions.append(of_step)
            self._host_table = self._host_table[:0]  # the table has no column for it yet
        return self._cells[number]

    def set_position(self, step: int, sample: int, column: int) -> None:
        """Prepare for this step, which trains on the samples from order[sample] and stores its sums in this column."""
        row = step - self._first_step
        if not 0 <= row < len(self._host_table) or self._outdated(step, row):
            self._fill_table(step)
            row = 0
        if self._host_counters != (row, sample, column):
            self._counters[...] = self._backend.asarray(numpy.array([row, sample, column]))
        self._host_counters = (row + 1, sample + self._rows, column + self._batches)  # after the step

    def _outdated(self, step: int, row: int) -> bool:
        """Whether the numbers of this step have changed, as when a callback changes the learning rate."""
        numbers = self._functions[-1](step) if self._functions else ()  # the last function is the optimizer's
        column = (len(self._functions) - 1) * CELL_SIZE
        return any(a != b for a, b in zip(numbers, self._host_table[row, column:], strict=False))

    def _fill_table(self, step: int) -> None:
        """Fill the table with the numbers of the steps from this one on."""
        table = numpy.zeros((_TABLE_STEPS, self._cells.size))
        for cell, of_step in enumerate(self._functions):
            for row in range(_TABLE_STEPS):
                numbers = of_step(step + row)
                table[row, cell * CELL_SIZE : cell * CELL_SIZE + len(numbers)] = numbers
        self._table[...] = self._backend.asarray(table)
        self._first_step, self._host_table = step, table


MOST_GATHERS = 4


def gatherable(array: Array, out: Array) -> bool:
    """Whether the first kernel of a step can gather rows of this array in `out`."""
    contiguous = array.flags.c_contiguous and out.flags.c_contiguous and out.size > 0
    return bool(contiguous and _unit_bytes(array, out) is not None)


def _unit_bytes(array: Array, out: Array) -> int | None:
    """The most bytes that a thread can copy at a time, 0 for bytes that become floats, None if it cannot."""
    if array.dtype != out.dtype:
        return 0 if (array.dtype, out.dtype) == (numpy.dtype("uint8"), numpy.dtype("float32")) else None
    row = out.nbytes // len(out)
    fits = (size for size in (16, 8, 4, 1) if (row | array.data.ptr | out.data.ptr) % size == 0)
    return next(fits)


def _gathers(pairs: Sequence[tuple[Array, Array]]) -> list[int]:
    """The fields of a struct Gathers."""
    rows = len(pairs[0][1]) if pairs else 0
    sizes = [_unit_bytes(*pair) or 0 for pair in pairs]
    units = [
        out.nbytes // rows // size if size else out.size // rows for (_, out), size in zip(pairs, sizes, strict=True)
    ]
    columns = [[a.data.ptr for a, _ in pairs], [out.data.ptr for _, out in pairs], units, sizes]
    return [rows, *[n for column in columns for n in (*column, *[0] * (MOST_GATHERS - len(column)))]]
