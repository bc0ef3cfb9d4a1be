"""A pretended CuPy whose kernels run, whose streams can be recorded, and whose cuBLAS multiplies, all on the host.

kernels.cu is compiled by g++ with a small shim (cuda_shim/shim.h). A capture refuses what a real one refuses: CuPy's
own matrix products, copies from and to the host, memory of the shared pool, the default stream. It executes nothing; a
replay works on bare addresses.

Arrays live in memory pools that behave as CuPy's do: a freed block goes to the next allocation that fits, and holds a
poison pattern until then. Two faults that real hardware leaves unnoticed are errors here (see `Pool` and `Graph`): an
allocation gets memory that a live graph touches, or a graph is replayed after memory that it touches was freed.

This is an emulation: right numbers, forbidden calls and memory faults can be seen with it, speed and real asynchrony
cannot.
"""

import contextlib
import ctypes
import functools
import hashlib
import operator
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import numpy as np
from fake_cupy import CUDARuntimeError, FakeCupy, Stream
from strict import StrictArray, StrictBackend, StrictError

from xpnet.backends import gpu_kernels
from xpnet.backends.gpu import GPUBackend

COMPILER = shutil.which("g++")
SHIM = Path(__file__).with_name("cuda_shim") / "shim.h"


class EmulatedGPU(GPUBackend):
    """The GPU's backend on the emulation. `cupy` is what it takes for CuPy."""

    def __init__(self) -> None:
        self.cupy = EmulatedCupy()
        super(GPUBackend, self).__init__("emulated", self.cupy)
        self.index, self._threads_own = 0, threading.local()

    def __reduce__(self) -> Any:
        return EmulatedGPU._same, (id(self),)

    _alive: ClassVar["weakref.WeakValueDictionary[int, EmulatedGPU]"] = weakref.WeakValueDictionary()

    def __new__(cls) -> "EmulatedGPU":
        made = super().__new__(cls)
        cls._alive[id(made)] = made
        return made

    @staticmethod
    def _same(key: int) -> "EmulatedGPU":
        return EmulatedGPU._alive[key]

    def _cublas_library(self) -> Any:
        return self.cupy.cublas


class EmulatedCupy(FakeCupy):
    """`launches`: the kernels launched, one by one, and "graph" for a recording played."""

    def __init__(self) -> None:
        super().__init__(devices=1)
        self.launches: list[str] = []
        self.device = self._backends[0] = RecordingBackend(self)
        self.cublas = EmulatedCublas(self)
        self.RawModule = functools.partial(EmulatedModule, self)
        #: The memory faults that were found. A test that leaves any behind fails (see conftest.py).
        self.faults: list[str] = []
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self._pools = [Pool(self), Pool(self)]
        self.get_default_memory_pool = lambda: self._pools[0]
        self.get_default_pinned_memory_pool = lambda: self._pools[1]
        vars(self.cuda).update(
            Stream=functools.partial(RecordingStream, self),
            MemoryPool=functools.partial(Pool, self),
            using_allocator=self._using_allocator,
            get_allocator=lambda: self.here.allocator or self._pools[0].malloc,
            alloc_pinned_memory=lambda size: bytearray(size),
        )
        self.cuda.runtime.getDeviceProperties = lambda i: {"name": b"Emulated", "major": 9, "minor": 0}

    @contextlib.contextmanager
    def _using_allocator(self, allocator: Callable[[int], Any]) -> Iterator[None]:
        before, self.here.allocator = self.here.allocator, allocator
        try:
            yield
        finally:
            self.here.allocator = before

    @property
    def recording(self) -> "Graph | None":
        """What the current stream records."""
        graph: Graph | None = self.here.stream.graph
        return graph

    def fault(self, what: str) -> NoReturn:
        """Note a memory fault, and raise it."""
        self.faults.append(what)
        raise StrictError(what)

    def refuse(self, what: str) -> None:
        """Raise as CUDA does where the current stream is capturing."""
        if self.recording is not None:
            self.recording.valid = False
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what}")


