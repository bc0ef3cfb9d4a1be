"""A training step recorded as a CUDA graph: one launch instead of dozens.

What changes from step to step cannot be an argument of a recorded kernel. It lies in device memory instead: a table
with a row of numbers a step (learning rates, words that noise is hashed from), and counters that say how far the tape
has come. The first kernel of a step reads its row and which samples it takes, the last one files its figures and moves
the counters on. https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.gpu_kernels import NUMBERS
from xpnet.errors import RecordingError

_PLACES = 64  # of numbers, in one step
_ROWS = 256  # steps that are looked ahead

_DOUBLE = numpy.dtype("float64")


class Recorder:
    """The captures of one run."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def tape(self, samples: int, rows: int, columns: int, record: Array) -> "Tape":
        return Tape(self.backend, samples, rows, columns, record)

    def graph(self) -> "CapturedGraph":
        """A graph of which nothing is captured yet."""
        return CapturedGraph(self.backend)


class CapturedGraph:
    """A CUDA graph and the memory that it works in.

    A graph keeps the addresses that it was captured with, so nobody else may ever get the memory behind them. What the
    work allocates and frees on its way comes from a pool of this graph's own, from which only its rehearsal and its
    capture allocate. Every other array that the work touches is given to `hold`, and lives as long as the graph.
    Arrays that are kept from step to step are allocated outside the pool (`lasting_memory`).
    """

    def __init__(self, backend: Any) -> None:
        self._backend, self._xp = backend, backend.xp
        self._pool = self._xp.cuda.MemoryPool()
        self._graph: Any = None
        self._held: list[Any] = []
        backend.graphs.add(self)

    def memory(self) -> AbstractContextManager[Any]:
        """A context in which arrays come from this graph's pool. It is left before anything else is done."""
        context: AbstractContextManager[Any] = self._backend.temporary_memory(self._pool)
        return context

    def capture(self, work: Callable[[], None]) -> None:
        """Capture what `work` asks of the device, which does none of it yet. Raises whatever cannot be captured."""
        stream = self._xp.cuda.get_current_stream()
        with self.memory():
            stream.begin_capture()
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):  # of a capture that is invalid already
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
        self._graph.upload(stream)

    def hold(self, arrays: Iterable[Array]) -> None:
        """Keep these arrays alive as long as the graph."""
        self._held.extend(arrays)

    def launch(self) -> None:
        self._graph.launch()

    @property
    def used_bytes(self) -> int:
        """How much of the pool is in use by arrays."""
        return int(self._pool.used_bytes())

    @property
    def total_bytes(self) -> int:
        """How much memory the pool holds: nobody else can have it, whether in use or not."""
        return int(self._pool.total_bytes())


class Tape:
    """What the steps of one kind read and write, beside the model.

    samples: how many there are in all.  rows: how many of them a step takes.  columns: in how many batches.
    record: (3, steps), where the figures of all steps go.
    """

    def __init__(self, backend: Any, samples: int, rows: int, columns: int, record: Array) -> None:
        self._backend, self._xp = backend, backend.xp
        self._rows, self._columns, self.record = rows, columns, record
        self.order = backend.empty((samples,), "int64")
        self.chosen = backend.empty((rows,), "int64")
        self.staged = backend.zeros((3, columns), "float64")
        self._table = backend.zeros((_ROWS, _PLACES * NUMBERS), "float64")
        self._now = backend.zeros((_PLACES, NUMBERS), "float64")
        self._counters = backend.zeros((3,), "int64")
        self._of_step: list[Callable[[int], Sequence[float]]] = []
        self._asked = 0
        self._first_step, self._told = 0, numpy.zeros((0, 0))  # the rows of the table, as they are on the host
        self._at = (0, 0, 0)  # the counters, as they are on the device

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, between its first kernel and its last."""
        launch, self._asked = self._backend._launch, 0
        width = self._now.size
        launch(
            "begin_step", _DOUBLE, max(width, self._rows),
            self._table, width, self._now, self.order, self._rows, self.chosen, self._counters,
        )  # fmt: skip
        with self._backend.recording(self):
            yield
        self._backend._kernels.launch(
            "end_step", _DOUBLE, (1,), (256,),
            self.staged, self._columns, self.record, self.record.shape[1], self._rows, self._counters,
        )  # fmt: skip

    def place(self, of_step: Callable[[int], Sequence[float]], step: int) -> Array:
        """Where the numbers of each step will be, that this function of the step gives."""
        number, self._asked = self._asked, self._asked + 1
        if number == _PLACES:
            raise RecordingError(f"more than {_PLACES} places of a step need numbers of their own")
        if number == len(self._of_step):
            self._of_step.append(of_step)
            self._told = self._told[:0]  # the table has nothing for it yet
        return self._now[number]

    def move_to(self, step: int, sample: int, column: int) -> None:
        """Be ready for this step, which takes samples from there on and files its figures there."""
        row = step - self._first_step
        if not 0 <= row < len(self._told) or self._changed(step, row):
            self._look_ahead(step)
            row = 0
        if self._at != (row, sample, column):
            self._counters[...] = self._backend.asarray(numpy.array([row, sample, column]))
        # Where they will be after it.
        self._at = (row + 1, sample + self._rows, column + self._columns)

    def _changed(self, step: int, row: int) -> bool:
        """Whether this step's numbers are others by now: somebody has changed the learning rate."""
        last = self._of_step[-1](step) if self._of_step else ()
        place = len(self._of_step) - 1
        return any(a != b for a, b in zip(last, self._told[row, place * NUMBERS :], strict=False))

    def _look_ahead(self, step: int) -> None:
        told = numpy.zeros((_ROWS, self._now.size))
        for place, of_step in enumerate(self._of_step):
            for row in range(_ROWS):
                numbers = of_step(step + row)
                told[row, place * NUMBERS : place * NUMBERS + len(numbers)] = numbers
        self._table[...] = self._backend.asarray(told)
        self._first_step, self._told = step, told
