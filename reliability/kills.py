"""Trainings with a Checkpoint are killed at random moments and resumed: they end as without kills, bit for bit."""

import contextlib
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import xpnet
from reliability.processes import Worker, read_task, tell
from reliability.results import Result, scaled
from xpnet import augment, callbacks, datasets, layers, optimizers, schedules

_PART = "kills"
_KILLS = 130  # at scale 1, over all configurations
_TIMEOUT = 120.0  # seconds of a run
_SAMPLES = 96


def _stack(*more: Any) -> Any:
    return xpnet.Sequential([layers.Dense(24), layers.Tanh(), *more, layers.Dense(5)], (12,), "cpu", seed=3)


def _cnn(*first: Any) -> Any:
    stack = [*first, layers.Conv2D(6, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten()]
    return xpnet.Sequential([*stack, layers.Dropout(0.3), layers.Dense(5)], (8, 8, 1), "cpu", seed=3)


def _lstm() -> Any:
    stack = [layers.Embedding(10, 8), layers.LSTM(12), layers.Dropout(0.1), layers.Dense(10)]
    return xpnet.Sequential(stack, (None,), "cpu", seed=3)


def _graph() -> Any:
    x, other = xpnet.Input((12,), name="x"), xpnet.Input((4,), name="other")
    h = layers.Concatenate()([layers.Tanh()(layers.Dense(16)(x)), layers.Dense(8)(other)])
    h = layers.BatchNorm()(layers.Dropout(0.2)(h))
    return xpnet.Model([x, other], [layers.Dense(5, name="a")(h), layers.Dense(1, name="b")(h)], "cpu", seed=3)


def _vectors() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(_SAMPLES, 12)).astype("float32"), rng.integers(0, 5, _SAMPLES)


def _images() -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    return rng.random((_SAMPLES, 8, 8, 1)).astype("float32"), rng.integers(0, 5, _SAMPLES)


def _tokens() -> tuple[Any, Any]:
    tokens = np.random.default_rng(2).integers(0, 10, (_SAMPLES, 7))
    return tokens[:, :-1], tokens[:, 1:]


def _two_headed() -> tuple[Any, Any]:
    (x, y), rng = _vectors(), np.random.default_rng(3)
    return [x, rng.normal(size=(_SAMPLES, 4)).astype("float32")], [y, rng.integers(0, 2, _SAMPLES)]


def _stream() -> tuple[Any, None]:
    return datasets.Stream(*_images(), block=8, window_bytes=2**13), None


def _batches() -> tuple[Any, None]:
    x, y = _vectors()
    return (lambda: ((x[i : i + 10], y[i : i + 10]) for i in range(0, _SAMPLES, 10))), None


def _stopping() -> list[Any]:
    return [callbacks.EarlyStopping("loss", patience=30), callbacks.ReduceLROnPlateau("loss", patience=1, factor=0.7)]


def _momentum() -> Any:
    return optimizers.SGD(schedules.OneCycle(0.05, steps=400), momentum=0.9, nesterov=True, weight_decay=1e-3)


#: By name: the model, the data, the optimizer, further arguments of fit, further callbacks.
CONFIGURATIONS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], dict[str, Any], Any]] = {
    "SGD": (_stack, _vectors, lambda: optimizers.SGD(0.05), {}, list),
    "momentum, schedule, callbacks": (_cnn, _images, _momentum, {"metrics": ["accuracy", "precision"]}, _stopping),
    "Adam, dropout": (lambda: _stack(layers.Dropout(0.4)), _vectors, lambda: optimizers.Adam(clip_norm=1.0), {}, list),
    "AdamW, augmentation": (
        lambda: _cnn(augment.RandomAffine(shift=1.0, rotation=10.0)), _images,
        lambda: optimizers.AdamW(schedules.CosineDecay(0.01, 400)), {}, list,
    ),
    "RMSprop, validation": (
        _cnn, _images, lambda: optimizers.RMSprop(0.001), {"validation_split": 0.25},
        lambda: [callbacks.EarlyStopping(patience=40)],
    ),
    "Adagrad, accumulate": (_stack, _vectors, lambda: optimizers.Adagrad(0.05), {"accumulate": 2}, list),
    "stream": (_cnn, _stream, lambda: optimizers.Adam(0.003), {}, list),
    "iterable of batches": (
        _stack, _batches, lambda: optimizers.SGD(schedules.StepDecay(0.05, every=50, factor=0.8), momentum=0.8),
        {"shuffle": False}, list,
    ),
    "LSTM": (_lstm, _tokens, lambda: optimizers.Adam(0.005, clip_norm=1.0), {}, list),
    "graph of two inputs and outputs": (
        _graph, _two_headed, lambda: optimizers.AdamW(0.003),
        {"loss": ["softmax_cross_entropy", "binary_cross_entropy"], "loss_weights": [1.0, 0.5]}, list,
    ),
    "weights of samples and classes": (
        lambda: _stack(layers.LayerNorm()), _vectors, lambda: optimizers.Adam(0.004),
        {"sample_weight": np.linspace(0.1, 2.0, _SAMPLES), "class_weight": "balanced"}, _stopping,
    ),
    "several best epochs": (
        lambda: _stack(layers.BatchNorm()), _vectors, lambda: optimizers.SGD(0.05, momentum=0.9), {},
        lambda: [callbacks.EarlyStopping("accuracy", patience=40)],
    ),
}  # fmt: skip


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    result = Result(f"kills of trainings, over {len(CONFIGURATIONS)} configurations")
    kills = scaled(_KILLS, scale, 3)
    rng = np.random.default_rng(seed)
    names = list(CONFIGURATIONS)
    resumed = 0
    for number, name in enumerate(names):
        own = kills // len(names) + (number < kills % len(names))
        if own:
            resumed += kill_often(name, own, rng, folder / str(number), result)
    result.note = f"{resumed:,} of them after a checkpoint, so that the run was resumed"
    return [result]


