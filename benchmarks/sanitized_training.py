"""Short training runs for compute-sanitizer, whose steps are captured and replayed as CUDA graphs.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitized_training

The runs are short, because compute-sanitizer slows every kernel down, but most of their steps are replayed. The exit
status is 1 if a run was not captured, raised an error, or ended with a loss that is not finite.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy

import xpnet
from benchmarks import messages
from benchmarks.peers.own import fallback_reason
from xpnet import callbacks, datasets, layers, optimizers
from xpnet.training import captured_step

SAMPLES, BATCH = 203, 20  # the last batch of an epoch has 3 samples, and its own graph
LARGER = 150


class Watch(callbacks.Callback):
    """Records whether the steps of a run were replayed."""

    def on_train_end(self, model: Any) -> None:
        self.fallback_reason = fallback_reason(self.run.executor)


class WorkBetween(callbacks.Callback):
    """Uses the model between two steps with larger batches than in training, so that its buffers grow."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def on_step_end(self, model: Any, step: int) -> None:
        if step % 7 == 0:
            model.forward(self.x[: LARGER // 2 + step], training=True)

    def on_epoch_end(self, model: Any, epoch: int, logs: dict[str, Any]) -> None:
        model.forward(self.x[:LARGER], training=True)
        model.evaluate(self.x, self.y, batch_size=LARGER)
        model.predict(self.x, batch_size=SAMPLES)


class OtherModel(callbacks.Callback):
    """Trains another model after each epoch, while the graphs of this one are kept."""

    def __init__(self, train: Callable[[], None]) -> None:
        self.train = train

    def on_epoch_end(self, model: Any, epoch: int, logs: dict[str, Any]) -> None:
        self.train()


def vectors() -> tuple[numpy.ndarray, numpy.ndarray]:
    rng = numpy.random.default_rng(0)
    return rng.random((SAMPLES, 64), dtype=numpy.float32), rng.integers(10, size=SAMPLES)


def images() -> tuple[numpy.ndarray, numpy.ndarray]:
    x, y = vectors()
    return x.reshape(SAMPLES, 8, 8, 1), y


def mlp(seed: int = 0) -> xpnet.Sequential:
    stack = [layers.Dense(48), layers.ReLU(), layers.Dropout(0.3), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend="gpu", seed=seed)


def cnn() -> xpnet.Sequential:
    stack = [
        *[layers.Conv2D(8, 3, padding="same"), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)],
        *[layers.Conv2D(8, 3), layers.ReLU(), layers.AvgPool2D(2), layers.Flatten(), layers.Dense(10)],
    ]
    return xpnet.Sequential(stack, (8, 8, 1), backend="gpu", seed=0)


def train(model: xpnet.Sequential, x: Any, y: Any = None, more: tuple = (), **options: Any) -> None:
    """Train. Raises RuntimeError if the steps were not replayed, or the loss is not finite."""
    watch = Watch()
    options = {"epochs": 4, "batch_size": BATCH, "optimizer": "adam", "verbose": 0, **options}
    history = model.fit(x, y, callbacks=[watch, *more], **options)
    if watch.fallback_reason is not None:
        raise RuntimeError(f"its steps are eager: {watch.fallback_reason}")
    if not all(math.isfinite(loss) for loss in history["loss"]):
        raise RuntimeError(f"its losses are not finite: {history['loss']}")


def dropout_and_momentum() -> None:
    train(mlp(), *vectors(), optimizer=optimizers.SGD(0.05, momentum=0.9))


def convolutions_and_clipping() -> None:
    train(cnn(), *images(), optimizer=optimizers.Adam(0.01, clip_norm=0.5))


def accumulation() -> None:
    train(mlp(), *vectors(), accumulate=3, epochs=6)


def a_stream() -> None:
    x, y = vectors()
    train(mlp(), datasets.Stream(x, y, block=20, window_bytes=60 * x[0].nbytes))


def work_between_steps() -> None:
    x, y = images()
    train(cnn(), x, y, more=(WorkBetween(x, y),), epochs=3)
    x, y = vectors()
    train(mlp(), x, y, more=(WorkBetween(x, y),))


def two_models_in_turn() -> None:
    x, y = vectors()
    first, second = mlp(1), mlp(2)
    for _ in range(2):
        train(first, x, y)
        train(second, x, y)
    train(first, x, y, more=(OtherModel(lambda: train(second, x, y)),))


TRAININGS = (
    dropout_and_momentum,
    convolutions_and_clipping,
    work_between_steps,
    two_models_in_turn,
    accumulation,
    a_stream,
)


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run starts after this time")
    options = parser.parse_args()
    captured_step._MIN_STEPS = 3
    status = 0
    for training in TRAININGS:
        what = training.__name__.replace("_", " ")
        if time.monotonic() - start > options.seconds:
            messages.send("dropped", what=what, why="no time was left")
            continue
        training_start = time.monotonic()
        try:
            training()
        except Exception as error:
            messages.send("failed", what=what, why=f"{type(error).__name__}: {error}"[:300])
            status = 1
        else:
            messages.send("trained", what=what, seconds=time.monotonic() - training_start)
    return status


if __name__ == "__main__":
    sys.exit(main())
