"""A process that trains a net with one hidden layer, with xpnet or as a plain NumPy script, for `benchmarks.tiny_nets`.

    python -m benchmarks.tiny_worker numpy 2-8-2 32 2000 20         # batch size, samples, epochs
    python -m benchmarks.tiny_worker ROOT 2-8-2 32 2000 20          # with the xpnet of this source tree

It reads one question per line and prints the answer. `fit`: the seconds per step of a whole training, from the same
initial weights each time.  `loss`, `accuracy`: those of the last epoch of the last training.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.numpy_script import train

RATE = 0.1

History = dict[str, list[float]]
Start = Callable[[], Callable[[], History]]  # prepares a training, and returns the function to measure


def problem(widths: tuple[int, int, int], samples: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(x, labels, initial weights) in float32, the same in every process. The labels are a linear function of x."""
    rng = np.random.default_rng(0)
    inputs, hidden, classes = widths
    x = rng.standard_normal((samples, inputs), dtype=np.float32)
    labels = (x @ rng.standard_normal((inputs, classes), dtype=np.float32)).argmax(axis=1)
    w1, w2 = (
        rng.standard_normal((rows, columns), dtype=np.float32) * np.float32((2 / rows) ** 0.5)
        for rows, columns in ((inputs, hidden), (hidden, classes))
    )
    return x, labels, [w1, np.zeros(hidden, np.float32), w2, np.zeros(classes, np.float32)]


def by_numpy(widths: tuple[int, int, int], batch_size: int, samples: int, epochs: int) -> Start:
    x, y, weights = problem(widths, samples)

    def start() -> Callable[[], History]:
        rng = np.random.default_rng(0)
        return lambda: train(x, y, weights, RATE, epochs, batch_size, rng)[0]

    return start


def by_xpnet(widths: tuple[int, int, int], batch_size: int, samples: int, epochs: int) -> Start:
    import xpnet
    from xpnet import layers, optimizers

    x, y, weights = problem(widths, samples)
    names = ("0.weight", "0.bias", "2.weight", "2.bias")

    def start() -> Callable[[], History]:
        stack = [layers.Dense(widths[1]), layers.ReLU(), layers.Dense(widths[2])]
        model = xpnet.Sequential(stack, input_shape=widths[:1], backend="cpu")
        model.load_state_dict(dict(zip(names, weights, strict=True)))
        optimizer = optimizers.SGD(RATE)
        return lambda: model.fit(x, y, optimizer=optimizer, epochs=epochs, batch_size=batch_size, verbose=0)

    return start


def main(kind: str, net: str, *numbers: str) -> None:
    inputs, hidden, classes = (int(width) for width in net.split("-"))
    batch_size, samples, epochs = (int(number) for number in numbers)
    if kind != "numpy":
        # The package benchmarks is imported already, so only xpnet comes from there.
        sys.path.insert(0, kind)
        import xpnet

        if not Path(xpnet.__file__).resolve().is_relative_to(Path(kind).resolve()):
            raise SystemExit(f"there is no xpnet in {kind}: {xpnet.__file__} was imported.")
    start = (by_numpy if kind == "numpy" else by_xpnet)((inputs, hidden, classes), batch_size, samples, epochs)
    start()()  # not measured
    steps, history = epochs * -(-samples // batch_size), {}
    print("ready", flush=True)
    for line in sys.stdin:
        what = line.strip()
        if what == "fit":
            run = start()
            begin = time.perf_counter()
            history = run()
            result = (time.perf_counter() - begin) / steps
        else:
            result = history[what][-1]
        print(result, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
