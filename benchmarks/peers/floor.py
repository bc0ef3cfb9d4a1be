"""The floor: the matrix products of a net's step with `out=`, and nothing else.

Of a convolution, for so many images at a time and in as many threads as xpnet's own: the products are the same.
"""

import math
from collections.abc import Callable
from typing import Any

import xpnet
from benchmarks.nets import Net, shapes


class Floor:
    def __init__(self, net: Net, batch: int, device: str, precision: str) -> None:
        self.backend, self.batch, self.precision = xpnet.get_backend(device), batch, precision or "float32"
        self.convolves = any(layer[0] == "conv" for layer in net.layers)
        self.products: list[Callable[[], None]] = []
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
        matmul = self.backend.xp.matmul
        grad = y
        if self.backend.name != "cpu":  # the same cuBLAS as xpnet's, with factors that are rounded already
            matmul = self.backend.matmul
            with self.backend.products(self.precision):
                x, weight, grad = self.backend.operand(x), self.backend.operand(weight), self.backend.operand(y)

        def run() -> None:
            matmul(x, weight, out=y)
            matmul(x.T, grad, out=grad_weight)
            if not first:
                matmul(grad, weight.T, out=grad_x)

        self.products.append(run)

    def _convolution(self, windows: int, cells: int, filters: int, first: bool) -> None:
        weight, y = self._array(cells, filters), self._array(self.batch, windows, filters)
        grads = [self._array(cells, filters) for _ in range(self.backend.shards)]
        matmul = self.backend.xp.matmul
        kept: dict[int, Any] = {}

        def part_and_patches(rows: slice, shard: int) -> tuple[Any, Any]:
            part = y[rows].reshape(-1, filters)
            if shard not in kept or len(kept[shard]) < len(part):
                kept[shard] = self._array(len(part), cells)
            return part, kept[shard][: len(part)]

        def forward(rows: slice, shard: int) -> None:
            part, patches = part_and_patches(rows, shard)
            matmul(patches, weight, out=part)

        def backward(rows: slice, shard: int) -> None:
            part, patches = part_and_patches(rows, shard)
            matmul(patches.T, part, out=grads[shard])
            if not first:
                matmul(part, weight.T, out=patches)

        def run() -> None:
            self.backend.in_chunks(self.batch, windows * cells * 4, forward)
            self.backend.in_chunks(self.batch, windows * cells * 4, backward)

        self.products.append(run)

    def _array(self, *shape: int) -> Any:
        array = self.backend.zeros(shape, "float32")
        array += 1e-3
        return array

    def step(self) -> None:
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


def make(net: Net, batch: int, device: str, option: str) -> Floor:
    return Floor(net, batch, device, option)