class Slab:
    """Memory as cudaMalloc gives it; freed when nothing refers to it any more."""

    def __init__(self, size: int) -> None:
        self.bytes = np.empty(size + _UNIT, dtype=np.uint8)
        self.start = -(-self.bytes.ctypes.data // _UNIT) * _UNIT
        self.size = size
        self.blocks: weakref.WeakSet[Block] = weakref.WeakSet()


class Block:
    """Memory of one array, given back to its pool when the last view of the array is gone."""

    def __init__(self, pool: "Pool", slab: Slab, address: int, size: int) -> None:
        self.pool, self.slab, self.address, self.size = pool, slab, address, size
        #: The graphs that touch this memory.
        self.graphs: list[weakref.ref[Graph]] = []
        slab.blocks.add(self)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.size,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self.pool.take_back(self)


class Pool:
    """cupy.cuda.MemoryPool: a freed block goes to the next allocation that fits, with a poison pattern in it.

    The pattern is NaN as a float, the largest number as an unsigned integer and -1 as a signed one.
    """

    def __init__(self, cupy: "EmulatedCupy") -> None:
        self._cupy, self._lock = cupy, threading.RLock()
        self.slabs: list[Slab] = []
        self._free: list[tuple[int, int, Slab, list[weakref.ref[Graph]]]] = []  # size, address, slab, graphs
        self._used = self.freed = 0
        cupy.pools.add(self)

    def malloc(self, size: int) -> Block:
        size = -(-max(size, 1) // _UNIT) * _UNIT
        with self._lock:
            fits = [i for i, chunk in enumerate(self._free) if chunk[0] >= size]
            if fits:
                whole, address, slab, graphs = self._free.pop(min(fits, key=lambda i: self._free[i][0]))
                if whole > size:
                    self._free.append((whole - size, address + size, slab, graphs))
            else:
                slab, graphs = Slab(size), []
                self.slabs.append(slab)
                address = slab.start
                ctypes.memset(address, _POISON, size)
            self._used += size
        if any(graph() is not None and graph().complete for graph in graphs):  # type: ignore[union-attr]
            self._cupy.fault("memory that a live graph touches is given to somebody else.")
        block = Block(self, slab, address, size)
        block.graphs = list(graphs)
        return block

    def take_back(self, block: Block) -> None:
        ctypes.memset(block.address, _POISON, block.size)
        with self._lock:
            self._used -= block.size
            self._free.append((block.size, block.address, block.slab, block.graphs))

    def block_at(self, address: int) -> Block | None:
        """The block that holds this address now."""
        for slab in self.slabs:
            if slab.start <= address < slab.start + slab.size:
                return next((b for b in slab.blocks if b.address <= address < b.address + b.size), None)
        return None

    def used_bytes(self) -> int:
        return self._used

    def total_bytes(self) -> int:
        return sum(slab.size for slab in self.slabs)

    def free_all_blocks(self) -> None:
        """Free the slabs of which no part is in use."""
        self.freed += 1
        with self._lock:
            unused = [slab for slab in self.slabs if not slab.blocks]
            self.slabs = [slab for slab in self.slabs if slab not in unused]
            self._free = [chunk for chunk in self._free if chunk[2] not in unused]


_UNIT = 512  # bytes, to which CuPy rounds allocations up
_POISON = 0xFF


class RecordingStream(Stream):
    """A stream that can write down what it is asked, instead of doing it."""

    cupy: EmulatedCupy

    def synchronize(self) -> None:
        self.cupy.refuse("synchronize")
        super().synchronize()

    def begin_capture(self) -> None:
        self.graph = Graph(self.cupy)

    def end_capture(self) -> "Graph":
        graph, self.graph = self.graph, None
        if not graph.valid:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        graph.complete = True
        made: Graph = graph
        return made


class Graph:
    """What was captured: the work to do, and the memory that it touches.

    Memory of the pool that the capture allocated from may be freed before a replay: nobody else has it until this pool
    hands it out again, which `Pool.malloc` notices. All other memory must still belong to its array.
    """

    def __init__(self, cupy: EmulatedCupy) -> None:
        self._cupy, self.valid, self.complete = cupy, True, False
        self.work: list[Callable[[], None]] = []
        allocator = cupy.here.allocator
        self._pool = None if allocator is None else weakref.ref(allocator.__self__)
        self._slabs: dict[int, weakref.ref[Slab]] = {}
        self._needed: dict[int, weakref.ref[Any]] = {}

    def add(self, work: Callable[[], None]) -> None:
        self.work.append(work)

    def address(self, a: np.ndarray) -> np.ndarray:
        """The same array by its address alone, which keeps nothing alive."""
        root = _root(a)
        self._touch(root.base if isinstance(root.base, Block) else root)
        return _at_address(a)

    def touch_address(self, address: int) -> None:
        """Note the memory behind a bare pointer."""
        for pool in list(self._cupy.pools):
            block = pool.block_at(address)
            if block is not None:
                self._touch(block)

    def _touch(self, owner: Any) -> None:
        if isinstance(owner, Block):
            if not any(graph() is self for graph in owner.graphs):
                owner.graphs.append(weakref.ref(self))
            self._slabs[id(owner.slab)] = weakref.ref(owner.slab)
            if self._pool is not None and owner.pool is self._pool():
                return
        self._needed[id(owner)] = weakref.ref(owner)

    def upload(self, stream: Stream) -> None:
        """Nothing to do."""

    def launch(self, stream: Stream | None = None) -> None:
        self._cupy.refuse("a graph within a graph")
        if any(owner() is None for owner in (*self._slabs.values(), *self._needed.values())):
            self._cupy.fault("a graph is replayed whose memory was given back.")
        self._cupy.launches.append("graph")
        with np.errstate(all="ignore"):
            for work in self.work:
                work()


def _root(a: np.ndarray) -> np.ndarray:
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a  # its base is a Block, or it has memory of its own


def _at_address(a: np.ndarray) -> np.ndarray:
    if a.size == 0:
        return a.copy()
    interface = {"data": (a.ctypes.data, False), "shape": a.shape, "strides": a.strides, "typestr": a.dtype.str}
    return np.asarray(SimpleNamespace(__array_interface__={**interface, "version": 3}))


# Arrays ------------------------------------------------------------------------------------------------------------


class RecordingBackend(StrictBackend):
    """The strict stand-in, whose operations are written down instead of done while a stream records."""

    def __init__(self, cupy: EmulatedCupy) -> None:
        super().__init__()
        self._cupy = cupy

    def read(self, what: str) -> None:
        self._refuse_while_capturing("D2H transfers are disallowed")
        super().read(what)

    def _refuse_while_capturing(self, what: str) -> None:
        """Raise as CuPy does, before it asks CUDA."""
        if self._cupy.recording is not None:
            raise RuntimeError(f"the current stream is capturing, so {what}")

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        graph = self._cupy.recording
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
        return self._write_down(graph, function, args, kwargs, inside)

    def _write_down(self, graph: Graph, function: Callable[..., Any], args: Any, kwargs: Any, inside: Any) -> Any:
        copies: dict[int, np.ndarray] = {}
        memory: dict[int, bytearray] = {}

        def copied(x: np.ndarray) -> np.ndarray:
            return copies.setdefault(id(x), _copied(x, memory))

        try_args = [_map(a, copied) for a in args]
        try_kwargs = {name: _map(a, copied) for name, a in kwargs.items()}
        with np.errstate(all="ignore"):
            tried = function(*try_args, **try_kwargs)
        originals = {id(copy): key for key, copy in copies.items()}
        by_address = [_map(a, graph.address) for a in args], {k: _map(a, graph.address) for k, a in kwargs.items()}

        def again() -> Any:
            return function(*by_address[0], **by_address[1])

        if tried is None or id(tried) in originals:
            graph.add(again)
            return None if tried is None else inside[originals[id(tried)]]
        if isinstance(tried, np.ndarray) and any(np.may_share_memory(tried, copy) for copy in copies.values()):
            view = function(*args, **kwargs)  # which of the array itself may have been a copy
            if any(np.may_share_memory(view, self.unwrap(a, {})) for a in inside.values()):
                return StrictArray(self, view)
        made = StrictArray(self, self._in_pool(_poisoned(np.asarray(tried))))
        target = graph.address(made._values)
        if function not in (np.empty, np.empty_like):  # which ask nothing of the device
            graph.add(lambda: operator.setitem(target, ..., again()))
        return made

    def _wrap(self, a: Any, inside: dict[int, StrictArray]) -> Any:
        if isinstance(a, np.generic | bool | int | float | complex):
            a = np.asarray(a)
        if isinstance(a, np.ndarray) and id(a) not in inside:
            a = self._in_pool(a)
        return super()._wrap(a, inside)

    def _in_pool(self, a: np.ndarray) -> np.ndarray:
        """The same numbers, axes in the same order, in memory of the current pool; a view of such memory as it is."""
        if a.size == 0 or isinstance(_root(a).base, Block):
            return a
        allocator = self._cupy.here.allocator
        if allocator is None and self._cupy.recording is not None:
            raise StrictError("a captured step takes memory from the shared pool.")
        memory = np.asarray((allocator or self._cupy._pools[0].malloc)(a.nbytes))[: a.nbytes]
        axes = sorted(range(a.ndim), key=lambda i: -abs(a.strides[i]))
        there = memory.view(a.dtype).reshape([a.shape[i] for i in axes]).transpose(np.argsort(axes))
        there[...] = a
        return there


def _map(a: Any, function: Callable[[np.ndarray], Any]) -> Any:
    if isinstance(a, np.ndarray):
        return function(a)
    return type(a)(_map(item, function) for item in a) if type(a) in (list, tuple) else a


def _copied(x: np.ndarray, memory: dict[int, bytearray]) -> np.ndarray:
    """The same array in a copy of its memory, which the copies of others of the same memory share."""
    if x.size == 0:
        return x.copy()
    root = _root(x)
    if id(root) not in memory:
        memory[id(root)] = bytearray(ctypes.string_at(root.ctypes.data, root.nbytes))
    return np.ndarray(x.shape, x.dtype, memory[id(root)], x.ctypes.data - root.ctypes.data, x.strides)


def _poisoned(like: np.ndarray) -> np.ndarray:
    """Memory that nothing has been computed into; whole numbers are 0, for they may be indices."""
    return np.full(like.shape, np.nan if like.dtype.kind in "fc" else 0, dtype=like.dtype)


# Kernels -----------------------------------------------------------------------------------------------------------


class EmulatedModule:
    """cupy.RawModule of kernels.cu."""

    def __init__(self, cupy: EmulatedCupy, code: str, options: Sequence[str]) -> None:
        real = next(o.removeprefix("-DREAL=") for o in options if o.startswith("-DREAL="))
        self._cupy, self._library = cupy, built(code, real)

    def get_function(self, name: str) -> "EmulatedKernel":
        return EmulatedKernel(self._cupy, name, getattr(self._library, f"run_{name}"))


class EmulatedKernel:
    def __init__(self, cupy: EmulatedCupy, name: str, function: Any) -> None:
        self._cupy, self._name, self._function = cupy, name, function
        function.restype = ctypes.c_char_p

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], given: tuple[Any, ...]) -> None:
        if any(n < 1 for n in (*grid, *block)):
            raise CUDARuntimeError(f"cudaErrorInvalidConfiguration: {self._name}, {grid}, {block}")
        graph = self._cupy.recording
        arrays = [a._values for a in given if isinstance(a, StrictArray)]
        if graph is not None:
            arrays = [graph.address(a) for a in arrays]
            for a in given:
                if isinstance(a, np.uint64) and a:
                    graph.touch_address(int(a))
        remaining = iter(arrays)
        kept, pointers = [], (ctypes.c_void_p * len(given))()
        for i, a in enumerate(given):
            if isinstance(a, StrictArray):
                a = np.uint64(next(remaining).ctypes.data)
            assert isinstance(a, np.generic), f"{self._name}: argument {i} is {a!r}, which has no fixed size"
            kept.append(np.array(a))
            pointers[i] = kept[-1].ctypes.data
        dims = (ctypes.c_uint * 6)(*(*grid, 1, 1, 1)[:3], *(*block, 1, 1, 1)[:3])

        def run(kept: Any = (kept, arrays)) -> None:
            with _one_at_a_time:
                trouble = self._function(dims, pointers)
            if trouble:
                raise AssertionError(f"{self._name}: {trouble.decode()}")

        if graph is not None:
            graph.add(run)
        else:
            self._cupy.launches.append(self._name)
            run()


