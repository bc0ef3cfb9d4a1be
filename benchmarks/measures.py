"""The measures of `python -m benchmarks`. Each yields its rows as soon as they are measured."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.nets import NETS, Net, epoch_size
from benchmarks.peers import can
from benchmarks.rounds import Measurement, environment, interleaved, workers

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist.py"


class Plan(NamedTuple):
    device: str
    threads: list[int]
    names: list[str]
    nets: list[str]
    batches: list[int]
    epoch_batches: list[int]
    rounds: int


class Row(NamedTuple):
    """The measurements of all peers for one network, batch size and number of threads."""

    measure: str
    situation: str
    measurements: dict[str, Measurement]


def _peers(plan: Plan, net: Net) -> list[str]:
    images = len(net.input_shape) == 3
    return [name for name in plan.names if can(name, net) and (images or "channels-last" not in name)]


def _situations(plan: Plan, batches: list[int]) -> Iterator[tuple[str, int, int, str]]:
    for net in plan.nets:
        for threads in plan.threads:
            for batch in batches:
                where = plan.device if plan.device != "cpu" else f"{threads} thread{'s' * (threads > 1)}"
                yield net, threads, batch, f"{net}, {where}, batch {batch}"


def step(plan: Plan) -> Iterator[Row]:
    """A training step, in ms; in brackets, the time of xpnet / the time of each other peer."""
    for net, threads, batch, situation in _situations(plan, plan.batches):
        with workers(_peers(plan, NETS[net]), net, batch, plan.device, threads) as processes:
            yield Row("step", situation, interleaved(processes, "step", plan.rounds))


def epoch(plan: Plan) -> Iterator[Row]:
    """An epoch with checks, shuffling, gathering and metrics, and as many steps of xpnet alone; and peak memory."""
    for net, threads, batch, situation in _situations(plan, plan.epoch_batches):
        names = [name for name in _peers(plan, NETS[net]) if not name.startswith(("floor", "jax-scan"))]
        names.append("xpnet-uint8")
        rounds, steps_an_epoch = max(3, plan.rounds // 3), epoch_size(NETS[net]) / batch
        with workers(names, net, batch, plan.device, threads) as processes:
            measurements, steps = {name: Measurement([]) for name in names}, Measurement([])
            several = f"step {max(1, round(1.0 / processes[0].ask('step 5')))}"
            processes[0].ask("epoch")  # not counted
            for _ in range(rounds):
                # Steps before and after the epoch, so that a drift of the machine's speed cancels out.
                before = processes[0].ask_after_pause(several)
                for worker in processes:
                    measurements[worker.name].values.append(worker.ask_after_pause("epoch"))
                    if worker is processes[0]:
                        steps.values.append((before + worker.ask(several)) / 2 * steps_an_epoch)
            yield Row("epoch", situation, {**measurements, "xpnet's steps": steps})
            yield Row("memory", situation, {worker.name: Measurement([worker.ask("memory")]) for worker in processes})


def inference(plan: Plan) -> Iterator[Row]:
    """A call of predict, from host array to host array, with 1 and with 1024 samples."""
    for net, threads, batch, situation in _situations(plan, [1, 1024]):
        left_out = ("floor", "jax-scan", "torch-graph", "xpnet-eager")  # their inference is not different
        names = [name for name in _peers(plan, NETS[net]) if not name.startswith(left_out)]
        with workers(names, net, batch, plan.device, threads) as processes:
            yield Row("inference", situation, interleaved(processes, "predict", plan.rounds))


_IMPORTS = {"xpnet": "import numpy, xpnet", "numpy": "import numpy"}
_OTHER_IMPORTS = {"torch": "import torch", "jax": "import jax", "sklearn": "from sklearn import neural_network"}
_CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def imports(plan: Plan) -> Iterator[Row]:
    """The import of each library, in a new process each time."""
    libraries = {name.split("-")[0] for name in plan.names}
    statements = _IMPORTS | {name: text for name, text in _OTHER_IMPORTS.items() if name in libraries}
    values: dict[str, list[float]] = {name: [] for name in statements}
    for i in range(plan.rounds + 1):
        for name, text in statements.items():
            done = subprocess.run(
                [sys.executable, "-c", _CLOCK.format(text)], capture_output=True, text=True, check=True,
                env=environment("xpnet", max(plan.threads))
            )  # fmt: skip
            if i:  # the first round fills the file cache
                values[name].append(float(done.stdout))
    yield Row("imports", "a new process", {name: Measurement(seconds) for name, seconds in values.items()})


_SEEDS = range(5)
_EPOCHS = {"mlp": 6, "cnn": 2}  # the fewest for 98 % and 99 %, chosen on held-out training images
_RESULT = re.compile(r"trained for ([\d.]+) s.*test accuracy: ([\d.]+)", re.DOTALL)


def accuracy(plan: Plan) -> Iterator[Row]:
    """examples/mnist.py from a cold start with five seeds: seconds of training, and accuracy on the test images."""
    for model, epochs in _EPOCHS.items():
        seconds, accuracies = Measurement([]), Measurement([])
        for seed in _SEEDS:
            done = subprocess.run(
                [sys.executable, str(EXAMPLE), "--backend", plan.device, "--model", model, "--seed", str(seed),
                 "--epochs", str(epochs)],
                capture_output=True, text=True, check=True, env=environment("xpnet", max(plan.threads))
            )  # fmt: skip
            result = _RESULT.search(done.stdout)
            if result is None or "MNIST was not found" in done.stdout:
                raise SystemExit(f"the example did not train on MNIST; set XPNET_DATA_DIR:\n{done.stdout}")
            seconds.values.append(float(result[1]))
            accuracies.values.append(float(result[2]))
        situation = f"{model}, {epochs} epochs, {max(plan.threads)} threads"
        yield Row("training", situation, {"xpnet": seconds})
        yield Row("accuracy", situation, {"xpnet": accuracies})


def rate(plan: Plan) -> Iterator[Row]:
    """A step of a network with three hidden layers of 4096, batch 4096, and its matrix products, in 3 precisions."""
    names = [f"{peer}{precision}" for peer in ("xpnet", "floor") for precision in ("", "-tf32", "-bfloat16")]
    with workers(names, "mlp-4096", 4096, plan.device, 1) as processes:
        yield Row("rate", "mlp-4096, batch 4096", interleaved(processes, "step", plan.rounds))


def profile(plan: Plan) -> Iterator[Row]:
    """The kernels of one step: µs of each, and its lower bound; see benchmarks/profile.py."""
    from benchmarks.profile import profile_of

    for net in ("mlp", "cnn"):
        for what, seconds, floor in profile_of(net, 128, plan.device):
            yield Row("profile", what, {"xpnet": Measurement([seconds]), "floor": Measurement([floor])})


MEASURES: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "step": step,
    "epoch": epoch,
    "inference": inference,
    "imports": imports,
    "accuracy": accuracy,
    "rate": rate,
    "profile": profile,
}
ONLY_ON_GPU = ("rate", "profile")
