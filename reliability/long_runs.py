"""Long runs: memory, objects, file handles and threads stay the same over many steps and many models.

Each run has a process of its own. A round of it is repeated, and after a warm-up the process is measured regularly.
"""

import array
import collections
import gc
import itertools
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy

import xpnet
from reliability.processes import in_a_process
from reliability.results import Result, scaled
from xpnet import augment, callbacks, datasets, layers
from xpnet.training import captured_inference, captured_step

#: What may grow between the first and the last quarter of the samples: MiB, and objects of caches of Python's own.
ALLOWED = {"memory": 1.0, "objects": 20}
SAMPLES = 40

Report = tuple[int, list[str], str]  # the steps, what went wrong, and the growth


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    results = []
    for name, (cases, count, least, seconds, _) in CASES.items():
        steps = scaled(count, scale, least)
        results.append(in_a_process("reliability.long_runs", name, cases, steps, seed, 60 + seconds * steps / count))
    return results


# Measurements ---------------------------------------------------------------------------------------------------------


def memory() -> float:
    """The resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured() -> dict[str, float]:
    gc.collect()
    return {
        "objects": len(gc.get_objects()),
        "file handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "memory": memory(),
    }


def watched(steps: int, round_: Callable[[int], int], more: Callable[[], dict[str, float]] = dict) -> Report:
    """Call round_(0), round_(1), …, which return their numbers of steps, until there were `steps`; measure in between.

    The first half of the steps is the warm-up. more: further quantities that must stay the same.
    """
    done, table = 0, dict[str, "array.array[float]"]()  # arrays, since new objects would be counted
    for i in itertools.count():
        if done >= steps:
            break
        done += round_(i)
        if done >= steps * (0.5 + 0.5 * len(table.get("steps", ())) / SAMPLES):
            add_sample(table, done, more())
    return done, *judged(table)


def add_sample(table: dict[str, "array.array[float]"], steps: int, more: dict[str, float]) -> None:
    for name in more:
        table.setdefault(name, array.array("d"))  # before the objects are counted, of which it is one
    for name, value in ({"steps": float(steps)} | measured() | more).items():
        table.setdefault(name, array.array("d")).append(value)


def judged(table: dict[str, "array.array[float]"]) -> tuple[list[str], str]:
    """What grew from the first to the last quarter of the samples, and the growth of the memory."""
    counts = table.pop("steps")
    quarter, growth, bad = max(1, len(counts) // 4), dict[str, float](), list[str]()
    for name, values in table.items():
        growth[name] = float(numpy.median(values[-quarter:]) - numpy.median(values[:quarter]))
        if growth[name] > ALLOWED.get(name, 0):
            line = f"{name} grew by {growth[name]:.6g} in {counts[-1] - counts[0]:,.0f} steps"
            bad.append(f"{line}: {', '.join(f'{value:.6g}' for value in values[:: max(1, len(values) // 10)])}")
    memories = table["memory"]
    slope = 1024 * numpy.polyfit(numpy.array(counts) / 1000, memories, 1)[0] if counts[-1] > counts[0] else 0.0
    spread = max(memories) - min(memories)
    note = (
        f"memory {memories[-1]:.0f} MiB, {growth['memory']:+.2f}, within {spread:.2f}, {slope:+.2f} KiB in 1,000 steps"
    )
    return bad, note


# Training -------------------------------------------------------------------------------------------------------------


def data(shape: tuple[int, ...], rows: int, seed: int, classes: int = 3) -> tuple[Any, Any]:
    draw = numpy.random.default_rng([seed, rows])
    return draw.normal(size=(rows, *shape)).astype("float32"), draw.integers(0, classes, rows)


def mlp(backend: Any = "cpu") -> xpnet.Sequential:
    stack = [layers.Dense(8), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2), layers.Dense(3)]
    return xpnet.Sequential(stack, (5,), backend)


def cnn(backend: Any = "cpu") -> xpnet.Sequential:
    stack = [layers.Conv2D(3, 3), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten(), layers.Dense(3)]
    return xpnet.Sequential(stack, (6, 6, 1), backend)


def lstm(backend: Any = "cpu") -> xpnet.Sequential:
    return xpnet.Sequential([layers.LSTM(4, return_sequences=False), layers.Dense(3)], (3, 2), backend)


def transformer(backend: Any = "cpu") -> xpnet.Sequential:
    stack = [layers.Dense(8), layers.TransformerBlock(2), layers.Flatten(), layers.Dense(3)]
    return xpnet.Sequential(stack, (3, 2), backend)


def graph(backend: Any = "cpu") -> xpnet.Model:
    x = xpnet.Input((5,))
    shared = layers.Dense(5)
    h = layers.Add()([layers.ReLU()(shared(x)), shared(layers.Tanh()(x))])
    return xpnet.Model(x, layers.Dense(3)(layers.Concatenate()([h, x])), backend)


MAKERS: tuple[Callable[..., Any], ...] = (mlp, cnn, lstm, transformer, graph)


def fits(makers: tuple[Callable[..., Any], ...], steps: int, seed: int, capture: bool = True) -> Report:
    """Fits of 200 steps, by one model of each kind in turn, with validation in every fifth."""
    if not capture:
        os.environ["XPNET_CAPTURE"] = "0"
    models = [make() for make in makers]
    sets = [data(model.input_shape, 40, seed) for model in models]

    def round_(i: int) -> int:
        model, (x, y) = models[i % len(models)], sets[i % len(models)]
        validation = (x, y) if i % 5 == 0 else None
        model.fit(x, y, epochs=40, batch_size=8, validation_data=validation, verbose=0)
        return 200

    return watched(steps, round_)


def one_fit(steps: int, seed: int) -> Report:
    """A single fit with many epochs. Only its history, lists of numbers, may grow."""
    model = mlp()
    x, y = data((5,), 800, seed)
    table, every = dict[str, Any](), max(1, steps // 100 // (2 * SAMPLES))

    class Measure(callbacks.Callback):
        def on_epoch_end(self, model: Any, epoch: int, logs: Any) -> None:
            if epoch * 100 >= steps // 2 and epoch % every == 0:
                add_sample(table, 100 * epoch, {})

    model.fit(x, y, epochs=max(4, steps // 100), batch_size=8, callbacks=[Measure()], verbose=0)
    return steps, *judged(table)


def streams(steps: int, seed: int) -> Report:
    """Fits on iterables of batches, on functions that return them, on a Stream, and on a memory-mapped file."""
    model, (x, y) = mlp(), data((5,), 200, seed)
    with tempfile.TemporaryDirectory() as folder:
        numpy.save(Path(folder, "x.npy"), x)
        mapped = numpy.load(Path(folder, "x.npy"), mmap_mode="r")

        def batches() -> Iterator[tuple[Any, Any]]:
            for i in range(0, 200, 10):
                yield x[i : i + 10], y[i : i + 10]

        sources: list[Callable[[], tuple[Any, ...]]] = [
            lambda: (batches,), lambda: (list(batches()),), lambda: (datasets.Stream(mapped, y),), lambda: (mapped, y)
        ]  # fmt: skip

        def round_(i: int) -> int:
            model.fit(*sources[i % 4](), epochs=5, batch_size=10, verbose=0)
            return 100

        return watched(steps, round_)


def evaluations(steps: int, seed: int) -> Report:
    """Predictions and evaluations of batches of several sizes."""
    captured_inference._EAGER_ON_CPU = 20  # captures predictions of all sizes in the warm-up
    models = [make() for make in MAKERS]
    sets = [data(model.input_shape, 40, seed) for model in models]
    for model, (x, y) in zip(models, sets, strict=True):
        model.fit(x, y, verbose=0)

    def round_(i: int) -> int:
        model, (x, y) = models[i % len(models)], sets[i % len(models)]
        for rows in (1, 2, 7, 40, 8, 33):
            model.predict(x[:rows])
            model.predict_proba(x[:rows], batch_size=5)
            model.evaluate(x[:rows], y[:rows], batch_size=11)
        model.activations(x[:3])
        return 18

    return watched(steps, round_)


def by_hand(steps: int, seed: int) -> Report:
    """train_on_batch, and forward, backward and apply_gradients."""
    models = [make() for make in MAKERS]
    sets = [data(model.input_shape, 40, seed) for model in models]

    def round_(i: int) -> int:
        model, (x, y) = models[i % len(models)], sets[i % len(models)]
        for rows in (8, 8, 5, 40):
            model.train_on_batch(x[:rows], y[:rows], "softmax_cross_entropy", "adam")
            model.forward(x[:rows], training=True)
            model.backward(numpy.ones((rows, 3), numpy.float32))
            model.apply_gradients("adam")
        return 8

    return watched(steps, round_)


def checkpoints(steps: int, seed: int) -> Report:
    """Fits that write checkpoints and are resumed from them, and models that are saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path, (x, y) = Path(folder, "state.ckpt"), data((5,), 40, seed)

        def round_(i: int) -> int:
            path.unlink(missing_ok=True)
            model = (mlp, graph)[i % 2]()
            arguments: dict[str, Any] = {"batch_size": 8, "verbose": 0}
            model.fit(x, y, epochs=4, callbacks=[callbacks.Checkpoint(path)], **arguments)
            twin = (mlp, graph)[i % 2]()
            twin.fit(x, y, epochs=8, callbacks=[callbacks.Checkpoint(path)], resume_from=path, **arguments)
            twin.save(Path(folder, "model.safetensors"))
            xpnet.load(Path(folder, "model.safetensors"), "cpu").predict(x)
            return 40

        return watched(steps, round_)


