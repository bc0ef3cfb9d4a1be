"""An emulation of CuPy on the host: its kernels run, its streams capture, and its cuBLAS multiplies.

The kernels are compiled by g++ with a small shim (cuda_shim/shim.h). A capture refuses what a real one refuses: CuPy's
own matrix products, copies from and to the host, memory of the default pool, the default stream. It executes nothing,
and a replay uses addresses only.

Arrays are in memory pools like those of CuPy: a freed block is reused by the next allocation that fits, and contains a
poison pattern until then. Two faults that real hardware does not report are errors here (see `Pool` and `Graph`): an
allocation gets memory that a live graph uses, or a graph is replayed after memory that it uses was freed.

The emulation shows wrong numbers, forbidden calls and memory faults. It does not show speed or real asynchrony.
"""

import bisect
import collections
import contextlib
import ctypes
import functools
import hashlib
import heapq
import operator
import re
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import numpy as np
from fake_cupy import CUDARuntimeError, FakeCupy, OutOfMemoryError, Stream
from strict import StrictArray, StrictBackend, StrictError

from xpnet.backends.cuda import kernels
from xpnet.backends.cuda.backend import GPUBackend
from xpnet.backends.cuda.choosing import Choices

COMPILER = shutil.which("g++")
SHIM = Path(__file__).with_name("cuda_shim") / "shim.h"


class EmulatedGPU(GPUBackend):
    """The GPU's backend on the emulation `cupy`."""

    def __init__(self) -> None:
        self.cupy = EmulatedCupy()
        super(GPUBackend, self).__init__("emulated", self.cupy)
        self.index = 0
        self.choices = Choices("emulated", None)

    def __reduce__(self) -> Any:
        return EmulatedGPU._same, (id(self),)

    _alive: ClassVar["weakref.WeakValueDictionary[int, EmulatedGPU]"] = weakref.WeakValueDictionary()

    def __new__(cls) -> "EmulatedGPU":
        backend = super().__new__(cls)
        cls._alive[id(backend)] = backend
        return backend

    @staticmethod
    def _same(key: int) -> "EmulatedGPU":
        return EmulatedGPU._alive[key]

    def _cublas_library(self) -> Any:
        return self.cupy.cublas

    def _cublaslt_library(self) -> Any:
        return self.cupy.cublaslt

    def _driver_library(self) -> Any:
        return self.cupy.driver

    def fastest(self, ways: Mapping[str, Callable[[], None]]) -> str | None:
        """The first way, since an emulation cannot tell."""
        return next(iter(ways), None)

    def close(self) -> None:
        """Free the workspaces of cuBLAS and all unused memory, since caches may keep the emulation alive."""
        self._handles.clear()
        self._products.clear()
        for pool in list(self.cupy.pools):
            pool.free_all_blocks()


class EmulatedCupy(FakeCupy):
    """launches: the names of the launched kernels, and "graph" for each replay."""

    def __init__(self) -> None:
        super().__init__(devices=1)
        self.launches: list[str] = []
        self.device = self._backends[0] = CapturingBackend(self)
        self.cublas, self.cublaslt = EmulatedCublas(self), EmulatedCublasLt(self)
        self.driver = EmulatedDriver(self)
        self.RawModule = functools.partial(EmulatedModule, self)
        #: The memory faults found so far. A test that leaves any here fails (see conftest.py).
        self.faults: list[str] = []
        self.captures: list[Graph] = []  # in progress
        #: The bytes that all pools together may use; None for any number.
        self.memory_limit: int | None = None
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self._pools = [Pool(self), Pool(self)]
        self.get_default_memory_pool = lambda: self._pools[0]
        self.get_default_pinned_memory_pool = lambda: self._pools[1]
        stream: Any = functools.partial(CapturingStream, self)
        stream.null = self.cuda.Stream.null
        vars(self.cuda).update(
            Stream=stream,
            MemoryPool=functools.partial(Pool, self),
            using_allocator=self._using_allocator,
            get_allocator=lambda: self.thread.allocator or self._pools[0].malloc,
            alloc_pinned_memory=lambda size: bytearray(size),
            Event=Event,
            get_elapsed_time=lambda start, stop: stop.seconds - start.seconds,
        )
        self.cuda.runtime.getDeviceProperties = lambda i: {
            "name": b"Emulated", "major": 9, "minor": 0, "sharedMemPerBlockOptin": 227 * 2**10
        }  # fmt: skip

    @contextlib.contextmanager
    def _using_allocator(self, allocator: Callable[[int], Any]) -> Iterator[None]:
        before, self.thread.allocator = self.thread.allocator, allocator
        try:
            yield
        finally:
            self.thread.allocator = before

    @property
    def capturing(self) -> "Graph | None":
        """The graph that the current stream captures."""
        graph: Graph | None = self.thread.stream.graph
        return graph

    def fault(self, what: str) -> NoReturn:
        """Record a memory fault, and raise it."""
        self.faults.append(what)
        raise StrictError(what)

    def refuse(self, what: str) -> None:
        """Raise the error of CUDA if the current stream captures."""
        if self.capturing is not None:
            self.capturing.valid = False
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what}")


