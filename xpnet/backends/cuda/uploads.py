"""Uploads of a dataset's next part, on a second stream and through pinned memory, while training continues."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device, Uploads

_PARTS_ON_THE_DEVICE = 2  # one for training, one being uploaded


class OverlappedUploads(Uploads):
    """Uploads that overlap with training.

    Memory is reused as soon as Python drops an array, even if the device has not finished its work on it. So a part is
    kept until the stream of the uploads waits for all training on it.
    """

    def __init__(self, backend: Device, thread: Any) -> None:
        """thread: the thread-local state of the backend, where `asarray` finds the uploads in progress."""
        self._xp, self._thread = backend.xp, thread
        self._stream = self._xp.cuda.Stream(non_blocking=True)
        self._in_use: deque[tuple[Any, Any]] = deque()  # (event after the training on a part, its arrays)
        self._pinned: list[Any] = []  # memory that is being read

    @contextmanager
    def prefetch(self) -> Iterator[None]:
        training = self._xp.cuda.get_current_stream()
        while len(self._in_use) >= _PARTS_ON_THE_DEVICE:
            trained, arrays = self._in_use.popleft()
            self._stream.wait_event(trained)
            del arrays
        self._thread.uploads = self
        try:
            with self._stream:
                yield
        finally:
            self._thread.uploads = None
            training.wait_event(self._stream.record())
            self._stream.synchronize()  # costs nothing, since the checks of the part have waited for it
            self._pinned.clear()

    def release(self, *arrays: Array) -> None:
        self._in_use.append((self._xp.cuda.get_current_stream().record(), arrays))

    def upload(self, a: numpy.ndarray[Any, Any]) -> Array:
        """A host array on the device. Only copies from pinned memory overlap with other work."""
        memory = self._xp.cuda.alloc_pinned_memory(a.nbytes)
        self._pinned.append(memory)
        pinned = numpy.frombuffer(memory, dtype=a.dtype, count=a.size).reshape(a.shape)
        pinned[...] = a
        uploaded = self._xp.empty(a.shape, dtype=a.dtype)
        uploaded.set(pinned, stream=self._stream)
        return uploaded
