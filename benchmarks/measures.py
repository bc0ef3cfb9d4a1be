"""What is measured. Each measure yields a row as soon as it stands."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.nets import NETS, Net, epoch_size
from benchmarks.peers import can
from benchmarks.rounds import Figure, environment, interleaved, workers

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist.py"


class Plan(NamedTuple):
    device: str
    threads: list[int]
    names: list[str]
    nets: list[str]
    batches: list[int]
    rounds: int


class Row(NamedTuple):
    """The figures of all peers in one situation: seconds, or bytes of memory."""

    measure: str
    situation: str
    figures: dict[str, Figure]


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
    """A training step: ms, and how many times as long xpnet takes as each of the others."""
    for net, threads, batch, situation in _situations(plan, plan.batches):
        with workers(_peers(plan, NETS[net]), net, batch, plan.device, threads) as team:
            yield Row("step", situation, interleaved(team, "step", plan.rounds))


def epoch(plan: Plan) -> Iterator[Row]:
    """An epoch from end to end (checks, shuffle, gather, metrics too) beside so many of xpnet's steps; and memory."""
    for net, threads, batch, situation in _situations(plan, [128]):
        names = [name for name in _peers(plan, NETS[net]) if not name.startswith(("floor", "jax-scan"))]
        names.append("xpnet-uint8")
        rounds, steps_an_epoch = max(3, plan.rounds // 3), epoch_size(NETS[net]) / batch
        with workers(names, net, batch, plan.device, threads) as team:
            figures, steps = {name: Figure([]) for name in names}, Figure([])
            several = f"step {max(1, round(1.0 / team[0].ask('step 5')))}"
            team[0].ask("epoch")  # not counted
            for _ in range(rounds):
                # Steps before and after the epoch, so that a machine that grows slower grows slower for both.
                before = team[0].ask_after_a_pause(several)
                for worker in team:
                    figures[worker.name].values.append(worker.ask_after_a_pause("epoch"))
                    if worker is team[0]:
                        steps.values.append((before + worker.ask(several)) / 2 * steps_an_epoch)
            yield Row("epoch", situation, {**figures, "xpnet's steps": steps})
            yield Row("memory", situation, {worker.name: Figure([worker.ask("memory")]) for worker in team})


def inference(plan: Plan) -> Iterator[Row]:
    """A call of predict, from host array to host array, of 1 sample and of 1024."""
    for net, threads, batch, situation in _situations(plan, [1, 1024]):
        left_out = ("floor", "jax-scan", "torch-graph", "xpnet-eager")  # no other inference than others
        names = [name for name in _peers(plan, NETS[net]) if not name.startswith(left_out)]
        with workers(names, net, batch, plan.device, threads) as team:
            yield Row("inference", situation, interleaved(team, "predict", plan.rounds))


_IMPORTS = {"xpnet": "import numpy, xpnet", "numpy": "import numpy"}
_OTHER_IMPORTS = {"torch": "import torch", "jax": "import jax", "sklearn": "from sklearn import neural_network"}
_CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def imports(plan: Plan) -> Iterator[Row]:
    """Importing the library, in a fresh process each time."""
    libraries = {name.split("-")[0] for name in plan.names}
    statements = _IMPORTS | {name: text for name, text in _OTHER_IMPORTS.items() if name in libraries}
    values: dict[str, list[float]] = {name: [] for name in statements}
    for i in range(plan.rounds + 1):
        for name, text in statements.items():
            done = subprocess.run(
                [sys.executable, "-c", _CLOCK.format(text)], capture_output=True, text=True, check=True,
                env=environment("xpnet", max(plan.threads))
            )  # fmt: skip
            if i:  # the first round warms the file cache
                values[name].append(float(done.stdout))
    yield Row("imports", "a fresh process", {name: Figure(seconds) for name, seconds in values.items()})


_SEEDS = range(5)
_EPOCHS = {"mlp": 6, "cnn": 2}  # fewest for 98 % and 99 %, chosen on training images held out
_TOLD = re.compile(r"trained for ([\d.]+) s.*test accuracy: ([\d.]+)", re.DOTALL)


def accuracy(plan: Plan) -> Iterator[Row]:
    """examples/mnist.py from a cold start, five seeds: seconds of training, and the accuracy on MNIST's test images."""
    for model, epochs in _EPOCHS.items():
        seconds, accuracies = Figure([]), Figure([])
        for seed in _SEEDS:
            done = subprocess.run(
                [sys.executable, str(EXAMPLE), "--backend", plan.device, "--model", model, "--seed", str(seed),
                 "--epochs", str(epochs)],
                capture_output=True, text=True, check=True, env=environment("xpnet", max(plan.threads))
            )  # fmt: skip
            told = _TOLD.search(done.stdout)
            if told is None or "MNIST is not here" in done.stdout:
                raise SystemExit(f"the example did not train on MNIST; put it where it is found:\n{done.stdout}")
            seconds.values.append(float(told[1]))
            accuracies.values.append(float(told[2]))
        situation = f"{model}, {epochs} epochs, {max(plan.threads)} threads"
        yield Row("training", situation, {"xpnet": seconds})
        yield Row("accuracy", situation, {"xpnet": accuracies})


def rate(plan: Plan) -> Iterator[Row]:
    """A step of three hidden layers of 4096, batch 4096, beside its products alone, in three precisions."""
    names = [f"{peer}{precision}" for peer in ("xpnet", "floor") for precision in ("", "-tf32", "-bfloat16")]
    with workers(names, "mlp-4096", 4096, plan.device, 1) as team:
        yield Row("rate", "mlp-4096, batch 4096", interleaved(team, "step", plan.rounds))


def profile(plan: Plan) -> Iterator[Row]:
    """One step kernel by kernel: µs of each, and how many times its floor; see benchmarks/profile.py."""
    from benchmarks.profile import profile_of

    for net in ("mlp", "cnn"):
        for what, seconds, floor in profile_of(net, 128, plan.device):
            yield Row("profile", what, {"xpnet": Figure([seconds]), "floor": Figure([floor])})


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
