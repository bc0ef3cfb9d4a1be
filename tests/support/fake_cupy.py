"""A fake `cupy` on top of the strict backend, with any number of GPUs, or with one of the errors of unusable ones."""

import functools
import itertools
import threading
import types
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np
from strict import StrictArray, StrictBackend


class CUDARuntimeError(RuntimeError):
    """The error of cupy_backends.cuda.api.runtime."""


class OutOfMemoryError(MemoryError):
    """The error of cupy.cuda.memory."""


class FakeCupy(types.ModuleType):
    """devices: the number of GPUs.  no_devices, no_memory: an error that counting or using them raises instead."""

    def __init__(
        self, devices: int = 1, no_devices: Exception | None = None, no_memory: Exception | None = None
    ) -> None:
        super().__init__("cupy")
        self.ndarray = StrictArray
        self.synchronized: list[int] = []
        self.waits: list[tuple[str, int, int]] = []
        self._no_devices, self._no_memory = no_devices, no_memory
        self._backends = [StrictBackend(i) for i in range(devices)]
        self._current = [0]
        runtime = SimpleNamespace(
            getDeviceCount=self._count,
            getDeviceProperties=lambda i: {"name": f"Fake {i}".encode(), "major": 9, "minor": i},
            memGetInfo=lambda: (2**30 * (3 + self._current[-1]), 2**30 * 8),
            driverGetVersion=lambda: 13020,
            runtimeGetVersion=lambda: 13010,
        )
        self.thread = ThreadState(self)
        stream: Any = functools.partial(Stream, self)
        stream.null = self.thread.stream
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=lambda i: _Device(self, i),
            Stream=stream,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            get_current_stream=lambda: self.thread.stream,
        )

    def _count(self) -> int:
        if self._no_devices is not None:
            raise self._no_devices
        return len(self._backends)

    def ones(self, *args: Any, **kwargs: Any) -> Any:
        if self._no_memory is not None:
            raise self._no_memory
        return self._backends[self._current[-1]].xp.ones(*args, **kwargs)

    def asnumpy(self, a: Any) -> Any:
        return a.get() if isinstance(a, StrictArray) else np.asarray(a)

    def __getattr__(self, name: str) -> Any:
        """The attribute of the current device; a function is looked up when it is called."""
        value = getattr(self._backends[0].xp, name)
        if callable(value) and not isinstance(value, type):
            value = _OnCurrentDevice(self, name)
            setattr(self, name, value)  # the same object each time
        return value


class _OnCurrentDevice:
    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self._cupy, self._name = cupy, name

    def _current(self) -> Any:
        return getattr(self._cupy._backends[self._cupy._current[-1]].xp, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current(), name)


class _Device:
    def __init__(self, cupy: FakeCupy, index: int) -> None:
        self._cupy, self._index = cupy, index
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> "_Device":
        self._cupy._current.append(self._index)
        self._entered.append(self._cupy._backends[self._index].device())
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)
        self._cupy._current.pop()


class ThreadState(threading.local):
    """The state of one thread: the current stream, and the allocator."""

    def __init__(self, cupy: FakeCupy) -> None:
        self.stream = Stream(cupy, default=True)
        self.allocator: Any = None


class Stream:
    """Executes everything at once, and records the events of the stream in `waits`."""

    _numbers = itertools.count(1)

    def __init__(self, cupy: FakeCupy, non_blocking: bool = False, default: bool = False) -> None:
        self.cupy, self.default = cupy, default
        self.ptr = 0 if default else next(self._numbers)
        self.graph: Any = None
        self._before: list[Stream] = []

    def __enter__(self) -> "Stream":
        self._before.append(self.cupy.thread.stream)
        self.cupy.thread.stream = self
        return self

    def __exit__(self, *error: Any) -> None:
        self.cupy.thread.stream = self._before.pop()

    def record(self) -> int:
        event = next(self._numbers)
        self.cupy.waits.append(("record", self.ptr, event))
        return event

    def wait_event(self, event: int) -> None:
        self.cupy.waits.append(("wait", self.ptr, event))

    def synchronize(self) -> None:
        self.cupy.synchronized.append(self.cupy._current[-1])