def with_callbacks(steps: int, seed: int) -> Report:
    """Fits with all callbacks, and with a distortion of images."""
    with tempfile.TemporaryDirectory() as folder:
        x, y = data((6, 6, 1), 40, seed)
        stack = [augment.RandomAffine(shift=0.1), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)]
        model = xpnet.Sequential(stack, (6, 6, 1), "cpu")

        def round_(i: int) -> int:
            used = [
                callbacks.EarlyStopping("loss", patience=100), callbacks.CSVLogger(Path(folder, f"{i % 3}.csv")),
                callbacks.ReduceLROnPlateau("loss", patience=1), callbacks.Checkpoint(Path(folder, "state")),
            ]  # fmt: skip
            model.fit(x, y, epochs=10, batch_size=8, callbacks=used, validation_split=0.2, verbose=0)
            return 40

        return watched(steps, round_)


def errors(steps: int, seed: int) -> Report:
    """Calls that are refused, and trainings that diverge, between those that succeed."""
    model, (x, y) = mlp(), data((5,), 40, seed)

    def round_(i: int) -> int:
        refused: list[Callable[[], Any]] = [
            lambda: model.fit(x, y[:-1], verbose=0), lambda: model.fit(x * numpy.nan, y, verbose=0),
            lambda: model.predict(x[:, :2]), lambda: model.fit(x, y, loss="mse", optimizer="nothing", verbose=0),
            lambda: model.fit(x, y, optimizer=xpnet.optimizers.SGD(1e30), epochs=3, batch_size=8, verbose=0),
            lambda: model.load_state_dict({}), lambda: xpnet.load("/nowhere"),
        ]  # fmt: skip
        for call in refused:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call()
            except xpnet.errors.XpnetError:
                pass
        model.fit(x, y, batch_size=8, epochs=4, verbose=0)
        return 20

    return watched(steps, round_)


