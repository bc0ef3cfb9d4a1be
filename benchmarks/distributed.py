"""The speedup of data-parallel training on one machine, and a model of its scaling to many.

    python -m benchmarks.distributed        # the measurements in docs/distributed.md; needs `xpnet[mpi]`

In each round, mpiexec is started once for each configuration. A ratio is the median of the ratios in each round. In the
model of the scaling, a step takes a fixed time and a time per row, from measurements of one thread with two batch
sizes. An all-reduce takes a latency and bytes / bandwidth, from measurements of all-reduces of many sizes.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy

from benchmarks.nets import NETS
from benchmarks.report import circumstances

BATCH, SMALL_BATCH = 512, 64
SAMPLES = {"mlp": 60 * BATCH, "cnn": 8 * BATCH}
CONFIGURATIONS = {"one rank, 1 thread": (1, 1), "one rank, 2 threads": (1, 2), "two ranks, 1 thread each": (2, 1)}
SIZES = [8, 2**10, 2**14, 2**17, 2**20, 2**23, 2**25]  # bytes of an all-reduce
IN_CACHE = 2**23  # bytes; larger messages do not fit into the cache, and are left out of the model

# Assumed (latency in seconds, bytes per second) of a message between two machines.
NETWORKS = {"10 Gbit/s Ethernet": (20e-6, 1.25e9), "100 Gbit/s InfiniBand": (2e-6, 12.5e9)}
RANKS = (2, 8, 64, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a folder")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # the task of one of the processes
    options = parser.parse_args()
    if options.work:
        task, *batch = options.work
        result = {"all-reduce": all_reduces, "overlap": overlap}[task]() if not batch else epoch(task, int(batch[0]))
        if result is not None:
            print(json.dumps(result))
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    for net in SAMPLES:
        for _ in range(options.rounds):
            for name, (ranks, threads) in CONFIGURATIONS.items():
                rows.setdefault(f"{net}, {name}", []).append(run(ranks, threads, net, str(BATCH)))
            rows.setdefault(f"{net}, small", []).append(run(1, 1, net, str(SMALL_BATCH)))
    all_reduce_times = run(2, 1, "all-reduce")
    overlaps = [run(2, 1, "overlap") for _ in range(3)]
    text = table(rows, all_reduce_times) + overlap_line(overlaps) + scaling(rows, all_reduce_times)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"mpi-{time.strftime('%Y-%m-%d')}.json"
    report = {**circumstances("cpu"), "rows": rows, "all-reduce, seconds by bytes": all_reduce_times}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"written: {path}")


def run(ranks: int, threads: int, *work: str) -> Any:
    """Run a task on this many ranks, and return the result of rank 0."""
    command = [sys.executable, "-m", "benchmarks.distributed", "--work", *work]
    if ranks > 1:
        here = str(Path(sys.executable).parent)
        mpiexec = shutil.which("mpiexec") or shutil.which("mpiexec", path=here)
        if mpiexec is None:
            raise SystemExit('mpiexec was not found. Run: pip install "xpnet[mpi]"')
        command = [mpiexec, "-n", str(ranks), "--bind-to", "core", *command]
    counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    environment = {**os.environ, **counts, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def epoch(net_name: str, batch: int) -> dict[str, float] | None:
    """Train three epochs; the times of the last one on rank 0, and the bytes of its all-reduces."""
    import xpnet
    from benchmarks.peers.own import Own
    from benchmarks.samples import batch_of
    from xpnet.distributed import Communicator, started_by_mpi

    net = NETS[net_name]
    own = Own(net, batch, "cpu", "")
    x, y = batch_of(net, SAMPLES[net_name])
    group = Communicator() if started_by_mpi() else None
    all_reduce_seconds = [0.0]
    if group:
        all_reduce = group.all_reduce

        def timed(array: Any) -> None:
            start = time.perf_counter()
            all_reduce(array)
            all_reduce_seconds[0] += time.perf_counter() - start

        group.all_reduce = timed  # type: ignore[method-assign]

    class Reset(xpnet.callbacks.Callback):
        def on_epoch_begin(self, model: Any, epoch: int) -> None:
            all_reduce_seconds[0] = 0.0

    history = own.model.fit(
        x, y, optimizer=own.optimizer, batch_size=batch, epochs=3, callbacks=[Reset()], verbose=0,
        distributed=group or False,
    )  # fmt: skip
    if group and group.rank:
        return None
    return {
        "seconds": history.seconds[-1],
        "all-reduce": all_reduce_seconds[0],
        "steps": SAMPLES[net_name] / batch,
        "bytes": own.model.context.store.grads.nbytes,
    }


def all_reduces() -> dict[str, float] | None:
    """{bytes: median seconds} of in-place all-reduces."""
    from mpi4py import MPI

    comm, medians = MPI.COMM_WORLD, {}
    for size in SIZES:
        numbers = numpy.ones(size // 4, dtype=numpy.float32)
        times = []
        for _ in range(30 if size > 2**20 else 300):
            comm.Barrier()
            start = time.perf_counter()
            comm.Allreduce(MPI.IN_PLACE, numbers)
            times.append(time.perf_counter() - start)
        medians[str(size)] = statistics.median(times)
    return medians if comm.rank == 0 else None


def overlap() -> dict[str, float] | None:
    """Median seconds to compute a weight gradient 784 x 512 and all-reduce it with that of the next layer, 512 x 512.

    "sequential": one all-reduce of both after the matrix product.  "overlapped": the all-reduce of the next layer's
    gradient runs during the matrix product.
    """
    from mpi4py import MPI

    comm, rng = MPI.COMM_WORLD, numpy.random.default_rng(0)
    x, grad = (rng.random((256, width), dtype=numpy.float32) for width in (784, 512))
    product, flat = numpy.empty((784, 512), numpy.float32), numpy.ones(784 * 512 + 512 * 512, numpy.float32)
    own, above = flat[: 784 * 512], flat[784 * 512 :]

    def sequential() -> None:
        numpy.matmul(x.T, grad, out=product)
        comm.Allreduce(MPI.IN_PLACE, flat)

    def overlapped() -> None:
        request = comm.Iallreduce(MPI.IN_PLACE, above)
        numpy.matmul(x.T, grad, out=product)
        comm.Allreduce(MPI.IN_PLACE, own)
        request.Wait()

    times: dict[str, list[float]] = {"sequential": [], "overlapped": []}
    for _ in range(60):
        for variant in (sequential, overlapped):
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(5):
                variant()
            times[variant.__name__].append((time.perf_counter() - start) / 5)
    return {name: statistics.median(values) for name, values in times.items()} if comm.rank == 0 else None


def overlap_line(overlaps: list[dict[str, float]]) -> str:
    ratios = ", ".join(f"{o['overlapped'] / o['sequential']:.2f}" for o in overlaps)
    milliseconds = 1e3 * statistics.median(o["sequential"] for o in overlaps)
    return (
        f"\nA matrix product and then an all-reduce of 2.6 MB take {milliseconds:.1f} ms. With 1 MB of it all-reduced "
        f"during the product: {ratios} of that, in {len(overlaps)} runs.\n"
    )


def table(rows: dict[str, list[dict[str, Any]]], all_reduce_times: dict[str, float]) -> str:
    lines = ["| epoch at batch 512 | samples/s | speedup over one rank, 1 thread | share of all-reduce |",
             "|---|---|---|---|"]  # fmt: skip
    for name, rounds in rows.items():
        if name.endswith("small"):
            continue
        base = rows[f"{name.split(',')[0]}, one rank, 1 thread"]
        speedup = statistics.median(b["seconds"] / r["seconds"] for b, r in zip(base, rounds, strict=True))
        rate = statistics.median(r["steps"] * BATCH / r["seconds"] for r in rounds)
        share = statistics.median(r["all-reduce"] / r["seconds"] for r in rounds)
        lines.append(f"| {name} | {rate:,.0f} | {speedup:.2f} | {share:.1%} |")
    lines += ["", "| bytes of an all-reduce, 2 ranks | µs |", "|---|---|"]
    lines += [f"| {int(size):,} | {1e6 * seconds:,.1f} |" for size, seconds in all_reduce_times.items()]
    return "\n".join(lines) + "\n"


def scaling(rows: dict[str, list[dict[str, Any]]], all_reduce_times: dict[str, float]) -> str:
    """The model of the scaling: its parameters, its error for 2 ranks, and its prediction for more."""
    points = [(int(size), seconds) for size, seconds in all_reduce_times.items() if int(size) <= IN_CACHE]
    latency = points[0][1]
    bandwidth = points[-1][0] / (points[-1][1] - latency)
    lines = [
        "",
        f"Measured: an all-reduce of 2 ranks takes {1e6 * latency:.1f} µs + bytes / {bandwidth / 1e9:.1f} GB/s.",
        "",
    ]
    lines += ["| a step | fixed, ms | per row, µs | 2 ranks, model / measured |", "|---|---|---|---|"]
    for net in SAMPLES:
        fixed, per_row, size = _fit(rows, net)
        measured = statistics.median(r["seconds"] / r["steps"] for r in rows[f"{net}, two ranks, 1 thread each"])
        model = fixed + per_row * BATCH / 2 + latency + size / bandwidth
        lines.append(
            f"| {net} | {1e3 * fixed:.3f} | {1e6 * per_row:.2f} | {1e3 * model:.2f} / {1e3 * measured:.2f} ms |"
        )
    lines += [
        "",
        "Speedup over one rank predicted by the model: with a global batch of 512, or with 512 rows on each rank.",
        "",
        f"| net, network | {' | '.join(f'{r} ranks, same batch' for r in RANKS[1:])} "
        f"| {' | '.join(f'{r} ranks, 512 each' for r in RANKS[1:])} |",
        "|---|" + "---|" * (2 * len(RANKS[1:])),
    ]
    for net in SAMPLES:
        fixed, per_row, size = _fit(rows, net)
        for network, (latency, bandwidth) in NETWORKS.items():
            one_rank = fixed + per_row * BATCH
            times = {ranks: all_reduce(ranks, size, latency, bandwidth) for ranks in RANKS[1:]}
            cells = [f"{one_rank / (fixed + per_row * -(-BATCH // n) + t):.1f}" for n, t in times.items()]
            cells += [f"{n * one_rank / (one_rank + t):.0f}" for n, t in times.items()]
            lines.append(f"| {net}, {network} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _fit(rows: dict[str, list[dict[str, Any]]], net: str) -> tuple[float, float, float]:
    """(fixed seconds of a step, seconds per row, bytes of the gradient), of one thread."""
    large, small = (
        statistics.median(r["seconds"] / r["steps"] for r in rows[f"{net}, {name}"])
        for name in ("one rank, 1 thread", "small")
    )
    per_row = (large - small) / (BATCH - SMALL_BATCH)
    return max(0.0, large - per_row * BATCH), per_row, rows[f"{net}, small"][0]["bytes"]


def all_reduce(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """The seconds of an all-reduce with the faster of two algorithms: a ring, or recursive doubling."""
    ring = 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size / bandwidth
    doubling = math.log2(ranks) * (latency + size / bandwidth)
    return min(ring, doubling)


if __name__ == "__main__":
    main()
