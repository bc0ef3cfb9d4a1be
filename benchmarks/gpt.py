"""A training step of a small GPT on the CPU, compared with PyTorch.

    python -m benchmarks.gpt                      # one thread and two
    python -m benchmarks.gpt --threads 1 --rounds 30

4 transformer blocks of width 128 with 4 heads, a context of 64, batches of 12, AdamW with clipped gradients, and no
biases. xpnet replays captured steps of `fit`; PyTorch runs eagerly, with its fused AdamW and attention. The processes
take turns. A ratio is xpnet / PyTorch.

The exit status is 1 if a step of xpnet takes more time or memory than one of PyTorch.
"""

import argparse
import contextlib
import sys

from benchmarks.report import circumstances
from benchmarks.rounds import Measurement, Worker, environment, ratio

PEERS = ("xpnet", "torch")
MIB = 2**20


def compare(threads: int, rounds: int) -> bool:
    """Print times, memory and losses. Return whether xpnet needs at most the time and memory of PyTorch."""
    times = {name: Measurement([]) for name in PEERS}
    with contextlib.ExitStack() as stack:
        workers = []
        for name in PEERS:
            workers.append(Worker(name, ["benchmarks.gpt_worker", name], environment(name, threads), threads))
            stack.callback(workers[-1].stop)
        for i in range(rounds):
            for worker in workers if i % 2 else reversed(workers):
                times[worker.name].values.append(worker.ask_after_pause("step"))
        memory = {worker.name: worker.ask("memory") for worker in workers}
        losses = {worker.name: worker.ask("loss") for worker in workers}
    step = ratio(times["xpnet"], times["torch"])
    print(f"{threads} thread{'s' if threads > 1 else ''}: time ratio {step:.2f}")
    for name in PEERS:
        milliseconds = f"{1e3 * times[name].minimum:.1f} ms, median {1e3 * times[name].median:.1f} ms"
        print(f"  {name:6} {milliseconds}; peak memory {memory[name] / MIB:.0f} MiB; loss {losses[name]:.3f}")
    return step <= 1.0 and memory["xpnet"] <= memory["torch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    print(*(f"{name}: {value}" for name, value in circumstances("cpu").items()), sep="\n")
    passed = [compare(threads, given.rounds) for threads in given.threads]
    if not all(passed):
        sys.exit(1)


if __name__ == "__main__":
    main()
