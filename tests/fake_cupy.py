"""A pretended `cupy` over the strict stand-in: as many GPUs as wanted, or one of the ways in which there are none."""

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
    """As cupy_backends.cuda.api.runtime raises it."""


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory raises it."""


class FakeCupy(types.ModuleType):
    """`devices`: how many GPUs there are. `no_devices`, `no_memory`: what counting or using them raises instead."""

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
        self.here = Here(self)
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=lambda i: _Device(self, i),
            Stream=functools.partial(Stream, self),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            get_current_stream=lambda: self.here.stream,
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
        """Each name as it is on the current device, looked up when it is called."""
        made = getattr(self._backends[0].xp, name)
        return _OnCurrentDevice(self, name) if callable(made) and not isinstance(made, type) else made


class _OnCurrentDevice:
    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self._cupy, self._name = cupy, name

    def _there(self) -> Any:
        return getattr(self._cupy._backends[self._cupy._current[-1]].xp, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._there()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._there(), name)


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


class Here(threading.local):
    """What holds in one thread: the current stream, and where memory comes from."""

    def __init__(self, cupy: FakeCupy) -> None:
        self.stream = Stream(cupy, default=True)
        self.allocator: Any = None


class Stream:
    """Does everything at once, and writes down in `waits` what it was to wait for."""

    _numbers = itertools.count(1)

    def __init__(self, cupy: FakeCupy, non_blocking: bool = False, default: bool = False) -> None:
        self.cupy, self.default = cupy, default
        self.ptr = 0 if default else next(self._numbers)
        self.graph: Any = None
        self._before: list[Stream] = []

    def __enter__(self) -> "Stream":
        self._before.append(self.cupy.here.stream)
        self.cupy.here.stream = self
        return self

    def __exit__(self, *error: Any) -> None:
        self.cupy.here.stream = self._before.pop()

    def record(self) -> int:
        event = next(self._numbers)
        self.cupy.waits.append(("record", self.ptr, event))
        return event

    def wait_event(self, event: int) -> None:
        self.cupy.waits.append(("wait", self.ptr, event))

    def synchronize(self) -> None:
        self.cupy.synchronized.append(self.cupy._current[-1])
