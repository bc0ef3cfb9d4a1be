"""Ctrl-C once and twice at random moments, in training and in all other calls: the model is whole and can be used.

After a single Ctrl-C in fit, the weights, buffers and optimizer state are those of the same run after some number of
whole steps, bit for bit.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

import xpnet
from reliability.processes import attack, read_task, tell
from reliability.results import Result, scaled
from xpnet import callbacks, datasets, layers

_PART = "interrupts"
_FITS = {"MLP": 800, "CNN": 800, "LSTM": 200, "graph": 200}  # moments at scale 1
_OTHERS = 700
_SAMPLES, _BATCH, _EPOCHS = 96, 16, 2
_HANGS_AFTER = 20.0  # seconds


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    results = []
    for name, count in _FITS.items():
        result = Result(f"moments of Ctrl-C in fit, {name}")
        task = {"subject": name, "calls": ["fit"], "seed": seed}
        attack(_PART, task, scaled(count, scale, 2), folder, result, _HANGS_AFTER, OPENBLAS_NUM_THREADS="2")
        results.append(result)
    result = Result(f"moments of Ctrl-C in {', '.join(name for name in CALLS if name != 'fit')}")
    task = {"subject": "", "calls": [name for name in CALLS if name != "fit"], "seed": seed}
    attack(_PART, task, scaled(_OTHERS, scale, len(CALLS)), folder, result, _HANGS_AFTER, OPENBLAS_NUM_THREADS="2")
    return [*results, result]


# Models ------------------------------------------------------------------------------------------------------------


def _mlp() -> Any:
    stack = [layers.Dense(128), layers.ReLU(), layers.Dropout(0.2), layers.Dense(10)]
    return xpnet.Sequential(stack, (50,), "cpu", seed=1)


def _cnn() -> Any:
    stack = [layers.Conv2D(8, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten()]
    return xpnet.Sequential([*stack, layers.Dense(10)], (12, 12, 2), "cpu", seed=1)


def _lstm() -> Any:
    stack = [layers.Embedding(10, 8), layers.LSTM(24), layers.Dense(10)]
    return xpnet.Sequential(stack, (None,), "cpu", seed=1)


def _graph() -> Any:
    x = xpnet.Input((50,))
    h = layers.Dense(32)(x)
    h = layers.BatchNorm()(layers.Concatenate()([h, layers.Tanh()(h)]))
    return xpnet.Model(x, layers.Dense(10)(layers.Dropout(0.1)(h)), "cpu", seed=1)


_MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "MLP": (_mlp, (50,)), "CNN": (_cnn, (12, 12, 2)), "LSTM": (_lstm, (6,)), "graph": (_graph, (50,)),
}  # fmt: skip


class Subject:
    """A kind of model, data for it, and what its run has after each step if nothing interrupts it."""

    def __init__(self, name: str, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.name, (self.make, shape) = name, _MODELS[name]
        self.file, self.written = folder / f"{name}.safetensors", folder / f"{name}-written.safetensors"
        if name == "LSTM":
            self.x = self.y = rng.integers(0, 10, (_SAMPLES, *shape))
        else:
            self.x = rng.normal(size=(_SAMPLES, *shape)).astype("float32")
            self.y = rng.integers(0, 10, _SAMPLES)
        self.states: dict[str, int] = {}
        for _ in range(2):  # the second time, everything is compiled
            model = self.make()
            self.states = {digest(model): 0}
            began = time.perf_counter()
            self.fit(model, callbacks=[_Recorder(self.states)])
            self.seconds = {"fit": time.perf_counter() - began}
        self.model = model
        self.model.save(self.file)
        self.model.save(self.written)
        self.outputs = self.model.predict(self.x)

    def fit(self, model: Any, **arguments: Any) -> Any:
        return model.fit(self.x, self.y, epochs=_EPOCHS, batch_size=_BATCH, verbose=0, **arguments)

    def time_of(self, call: str) -> float:
        """The seconds that this call takes, on a copy."""
        if call not in self.seconds:
            for _ in range(2):
                model = self.make()
                model.fit(self.x[:32], self.y[:32], verbose=0)
                began = time.perf_counter()
                CALLS[call](self, model)
                self.seconds[call] = time.perf_counter() - began
        return self.seconds[call]


class _Recorder(callbacks.Callback):
    def __init__(self, states: dict[str, int]) -> None:
        self.states = states

    def on_step_end(self, model: Any, step: int) -> None:
        self.states[digest(model)] = step


def digest(model: Any) -> str:
    """Of all that training changes: weights, buffers, the state of the optimizer, and the number of steps."""
    result = hashlib.sha256()
    for value in model.state_dict().values():
        result.update(value.tobytes())
    state = model._state
    slots = getattr(getattr(state, "optimizer_state", None), "slots", {})
    for name in sorted(slots):
        if np.asarray(slots[name]).any():  # before the first step there are none
            result.update(name.encode() + np.asarray(slots[name]).tobytes())
    result.update(str(state.step).encode())
    return result.hexdigest()


# Calls -------------------------------------------------------------------------------------------------------------


def _generate(subject: Subject, model: Any) -> None:
    if subject.name == "LSTM":
        xpnet.generate(model, subject.x[:8], 12)


CALLS: dict[str, Callable[[Subject, Any], Any]] = {
    "fit": lambda subject, model: subject.fit(model),
    "fit of a stream": lambda subject, model: model.fit(
        datasets.Stream(subject.x, subject.y, window_bytes=2**12), batch_size=_BATCH, verbose=0
    ),
    "predict": lambda subject, model: [model.predict(subject.x, batch_size=16) for _ in range(3)],
    "evaluate": lambda subject, model: [model.evaluate(subject.x, subject.y, batch_size=16) for _ in range(3)],
    "save": lambda subject, model: [model.save(subject.written) for _ in range(3)],
    "load": lambda subject, model: [xpnet.load(subject.file, "cpu") for _ in range(3)],
    "generate": _generate,
    "train_on_batch": lambda subject, model: [
        model.train_on_batch(subject.x[:16], subject.y[:16]) for _ in range(6)
    ],
}  # fmt: skip


# Presses -----------------------------------------------------------------------------------------------------------

_PRESSER = """
import os, sys, time
for line in sys.stdin:
    for delay in map(float, line.split()):
        time.sleep(delay)
        os.kill(int(sys.argv[1]), 2)
    print("done", flush=True)
