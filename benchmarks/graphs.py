"""CUDA graphs of work to measure, so that the time of its kernel launches is not measured."""

import contextlib
from collections.abc import Callable
from typing import Any


class Graph:
    """A CUDA graph of `work`, captured on the current stream, which must not be a default stream.

    `warm_up`, or else `work` itself, runs once before the capture, to load kernels and allocate memory. Temporary
    arrays of the work are allocated from a memory pool of this graph. Arrays that outlive the work must exist before.
    """

    def __init__(self, backend: Any, work: Callable[[], None], warm_up: Callable[[], None] | None = None) -> None:
        cuda = backend.xp.cuda
        stream = cuda.get_current_stream()
        self._work, self._pool = work, cuda.MemoryPool()  # both must live as long as the graph
        with cuda.using_allocator(self._pool.malloc):
            (warm_up or work)()
            stream.synchronize()
            stream.begin_capture()
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):  # the capture may already be invalid
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
        self._graph.upload(stream)

    def replay(self) -> None:
        self._graph.launch()
