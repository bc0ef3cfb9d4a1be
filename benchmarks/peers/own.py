"""xpnet itself."""

from collections.abc import Iterator

import xpnet
from benchmarks.nets import RATES, Net
from benchmarks.samples import batch_of
from xpnet import layers, losses, optimizers
from xpnet.data import Batch, prepare
from xpnet.layers.base import Workspace
from xpnet.step import Figures, Step

_LAYERS = {
    "conv": lambda filters, kernel, padding: layers.Conv2D(filters, kernel, padding=padding),
    "dense": layers.Dense,
    "dropout": layers.Dropout,
    "flatten": layers.Flatten,
    "pool": layers.MaxPool2D,
    "relu": layers.ReLU,
}
_OPTIMIZERS = {"sgd": optimizers.SGD, "adam": optimizers.Adam}


class Own:
    """The step is that of `fit`, with its mean loss."""

    def __init__(self, net: Net, batch: int, device: str, dtype: str) -> None:
        stack = [_LAYERS[kind](*arguments) for kind, *arguments in net.layers]
        if dtype == "uint8":
            stack.insert(0, layers.Rescale(1 / 255))
        self.model = xpnet.Sequential(stack, net.input_shape, backend=device)
        self.optimizer = _OPTIMIZERS[net.optimizer](RATES[net.optimizer])
        self.batch = batch
        state, loss = self.model._state, losses.SoftmaxCrossEntropy()
        state.begin(self.model.context.store, loss, [], self.optimizer)
        self._data = prepare(self.model, *batch_of(net, batch, dtype), loss)
        self._step, self._work = Step(self.model, state), Workspace(self.model.context)
        self._steps = 1000
        self._batches = self._endless()
        self._begin()

    def _begin(self) -> None:
        self._figures, self._room = Figures(self.model, [], self._steps), self._steps

    def step(self) -> None:
        if not self._room:
            self._begin()
        self._room -= 1
        self._step(self._batches, self.batch, self._figures)

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._data.batches(self._work, self.batch)

    def synchronize(self) -> None:
        self.model.backend.synchronize()

    def epoch(self, x, y) -> None:
        self.model.fit(x, y, optimizer=self.optimizer, batch_size=self.batch, verbose=0)

    def predict(self, x):
        return self.model.predict(x)


def make(net: Net, batch: int, device: str, option: str) -> Own:
    return Own(net, batch, device, option or "float32")