"""


class Presser:
    """Presses Ctrl-C after some delays, from a thread or from another process. `done` is true after the last."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", _PRESSER, str(os.getpid())], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
        self.done: list[bool] = []

    def press(self, delays: list[float], from_process: bool) -> None:
        self.done = []
        threading.Thread(target=self._press, args=(delays, from_process, self.done), daemon=True).start()

    def _press(self, delays: list[float], from_process: bool, done: list[bool]) -> None:
        if from_process:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(" ".join(map(str, delays)) + "\n")
            self.process.stdin.flush()
            self.process.stdout.readline()
        else:
            for delay in delays:
                time.sleep(delay)
                os.kill(os.getpid(), 2)
        done.append(True)

    def wait(self) -> None:
        while not self.done:
            time.sleep(1e-4)
        time.sleep(1e-3)  # the signal of another process may arrive a little later


class Outcome:
    """What a call did: its result, whether it ended before the first press, and whether Ctrl-C was raised in it."""

    def __init__(self, presser: Presser, call: Callable[[], Any], delays: list[float], from_process: bool) -> None:
        self.result: Any = None
        self.raised = self.ended = False
        self.error: BaseException | None = None
        # A press may come at any moment of this function, also in its handlers: there are two presses at most.
        try:
            try:
                try:
                    presser.press(delays, from_process)
                    self.result = call()
                    self.ended = True
                    presser.wait()
                except KeyboardInterrupt:
                    self.raised = True
                    presser.wait()
                except BaseException as error:
                    self.error = error
                    presser.wait()
                presser.wait()
            except KeyboardInterrupt:
                self.raised = True
                presser.wait()
        except KeyboardInterrupt:
            self.raised = True
            presser.wait()


def _in_thread(work: Callable[[], Any]) -> list[Any]:
    """[the result] of a call in another thread, or [] if it has none after 15 s, because a lock is held."""
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(15)
    return out


