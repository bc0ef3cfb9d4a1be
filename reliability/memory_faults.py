"""Memory is exhausted at many moments, on the CPU (RLIMIT_AS) and on the emulated GPU: DeviceMemoryError, and no harm.

After each failure the weights are finite, those of a call that must not change them are unchanged, and the same call
with a smaller batch succeeds once there is memory, with the right numbers.
"""

import contextlib
import ctypes
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import xpnet
from reliability.processes import attack, read_task, tell
from reliability.results import Result, scaled
from xpnet import callbacks, datasets, layers
from xpnet.errors import DeviceMemoryError

_PART = "memory_faults"
_CASES = {"cpu": 3000, "emulated": 400}  # at scale 1
_SAMPLES, _VOCABULARY = 512, 40


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    results = []
    for device, count in _CASES.items():
        if device == "emulated" and shutil.which("g++") is None:
            continue
        result = Result(f"moments at which the memory of {device} was exhausted")
        task = {"device": device, "seed": seed}
        attack(_PART, task, scaled(count, scale, 8), folder, result, 60.0, OPENBLAS_NUM_THREADS="1")
        results.append(result)
    return results


# Shortages ---------------------------------------------------------------------------------------------------------


class AddressSpace:
    """A limit of the address space of this process, `extra` bytes above what it uses."""

    most = 2**28

    def __init__(self) -> None:
        import resource

        self._resource = resource
        self._libc = ctypes.CDLL(None)
        self._libc.mallopt(-3, 2**12)  # M_MMAP_THRESHOLD: larger arrays are mapped, so that freed ones do not help

    @contextlib.contextmanager
    def shortage(self, extra: int) -> Iterator[None]:
        self._libc.malloc_trim(0)
        hard = self._resource.getrlimit(self._resource.RLIMIT_AS)[1]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        self._resource.setrlimit(self._resource.RLIMIT_AS, (pages * self._resource.getpagesize() + extra, hard))
        try:
            yield
        finally:
            self._resource.setrlimit(self._resource.RLIMIT_AS, (hard, hard))


class PoolLimit:
    """A limit of the pools of an emulated GPU, `extra` bytes above what they use."""

    most = 2**24

    def __init__(self, backend: Any) -> None:
        self._cupy = backend.cupy

    @contextlib.contextmanager
    def shortage(self, extra: int) -> Iterator[None]:
        self._cupy.memory_limit = sum(pool.used_bytes() for pool in self._cupy.pools) + extra
        try:
            yield
        finally:
            self._cupy.memory_limit = None


# Calls -------------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model and data for it. integers: whether it takes tokens."""

    make: Callable[[], Any]
    x: Any
    y: Any
    integers: bool = False