_one_at_a_time = threading.Lock()  # the shim has one grid


@functools.cache
def built(code: str, real: str) -> ctypes.CDLL:
    """kernels.cu as a library of the host, with `run_NAME(dims, arguments)` for each kernel."""
    assert COMPILER, "the emulation needs g++"
    parts = ['#include "shim.h"', code]
    for name, parameters in gpu_kernels.signatures().items():
        given = ", ".join(f"*({_c(p, real)}*)a[{i}]" for i, p in enumerate(parameters))
        parts.append(f"static void body_{name}(void** a) {{ {name}({given}); }}")
        parts.append(
            f'extern "C" const char* run_{name}(unsigned* d, void** a) {{ return run(body_{name}, a, '
            f"Dim{{d[0], d[1], d[2]}}, Dim{{d[3], d[4], d[5]}}, {str(_meets(code, name)).lower()}); }}"
        )
    source = "\n".join(parts) + "\n"
    options = ["-O2", "-std=c++17", "-shared", "-fPIC", f"-DREAL={real}", "-U_FORTIFY_SOURCE", f"-I{SHIM.parent}"]
    digest = hashlib.sha256((source + SHIM.read_text() + " ".join(options)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"xpnet-kernels-{digest}"
    library = folder / "kernels.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            (Path(own) / "kernels.cpp").write_text(source, encoding="utf-8")
            made = Path(own) / "kernels.so"
            command = [COMPILER, *options, "-o", str(made), str(Path(own) / "kernels.cpp")]
            subprocess.run(command, check=True)
            made.replace(library)  # another process may have been as fast
    return ctypes.CDLL(str(library))


def _c(parameter: gpu_kernels.Parameter, real: str) -> str:
    kind = real if parameter.type == "real" else parameter.type
    return f"{kind}*" if parameter.pointer else kind


def _meets(code: str, name: str) -> bool:
    """Whether the threads of a block of this kernel meet: it, or a function that it calls, has __syncthreads."""
    bodies = {m[1]: m[2] for m in re.finditer(r"(\w+)\([^()]*(?:\([^()]*\)[^()]*)*\) \{\n(.*?)\n\}", code, re.DOTALL)}
    seen, waiting = set(), [name]
    while waiting:
        body = bodies.get(current := waiting.pop(), "")
        if "__syncthreads" in body:
            return True
        seen.add(current)
        waiting += [called for called in re.findall(r"(\w+)\(", body) if called in bodies and called not in seen]
    return False


# cuBLAS ------------------------------------------------------------------------------------------------------------

_TYPES = {0: np.float32, 1: np.float64, 2: np.uint16, 14: np.uint16}


def decoded(bits: np.ndarray, kind: int) -> np.ndarray:
    """The numbers of 16-bit floats: cudaDataType 2 is float16, 14 bfloat16."""
    if kind == 2:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(a: np.ndarray) -> np.ndarray:
    """Rounded to the 10 bits of mantissa that TF32 has."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


class EmulatedCublas:
    """The functions of cuBLAS that are called, on matrices that lie by columns, as NVIDIA documents them."""

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
        if self._streams[handle.value] != self._cupy.here.stream.ptr:
            raise StrictError("a handle of cuBLAS works on a stream that is not the current one.")
        if self._cupy.recording is not None and not self._workspaces.get(handle.value):
            self._cupy.refuse("cuBLAS without a workspace of its own")
        assert lda >= (m if op_a == 0 else k) and ldb >= (k if op_b == 0 else n) and ldc >= m, "a leading dimension"
        alpha, beta = alpha._obj.value, beta._obj.value
        self.calls.append((op_a, op_b, m, n, k, type_a, type_c, compute, beta))
        if self._cupy.recording is not None:
            for pointer in (a, b, c):
                self._cupy.recording.touch_address(pointer.value)
        left = self._by_columns(a, type_a, op_a, m, k, lda)
        right = self._by_columns(b, type_b, op_b, k, n, ldb)
        out = self._by_columns(c, type_c, 0, m, n, ldc)

        def multiply() -> None:
            x, y = (decoded(v, t) if t in (2, 14) else v for v, t in ((left, type_a), (right, type_b)))
            if compute == 77:
                x, y = to_tf32(x), to_tf32(y)
            product = alpha * np.matmul(x, y, dtype=out.dtype)
            out[...] = product if beta == 0 else product + beta * out

        if self._cupy.recording is not None:
            self._cupy.recording.add(multiply)
        else:
            self._cupy.launches.append("gemm")
            multiply()
        return 0

    def cublasGemmStridedBatchedEx(
        self, handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, apart_a, b, type_b, ldb, apart_b, beta,
        c, type_c, ldc, apart_c, count, compute, algorithm,
    ) -> int:  # fmt: skip
        for i in range(count):
            a_i, b_i, c_i = (
                ctypes.c_void_p(x.value + i * apart.value * np.dtype(_TYPES[kind]).itemsize)
                for x, apart, kind in ((a, apart_a, type_a), (b, apart_b, type_b), (c, apart_c, type_c))
            )
            self.cublasGemmEx(
                handle, op_a, op_b, m, n, k, alpha, a_i, type_a, lda, b_i, type_b, ldb, beta, c_i, type_c, ldc, compute,
                algorithm,
            )  # fmt: skip
        return 0

    @staticmethod
    def _by_columns(address: Any, kind: int, operation: int, rows: int, columns: int, leading: int) -> np.ndarray:
        """op(X), (rows, columns), of an X that lies by columns, `leading` elements from one to the next."""
        x_rows, x_columns = (rows, columns) if operation == 0 else (columns, rows)
        dtype = np.dtype(_TYPES[kind])
        interface = {
            "data": (address.value, False), "shape": (x_rows, x_columns), "typestr": dtype.str, "version": 3,
            "strides": (dtype.itemsize, leading * dtype.itemsize),
        }  # fmt: skip
        x = np.asarray(SimpleNamespace(__array_interface__=interface))
        return x if operation == 0 else x.T
