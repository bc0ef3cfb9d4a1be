"""Training 784-128-10 on MNIST beside PyTorch's eager mode: same data, batches, epochs and optimiser, interleaved.

    XPNET_DATA_DIR=... python -m benchmarks.mnist_torch --rounds 7 --epochs 2

Each round is a fresh process per library, so that one's idle threads do not sit on the other's cores, and starts its
clock when the data is in memory and one warm-up epoch is over. Reported: the minimum, the median, and the ratio of
each pair of neighbours.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time


def run_xpnet(epochs: int) -> float:
    from examples import mnist

    (x, y), _ = mnist.datasets.mnist()
    model = mnist.build_mlp(x.shape[1:], backend="cpu", seed=0)
    mnist.train(model, x, y, epochs=1, verbose=0)
    start = time.perf_counter()
    mnist.train(model, x, y, epochs=epochs, verbose=0)
    return time.perf_counter() - start


def run_torch(epochs: int) -> float:
    import torch

    from examples import mnist

    (x, y), _ = mnist.datasets.mnist()
    torch.manual_seed(0)
    x = torch.from_numpy(x).reshape(len(x), -1).float().div_(255)  # in memory as floats: PyTorch at its best
    y = torch.from_numpy(y)
    model = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    loss = torch.nn.CrossEntropyLoss()

    def train(count: int) -> None:
        steps = -(-len(x) // mnist.BATCH_SIZE)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=mnist.LEARNING_RATE, weight_decay=mnist.WEIGHT_DECAY, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, mnist.LEARNING_RATE, total_steps=count * steps)
        for _ in range(count):
            hits, total = torch.zeros((), dtype=torch.int64), torch.zeros(())
            for rows in torch.randperm(len(x)).split(mnist.BATCH_SIZE):
                inputs, targets = x[rows], y[rows]
                optimizer.zero_grad(set_to_none=True)
                outputs = model(inputs)
                value = loss(outputs, targets)
                value.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():  # the figures that xpnet's history holds
                    total += value * len(rows)
                    hits += (outputs.argmax(1) == targets).sum()
            total.item(), hits.item()

    train(1)
    start = time.perf_counter()
    train(epochs)
    return time.perf_counter() - start


RUNNERS = {"xpnet": run_xpnet, "torch": run_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", choices=RUNNERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(RUNNERS[options.one](options.epochs)))
        return
    report = {}
    for threads in options.threads:
        times = {name: [] for name in RUNNERS}
        for i in range(options.rounds):
            for name in sorted(RUNNERS, reverse=bool(i % 2)):
                times[name].append(_fresh_process(name, options.epochs, threads))
        ratios = [a / b for a, b in zip(times["xpnet"], times["torch"], strict=True)]
        for name, seconds in times.items():
            print(f"{threads} thread(s)  {name:6s} min {min(seconds):.2f} s  median {statistics.median(seconds):.2f} s")
        print(
            f"{threads} thread(s)  xpnet / torch: median of {len(ratios)} pairs {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}), of minima {min(times['xpnet']) / min(times['torch']):.3f}"
        )
        report[threads] = {**times, "ratios": ratios}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**_circumstances(), "epochs": options.epochs, "seconds by threads": report}, file, indent=1)


def _circumstances() -> dict[str, str]:
    import numpy
    import torch

    import xpnet

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = ", ".join(text for _, text in xpnet.get_backend("cpu").describe())
    versions = f"Python {platform.python_version()}, NumPy {numpy.__version__}, PyTorch {torch.__version__}"
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": machine, "versions": versions}


def _fresh_process(name: str, epochs: int, threads: int) -> float:
    count = str(threads)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    command = [sys.executable, "-m", "benchmarks.mnist_torch", "--one", name, "--epochs", str(epochs)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