def _subjects(backend: Any) -> dict[str, Subject]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, _SAMPLES)

    def mlp() -> Any:
        stack = [layers.Dense(300), layers.ReLU(), layers.Dropout(0.2), layers.Dense(10)]
        return xpnet.Sequential(stack, (200,), backend, seed=0)

    def cnn() -> Any:
        stack = [layers.Conv2D(8, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten()]
        return xpnet.Sequential([*stack, layers.Dense(10)], (12, 12, 2), backend, seed=0)

    def graph() -> Any:
        x = xpnet.Input((200,))
        h = layers.Dense(64)(x)
        h = layers.Concatenate()([h, layers.Tanh()(h), layers.Dense(32)(x)])
        return xpnet.Model(x, layers.Dense(10)(h), backend, seed=0)

    def lstm() -> Any:
        stack = [layers.Embedding(_VOCABULARY, 16), layers.LSTM(32), layers.Dense(_VOCABULARY)]
        return xpnet.Sequential(stack, (None,), backend, seed=0)

    vectors = rng.normal(size=(_SAMPLES, 200)).astype("float32")
    images = rng.normal(size=(_SAMPLES, 12, 12, 2)).astype("float32")
    tokens = rng.integers(0, _VOCABULARY, (_SAMPLES, 8))
    return {
        "MLP": Subject(mlp, vectors, y),
        "CNN": Subject(cnn, images, y),
        "graph": Subject(graph, vectors, y),
        "LSTM": Subject(lstm, tokens, tokens, integers=True),
    }


class Call(NamedTuple):
    """A call under a shortage. batched: whether the error must name a batch size to try."""

    run: Callable[["Case", int], Any]
    trains: bool = False
    batched: bool = False
    subjects: tuple[str, ...] = ("MLP", "CNN", "graph", "LSTM")


class Case:
    """What a call may use: a trained model, its data, and files of it."""

    def __init__(self, subject: Subject, folder: Path, backend: Any) -> None:
        self.subject, self.x, self.y, self.backend = subject, subject.x, subject.y, backend
        self.model_file, self.checkpoint, self.onnx = folder / "model", folder / "run", folder / "model.onnx"
        self.arrays = folder / "x.idx"
        writes = not folder.exists()
        if writes:
            folder.mkdir()
            np.save(folder / "x.npy", self.x)
            datasets.write_idx(self.arrays, self.x.astype("int32" if subject.integers else "float32"))
        self.memmap = np.load(folder / "x.npy", mmap_mode="r")
        self.model = subject.make()
        checkpoint = [callbacks.Checkpoint(self.checkpoint)] if writes else []
        self.model.fit(self.x[:64], self.y[:64], batch_size=32, verbose=0, callbacks=checkpoint)
        if writes:
            self.model.save(self.model_file)
            if not subject.integers:
                xpnet.export_onnx(self.model, self.onnx)


CALLS: dict[str, Call] = {
    "build": Call(lambda c, n: c.subject.make()),
    "fit": Call(lambda c, n: c.model.fit(c.x, c.y, epochs=3, batch_size=n, verbose=0), trains=True, batched=True),
    "fit, validate": Call(
        lambda c, n: c.model.fit(c.x, c.y, batch_size=n, validation_split=0.5, verbose=0,
                                 callbacks=[callbacks.EarlyStopping()]),
        trains=True, batched=True,
    ),
    "fit, stream": Call(
        lambda c, n: c.model.fit(datasets.Stream(c.memmap, c.y, window_bytes=2**17), batch_size=n, verbose=0),
        trains=True, batched=True,
    ),
    "resume": Call(
        lambda c, n: c.subject.make().fit(c.x[:64], c.y[:64], epochs=2, batch_size=32, resume_from=c.checkpoint,
                                          verbose=0)
    ),
    "train_on_batch": Call(lambda c, n: c.model.train_on_batch(c.x[:n], c.y[:n]), trains=True),
    "by hand": Call(
        lambda c, n: (
            c.model.forward(c.x[:n], training=True),
            c.model.backward(np.ones((min(n, _SAMPLES), *c.y.shape[1:], c.model.output_shape[-1]))),
            c.model.apply_gradients(),
        ),
        trains=True,
    ),
    "predict": Call(lambda c, n: c.model.predict(c.x, batch_size=n), batched=True),
    "predict_proba": Call(lambda c, n: c.model.predict_proba(c.x, batch_size=n), batched=True),
    "evaluate": Call(lambda c, n: c.model.evaluate(c.x, c.y, batch_size=n), batched=True),
    "activations": Call(lambda c, n: c.model.activations(c.x[:n])),
    "generate": Call(lambda c, n: xpnet.generate(c.model, c.x[:n], 6), subjects=("LSTM",)),
    "save": Call(lambda c, n: c.model.save(c.model_file)),
    "load": Call(lambda c, n: xpnet.load(c.model_file, c.backend)),
    "state": Call(lambda c, n: c.model.load_state_dict(c.model.state_dict())),
    "check_gradients": Call(
        lambda c, n: xpnet.check_gradients(c.model, c.x[:4], c.y[:4], "softmax_cross_entropy", samples=2)
    ),
    "summary": Call(lambda c, n: c.model.summary(batch_size=n)),
    "read_idx": Call(lambda c, n: datasets.read_idx(c.arrays)),
    "write_idx": Call(lambda c, n: datasets.write_idx(c.arrays, c.x.astype("int32"))),
    "export": Call(lambda c, n: xpnet.export_onnx(c.model, c.onnx), subjects=("MLP", "CNN", "graph")),
    "import": Call(lambda c, n: xpnet.import_onnx(c.onnx, backend=c.backend), subjects=("MLP", "CNN", "graph")),
}  # fmt: skip


def tried(call: Call, case: Case, limits: Any, extra: int, batch: int) -> str | None:
    """What went wrong when this call ran out of memory, or None."""
    before, want = case.model.state_dict(), case.model.predict(case.x[:32])
    failure: BaseException | None = None
    try:
        with limits.shortage(extra):
            call.run(case, batch)
    except BaseException as error:
        failure = error
    if failure is not None:
        if not isinstance(failure, DeviceMemoryError):
            return f"{type(failure).__name__} instead of DeviceMemoryError: {failure}"
        text = str(failure)
        failure = None  # its traceback has the arrays
        if not re.search(r"[\d.,]+ [KMGT]?i?(B|bytes)", text):
            return f"the error names no amount of memory: {text}"
        if call.batched and batch > 1 and not re.search(r"try batch_size=\d+", text):
            return f"the error suggests no batch size: {text}"
    after = case.model.state_dict()
    if not all(np.isfinite(value).all() for value in after.values()):
        return "weights are NaN"
    if not call.trains:
        if any(not np.array_equal(before[name], value) for name, value in after.items()):
            return "the weights have changed"
        if not np.array_equal(case.model.predict(case.x[:32]), want):
            return "another prediction"
    try:
        call.run(case, max(1, batch // 2))
    except BaseException as error:
        return f"afterwards, with memory and half the batch: {type(error).__name__}: {error}"
    after = case.model.state_dict()
    if not all(np.isfinite(value).all() for value in after.values()):
        return "weights are NaN after the next call"
    twin = case.subject.make()
    twin.load_state_dict(after)
    if not np.allclose(case.model.predict(case.x[:40]), twin.predict(case.x[:40]), rtol=1e-5, atol=1e-6):
        return "afterwards, predictions are wrong"
    return None


def main() -> None:
    task = read_task()
    if task["device"] == "cpu":
        backend: Any = xpnet.get_backend("cpu")
        limits: Any = AddressSpace()
    else:
        from emulated_cuda import EmulatedGPU

        backend = EmulatedGPU()
        limits = PoolLimit(backend)
    plant = task.get("plant")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        subjects = _subjects(backend)
        folders = {name: Path(folder, name) for name in subjects}
        cases = {name: Case(subject, folders[name], backend) for name, subject in subjects.items()}
        for name, case in cases.items():  # compile, and start threads
            for call in CALLS.values():
                if name in call.subjects and not plant:
                    call.run(case, 64)
        for number in range(task["first"], task["count"]):
            rng = np.random.default_rng([task["seed"], number])
            name = str(rng.choice(list(CALLS)))
            call = CALLS[name]
            subject = str(rng.choice(call.subjects))
            extra, batch = int(2 ** rng.uniform(12, np.log2(limits.most))), int(2 ** rng.integers(0, 10))
            tell(case=f"{number}: {name} of {subject}, batch {batch}, {extra:,} bytes")
            case = Case(subjects[subject], folders[subject], backend)
            if plant:
                call = call._replace(run=lambda c, n: [][1])
            bad = tried(call, case, limits, extra, batch)
            if bad is None and getattr(backend.xp, "faults", None):
                bad = f"memory faults: {backend.xp.faults}"
                backend.xp.faults.clear()
            tell(bad=bad)


if __name__ == "__main__":
    main()
    sys.exit()