# Models that are dropped ----------------------------------------------------------------------------------------------


def of_xpnet() -> dict[str, float]:
    """The number of objects of each class of xpnet that depends on models."""
    classes = map(type, gc.get_objects())
    counts = collections.Counter(cls.__qualname__ for cls in classes if str(cls.__module__).startswith("xpnet."))
    return {f"objects of {name}": count for name, count in counts.items()}


def dropped(count: int, seed: int) -> Report:
    """Models that are built, trained for a step, used and dropped."""
    with tempfile.TemporaryDirectory() as folder:

        def round_(i: int) -> int:
            model = MAKERS[i % len(MAKERS)]()
            x, y = data(model.input_shape, 12, seed)
            model.fit(x, y, batch_size=12, verbose=0)
            if i % 3 == 0:
                model.predict(x)
                model.save(Path(folder, "model.safetensors"))
                xpnet.load(Path(folder, "model.safetensors"), "cpu").evaluate(x, y, "softmax_cross_entropy")
            if i % 7 == 0:
                model.fit(x, y, batch_size=4, epochs=20, verbose=0)  # is captured
                thread = threading.Thread(target=lambda: model.predict(x))
                thread.start()
                thread.join()
            return 1

        return watched(count, round_, of_xpnet)


# The emulated GPU -----------------------------------------------------------------------------------------------------


