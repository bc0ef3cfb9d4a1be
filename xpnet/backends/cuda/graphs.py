"""CUDA graphs: a training step captured once and replayed with one launch, instead of dozens.

The arguments of a captured kernel never change. So what changes from step to step is read from device memory: the cells
of the step (`StepCells`), and the samples. Cells are filled from a table with a row of numbers for each step (learning
rates, words that noise is hashed from), and counters hold the row, the first sample and the column of the current step.
The last kernel of a step stores its sums, advances the counters, fills the cells for the next step and gathers its
samples, because a kernel of its own for that would take longer. Where the steps do not follow one another, `begin_step`
does this before the graph is launched.
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
MOST_GATHERS = 4  # of a step: arrays of samples
STEP_THREADS, _MOST_GATHERING_BLOCKS = 256, 1024  # of the kernels that gather samples
NO_STEP = [0] * (15 + 4 * MOST_GATHERS)  # the fields of a struct Step for a kernel that does not end a captured step


class GraphCapture:
    """Makes the cells and the graphs of one training run, and the graphs of inference."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def cells(self, samples: int, rows: int, batches: int, batch_sums: Array) -> "StepCells":
        return StepCells(self.backend, samples, rows, batches, batch_sums)

    def graph(self) -> "CapturedGraph":
        return CapturedGraph(self.backend)

    def stream(self) -> AbstractContextManager[None]:
        """The stream for graphs that any thread may replay, which have to be captured in it too."""
        context: AbstractContextManager[None] = self.backend.shared_stream()
        return context


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
        self.hold(self._backend.thread.tickets.values())  # the graph may outlive the thread
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

    gathers: (array, out) pairs: before each step, `out` gets the rows of the array that `indices` names.
    ends_with_update: whether the update of the weights is the last kernel; otherwise end_step is.
    """

    def __init__(self, backend: Any, samples: int, rows: int, batches: int, batch_sums: Array) -> None:
        self._backend = backend
        self._rows, self._batches, self._batch_sums = rows, batches, batch_sums
        self.order = backend.empty((samples,), "int64")
        self.indices = backend.empty((rows,), "int64")
        self.staged_sums = backend.zeros((3, batches), "float64")
        self._table = backend.zeros((_TABLE_STEPS + 1, _CELLS * CELL_SIZE), "float64")  # the last row has no numbers
        self._cells = backend.zeros((_CELLS, CELL_SIZE), "float64")
        #: Row of the table, first sample, column of batch_sums; how many blocks of the last kernel have begun.
        self._counters = backend.zeros((4,), "int64")
        self.gathers: list[tuple[Array, Array]] = []
        self.ends_with_update = False
        self._functions: list[Callable[[int], Sequence[float]]] = []  # of the step: one per cell
        self._next_cell = 0
        self._first_step, self._host_table = 0, numpy.zeros((0, 0))  # the table, on the host
        self._host_counters = (0, 0, 0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for the work of a step, whose last kernel prepares the next one."""
        self._next_cell = 0
        with self._backend.step_cells(self):
            yield
        if not self.ends_with_update:
            self._launch("end_step")

    def begin(self) -> None:
        """Fill the cells with the numbers of the step at the counters, and gather its samples."""
        self._launch("begin_step")

    def _launch(self, kernel: str) -> None:
        grid = {"blocks": self.gathering_blocks, "threads": STEP_THREADS}
        self._backend.launch(kernel, self._counters, **grid, step=self.fields())

    @property
    def gathering_blocks(self) -> int:
        """How many blocks gather the samples of a step."""
        return min(-(-self._rows * self._group // STEP_THREADS), _MOST_GATHERING_BLOCKS)

    @property
    def _group(self) -> int:
        """How many threads gather the rows of one sample."""
        units = max([1, *[_units(*pair)[0] for pair in self.gathers]])
        return min(STEP_THREADS, 1 << (units - 1).bit_length())

    def fields(self) -> list[int]:
        """The fields of the struct Step of kernels.cu."""
        columns = [(a.data.ptr, out.data.ptr, *_units(a, out)) for a, out in self.gathers]
        columns += [(0, 0, 0, 0)] * (MOST_GATHERS - len(columns))
        table, cells, order, indices, staged, sums, counters = (
            a.data.ptr
            for a in (
                self._table, self._cells, self.order, self.indices, self.staged_sums, self._batch_sums, self._counters
            )
        )  # fmt: skip
        return [
            table, cells, self._table.shape[1], len(self._functions) * CELL_SIZE, order, len(self.order), self._rows,
            indices, staged, sums, self._batches, self._batch_sums.shape[1], counters, self._group,
            len(self.gathers[0][1]) if self.gathers else 0, *[n for field in zip(*columns, strict=True) for n in field],
        ]  # fmt: skip

    def cell(self, of_step: Callable[[int], Sequence[float]], step: int) -> Array:
        """The next cell of the step, which will hold the numbers of_step(step) in each step."""
        number, self._next_cell = self._next_cell, self._next_cell + 1
        if number == _CELLS:
            raise CaptureError(f"more than {_CELLS} operators of a step need numbers that change from step to step")
        if number == len(self._functions):
            self._functions.append(of_step)
            self._host_table = self._host_table[:0]  # the table has no column for it yet
        return self._cells[number]

    def set_position(
        self, step: int, sample: int, column: int, new_samples: bool = False, new_numbers: bool = True
    ) -> None:
        """Prepare for this step, which trains on the samples from order[sample] and stores its sums in this column.

        new_samples: whether the order or the arrays have changed since the last step.  new_numbers: whether the
        numbers of this step may differ from those in the table, for example because a callback has changed the learning
        rate.
        """
        row = step - self._first_step
        prepared = not new_samples
        if not 0 <= row < len(self._host_table) or (new_numbers and self._outdated(step, row)):
            self._fill_table(step)
            row, prepared = 0, False
        if self._host_counters != (row, sample, column):
            self._counters[...] = self._backend.asarray(numpy.array([row, sample, column, 0]))
            prepared = False
        if not prepared:
            self.begin()
        self._host_counters = (row + 1, sample + self._rows, column + self._batches)  # after the step

    def _outdated(self, step: int, row: int) -> bool:
        """Whether the numbers of this step differ from those in the table."""
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
        self._table[:-1] = self._backend.asarray(table)
        self._first_step, self._host_table = step, table


def gatherable(array: Array, out: Array) -> bool:
    """Whether the kernels of `StepCells` can gather rows of this array in `out`."""
    converted = (array.dtype, out.dtype) == (numpy.dtype("uint8"), numpy.dtype("float32"))
    contiguous = array.flags.c_contiguous and out.flags.c_contiguous and out.size > 0
    return bool(contiguous and (array.dtype == out.dtype or converted))


def _units(array: Array, out: Array) -> tuple[int, int]:
    """How many units a row has, and their bytes: the most that a thread can copy; 0 for bytes that become floats."""
    if array.dtype != out.dtype:
        return out.size // len(out), 0
    row = out.nbytes // len(out)
    size = next(size for size in (16, 8, 4, 1) if (row | array.data.ptr | out.data.ptr) % size == 0)
    return row // size, size
