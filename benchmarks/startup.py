"""What a program waits for before and beside its training on the CPU.

    python -m benchmarks.startup                                  # needs PyTorch, and MNIST in $XPNET_DATA_DIR
    python -m benchmarks.startup --measure import inputs --rounds 15

import: new processes that import NumPy, and NumPy and xpnet.  first-epoch: new processes of examples/mnist.py and of
the same training with PyTorch, until the line of the first epoch.  inputs: epochs of one network from float32 and uint8
arrays, in memory and on disk, in one process.

All processes and epochs are interleaved, and files are in the system's cache. Prints the median of each and its ratio
to the first one: the median of the ratios in each round.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy

from benchmarks.measures import EXAMPLE
from benchmarks.nets import NETS, RATES
from benchmarks.rounds import Measurement, environment, limit_cores, ratio
from benchmarks.samples import batch_of

PYTORCH = Path(__file__).parent / "peers" / "mnist_pytorch.py"
ROOT = Path(__file__).parent.parent
SAMPLES, BATCH = 60_000, 128
PARTS = ("first epoch", "second epoch", "fit")
FIRST_EPOCH = r"epoch +1/"  # how its line begins

Measurements = dict[str, Measurement]


def processes(commands: dict[str, list[str]], threads: int, rounds: int, until: str | None = None) -> Measurements:
    """Seconds of new processes: to their ends, or to the first line of their output that matches `until`.

    A round before the others, which is not counted, fills the caches of the system, of Python and of Numba.
    """
    env = {**environment("xpnet", threads), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # as for an installed package, whose bytecode pip has written
    values: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            with subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=env,
                preexec_fn=lambda: limit_cores(threads)
            ) as process:  # fmt: skip
                assert process.stdout is not None
                found = until is not None and any(re.match(until, line) for line in process.stdout)
                if found:
                    seconds = time.perf_counter() - start
                    process.kill()
                else:
                    process.communicate()
                    seconds = time.perf_counter() - start
            if found != (until is not None) or (until is None and process.returncode):
                raise SystemExit(f"{name} ended with exit status {process.returncode}; its message is above.")
            if i:
                values[name].append(seconds)
    return {name: Measurement(seconds) for name, seconds in values.items()}


def imports(threads: int, rounds: int) -> Iterator[tuple[str, Measurements]]:
    measured = processes({"numpy": ["-c", "import numpy"], "numpy, xpnet": ["-c", "import numpy, xpnet"]}, 1, rounds)
    more = Measurement([b - a for a, b in zip(*(m.values for m in measured.values()), strict=True)])
    yield "import", {**measured, "xpnet alone": more}


def first_epoch(threads: int, rounds: int) -> Iterator[tuple[str, Measurements]]:
    folder = Path(os.environ.get("XPNET_DATA_DIR", ""), "mnist")
    if not folder.is_dir():
        raise SystemExit("first-epoch needs MNIST in the folder mnist of $XPNET_DATA_DIR.")
    commands = {"torch": [str(PYTORCH), str(folder)], "xpnet": [str(EXAMPLE), "--backend", "cpu"]}
    yield "first-epoch", processes(commands, threads, rounds, FIRST_EPOCH)


def inputs(threads: int, rounds: int) -> Iterator[tuple[str, Measurements]]:
    command = [sys.executable, "-m", "benchmarks.startup", "--epochs-of-inputs", str(rounds)]
    done = subprocess.run(
        command, env=environment("xpnet", threads), stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT,
        preexec_fn=lambda: limit_cores(threads)
    )  # fmt: skip
    for what, values in json.loads(done.stdout).items():
        yield what, {name: Measurement(seconds) for name, seconds in values.items()}


def epochs_of_inputs(rounds: int, samples: int = SAMPLES) -> dict[str, dict[str, list[float]]]:
    """{"first epoch", "second epoch", "fit": {kind of input: seconds}} of calls of `fit` with two epochs."""
    import xpnet
    from xpnet import datasets, layers

    net = NETS["mlp"]
    pixels, y = batch_of(net, samples, "uint8")
    floats = (pixels / numpy.float32(255)).astype(numpy.float32)

    def model(scale: bool) -> xpnet.Sequential:
        first = [layers.Rescale(1 / 255)] if scale else []
        dense = [layers.Dense(128), layers.ReLU(), layers.Dense(10)]
        return xpnet.Sequential([*first, *dense], net.input_shape, backend="cpu", seed=0)

    with tempfile.TemporaryDirectory() as folder:
        mapped = []
        for array in (floats, pixels):
            numpy.save(path := Path(folder, f"{array.dtype}.npy"), array)
            mapped.append(numpy.load(path, mmap_mode="r"))
        given = {
            "float32": (model(False), floats, y),
            "float32, again": (model(False), floats, y),  # whose ratio to the first is the noise
            "uint8": (model(True), pixels, y),
            "float32, memmap": (model(False), mapped[0], y),
            "uint8, memmap": (model(True), mapped[1], y),
            "float32, Stream": (model(False), datasets.Stream(mapped[0], y), None),
            "uint8, Stream": (model(True), datasets.Stream(mapped[1], y), None),
        }
        result: dict[str, dict[str, list[float]]] = {what: {name: [] for name in given} for what in PARTS}
        settings = {"epochs": 2, "loss": "softmax_cross_entropy", "batch_size": BATCH, "verbose": 0}
        for i in range(rounds + 1):
            for name, (trained, x, targets) in list(given.items())[:: 1 if i % 2 else -1]:
                optimizer = xpnet.optimizers.SGD(RATES["sgd"])
                start = time.perf_counter()
                history = trained.fit(x, targets, optimizer=optimizer, **settings)
                if i:  # the first round fills caches
                    for what, seconds in zip(PARTS, (*history.seconds, time.perf_counter() - start), strict=True):
                        result[what][name].append(seconds)
        mapped.clear()
        given.clear()  # closes the files, which Windows does not delete otherwise
    return result


MEASURES = {"import": imports, "first-epoch": first_epoch, "inputs": inputs}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=21, help="(default: %(default)s)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--epochs-of-inputs", type=int, metavar="ROUNDS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.epochs_of_inputs:
        print(json.dumps(epochs_of_inputs(options.epochs_of_inputs)))
        return
    for measure in options.measure:
        for threads in options.threads[: 1 if measure == "import" else None]:
            for what, measured in MEASURES[measure](threads, options.rounds):
                print(f"\n{what}, {threads} thread{'s' * (threads > 1)}", flush=True)
                first = next(iter(measured.values()))
                for name, one in measured.items():
                    print(f"  {name:16s} {1e3 * one.median:8.1f} ms  {ratio(one, first):6.3f}", flush=True)


if __name__ == "__main__":
    main()