def _blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def tried(subject: Subject, name: str, presser: Presser, rng: np.random.Generator, plant: bool) -> str | None:
    """What went wrong after Ctrl-C in this call, or None."""
    model = subject.make()
    if name != "fit":
        model.fit(subject.x[:32], subject.y[:32], verbose=0)
    seconds = subject.time_of(name)
    delays = [float(rng.uniform(0, seconds * 1.1))]
    twice, stop = bool(rng.random() < 0.5), bool(rng.random() < 0.3)
    if twice:
        delays.append(float(rng.choice([0, 1e-5, 1e-4, rng.uniform(0, seconds / 3)])))
    before, blas = model.state_dict(), _blas_threads()

    def call() -> Any:
        if plant:
            model.context.store.values[:1] += 1
        if name == "fit" and stop:
            return subject.fit(model, on_interrupt="stop")
        return CALLS[name](subject, model)

    outcome = Outcome(presser, call, delays, bool(rng.random() < 0.5))
    if outcome.error is not None:
        return f"{type(outcome.error).__name__}: {outcome.error}"
    if not outcome.raised and not outcome.ended:
        return "neither a result nor KeyboardInterrupt"
    if not outcome.raised and not (name == "fit" and stop and outcome.result.stopped == "interrupted"):
        return "Ctrl-C was swallowed"
    if blas != _blas_threads() or xpnet.get_backend("cpu").threads.region_workers is not None:
        return "the BLAS has another number of threads"
    if leftover := [t.name for t in threading.enumerate() if t.name.startswith("xpnet-stream") and t.is_alive()]:
        time.sleep(0.2)
        if leftover := [t.name for t in threading.enumerate() if t.name in leftover]:
            return f"threads are left: {leftover}"
    if model.context.guard.in_training:
        return "the model is still in training"
    values = model.state_dict()
    if not all(np.isfinite(value).all() for value in values.values()):
        return "weights are NaN"
    if name == "fit" and not twice:
        step = subject.states.get(digest(model))
        if step is None:
            return f"the state is that of no whole step; it says {model._state.step}"
        per_epoch = _SAMPLES // _BATCH
        epochs = 0 if model.history is None else len(model.history.get("loss", []))
        if epochs not in (step // per_epoch, -(-step // per_epoch) - 1):
            return f"the history has {epochs} epochs after {step} steps"
    trains = name in ("fit", "fit of a stream", "train_on_batch")
    if not trains and any(not np.array_equal(before[key], value) for key, value in values.items()):
        return "the weights have changed"
    if name == "save":
        leftovers = [path.name for path in subject.written.parent.iterdir() if path.name.endswith(".tmp")]
        loaded = xpnet.load(subject.written, "cpu")
        loaded.save(subject.written)
        if leftovers and not twice:
            return f"temporary files are left: {leftovers}"
    predicted = _in_thread(lambda: model.predict(subject.x[:20]))
    if not predicted:
        return "the lock of the model is held"
    twin = subject.make()
    twin.load_state_dict(values)
    if not np.array_equal(predicted[0], twin.predict(subject.x[:20])):
        return "another prediction than that of a model with the same weights"
    history = model.fit(subject.x[:32], subject.y[:32], batch_size=_BATCH, verbose=0)
    if history.stopped is not None or not np.isfinite(history["loss"]).all():
        return f"fit afterwards: {history}, {history.stopped}"
    return None


def main() -> None:
    task = read_task()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        names = [task["subject"]] if task["subject"] else list(_MODELS)
        subjects = {name: Subject(name, Path(folder)) for name in names}
        presser = Presser()
        for number in range(task["first"], task["count"]):
            rng = np.random.default_rng([task["seed"], number, len(names)])
            call = task["calls"][number % len(task["calls"])]
            subject = subjects["LSTM" if call == "generate" else names[int(rng.integers(len(names)))]]
            tell(case=f"{number}: Ctrl-C in {call} of {subject.name}")
            tell(bad=tried(subject, call, presser, rng, bool(task.get("plant"))))
        presser.process.kill()


if __name__ == "__main__":
    main()
