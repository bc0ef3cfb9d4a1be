"""xpnet itself."""

import contextlib
import itertools

import xpnet
from benchmarks.nets import RATES, Net
from benchmarks.samples import batch_of
from xpnet import layers, losses, optimizers
from xpnet.data import Update, prepare
from xpnet.layers.base import Workspace
from xpnet.replay import Player
from xpnet.step import Figures, Step

BATCHES = 50

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
    """The step is that of `fit`, with its mean loss; on a GPU captured and replayed as a CUDA graph, as there."""

    def __init__(self, net: Net, batch: int, device: str, option: str) -> None:
        stack = [_LAYERS[kind](*arguments) for kind, *arguments in net.layers]
        dtype = "uint8" if option == "uint8" else "float32"
        if dtype == "uint8":
            stack.insert(0, layers.Rescale(1 / 255))
        precision = option if option in ("tf32", "float16", "bfloat16") else None
        self.model = xpnet.Sequential(stack, net.input_shape, backend=device, precision=precision)
        self._open = contextlib.ExitStack()  # until `close`
        self._open.enter_context(self.model.backend.stream())
        self.optimizer = _OPTIMIZERS[net.optimizer](RATES[net.optimizer])
        self.batch = batch
        state, loss = self.model._state, losses.SoftmaxCrossEntropy()
        state.begin(self.model.context, loss, [], self.optimizer)
        # On a GPU a step goes on to the next batch, as in `fit`: back to the same one costs it a transfer.
        batches = 1 if self.model.backend.name == "cpu" else BATCHES
        data = prepare(self.model, *batch_of(net, batch * batches, dtype), loss)
        self.player = Player(Step(self.model, state), streamed=False)
        work = Workspace(self.model.context)
        self._updates = [Update(data, work, None, i * batch, batch, batch) for i in range(batches)]
        self._next = itertools.cycle(self._updates)
        self._steps = 1000
        self._figures = Figures(self.model, [], self._steps)

    def step(self) -> None:
        if self._figures.steps == self._steps:
            self._figures.clear()
        self.player(next(self._next), self._figures)

    def synchronize(self) -> None:
        self.model.backend.synchronize()

    def epoch(self, x, y) -> float | None:
        """On a GPU the last of several epochs, of data that is there by then: what comes before it comes once."""
        if self.model.backend.name == "cpu":
            self.model.fit(x, y, optimizer=self.optimizer, batch_size=self.batch, verbose=0)
            return None
        history = self.model.fit(x, y, optimizer=self.optimizer, batch_size=self.batch, epochs=5, verbose=0)
        return history.seconds[-1]

    def predict(self, x):
        return self.model.predict(x)

    def why_eager(self) -> str | None:
        """Why the steps are not replayed as a CUDA graph; None if they are."""
        return why_eager(self.player)

    def close(self) -> None:
        self._open.close()


def why_eager(player: Player) -> str | None:
    """Why no update of this run is replayed as a CUDA graph; None if at least one kind of update is."""
    if player.recorded:
        return None
    return player.why_not or "no update was captured"


def make(net: Net, batch: int, device: str, option: str) -> Own:
    return Own(net, batch, device, option)