def kill_often(
    name: str, kills: int, rng: np.random.Generator, folder: Path, result: Result, plant: bool = False
) -> int:
    """Kill a training this often, then let it end, and compare. Returns how many runs were resumed."""
    folder.mkdir()
    want, seconds = _finished(name, folder / "whole.safetensors", folder)
    path, done, resumed = folder / "run.safetensors", 0, 0
    while True:
        resumed += path.exists()
        with _running(name, path, folder) as worker:
            deadline = float(rng.uniform(0, seconds / 3)) if done < kills else None
            got = _killed_or_finished(worker, deadline)
            errors = worker.stop()
        if got is None and deadline is not None and worker.process.returncode == -signal.SIGKILL:
            done += 1
            result.tried += 1
            if plant:
                path.unlink(missing_ok=True)
                with contextlib.suppress(ValueError):
                    want = want[::-1]
            continue
        if got != want:
            result.bad.append(f"{name}: after {done} kills: {got} instead of {want}\n{errors}")
            return resumed
        if done == kills:
            break
        path.unlink()  # the run has ended before it was killed, so another one begins
    if leftovers := [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]:
        result.bad.append(f"{name}: temporary files are left: {leftovers}")
    return resumed


@contextlib.contextmanager
def _running(name: str, path: Path, folder: Path) -> Iterator[Worker]:
    worker = Worker(_PART, {"name": name, "path": str(path)}, folder, OPENBLAS_NUM_THREADS="1")
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()
        worker.stop()


def _finished(name: str, path: Path, folder: Path) -> tuple[str, float]:
    """The result of a run without kills, and the seconds that its steps take."""
    with _running(name, path, folder) as worker:
        began = 0.0
        for message in worker.messages(_TIMEOUT):
            if "begins" in message:
                began = time.monotonic()
            if "digest" in message:
                return message["digest"], time.monotonic() - began
        raise AssertionError(f"{name} does not run: {worker.stop()}")


def _killed_or_finished(worker: Worker, delay: float | None) -> str | None:
    """Kill the worker this long after it began to train. The result if it ends before, else None."""
    messages = worker.messages(_TIMEOUT)
    with contextlib.suppress(TimeoutError):
        for message in messages:
            if "begins" in message and delay is not None:
                time.sleep(delay)
                worker.process.kill()
            if "digest" in message:
                return str(message["digest"])
    return None


class _Begins(callbacks.Callback):
    def on_train_begin(self, model: Any) -> None:
        tell(begins=True)


def main() -> None:
    task = read_task()
    make, data, optimizer, arguments, others = CONFIGURATIONS[task["name"]]
    path, (x, y) = Path(task["path"]), data()
    model = make()
    history = model.fit(
        x, y, optimizer=optimizer(), epochs=30, batch_size=16, verbose=0,
        callbacks=[callbacks.Checkpoint(path, minutes=0), *others(), _Begins()],
        resume_from=path if path.exists() else None, **arguments,
    )  # fmt: skip
    result = hashlib.sha256()
    for value in model.state_dict().values():
        result.update(value.tobytes())
    result.update(repr(sorted(history.items())).encode())
    tell(digest=result.hexdigest())


if __name__ == "__main__":
    main()
    sys.exit()
