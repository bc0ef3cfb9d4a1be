"""The floor: the matrix products of a net's step with `out=`, and nothing else.

On a GPU they are a CUDA graph, as xpnet's own step is. Of a convolution, for so many images at a time and in as many
threads as xpnet's own: the products are the same.
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
        # On a GPU through cuBLAS as xpnet calls it: CuPy's own products cannot be captured.
        self.matmul = self.backend.matmul if on_gpu else self.backend.xp.matmul
        self.convolves = any(layer[0] == "conv" for layer in net.layers)
        self.products: list[Callable[[], None]] = []
        self._open = contextlib.ExitStack()  # until `close`
        if on_gpu:
            self._open.enter_context(self.backend.stream())
        with self.backend.products(self.precision):
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
        # Rounded here, where the precision asks for it, so that rounding is not measured.
        x, weight, grad = (self.backend.operand(a) for a in (x, weight, y))
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
        weight, grad = backend.operand(self._array(cells, filters)), backend.operand(y)
        grads = [self._array(cells, filters) for _ in range(backend.shards)]
        kept: dict[int, Any] = {}

        def patches_of(count: int, shard: int) -> tuple[Any, Any]:
            """The patches of `count` windows, and the same as the products read them."""
            if shard not in kept or len(kept[shard][0]) < count:
                patches = self._array(count, cells)
                kept[shard] = patches, backend.operand(patches)
            patches, rounded = kept[shard]
            return patches[:count], rounded[:count]

        def part_of(rows: slice) -> slice:
            return slice(rows.start * windows, rows.stop * windows)

        def forward(rows: slice, shard: int) -> None:
            out = y[part_of(rows)]
            matmul(patches_of(len(out), shard)[1], weight, out=out)

        def backward(rows: slice, shard: int) -> None:
            part = grad[part_of(rows)]
            patches, rounded = patches_of(len(part), shard)
            matmul(rounded.T, part, out=grads[shard])
            if not first:
                matmul(part, weight.T, out=patches)

        def run() -> None:
            backend.in_chunks(self.batch, windows * cells * 4, forward)
            backend.in_chunks(self.batch, windows * cells * 4, backward)

        if backend.name != "cpu":
            run()  # makes the patches, outside the memory of the graph
        self.products.append(run)

    def _array(self, *shape: int) -> Any:
        array = self.backend.zeros(shape, "float32")
        array += 1e-3
        return array

    def _step(self) -> None:
        if self.convolves or self.backend.name != "cpu":
            with self.backend.working(), self.backend.products(self.precision):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        for products in self.products:
            products()

    def synchronize(self) -> None:
        self.backend.synchronize()

    def close(self) -> None:
        self._open.close()


def make(net: Net, batch: int, device: str, option: str) -> Floor:
    return Floor(net, batch, device, option)
