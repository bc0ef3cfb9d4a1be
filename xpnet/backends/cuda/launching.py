"""How the operators of a GPU launch kernels, and fall back to the reference formulas."""

import functools
import inspect
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import numpy

from xpnet.backends.arrays import Array, DType
from xpnet.backends.cuda.compiling import watch
from xpnet.backends.cuda.cublas import HalfMatrix
from xpnet.backends.cuda.driver import FIRST_CAPABILITY, Driver
from xpnet.backends.cuda.driver import load as load_driver
from xpnet.backends.cuda.graphs import CapturedGraph, StepCells
from xpnet.backends.cuda.kernels import BLOCK, CELL_SIZE, REALS, Kernels
from xpnet.backends.reference import Backend
from xpnet.backends.reference.random import step_word
from xpnet.concurrency.interrupts import recoverable
from xpnet.errors import CaptureError

_log = logging.getLogger(__name__)

MOST_BLOCKS = 4096  # of a grid that strides over the elements: enough to occupy any device
VECTOR = 4  # neighboring elements that a thread loads at a time, where their addresses allow that
_FEW_ROWS = 1024  # are summed without parts, because adding these up would take longer
_ROWS_EACH, _MOST_PARTS = 4, 264  # the rows that a thread sums at least, and the most blocks of such a sum
_TICKETS = 1024  # column sums with more blocks side by side are not made in parts
_INT64 = (numpy.dtype("int64"),)
_OTHER_DTYPES = {  # of arguments that do not have the dtype of the others
    "labels": _INT64,
    "choice": (numpy.dtype("uint8"), numpy.dtype("int32")),
    "correct": _INT64,
    "loss_sum": (numpy.dtype("float64"),),
    "mask": (numpy.dtype("bool"),),
    "rows": _INT64,
}

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def by_kernel(formula: F, rowwise: bool = False, below: float = math.inf, each: int = 1) -> F:
    """An operator that launches the kernel of the formula's name; for arrays that kernels do not accept, the formula.

    The kernel gets the operator's arguments, and the sizes that `KernelLauncher.launch` adds.  rowwise: the kernel uses
    a block for each row, instead of a thread for each element.  below: as in `fused`.  each: as in `launch`.
    """
    name = formula.__name__

    @functools.wraps(formula)
    def operator(self: "KernelLauncher", out: Any = None, **given: Any) -> Any:
        if isinstance(out, HalfMatrix):  # in a captured step
            self.launch(name, next(iter(given.values())), each=each, out=None, **out.as_copy, **given)
            return out
        out = self.xp.empty_like(given["x"]) if out is None else out
        return self.launch_rows(name, out, **given) if rowwise else self.launch(name, out, each=each, **given)

    return fused(cast(F, operator), below)


