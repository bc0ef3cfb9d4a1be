"""The floor: only the matrix products of a network's training step, with `out=`.

On a GPU they are captured as a CUDA graph, like the step of xpnet. The products of a convolution have the same sizes
and the same number of threads as in xpnet.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import xpnet
from benchmarks.graphs import Graph
from benchmarks.nets import Net, shapes


class Floor:
    def __init__(self, net: Net, batch: int, device: str, precision: str) -> None:
        self.backend, self.batch, self.precision = xpnet.get_backend(device), batch, precision or "float32"
        on_gpu = self.backend.name != "cpu"
        # On a GPU, xpnet calls cuBLAS directly, because matmul of CuPy cannot be captured.
        self.matmul = self.backend.matmul if on_gpu else self.backend.xp.matmul
        self.convolves = any(layer[0] == "conv" for layer in net.layers)
        self.products: list[Callable[[], None]] = []
        self._contexts = contextlib.ExitStack()  # left by `close`
        if on_gpu:
            self._contexts.enter_context(self.backend.stream())
        with self.backend.matmul_precision(self.precision):
            self._add_products(net)
        self.step = self._step
        if on_gpu:
            self.step = Graph(self.backend, self._step).replay

    def _add_products(self, net: Net) -> None:
        first = True
        for layer, before, after in shapes(net):
            match layer:
                case ("conv", filters, kernel, _):
                    self._convolution(math.prod(after[:2]), kernel * kernel * before[2], filters, first)
                case ("dense", units):
                    self._dense(before[0], units, first)
                case _:
                    continue
            first = False

    def _dense(self, inputs: int, units: int, first: bool) -> None:
        x, weight, y = self._array(self.batch, inputs), self._array(inputs, units), self._array(self.batch, units)
        grad_weight, grad_x = self._array(inputs, units), self._array(self.batch, inputs)
        # Cast here, so that the casts of a half precision are not measured.
        x, weight, grad = (self.backend.cast(a) for a in (x, weight, y))
        matmul = self.matmul

        def run() -> None:
            matmul(x, weight, out=y)
            matmul(x.T, grad, out=grad_weight)
            if not first:
                matmul(grad, weight.T, out=grad_x)

        self.products.append(run)

    def _convolution(self, windows: int, cells: int, filters: int, first: bool) -> None:
        backend, matmul = self.backend, self.matmul
        y = self._array(self.batch * windows, filters)
        weight, grad = backend.cast(self._array(cells, filters)), backend.cast(y)
        grads = [self._array(cells, filters) for _ in range(backend.workers)]
        buffers: dict[int, Any] = {}

        def patches_of(count: int, worker: int) -> tuple[Any, Any]:
            """The im2col matrix of `count` windows, and its cast to the precision, in buffers of this worker."""
            if worker not in buffers or len(buffers[worker][0]) < count:
                patches = self._array(count, cells)
                buffers[worker] = patches, backend.cast(patches)
            patches, cast = buffers[worker]
            return patches[:count], cast[:count]

        def part_of(rows: slice) -> slice:
            return slice(rows.start * windows, rows.stop * windows)

        def forward(rows: slice, worker: int) -> None:
            out = y[part_of(rows)]
            matmul(patches_of(len(out), worker)[1], weight, out=out)

        def backward(rows: slice, worker: int) -> None:
            part = grad[part_of(rows)]
            patches, cast = patches_of(len(part), worker)
            matmul(cast.T, part, out=grads[worker])
            if not first:
                matmul(part, weight.T, out=patches)

        def run() -> None:
            backend.in_chunks(self.batch, windows * cells * 4, forward)
            backend.in_chunks(self.batch, windows * cells * 4, backward)

        if backend.name != "cpu":
            run()  # allocates the im2col matrices, outside the memory pool of the graph
        self.products.append(run)

    def _array(self, *shape: int) -> Any:
        array = self.backend.zeros(shape, "float32")
        array += 1e-3
        return array

    def _step(self) -> None:
        if self.convolves or self.backend.name != "cpu":
            with self.backend.parallel_region(), self.backend.matmul_precision(self.precision):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        for products in self.products:
            products()

    def synchronize(self) -> None:
        self.backend.synchronize()

    def close(self) -> None:
        self._contexts.close()


def make(net: Net, batch: int, device: str, option: str) -> Floor:
    return Floor(net, batch, device, option)