class Slab:
    """Memory as from cudaMalloc, freed when nothing refers to it any more."""

    def __init__(self, size: int) -> None:
        self.bytes = np.empty(size + _UNIT, dtype=np.uint8)
        self.start = -(-self.bytes.ctypes.data // _UNIT) * _UNIT
        self.size = size
        self.dropped = False
        self.blocks: weakref.WeakSet[Block] = weakref.WeakSet()


class Block:
    """The memory of one array, which returns to its pool with the last view of the array."""

    def __init__(self, pool: "Pool", slab: Slab, address: int, size: int, stream: int) -> None:
        self.pool, self.slab, self.address, self.size, self.stream = pool, slab, address, size, stream
        #: The graphs that use this memory.
        self.graphs: list[weakref.ref[Graph]] = []
        slab.blocks.add(self)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.size,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self.pool.free(self)


class Pool:
    """cupy.cuda.MemoryPool: a freed block, filled with a poison pattern, is reused by the next allocation that fits.

    As in CuPy, only an allocation on the same stream reuses it. The pattern is NaN as a float, the largest number as an
    unsigned integer and -1 as a signed one.
    """

    def __init__(self, cupy: "EmulatedCupy") -> None:
        self._cupy, self._lock = cupy, threading.Lock()
        self.slabs: list[Slab] = []  # by address
        #: Of each free chunk, the smallest first: its size, address, slab, graphs and stream.
        self._free: list[tuple[int, int, Slab, list[weakref.ref[Graph]], int]] = []
        #: Chunks that were freed and are not in `_free` yet. The garbage collector may free a block at any allocation,
        #: also while `malloc` reads `_free`.
        self._returned: collections.deque[tuple[int, int, Slab, list[weakref.ref[Graph]], int]] = collections.deque()
        self._used = self.freed = 0
        cupy.pools.add(self)

    def malloc(self, size: int) -> Block:
        size = -(-max(size, 1) // _UNIT) * _UNIT
        if (limit := self._cupy.memory_limit) is not None:
            used = sum(pool.used_bytes() for pool in list(self._cupy.pools))
            if used + size > limit:
                raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes (allocated so far: {used:,} bytes).")
        stream = self._cupy.thread.stream.ptr
        with self._lock:
            self._collect()
            first = bisect.bisect_left(self._free, size, key=_SIZE)
            fit = next((i for i in range(first, len(self._free)) if self._free[i][4] == stream), None)
            if fit is not None:
                whole, address, slab, graphs, _ = self._free.pop(fit)
                if whole > size:
                    chunk = whole - size, address + size, slab, graphs, stream
                    bisect.insort(self._free, chunk, key=_SIZE)
            else:
                slab, graphs = Slab(size), []
                bisect.insort(self.slabs, slab, key=_START)
                address = slab.start
                ctypes.memset(address, _POISON, size)
            self._used += size
        live = [graph for reference in graphs if (graph := reference()) is not None]
        if any(graph.complete for graph in live):
            self._cupy.fault("memory that a live graph uses is allocated again.")
        block = Block(self, slab, address, size, stream)
        block.graphs = [weakref.ref(graph) for graph in live]
        return block

    def free(self, block: Block) -> None:
        ctypes.memset(block.address, _POISON, block.size)
        self._returned.append((block.size, block.address, block.slab, block.graphs, block.stream))

    def _collect(self) -> None:
        """Sort the returned chunks into `_free`."""
        while self._returned:
            chunk = self._returned.popleft()
            self._used -= chunk[0]
            if not chunk[2].dropped:
                bisect.insort(self._free, chunk, key=_SIZE)

    def block_at(self, address: int) -> Block | None:
        """The block that contains this address now."""
        position = bisect.bisect_right(self.slabs, address, key=_START) - 1
        blocks = self.slabs[position].blocks if position >= 0 else ()
        return next((b for b in blocks if b.address <= address < b.address + b.size), None)

    def used_bytes(self) -> int:
        with self._lock:
            self._collect()
            return self._used

    def total_bytes(self) -> int:
        return sum(slab.size for slab in self.slabs)

    def free_all_blocks(self) -> None:
        """Free the slabs that no block uses."""
        self.freed += 1
        with self._lock:
            self._collect()
            for slab in self.slabs:
                slab.dropped = not slab.blocks
            self.slabs = [slab for slab in self.slabs if not slab.dropped]
            self._free = [chunk for chunk in self._free if not chunk[2].dropped]


_SIZE, _START = operator.itemgetter(0), operator.attrgetter("start")
_UNIT = 512  # bytes, to which CuPy rounds allocations up
_POISON = 0xFF


class CapturingStream(Stream):
    """A stream that can capture work instead of executing it."""

    cupy: EmulatedCupy

    def synchronize(self) -> None:
        self.cupy.refuse("synchronize")
        super().synchronize()

    def is_capturing(self) -> bool:
        return self.graph is not None

    def begin_capture(self) -> None:
        self.graph = Graph(self.cupy)
        self.cupy.captures.append(self.graph)

    def end_capture(self) -> "Graph":
        graph: Graph = self.graph
        self.cupy.captures.remove(graph)
        for stream in (self, *graph.joined):
            stream.graph = None
        if not graph.valid:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        if not graph.all_before(self):
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined")
        graph.complete = True
        return graph

    def record(self) -> int:
        event = super().record()
        if self.graph is not None:
            self.graph.events[event] = self.graph.before(self)
        return event

    def wait_event(self, event: int) -> None:
        super().wait_event(event)
        for graph in self.cupy.captures:
            if event in graph.events:
                graph.wait(self, event)


class Event:
    """A point in time of a stream."""

    def record(self, stream: Stream) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to do."""


class Graph:
    """A captured graph: the work to do, and the memory that it uses.

    Memory of the pool that the capture allocated from may be freed before a replay, because it has no other user until
    the pool allocates it again, which `Pool.malloc` notices. All other memory must still belong to its array.
    """

    def __init__(self, cupy: EmulatedCupy) -> None:
        self._cupy, self.valid, self.complete = cupy, True, False
        #: Each piece of work, with the positions of those before it: that of its own stream, and those it waits for.
        self.work: list[tuple[Callable[[], None], set[int]]] = []
        self.joined: list[CapturingStream] = []  # the streams that the capture has spread to
        self.events: dict[int, set[int]] = {}
        self._before: dict[int, set[int]] = {}  # by stream
        self._launches = 0
        allocator = cupy.thread.allocator
        self._pool = None if allocator is None else weakref.ref(allocator.__self__)
        self._slabs: dict[int, weakref.ref[Slab]] = {}
        self._needed: dict[int, weakref.ref[Any]] = {}

    def add(self, work: Callable[[], None]) -> None:
        stream = self._cupy.thread.stream
        self.work.append((work, self.before(stream)))
        self._before[stream.ptr] = {len(self.work) - 1}

    def before(self, stream: Stream) -> set[int]:
        """The work after which the next work on a stream begins."""
        return set(self._before.get(stream.ptr, ()))

    def wait(self, stream: CapturingStream, event: int) -> None:
        if stream.graph is None:
            stream.graph = self
            self.joined.append(stream)
        self._before[stream.ptr] = self.before(stream) | self.events[event]

    def all_before(self, stream: Stream) -> bool:
        """Whether all work comes before the next work on this stream."""
        found, waiting = set[int](), self.before(stream)
        while waiting:
            position = waiting.pop()
            found.add(position)
            waiting |= self.work[position][1] - found
        return len(found) == len(self.work)

    def _order(self) -> Iterator[int]:
        """The positions of all work, in an order that the device may choose: as captured, or as late as possible."""
        self._launches += 1
        sign = 1 if self._launches % 2 else -1
        missing = {position: len(before) for position, (_, before) in enumerate(self.work)}
        after: dict[int, list[int]] = {position: [] for position in missing}
        for position, (_, before) in enumerate(self.work):
            for other in before:
                after[other].append(position)
        ready = [sign * position for position, count in missing.items() if not count]
        heapq.heapify(ready)
        while ready:
            position = sign * heapq.heappop(ready)
            yield position
            for other in after[position]:
                missing[other] -= 1
                if not missing[other]:
                    heapq.heappush(ready, sign * other)

    def address(self, a: np.ndarray) -> np.ndarray:
        """The same array by its address alone, which does not keep its memory alive."""
        root = _root(a)
        self._use(root.base if isinstance(root.base, Block) else root)
        return _at_address(a)

    def use_address(self, address: int) -> None:
        """Record the use of the memory at an address."""
        for pool in list(self._cupy.pools):
            block = pool.block_at(address)
            if block is not None:
                self._use(block)

    def _use(self, owner: Any) -> None:
        if isinstance(owner, Block):
            live = [graph for graph in owner.graphs if graph() is not None]
            if not any(graph() is self for graph in live):
                owner.graphs = [*live, weakref.ref(self)]
            self._slabs[id(owner.slab)] = weakref.ref(owner.slab)
            if self._pool is not None and owner.pool is self._pool():
                return
        self._needed[id(owner)] = weakref.ref(owner)

    def upload(self, stream: Stream) -> None:
        """Nothing to do."""

    def launch(self, stream: Stream | None = None) -> None:
        self._cupy.refuse("a replay during a capture")
        if any(owner() is None for owner in (*self._slabs.values(), *self._needed.values())):
            self._cupy.fault("a graph is replayed whose memory was freed.")
        self._cupy.launches.append("graph")
        with np.errstate(all="ignore"):
            for position in self._order():
                self.work[position][0]()


def _root(a: np.ndarray) -> np.ndarray:
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a  # its base is a Block, or it owns its memory


def _at_address(a: np.ndarray) -> np.ndarray:
    if a.size == 0:
        return a.copy()
    interface = {"data": (a.ctypes.data, False), "shape": a.shape, "strides": a.strides, "typestr": a.dtype.str}
    return np.asarray(SimpleNamespace(__array_interface__={**interface, "version": 3}))


# Arrays ------------------------------------------------------------------------------------------------------------


class CapturingBackend(StrictBackend):
    """The strict backend, whose operations are captured instead of executed while a stream captures."""

    def __init__(self, cupy: EmulatedCupy) -> None:
        super().__init__()
        self._cupy = cupy

    def read(self, what: str) -> None:
        self._refuse_while_capturing("D2H transfers are disallowed")
        super().read(what)

    def _refuse_while_capturing(self, what: str) -> None:
        """Raise the error of CuPy, which checks this itself."""
        if self._cupy.capturing is not None:
            raise RuntimeError(f"the current stream is capturing, so {what}")

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        graph = self._cupy.capturing
        if graph is None:
            return super().compute(function, *args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in ("matmul", "dot", "tensordot", "einsum"):
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        if not any(isinstance(a, StrictArray) for a in (*args, *kwargs.values())) and name in (
            "asarray", "array", "ascontiguousarray"
        ):  # fmt: skip
            self._refuse_while_capturing("H2D transfers are disallowed")
        inside: dict[int, StrictArray] = {}
        args = tuple(self.unwrap(a, inside) for a in args)
        kwargs = {name: self.unwrap(a, inside) for name, a in kwargs.items()}
        return self._capture(graph, function, args, kwargs, inside)

    def _capture(self, graph: Graph, function: Callable[..., Any], args: Any, kwargs: Any, inside: Any) -> Any:
        copies: dict[int, np.ndarray] = {}
        memory: dict[int, bytearray] = {}

        def copy(x: np.ndarray) -> np.ndarray:
            return copies.setdefault(id(x), _copy(x, memory))

        trial_args = [_map(a, copy) for a in args]
        trial_kwargs = {name: _map(a, copy) for name, a in kwargs.items()}
        with np.errstate(all="ignore"):
            result = function(*trial_args, **trial_kwargs)
        originals = {id(copied): key for key, copied in copies.items()}
        by_address = [_map(a, graph.address) for a in args], {k: _map(a, graph.address) for k, a in kwargs.items()}

        def replay() -> Any:
            return function(*by_address[0], **by_address[1])

        if result is None or id(result) in originals:
            graph.add(replay)
            return None if result is None else inside[originals[id(result)]]
        if isinstance(result, np.ndarray) and any(np.may_share_memory(result, copied) for copied in copies.values()):
            view = function(*args, **kwargs)  # of the array itself, the result may be a copy instead of a view
            if any(np.may_share_memory(view, self.unwrap(a, {})) for a in inside.values()):
                return StrictArray(self, view)
        output = StrictArray(self, self._in_pool(_poisoned(np.asarray(result))))
        target = graph.address(output._values)
        if function not in (np.empty, np.empty_like):  # these do nothing on the device
            graph.add(lambda: operator.setitem(target, ..., replay()))
        return output

    def _wrap(self, a: Any, inside: dict[int, StrictArray]) -> Any:
        if isinstance(a, np.generic | bool | int | float | complex):
            a = np.asarray(a)
        if isinstance(a, np.ndarray) and id(a) not in inside:
            a = self._in_pool(a)
        return super()._wrap(a, inside)

    def _in_pool(self, a: np.ndarray) -> np.ndarray:
        """A copy, with the same order of axes, in memory of the current pool. A view of such memory is not copied."""
        if a.size == 0 or isinstance(_root(a).base, Block):
            return a
        allocator = self._cupy.thread.allocator
        if allocator is None and self._cupy.capturing is not None:
            raise StrictError("a captured step allocates from the default pool.")
        memory = np.asarray((allocator or self._cupy._pools[0].malloc)(a.nbytes))[: a.nbytes]
        axes = sorted(range(a.ndim), key=lambda i: -abs(a.strides[i]))
        array = memory.view(a.dtype).reshape([a.shape[i] for i in axes]).transpose(np.argsort(axes))
        array[...] = a
        return array


def _map(a: Any, function: Callable[[np.ndarray], Any]) -> Any:
    if isinstance(a, np.ndarray):
        return function(a)
    return type(a)(_map(item, function) for item in a) if type(a) in (list, tuple) else a


def _copy(x: np.ndarray, memory: dict[int, bytearray]) -> np.ndarray:
    """The array in a copy of its memory. Copies of arrays that share memory share it too."""
    if x.size == 0:
        return x.copy()
    root = _root(x)
    if id(root) not in memory:
        memory[id(root)] = bytearray(ctypes.string_at(root.ctypes.data, root.nbytes))
    return np.ndarray(x.shape, x.dtype, memory[id(root)], x.ctypes.data - root.ctypes.data, x.strides)


def _poisoned(like: np.ndarray) -> np.ndarray:
    """Memory without a result: NaN, or 0 for integers, because they may be indices."""
    return np.full(like.shape, np.nan if like.dtype.kind in "fc" else 0, dtype=like.dtype)


# Kernels -----------------------------------------------------------------------------------------------------------


class EmulatedModule:
    """cupy.RawModule, for kernels.cu and the like."""

    def __init__(self, cupy: EmulatedCupy, code: str, options: Sequence[str]) -> None:
        self._cupy, self._library = cupy, compile_for_host(code, tuple(options))
        self._counts = {name: len(arguments) for name, arguments in kernels.signatures(code).items()}
        self._declares_shared = re.search(r"^ *__shared__", code, re.MULTILINE) is not None

    def get_function(self, name: str) -> "EmulatedKernel":
        sizes = (ctypes.c_ulong * self._counts[name]).in_dll(self._library, f"sizes_{name}")
        function = getattr(self._library, f"run_{name}")
        return EmulatedKernel(self._cupy, name, function, list(sizes), 16 if self._declares_shared else 0)


class EmulatedKernel:
    """A kernel. shared_size_bytes: of the shared memory that it declares, if it does, at least these."""

    def __init__(
        self, cupy: EmulatedCupy, name: str, function: Any, sizes: Sequence[int], shared_size_bytes: int
    ) -> None:
        self._cupy, self._name, self._function, self._sizes = cupy, name, function, sizes
        self.shared_size_bytes = shared_size_bytes
        self.max_dynamic_shared_size_bytes = 48 * 2**10 - shared_size_bytes
        function.restype = ctypes.c_char_p
        self.kernel = SimpleNamespace(ptr=cupy.driver.number_of(self))

    def arguments_at(self, pointers: Sequence[int]) -> tuple[Any, ...]:
        """Copies of the arguments at these addresses, as bytes without a type."""
        pairs = zip(pointers, self._sizes, strict=True)
        return tuple(np.frombuffer(ctypes.string_at(pointer, size), f"V{size}") for pointer, size in pairs)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        if shared_mem > min(self.max_dynamic_shared_size_bytes, 227 * 2**10):
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {self._name}, {shared_mem} bytes of shared memory")
        if any(n < 1 for n in (*grid, *block)):
            raise CUDARuntimeError(f"cudaErrorInvalidConfiguration: {self._name}, {grid}, {block}")
        graph = self._cupy.capturing
        arrays = [a._values for a in arguments if isinstance(a, StrictArray)]
        if graph is not None:
            arrays = [graph.address(a) for a in arrays]
            for a in arguments:
                if isinstance(a, np.uint64) and a:
                    graph.use_address(int(a))
                elif a.dtype.kind == "V" and a.nbytes % 8 == 0:  # a struct, perhaps with addresses
                    for word in a.view("u8"):
                        graph.use_address(int(word))
        remaining = iter(arrays)
        kept, pointers = [], (ctypes.c_void_p * len(arguments))()
        for i, a in enumerate(arguments):
            if isinstance(a, StrictArray):
                a = np.uint64(next(remaining).ctypes.data)
            is_struct = a.dtype.kind == "V" and a.size == 1
            assert isinstance(a, np.generic) or is_struct, f"{self._name}: CuPy does not pass argument {i}, {a!r}"
            kept.append(np.array(a))
            pointers[i] = kept[-1].ctypes.data
        dims = (ctypes.c_uint * 6)(*(*grid, 1, 1, 1)[:3], *(*block, 1, 1, 1)[:3])

        def run(kept: Any = (kept, arrays)) -> None:
            with _one_at_a_time:
                error = self._function(dims, pointers)
            if error:
                raise AssertionError(f"{self._name}: {error.decode()}")

        if graph is not None:
            graph.add(run)
        else:
            self._cupy.launches.append(self._name)
            run()


class EmulatedDriver:
    """The function of the CUDA driver that xpnet calls. launches: how many kernels it has launched."""

    def __init__(self, cupy: EmulatedCupy) -> None:
        self._cupy, self.launches = cupy, 0
        self._kernels: list[EmulatedKernel] = []

    def number_of(self, kernel: EmulatedKernel) -> int:
        self._kernels.append(kernel)
        return len(self._kernels) - 1

    def cuLaunchKernelEx(self, configuration: Any, function: Any, pointers: Any, extra: None) -> int:
        given, kernel = configuration._obj, self._kernels[function.value or 0]
        assert given.stream == self._cupy.thread.stream.ptr and self._cupy.capturing is not None
        assert given.attribute_count == 1 and given.attributes[0].id == 6 and given.attributes[0].value[0] == 1
        self.launches += 1
        kernel(tuple(given.grid), tuple(given.block), kernel.arguments_at(pointers), given.shared_bytes)
        return 0


_one_at_a_time = threading.Lock()  # the shim has a single grid


@functools.cache
def compile_for_host(code: str, definitions: tuple[str, ...]) -> ctypes.CDLL:
    """A source file as a shared library of the host, with `run_NAME(dims, arguments)` for each kernel."""
    assert COMPILER, "the emulation needs g++"
    real = next(o.removeprefix("-DREAL=") for o in definitions if o.startswith("-DREAL="))
    parts = ['#include "shim.h"', code]
    for name, parameters in kernels.signatures(code).items():
        arguments = ", ".join(f"*({_c(p, real)}*)a[{i}]" for i, p in enumerate(parameters))
        sizes = ", ".join(f"sizeof({_c(p, real)})" for p in parameters)
        parts.append(f'extern "C" const unsigned long sizes_{name}[] = {{{sizes}}};')
        parts.append(f"static void body_{name}(void** a) {{ {name}({arguments}); }}")
        parts.append(
            f'extern "C" const char* run_{name}(unsigned* d, void** a) {{ return run(body_{name}, a, '
            f"Dim{{d[0], d[1], d[2]}}, Dim{{d[3], d[4], d[5]}}, {str(_synchronizes(code, name)).lower()}); }}"
        )
    source = "\n".join(parts) + "\n"
    options = ["-O2", "-std=c++17", "-shared", "-fPIC", *definitions, "-U_FORTIFY_SOURCE", f"-I{SHIM.parent}"]
    options.append("-fno-gnu-unique")  # else the libraries of float and double share the variables of templates
    digest = hashlib.sha256((source + SHIM.read_text() + " ".join(options)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"xpnet-kernels-{digest}"
    library = folder / "kernels.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            (Path(own) / "kernels.cpp").write_text(source, encoding="utf-8")
            output = Path(own) / "kernels.so"
            command = [COMPILER, *options, "-o", str(output), str(Path(own) / "kernels.cpp")]
            subprocess.run(command, check=True)
            output.replace(library)  # atomic, since another process may do the same
    return ctypes.CDLL(str(library))


def _c(argument: kernels.KernelArgument, real: str) -> str:
    kind = real if argument.type == "real" else argument.type
    return f"{kind}*" if argument.pointer else kind


def _synchronizes(code: str, name: str) -> bool:
    """Whether this kernel, or a function that it names, synchronizes threads."""
    start = r"(\w+)\([^()]*(?:\([^()]*\)[^()]*)*\) \{(?: await_previous_kernel\(\);)?"
    bodies = {m[1]: m[2] for m in re.finditer(rf"{start}\n(.*?)\n\}}", code, re.DOTALL)}
    seen, waiting = set(), [name]
    while waiting:
        body = bodies.get(current := waiting.pop(), "")
        if "__sync" in body or "_sync(" in body:
            return True
        seen.add(current)
        waiting += [called for called in re.findall(r"\w+", body) if called in bodies and called not in seen]
    return False


# cuBLAS ------------------------------------------------------------------------------------------------------------

_TYPES = {0: np.float32, 1: np.float64, 2: np.uint16, 14: np.uint16}


def decoded(bits: np.ndarray, kind: int) -> np.ndarray:
    """16-bit floats as float32. cudaDataType 2 is float16, and 14 is bfloat16."""
    if kind == 2:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encoded(a: np.ndarray, kind: int) -> np.ndarray:
    """float32 as the bits of 16-bit floats, rounded to the nearest, ties to even; a NaN stays a NaN."""
    if kind == 2:
        return a.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(a), bits >> 16 | 0x40, rounded).astype(np.uint16)


def to_tf32(a: np.ndarray) -> np.ndarray:
    """Rounded to TF32, which has 10 bits of mantissa."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


class EmulatedCublas:
    """The functions of cuBLAS that xpnet calls, on matrices in column-major order, as NVIDIA documents them."""

    def __init__(self, cupy: EmulatedCupy) -> None:
        self._cupy = cupy
        self.calls: list[tuple[Any, ...]] = []
        self._streams: dict[int, int] = {}
        self._workspaces: dict[int, int] = {}

    # ruff: noqa: N802
    def cublasCreate_v2(self, handle: Any) -> int:
        self._cupy.refuse("cublasCreate")
        handle._obj.value = len(self._streams) + 1
        self._streams[handle._obj.value] = 0
        return 0

    def cublasSetStream_v2(self, handle: Any, stream: Any) -> int:
        self._streams[handle.value] = stream.value or 0
        self._workspaces.pop(handle.value, None)
        return 0

    def cublasSetWorkspace_v2(self, handle: Any, address: Any, size: Any) -> int:
        self._workspaces[handle.value] = size.value
        return 0

    def cublasGemmEx(
        self,
        handle,
        op_a,
        op_b,
        m,
        n,
        k,
        alpha,
        a,
        type_a,
        lda,
        b,
        type_b,
        ldb,
        beta,
        c,
        type_c,
        ldc,
        compute,
        algorithm,
    ) -> int:
        if self._streams[handle.value] != self._cupy.thread.stream.ptr:
            raise StrictError("a cuBLAS handle uses another stream than the current one.")
        if self._cupy.capturing is not None and not self._workspaces.get(handle.value):
            self._cupy.refuse("cuBLAS without a workspace of its own")
        assert lda >= (m if op_a == 0 else k) and ldb >= (k if op_b == 0 else n) and ldc >= m, "a leading dimension"
        alpha, beta = alpha._obj.value, beta._obj.value
        self.calls.append((op_a, op_b, m, n, k, type_a, type_c, compute, beta))
        if self._cupy.capturing is not None:
            for pointer in (a, b, c):
                self._cupy.capturing.use_address(pointer.value)
        left = _by_columns(a, type_a, op_a, m, k, lda)
        right = _by_columns(b, type_b, op_b, k, n, ldb)
        out = _by_columns(c, type_c, 0, m, n, ldc)

        def multiply() -> None:
            x, y = (decoded(v, t) if t in (2, 14) else v for v, t in ((left, type_a), (right, type_b)))
            if compute == 77:
                x, y = to_tf32(x), to_tf32(y)
            product = alpha * np.matmul(x, y, dtype=out.dtype)
            out[...] = product if beta == 0 else product + beta * out

        if self._cupy.capturing is not None:
            self._cupy.capturing.add(multiply)
        else:
            self._cupy.launches.append("gemm")
            multiply()
        return 0

    def cublasGemmStridedBatchedEx(
        self, handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, stride_a, b, type_b, ldb, stride_b, beta,
        c, type_c, ldc, stride_c, count, compute, algorithm,
    ) -> int:  # fmt: skip
        for i in range(count):
            a_i, b_i, c_i = (
                ctypes.c_void_p(x.value + i * stride.value * np.dtype(_TYPES[kind]).itemsize)
                for x, stride, kind in ((a, stride_a, type_a), (b, stride_b, type_b), (c, stride_c, type_c))
            )
            self.cublasGemmEx(
                handle, op_a, op_b, m, n, k, alpha, a_i, type_a, lda, b_i, type_b, ldb, beta, c_i, type_c, ldc, compute,
                algorithm,
            )  # fmt: skip
        return 0


def _by_columns(address: Any, kind: int, operation: int, rows: int, columns: int, leading: int) -> np.ndarray:
    """op(X), (rows, columns), for X in column-major order with `leading` elements from a column to the next."""
    x_rows, x_columns = (rows, columns) if operation == 0 else (columns, rows)
    dtype = np.dtype(_TYPES[kind])
    interface = {
        "data": (address.value, False), "shape": (x_rows, x_columns), "typestr": dtype.str, "version": 3,
        "strides": (dtype.itemsize, leading * dtype.itemsize),
    }  # fmt: skip
    x = np.asarray(SimpleNamespace(__array_interface__=interface))
    return x if operation == 0 else x.T


class EmulatedCublasLt:
    """The functions of cuBLASLt that xpnet calls. Its heuristics propose two algorithms, which do the same.

    calls: the sizes (m, n, k), compute type, epilogue and algorithm of each product.
    """

    def __init__(self, cupy: EmulatedCupy) -> None:
        self._cupy = cupy
        self.calls: list[tuple[int, ...]] = []
        self._objects: list[Any] = [None]  # descriptions and layouts, by their handles

    def _new(self, handle: Any, value: Any) -> int:
        handle._obj.value = len(self._objects)
        self._objects.append(value)
        return 0

    def cublasLtGetVersion(self) -> int:
        return 130100

    def cublasLtCreate(self, handle: Any) -> int:
        self._cupy.refuse("cublasLtCreate")
        return self._new(handle, "handle")

    def cublasLtMatmulDescCreate(self, handle: Any, compute: int, scale: int) -> int:
        return self._new(handle, {"compute": compute, 3: 0, 4: 0, 7: 1})

    def cublasLtMatmulDescSetAttribute(self, handle: Any, attribute: int, value: Any, size: Any) -> int:
        assert ctypes.sizeof(value._obj) == size.value
        self._objects[handle.value][attribute] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, handle: Any, kind: int, rows: Any, columns: Any, leading: Any) -> int:
        assert leading.value >= rows.value, "a leading dimension"
        return self._new(handle, (kind, rows.value, columns.value, leading.value))

    def cublasLtMatmulPreferenceCreate(self, handle: Any) -> int:
        return self._new(handle, {})

    def cublasLtMatmulPreferenceSetAttribute(self, handle: Any, attribute: int, value: Any, size: Any) -> int:
        assert ctypes.sizeof(value._obj) == size.value
        return 0

    def cublasLtMatmulPreferenceDestroy(self, handle: Any) -> int:
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, lt, description, a, b, c, out, preference, most, found, count) -> int:
        count._obj.value = min(2, most)
        for i in range(count._obj.value):
            found[i].algorithm[0], found[i].state = i + 1, 0
        return 0

    def cublasLtMatmul(
        self, lt, description, alpha, a, layout_a, b, layout_b, beta, c, layout_c, out, layout_out, algorithm,
        workspace, workspace_size, stream,
    ) -> int:  # fmt: skip
        if (stream.value or 0) != self._cupy.thread.stream.ptr:
            raise StrictError("cuBLASLt uses another stream than the current one.")
        given = self._objects[description.value]
        x, y, to = (
            self._matrix(*pair, operation)
            for pair, operation in (((a, layout_a), given[3]), ((b, layout_b), given[4]), ((out, layout_out), 0))
        )
        type_in, type_out = (self._objects[layout.value][0] for layout in (layout_a, layout_out))
        assert type_in == self._objects[layout_b.value][0] and type_out in (0, type_in)
        assert given["compute"] == 68 or type_in == 0, "16-bit matrices are multiplied exactly"
        assert x.shape[1] == y.shape[0] and to.shape == (x.shape[0], y.shape[1])
        assert alpha._obj.value == 1 and beta._obj.value == 0 and algorithm._obj[0] in (1, 2)
        epilogue, graph = given[7], self._cupy.capturing
        assert epilogue in (1, 2, 4, 6, 134, 136, 256), "an epilogue"
        vector, mask = None, None
        if epilogue & (4 | 256):  # a bias, or its gradient: one number for each row of the result
            vector = _by_columns(ctypes.c_void_p(given[8]), type_out, 0, len(to), 1, len(to))
        if epilogue & 128:
            mask = self._mask(given[11], given[12], *to.shape)
        self.calls.append((*to.shape, x.shape[1], given["compute"], epilogue, algorithm._obj[0]))
        if graph is not None:
            for pointer in (a, b, out, workspace):
                graph.use_address(pointer.value)
            for address in ([given[8]] if vector is not None else []) + ([given[11]] if mask is not None else []):
                graph.use_address(address)

        def multiply() -> None:
            left, right = (decoded(v, type_in) if type_in else v for v in (x, y))
            if given["compute"] == 77:
                left, right = to_tf32(left), to_tf32(right)
            product = np.matmul(left, right)
            if epilogue & 4:
                product += decoded(vector, type_out) if type_out else vector
            if epilogue & 2:
                if mask is not None:
                    bits = np.packbits(product > 0, axis=0, bitorder="little")
                    mask[: len(bits)] = bits
                product = np.where(product <= 0, np.float32(0), product)
            if epilogue & 8:
                product *= np.unpackbits(mask, axis=0, count=len(to), bitorder="little")
            if epilogue & 256:
                sums = left.sum(axis=1, keepdims=True, dtype="float64")
                vector[...] = encoded(sums.astype("float32"), type_out) if type_out else sums
            to[...] = encoded(product, type_out) if type_out else product

        if graph is not None:
            graph.add(multiply)
        else:
            self._cupy.launches.append("lt")
            multiply()
        return 0

    @staticmethod
    def _mask(address: int, leading: int, rows: int, columns: int) -> np.ndarray:
        """The bits of a matrix as bytes (leading / 8, columns), whose leading dimension is a number of bits."""
        assert leading % 128 == 0 and leading >= rows and address % 16 == 0, "the mask of ReLU"
        interface = {
            "data": (address, False), "shape": (leading // 8, columns), "typestr": "|u1", "version": 3,
            "strides": (1, leading // 8),
        }  # fmt: skip
        return np.asarray(SimpleNamespace(__array_interface__=interface))

    def _matrix(self, address: Any, layout: Any, operation: int) -> np.ndarray:
        kind, rows, columns, leading = self._objects[layout.value]
        matrix = _by_columns(address, kind, 0, rows, columns, leading)
        return matrix.T if operation else matrix
