"""A pretended `cupy` over the strict stand-in: as many GPUs as wanted, or one of the ways in which there are none."""

import types
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np
from strict import StrictArray, StrictBackend


class CUDARuntimeError(RuntimeError):
    """As cupy_backends.cuda.api.runtime raises it."""


class FakeCupy(types.ModuleType):
    """`devices`: how many GPUs there are. `no_devices`, `no_memory`: what counting or using them raises instead."""

    def __init__(
        self, devices: int = 1, no_devices: Exception | None = None, no_memory: Exception | None = None
    ) -> None:
        super().__init__("cupy")
        self.ndarray = StrictArray
        self.synchronized: list[int] = []
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
        self.cuda = SimpleNamespace(
            runtime=runtime, Device=lambda i: _Device(self, i), get_current_stream=lambda: _Stream(self)
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


class _Stream:
    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy

    def synchronize(self) -> None:
        self._cupy.synchronized.append(self._cupy._current[-1])