def fused(operator: F, below: float = math.inf) -> F:
    """Call the decorated method if kernels accept its arrays, else the reference formula of its name.

    below: the arrays must have fewer elements than that.
    """
    reference = getattr(Backend, operator.__name__)
    parameters = list(inspect.signature(operator).parameters)[1:]

    @functools.wraps(operator)
    def choose(self: "KernelLauncher", *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        arrays = {name: a for name, a in given.items() if isinstance(a, self.xp.ndarray)}
        reals = [a for name, a in arrays.items() if name not in _OTHER_DTYPES]
        others = [(a, _OTHER_DTYPES[name]) for name, a in arrays.items() if name in _OTHER_DTYPES]
        accepted = self.accepts(*reals) and max(a.size for a in reals) < below
        accepted = accepted and all(a.dtype in dtypes and a.flags.c_contiguous for a, dtypes in others)
        return (operator if accepted else reference)(self, **given)

    return cast(F, choose)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class _ThreadState(threading.local):
    """What differs between the threads that use one backend."""

    precision: str | None = None  # of matrix products
    cells: StepCells | None = None  # of the step that is being captured
    lasting_allocator: Any = None  # for lasting memory, while other arrays come from the pool of a graph
    stream: Any = None  # of this thread's trainings
    uploads: Any = None  # that are in progress

    def __init__(self) -> None:
        self.side_streams: list[Any] = []
        #: By stream, for the kernels that count their finished blocks. They are 0 between kernels.
        self.tickets: dict[int, Array] = {}


class KernelLauncher(Backend):
    """A backend on CuPy. Whatever cannot be compiled or loaded falls back to the formulas, and is logged once."""

    index: int  # of the device

    def __init__(self, name: str, xp: Any) -> None:
        super().__init__(name, xp)
        self._driver: Driver | None = None  # until `driver` has been asked for
        self._compile_watch = watch(xp)  # before any kernel is compiled
        self.kernels = Kernels(xp, self.launch_kernel)
        self._instances: dict[Any, Kernels] = {}
        self.thread = _ThreadState()
        self._shared_stream: Any = None
        self.shared_stream_lock = threading.Lock()
        #: The live graphs, each of which has its own memory pool.
        self.graphs: weakref.WeakSet[CapturedGraph] = weakref.WeakSet()
        recoverable.add(self)

    def recover(self) -> None:
        """Reset what contexts set for this thread, in case an interrupt kept them from resetting it."""
        self.thread.precision = self.thread.cells = self.thread.uploads = None

    @property
    def compile_seconds(self) -> float:
        return self._compile_watch.seconds if self._compile_watch else 0.0

    def on_compile(self, listener: Callable[[], None]) -> AbstractContextManager[Any]:
        return self._compile_watch.on_compile(listener) if self._compile_watch else nullcontext()

    @functools.cached_property
    def kernels_unavailable(self) -> str | None:
        """Why kernels.cu cannot be used, found by running a small kernel; None if it can be used."""
        try:
            with self.device():
                ones = self.xp.ones(1, dtype=numpy.float32)
                self.launch("relu", ones, x=ones)
        except Exception as error:  # no compiler, no headers, a device too old
            return self.log_unavailable("kernels.cu does not compile", error)
        return None

    @functools.cached_property
    def properties(self) -> dict[str, Any]:
        """What CUDA says about the device."""
        properties: dict[str, Any] = self.xp.cuda.runtime.getDeviceProperties(self.index)
        return properties

    @property
    def capability(self) -> int:
        """The compute capability of the device, without the digit after the point."""
        return int(self.properties["major"])

    @functools.cached_property
    def driver(self) -> Driver | None:
        """The driver, if a small graph shows that it can begin a kernel before the previous one ends; else None."""
        if self.capability < FIRST_CAPABILITY:
            return None
        try:
            with self.device():
                self._driver = Driver(self._driver_library())
                self._check_overlap()
        except Exception as error:  # a driver that is too old
            _log.info("%s: the kernels of a graph do not overlap (%s)", self.name, error)
            self._driver = None
        return self._driver

    def _driver_library(self) -> Any:
        return load_driver()

    def _check_overlap(self) -> None:
        """Compute on two streams in a graph. RuntimeError if the numbers are wrong."""
        main, side = (self.xp.cuda.Stream(non_blocking=True) for _ in range(2))
        with main:
            arrays = [self.xp.full(2**16, i, dtype=numpy.float32) for i in range(5)]
            main.synchronize()
            a, b, c, d, e = arrays
            main.begin_capture()
            try:
                self.launch("rescale", b, x=a, scale=1.0, offset=1.0)
                side.wait_event(main.record())
                with side:
                    self.launch("rescale", c, x=b, scale=2.0, offset=1.0)
                self.launch("rescale", d, x=b, scale=1.0, offset=-1.0)
                self.launch("rescale", a, x=d, scale=1.0, offset=4.0)
                main.wait_event(side.record())
                self.launch("relu_grad", e, grad=c, y=a)
            finally:
                graph = main.end_capture()
            graph.launch()
            if bool((e != 3.0).any()):
                raise RuntimeError("a small graph computes wrong numbers")

    def launch_kernel(
        self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_bytes: int
    ) -> None:
        """Launch a kernel of CuPy; in a graph, by the driver, so that it may begin before the previous one ends."""
        if self._driver is not None:
            stream = self.xp.cuda.get_current_stream()
            if stream.ptr and stream.is_capturing():  # a default stream cannot capture
                self._driver.launch(kernel, grid, block, arguments, shared_bytes, stream.ptr)
                return
        kernel(grid, block, arguments, shared_mem=shared_bytes)

    def instances(self, kernel: Any, templates: str) -> Kernels:
        """The module of a kernel that is an instance of a template, `kernel.definition`. It is compiled once."""
        if kernel not in self._instances:
            made = Kernels(self.xp, self.launch_kernel, templates + kernel.definition)
            self._instances.setdefault(kernel, made)  # another thread may have been faster
        return self._instances[kernel]

    def step_word(self, key: Sequence[int]) -> Array:
        """The word from which the noise of a step is hashed, in device memory. key: as in `random_bits`."""
        return self.step_numbers(functools.partial(step_word, tuple(key[:-1])), key[-1])

    def log_unavailable(self, what: str, error: Exception) -> str:
        reason = f"{what} ({type(error).__name__}: {error})"
        _log.warning("%s: %s; CuPy's own functions are used instead, which are slower", self.name, reason)
        return reason

    def accepts(self, *arrays: Array) -> bool:
        """Whether kernels can process these arrays: contiguous, not empty, and all float32 or all float64."""
        dtype = arrays[0].dtype
        if dtype not in REALS or self.kernels_unavailable:
            return False
        return all(a.flags.c_contiguous and a.size and a.dtype == dtype for a in arrays)

    def launch(
        self, name: str, array: Array, /, *, blocks: int = 0, threads: int = BLOCK, each: int = 1, **given: Any
    ) -> Array:
        """Launch a kernel whose threads stride over the elements of `array`, and return the array.

        given: the arguments of the kernel by name. Unless they are given, `out` is the array, `n` its size, `columns`
        the size of its last axis, and `copy` null.  blocks: 0 means as many as are needed if a thread computes `each`
        of the n elements.
        """
        columns = array.shape[-1] if array.ndim else 1
        arguments = {"out": array, "n": array.size, "columns": columns, "copy": None, "bfloat16": 0, **given}
        blocks = blocks or min(-(-arguments["n"] // (threads * each)), MOST_BLOCKS)
        self.kernels.launch(name, array.dtype, (blocks,), (threads,), arguments)
        return array

    def launch_rows(self, name: str, array: Array, /, **given: Any) -> Array:
        """Launch a kernel with a block for each row of `array`, and return the array."""
        columns = array.shape[-1]
        rows, threads = array.size // columns, min(BLOCK, max(32, power_of_two(columns)))
        return self.launch(name, array, blocks=min(rows, 2**16), threads=threads, rows=rows, **given)

    def launch_column_sums(
        self, name: str, array: Array, /, *, per_column: int = 1, real: DType = None, **given: Any
    ) -> None:
        """Launch a kernel that sums `per_column` numbers of each column of `array` over the rows.

        real: the dtype of the sums, if the array has numbers of 16 bits, of which a thread then loads 8.  given: the
        arguments of the kernel by name, besides sizes and memory for parts of the sums.
        """
        rows, columns = array.shape
        arrays = [a for a in given.values() if isinstance(a, self.xp.ndarray)]
        width = self.width_of(columns, *arrays, most=VECTOR if real is None else 2 * VECTOR)
        if rows < _FEW_ROWS:
            width = 1
        threads = min(8 if width > 1 or rows < _FEW_ROWS else 32, power_of_two(-(-columns // width)))
        across = -(-columns // (width * threads))
        most = min(_MOST_PARTS // across, rows * threads // (_ROWS_EACH * BLOCK))
        parts = 1 if rows < _FEW_ROWS or across > _TICKETS else max(1, most)
        part_rows = -(-rows // parts)
        parts = -(-rows // part_rows)
        memory = None
        if parts > 1:
            memory = self.xp.empty((parts, across * threads * width * per_column), dtype=numpy.float64)
        arguments = {**given, "rows": rows, "columns": columns, "part_rows": part_rows, "width": width}
        arguments |= {"parts": memory, "tickets": None if memory is None else self._tickets()}
        self.kernels.launch(name, real or array.dtype, (across, parts), (threads, BLOCK // threads), arguments)

    def width_of(self, size: int, *arrays: Array, most: int = VECTOR) -> int:
        """How many neighboring elements a kernel may load at a time: `most` or 1.

        size: that of the last axis of all of these arrays, which are contiguous.
        """
        aligned = all(a.data.ptr % min(16, most * a.itemsize) == 0 for a in arrays)
        return most if aligned and size % most == 0 else 1

    def _tickets(self) -> Array:
        """Zeros, in which kernels of the current stream count their finished blocks."""
        return self.once_per_stream(self.thread.tickets, lambda stream: self.xp.zeros(_TICKETS, dtype=numpy.uint32))

    def step_numbers(self, of_step: Callable[[int], Sequence[float]], step: int) -> Array:
        """The numbers of_step(step) in device memory; while a step is captured, a cell that each replay fills."""
        if self.thread.cells is not None:
            return self.thread.cells.cell(of_step, step)
        given = (*of_step(step), *[0.0] * CELL_SIZE)[:CELL_SIZE]
        return self.launch("set_numbers", self.xp.empty(CELL_SIZE, dtype=numpy.float64), given=given)

    @contextmanager
    def step_cells(self, cells: StepCells) -> Iterator[None]:
        """A context in which this thread captures a step, whose `step_numbers` are in these cells."""
        self.thread.cells = cells
        try:
            yield
        finally:
            self.thread.cells = None

    def refuse_capture(self, reason: str, *values: object) -> None:
        if self.thread.cells is not None:
            raise CaptureError(reason % values)

    @contextmanager
    def temporary_memory(self, pool: Any) -> Iterator[None]:
        """A context in which this thread's arrays come from this pool, except those made in `lasting_memory`."""
        cuda, before = self.xp.cuda, self.thread.lasting_allocator
        self.thread.lasting_allocator = before or cuda.get_allocator()
        try:
            with cuda.using_allocator(pool.malloc):
                yield
        finally:
            self.thread.lasting_allocator = before

    def once_per_stream(self, made: dict[int, T], make: Callable[[int], T]) -> T:
        """What make(stream) returns for the current stream, in lasting memory. It is kept in `made`."""
        stream = self.xp.cuda.get_current_stream().ptr
        if stream not in made:
            with self.lasting_memory():
                made[stream] = make(stream)
        return made[stream]

    def lasting_memory(self) -> AbstractContextManager[Any]:
        allocator = self.thread.lasting_allocator
        if allocator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self.xp.cuda.using_allocator(allocator)
        return context
