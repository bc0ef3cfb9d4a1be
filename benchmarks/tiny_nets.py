"""`Sequential.fit` compared with a plain NumPy script of the same training, for nets with one hidden layer on the CPU.

    python -m benchmarks.tiny_nets                                # 2-8-2, 10-100-4, 64-32-10 and 2-3-2, 1 and 2 threads
    python -m benchmarks.tiny_nets --nets 784-128-10 --threads 1
    python -m benchmarks.tiny_nets --root ../before --root .      # the xpnet of several source trees

The script (numpy_script.py) and xpnet train on the same data from the same initial weights, and compute the loss and
the accuracy of every epoch. A time is that of the whole call, divided by its steps; each process has trained once
before. The processes take turns, and start again --restarts times. A ratio is time of xpnet / time of the script.
In all processes, malloc keeps freed memory: otherwise, half of the script's time for 784-128-10 would be page faults.

The exit status is 1 if the losses or accuracies of the last epoch differ, or if a source tree changes meanwhile.
"""

import argparse
import contextlib
import string
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import as_text, circumstances
from benchmarks.rounds import Measurement, Worker, environment, interleaved, ratio
from benchmarks.versions import ROOT, commit_of


class Case(NamedTuple):
    """The size of a training."""

    batch_size: int
    samples: int
    epochs: int


CASES = {
    "2-8-2": Case(32, 2000, 20),
    "10-100-4": Case(32, 2000, 20),
    "64-32-10": Case(32, 2000, 20),
    "2-3-2": Case(200, 200, 1000),  # one step per epoch
    "784-128-10": Case(32, 2000, 10),
}
TINY = [net for net in CASES if net != "784-128-10"]
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}  # glibc; bytes
# Each library has its own orders of the samples, so results differ a little.
LOSS_TOLERANCE = 0.1  # relative
ACCURACY_TOLERANCE = 0.02


class Result(NamedTuple):
    """The measurements in all rounds of all restarts, and the results of the last epoch, by name."""

    seconds: dict[str, Measurement]
    losses: dict[str, float]
    accuracies: dict[str, float]

    def differ(self) -> bool:
        """Whether the trainings had different results."""
        losses, accuracies = self.losses.values(), self.accuracies.values()
        return (
            max(losses) - min(losses) > LOSS_TOLERANCE * max(losses)
            or max(accuracies) - min(accuracies) > ACCURACY_TOLERANCE
        )


def compare(net: str, case: Case, threads: int, trees: dict[str, Path], rounds: int, restarts: int) -> Result:
    """Measure the script, named "numpy", and the xpnet of each source tree."""
    result = Result({name: Measurement([]) for name in ("numpy", *trees)}, {}, {})
    for _ in range(restarts):
        with contextlib.ExitStack() as stack:
            workers = []
            for name in result.seconds:
                command = ["benchmarks.tiny_worker", str(trees.get(name, name)), net, *map(str, case)]
                workers.append(Worker(name, command, environment("xpnet", threads) | KEEP_MEMORY, threads))
                stack.callback(workers[-1].stop)
            for name, measurement in interleaved(workers, "fit", rounds).items():
                result.seconds[name].values.extend(measurement.values)
            for worker in workers:
                result.losses[worker.name] = worker.ask("loss")
                result.accuracies[worker.name] = worker.ask("accuracy")
    return result


def sources(root: Path) -> dict[str, int]:
    """The time of the last change of each source file of xpnet in this tree, in ns."""
    return {str(path): path.stat().st_mtime_ns for path in (root / "xpnet").rglob("*.py")}


HEADS = ("net, batch, threads", "", "µs per step", "to NumPy", "smallest, µs", "to NumPy", "last loss", "accuracy")


def lines(situation: str, result: Result) -> list[str]:
    """Rows of a table in Markdown: the script and each source tree."""
    rows, script = [], result.seconds["numpy"]
    for name, own in result.seconds.items():
        to_script = [f"{ratio(own, script):.2f}", f"{own.minimum / script.minimum:.2f}"]
        middle, least = to_script if name != "numpy" else ("", "")
        cells = [situation, name, f"{1e6 * own.median:.1f}", middle, f"{1e6 * own.minimum:.1f}", least]
        cells += [f"{result.losses[name]:.4f}", f"{result.accuracies[name]:.3f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def as_json(result: Result) -> dict[str, object]:
    script = result.seconds["numpy"]
    return {
        "measurements": {
            name: {
                "this / numpy": round(ratio(own, script), 4),
                "median": own.median,
                "least": own.minimum,
                "values": [float(f"{v:.5g}") for v in own.values],
            }
            for name, own in result.seconds.items()
        },
        "losses": result.losses,
        "accuracies": result.accuracies,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=CASES, default=TINY)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--root", type=Path, action="append", help="a source tree (default: this one); repeatable")
    parser.add_argument("--epochs", type=int, help="of each training (default: 20; 1000 of one step; 10 for 784)")
    parser.add_argument("--rounds", type=int, default=15, help="between restarts (default: %(default)s)")
    parser.add_argument("--restarts", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the measurements of all rounds")
    options = parser.parse_args(arguments)

    roots = [root.resolve() for root in options.root or [ROOT]]
    names = ["xpnet"] if len(roots) == 1 else [f"xpnet {letter}" for letter in string.ascii_uppercase[: len(roots)]]
    trees = dict(zip(names, roots, strict=True))
    commits = {name: commit_of(root) for name, root in trees.items()}
    before = [sources(root) for root in roots]
    for name in names:
        print(f"{name}: commit {commits[name]}, {trees[name]}")
    print(f"\n| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    faults, rows = [], []
    for net in options.nets:
        case = CASES[net] if options.epochs is None else CASES[net]._replace(epochs=options.epochs)
        for threads in options.threads:
            situation = f"{net}, {case.batch_size}, {threads}"
            result = compare(net, case, threads, trees, options.rounds, options.restarts)
            print("\n".join(lines(situation, result)), flush=True)
            rows.append({"situation": situation, **case._asdict(), **as_json(result)})
            if result.differ():
                faults.append(f"{situation}: the losses or accuracies differ.")
    faults += [f"{root} has changed." for root, old in zip(roots, before, strict=True) if sources(root) != old]
    if options.out:
        report = {**circumstances("cpu"), "trees": commits, "rows": rows}
        options.out.write_text(as_text(report), encoding="utf-8")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
