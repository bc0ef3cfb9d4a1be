"""A recurrent layer compared with PyTorch's on the CPU: forward, and backward to the inputs and all parameters.

    python -m benchmarks.lstm                         # LSTM, 128 features, 256 units, 64 samples of 64 steps
    python -m benchmarks.lstm --layer GRU --threads 1

Both get the sequences in their own order of axes: (N, T, features) here, (T, N, features) in PyTorch, which is its
faster one. The processes take turns, see benchmarks/rounds.py. A ratio is time of xpnet / time of PyTorch.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.rounds import Worker, environment, interleaved, ratio

FEATURES, UNITS, SAMPLES, STEPS = 128, 256, 64, 64
LAYERS = {"LSTM": "LSTM", "GRU": "GRU", "SimpleRNN": "RNN"}  # the names here and in PyTorch


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """(x, the gradient of the outputs), the same in both processes."""
    rng = np.random.default_rng(0)
    x, grad = (rng.standard_normal((SAMPLES, STEPS, size), dtype=np.float32) for size in (FEATURES, UNITS))
    return x, grad


def by_xpnet(layer: str) -> Callable[[], None]:
    """A function that computes one forward and one backward pass."""
    import xpnet

    model = xpnet.Sequential([getattr(xpnet.layers, layer)(UNITS)], (STEPS, FEATURES), "cpu")
    x, grad = arrays()

    def compute() -> None:
        with model.execution_context(SAMPLES):
            model.forward_in_context(x, training=True)
            model.backward_in_context(grad)

    return compute


def by_pytorch(layer: str) -> Callable[[], None]:
    """The same with PyTorch."""
    import torch

    net = getattr(torch.nn, LAYERS[layer])(FEATURES, UNITS)
    x, grad = (torch.from_numpy(np.ascontiguousarray(a.swapaxes(0, 1))) for a in arrays())
    x.requires_grad = True

    def compute() -> None:
        x.grad = None
        net.zero_grad()
        net(x)[0].backward(grad)

    return compute


def work(peer: str, layer: str) -> None:
    """Answer each question "step COUNT", a line on stdin, with the seconds per pass, the mean of COUNT passes."""
    compute = (by_xpnet if peer == "xpnet" else by_pytorch)(layer)
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line.split()[1])
        begin = time.perf_counter()
        for _ in range(count):
            compute()
        print((time.perf_counter() - begin) / count, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=LAYERS, default="LSTM", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.layer)
        return
    for threads in options.threads:
        with contextlib.ExitStack() as stack:
            workers = []
            for peer in ("xpnet", "torch"):
                command = ["benchmarks.lstm", "--worker", peer, "--layer", options.layer]
                workers.append(Worker(peer, command, environment(peer, threads), threads))
                stack.callback(workers[-1].stop)
            own, theirs = interleaved(workers, "step", options.rounds).values()
        least = own.minimum / theirs.minimum
        print(
            f"{options.layer}, {threads} threads: xpnet {1e3 * own.median:.1f} ms, PyTorch {1e3 * theirs.median:.1f} "
            f"ms, ratio {ratio(own, theirs):.2f}, of the smallest {least:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