def emulated() -> Any:
    from emulated_cuda import EmulatedGPU

    captured_step._MIN_STEPS = 3  # captures short runs, although that does not pay
    captured_inference._EAGER_ON_GPU = 1  # captures predictions of all sizes in the warm-up
    return EmulatedGPU()


def on_emulated_gpu(steps: int, seed: int) -> Report:
    """Fits, predictions and evaluations, with models that stay."""
    backend = emulated()
    models = [make(backend) for make in MAKERS]
    sets = [data(model.input_shape, 40, seed) for model in models]

    def round_(i: int) -> int:
        model, (x, y) = models[i % len(models)], sets[i % len(models)]
        model.fit(x, y, epochs=2, batch_size=8, verbose=0)
        model.predict(x[: 1 + i % 7])  # with the evaluation no more sizes than a model keeps captures of
        model.evaluate(x, y)
        forget_calls(backend)
        return 10

    return watched(steps, round_, lambda: pools(backend))


def forget_calls(backend: Any) -> None:
    """Empty the lists in which the emulation notes every call of a kernel and of a matrix product."""
    for noted in (backend.cupy.launches, backend.cupy.cublas.calls, backend.cupy.cublaslt.calls):
        noted.clear()


def pools(backend: Any) -> dict[str, float]:
    """The blocks and bytes of all pools of the emulated GPU."""
    alive = list(backend.cupy.pools)
    return {
        "blocks": sum(len(slab.blocks) for each in alive for slab in each.slabs),
        "used bytes": sum(each.used_bytes() for each in alive),
        "bytes from the driver": sum(each.total_bytes() for each in alive),
        "pools": len(alive),
        "faults": len(backend.cupy.faults),
    }


def dropped_on_emulated_gpu(count: int, seed: int) -> Report:
    """Models on the GPU that are trained, captured and dropped leave no blocks."""
    backend = emulated()
    pool = backend.xp.get_default_memory_pool()

    def round_(i: int) -> int:
        model = MAKERS[i % len(MAKERS)](backend)
        x, y = data(model.input_shape, 12, seed)
        model.fit(x, y, batch_size=4, epochs=2 if i % 3 else 4, verbose=0)
        model.predict(x)
        forget_calls(backend)
        for products in backend._products.values():
            # The backend keeps one for each alignment, and so for the addresses that the pool happens to give.
            products._lt_products.clear()
        return 1

    done, bad, note = watched(count, round_, lambda: pools(backend) | of_xpnet())
    gc.collect()
    backend.close()
    return done, bad, f"{note}; emulated, {pool.used_bytes():,} bytes are used after the last model"


#: {name: (what is counted, steps at scale 1, the least steps with a complete warm-up, seconds for all, the function)}.
CASES: dict[str, tuple[str, int, int, float, Callable[[int, int], Report]]] = {
    "captured": ("steps of captured fits", 100_000, 1_600, 300, lambda n, seed: fits((mlp, cnn), n, seed)),
    "graphs": ("steps of captured fits of graph models", 60_000, 1_600, 300, lambda n, seed: fits((graph,), n, seed)),
    "sequences": ("steps of captured fits of LSTMs and transformers", 60_000, 1_600, 400,
                  lambda n, seed: fits((lstm, transformer), n, seed)),
    "eager": ("steps of eager fits", 80_000, 1_600, 500, lambda n, seed: fits(MAKERS, n, seed, capture=False)),
    "one_fit": ("steps of a single fit", 60_000, 1_600, 300, one_fit),
    "streams": ("steps of fits on streams", 50_000, 1_600, 300, streams),
    "by_hand": ("steps by train_on_batch and by hand", 30_000, 1_600, 300, by_hand),
    "checkpoints": ("steps with checkpoints, resuming, saving and loading", 20_000, 1_600, 400, checkpoints),
    "callbacks": ("steps with callbacks", 20_000, 1_600, 300, with_callbacks),
    "errors": ("steps between errors", 20_000, 1_600, 300, errors),
    "evaluations": ("predictions and evaluations", 60_000, 4_000, 400, evaluations),
    "dropped": ("models trained and dropped", 2_000, 250, 400, dropped),
    "emulated": ("steps on the emulated GPU", 4_000, 1_500, 600, on_emulated_gpu),
    "dropped_emulated": ("models trained and dropped on the emulated GPU", 200, 80, 600, dropped_on_emulated_gpu),
}  # fmt: skip
