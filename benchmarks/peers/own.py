"""xpnet."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import xpnet
from benchmarks.nets import RATES, Net
from benchmarks.samples import batch_of
from xpnet import layers, losses, optimizers
from xpnet.data.dataset import StepData
from xpnet.data.preparation import prepare
from xpnet.layers.context import Workspace
from xpnet.training.captured_step import StepExecutor, StepsToCome
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.step import TrainingStep

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


class Steps:
    """Training steps as in `fit`, which are captured and replayed as in a long `fit`.

    samples: a function of their number that gives (x, y).  batches: how many different ones a GPU gets.
    """

    def __init__(
        self,
        model: Any,
        loss: Any,
        optimizer: Any,
        samples: Callable[[int], Any],
        batch: int,
        batches: int = BATCHES,
    ) -> None:
        self.model, self.optimizer, self.batch = model, optimizer, batch
        self._contexts = contextlib.ExitStack()  # left by `close`
        self._steps = 1000  # of an epoch
        self._contexts.enter_context(self.model.backend.stream())
        state = self.model._state.begin(self.model.context, loss, [], self.optimizer)
        self.model._state = state
        # On a GPU, each step has the next batch, as in `fit`; the same batch again would need a transfer.
        batches = 1 if self.model.backend.name == "cpu" else batches
        data = prepare(self.model, *samples(batch * batches), loss)
        self.executor = StepExecutor(TrainingStep(self.model, state), streaming=False)
        self.executor.begin_epoch(StepsToCome(epochs=1, all_epochs=1, steps=self._steps, rows=batch), user_code=False)
        work = Workspace(self.model.context)
        self._steps_data = [StepData(data, work, None, i * batch, batch, batch) for i in range(batches)]
        self._next = itertools.cycle(self._steps_data)
        self._metrics = EpochMetrics(self.model, loss, [], self._steps)

    def step(self) -> None:
        if self._metrics.batches == self._steps:
            self._metrics.clear()
        self.executor(next(self._next), self._metrics)

    def synchronize(self) -> None:
        self.model.backend.synchronize()

    def fallback_reason(self) -> str | None:
        """Why the steps are not replayed as a CUDA graph; None if they are."""
        return fallback_reason(self.executor)

    def close(self) -> None:
        self._contexts.close()


class Own(Steps):
    """xpnet with the training step of `fit` and its mean loss."""

    def __init__(self, net: Net, batch: int, device: str, option: str) -> None:
        stack = [_LAYERS[kind](*arguments) for kind, *arguments in net.layers]
        dtype = "uint8" if option == "uint8" else "float32"
        if dtype == "uint8":
            stack.insert(0, layers.Rescale(1 / 255))
        precision = option if option in ("tf32", "float16", "bfloat16") else None
        model = xpnet.Sequential(stack, net.input_shape, backend=device, precision=precision)
        optimizer, loss = _OPTIMIZERS[net.optimizer](RATES[net.optimizer]), losses.SoftmaxCrossEntropy()
        super().__init__(model, loss, optimizer, lambda count: batch_of(net, count, dtype), batch)

    def epoch(self, x, y) -> float | None:
        """On a GPU, the seconds of the last of 5 epochs, without the upload of the data and the capture."""
        if self.model.backend.name == "cpu":
            self.model.fit(x, y, optimizer=self.optimizer, batch_size=self.batch, verbose=0)
            return None
        history = self.model.fit(x, y, optimizer=self.optimizer, batch_size=self.batch, epochs=5, verbose=0)
        return history.seconds[-1]

    def predict(self, x):
        return self.model.predict(x)


def fallback_reason(executor: StepExecutor) -> str | None:
    """Why no step of this run is replayed as a CUDA graph; None if at least one kind of step is."""
    if executor.captured:
        return None
    return executor.fallback_reason or "no step was captured"


def make(net: Net, batch: int, device: str, option: str) -> Own:
    return Own(net, batch, device, option)
