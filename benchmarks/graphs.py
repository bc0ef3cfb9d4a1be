"""Work of a GPU captured as a CUDA graph, for measuring it without the cost of its launches."""

import contextlib
from collections.abc import Callable
from typing import Any


class Graph:
    """What `work` asks of the device, captured on the current stream, which must not be a default stream.

    `warm_up`, or the work itself, runs once before, so that kernels are loaded and memory is there. Temporary arrays of
    the work come from a memory pool of this graph; arrays that outlive the work must be allocated before.
    """

    def __init__(self, backend: Any, work: Callable[[], None], warm_up: Callable[[], None] | None = None) -> None:
        cuda = backend.xp.cuda
        stream = cuda.get_current_stream()
        self._work, self._pool = work, cuda.MemoryPool()  # the graph uses both as long as it lives
        with cuda.using_allocator(self._pool.malloc):
            (warm_up or work)()
            stream.synchronize()
            stream.begin_capture()
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):  # of a capture that is invalid already
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
        self._graph.upload(stream)

    def replay(self) -> None:
        self._graph.launch()
