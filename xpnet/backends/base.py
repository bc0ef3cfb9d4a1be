"""Device: the array module of a backend, its transfers, memory, streams, captures, and how it splits work."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array, DType
from xpnet.errors import ArgumentError, shown


class Memory(NamedTuple):
    """Memory in bytes.

    used: by arrays of this process.  held: used, and kept for future arrays.  free, total: of the whole device. On the
    CPU, used and held are those of the whole process, and free and total are None if the system does not report them.
    """

    used: int
    held: int
    free: int | None
    total: int | None


class Uploads:
    """Copies the next part of a dataset to the device while a model trains on the current part.

    On the CPU there is nothing to copy.
    """

    def prefetch(self) -> AbstractContextManager[Any]:
        """A context in which arrays are uploaded while training continues. Training may use them after it."""
        return nullcontext()

    def release(self, *arrays: Array) -> None:
        """Free these arrays as soon as the device has finished the training requested so far on them."""


class Device:
    """A backend without its operators, which `Backend` adds."""

    #: An elementwise update of a long vector is done in pieces of this many elements; None means in one piece.
    chunk_elements: int | None = None
    #: Whether threads may use different streams of the device.
    has_streams = False
    #: Whether a captured step is a list of calls, whose numbers may change from step to step; a CUDA graph is not.
    replays_calls = False

    def __init__(self, name: str, xp: ModuleType | Any) -> None:
        self.name = name
        self.xp = xp
        self._workspace_bytes = 256 * 2**20
        self._rotations: dict[tuple[int, int, str], tuple[Array, Array]] = {}

    def __repr__(self) -> str:
        return f"<xpnet backend {self.name!r}>"

    def __deepcopy__(self, memo: Any) -> "Device":
        return self

    # Transfers -------------------------------------------------------------------------------------------------------

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        """`a` (an array of the host or a device, a list, a number) as an array of this device, copied if necessary."""
        return self.xp.asarray(a, dtype=dtype)

    def to_numpy(self, a: Any) -> numpy.ndarray[Any, Any]:
        """`a` as a NumPy array on the host. Waits for the device."""
        return numpy.asarray(a)

    def synchronize(self) -> None:
        """Wait until the device has done all requested work. Returns at once on the CPU."""

    def device(self) -> AbstractContextManager[Any]:
        """A context in which `xp` allocates and computes on this backend's device."""
        return nullcontext()

    def stream(self) -> AbstractContextManager[Any]:
        """A context for training. On a GPU it uses its own stream, ordered with the caller's stream."""
        return nullcontext()

    def current_stream(self) -> Any:
        """The device stream of this thread; None on the CPU."""
        return None

    def wait_for(self, stream: Any) -> None:
        """Make the later work of this thread wait for all work in `stream` so far.

        stream: a result of `current_stream`; None is the default stream.
        """

    def in_turn(self, stream: Any) -> AbstractContextManager[Any]:
        """A context: its work comes after all work in `stream` so far, and before all later work in `stream`."""
        return nullcontext()

    def uploads(self) -> Uploads:
        """An object that uploads the parts of a dataset which is larger than the device's memory."""
        return Uploads()

    # Memory ----------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: DType) -> Array:
        with self.device():
            return self.xp.empty(tuple(shape), dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: DType) -> Array:
        with self.device():
            return self.xp.zeros(tuple(shape), dtype=dtype)

    def memory(self) -> Memory:
        """How much memory is used, held and free."""
        return Memory(0, 0, None, None)

    def can_hold(self, count: int) -> bool:
        """Whether the device's memory, used and free, is at least `count` bytes."""
        total = self.memory().total if count > 2**30 else None  # a query takes time
        return count <= (2**62 if total is None else total)

    def free_memory(self) -> None:
        """Return unused memory to the device."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that the memory of the device, not of the host, is exhausted."""
        return False

    def lasting_memory(self) -> AbstractContextManager[Any]:
        """A context for allocating arrays that outlive a step.

        While a step is captured, all other arrays come from the memory pool of its CUDA graph.
        """
        return nullcontext()

    # Captures --------------------------------------------------------------------------------------------------------

    def graph_capture(self) -> Any:
        """The object that captures training steps as CUDA graphs (see `cuda/graphs.py`), or None if there is none."""
        return None

    def refuse_capture(self, reason: str, *values: object) -> None:
        """Raise CaptureError(reason % values) if a step is being captured. Does nothing otherwise."""

    def step_number(self, of_step: Callable[[int], float], step: int) -> Any:
        """of_step(step): a number that changes from step to step. While a step is captured, a `StepNumber`."""
        return of_step(step)

    # Constants -------------------------------------------------------------------------------------------------------

    def rotations(self, steps: int, pairs: int, dtype: DType) -> tuple[Array, Array]:
        """(cosines, sines) of the angles t · 10000^(-i / pairs), (steps, pairs), for t from 0.

        They are computed on the host, since float32 would lose digits of large angles, and kept as long as the backend,
        since captured graphs use them.
        """
        length = 1 << (steps - 1).bit_length()  # so that tables of all lengths take twice the memory of the longest
        key = length, pairs, numpy.dtype(dtype).str
        kept = self._rotations.get(key)
        if kept is None:
            angles = numpy.arange(length)[:, None] * 10000.0 ** (numpy.arange(pairs) / -pairs)
            with self.device(), self.lasting_memory():
                kept = self.asarray(numpy.cos(angles), dtype=dtype), self.asarray(numpy.sin(angles), dtype=dtype)
                self.synchronize()  # other threads may use them in other streams
            self._rotations[key] = kept
        return kept[0][:steps], kept[1][:steps]

    # Precision -------------------------------------------------------------------------------------------------------

    def precision_unavailable(self, precision: str) -> str | None:
        """Why matrix products cannot use the precision "tf32", "float16" or "bfloat16" here; None if they can."""
        if precision == "float32":
            return None
        return (
            "it needs the tensor cores of a GPU; the CPU would have to emulate it, more slowly than float32 and less "
            "exactly"
        )

    def matmul_precision(self, precision: str) -> AbstractContextManager[Any]:
        """A context in which `cast` and `matmul` use this precision."""
        return nullcontext()

    def lowest(self, dtype: DType) -> float:
        """The lowest finite number of a floating-point dtype."""
        return float(numpy.finfo(dtype).min)

    # Compiling and versions ------------------------------------------------------------------------------------------

    @property
    def compile_seconds(self) -> float:
        """How many seconds this process has spent compiling kernels."""
        return 0.0

    def on_compile(self, listener: Callable[[], None]) -> AbstractContextManager[Any]:
        """A context in which `listener` is called before each compilation of a kernel."""
        return nullcontext()

    def describe(self) -> list[tuple[str, str]]:
        """(label, text) pairs that describe the device and its libraries."""
        return [("device", self.name)]

    def environment(self) -> dict[str, str]:
        """What must be the same for a run to repeat bit for bit."""
        return {"NumPy": numpy.__version__, **{name: text for name, text in self.describe() if name != "memory"}}

    # Splitting work --------------------------------------------------------------------------------------------------

    @property
    def workspace_bytes(self) -> int:
        """The most bytes of a convolution's patches at a time, for any batch size; users may set it.

        The patches of one image are always allowed.
        """
        return self._workspace_bytes

    @workspace_bytes.setter
    def workspace_bytes(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float | numpy.number) or not 1 <= value < math.inf:
            raise ArgumentError(f"workspace_bytes must be a number of bytes, at least 1, not {shown(value)}.")
        self._workspace_bytes = int(value)

    @property
    def workers(self) -> int:
        """How many parts of a batch are processed in parallel, at most."""
        return 1

    def parallel_region(self, split: bool = True) -> AbstractContextManager[Any]:
        """A context for the passes of one model. On the CPU, operators use compiled loops inside it if Numba is there.

        split: whether workers process parts of the batch in parallel, while the BLAS uses one thread.
        """
        return nullcontext()

    def in_chunks(self, count: int, bytes_each: int, work: Callable[[slice, int], None]) -> None:
        """Call work(rows, worker) for consecutive slices of range(count), which workers process in parallel.

        A slice has as many rows of `bytes_each` as fit into `workspace_bytes`, and on the CPU into a core's cache.
        """
        rows = max(1, self.workspace_bytes // max(1, bytes_each))
        for start in range(0, count, rows):
            work(slice(start, min(start + rows, count)), 0)
