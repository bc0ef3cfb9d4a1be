"""Several ranks on one machine, beside one process: how much faster an epoch is, and where its time goes.

    python -m benchmarks.distributed                          # what docs/distributed.md shows; needs the extra `mpi`

Each figure is of a fresh start of mpiexec, one after the other and round after round. Ratios are of one round; the
median over the rounds is reported. Then comes a model of the scaling: a step is a fixed part and one for each row, from
one thread at two batch sizes; an all-reduce is a latency and bytes / bandwidth, from all-reduces of many sizes.
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
WAYS = {"one rank, 1 thread": (1, 1), "one rank, 2 threads": (1, 2), "two ranks, 1 thread each": (2, 1)}
SIZES = [8, 2**10, 2**14, 2**17, 2**20, 2**23, 2**25]  # bytes of an all-reduce
IN_CACHE = 2**23  # more falls out of it, and is no guide to a network

# On paper: (latency in seconds, bytes a second) of a message between two machines.
NETWORKS = {"10 Gbit/s Ethernet": (20e-6, 1.25e9), "100 Gbit/s InfiniBand": (2e-6, 12.5e9)}
RANKS = (2, 8, 64, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a folder for the figures")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # what one of the processes does
    options = parser.parse_args()
    if options.work:
        what, *given = options.work
        told = {"all-reduce": all_reduces, "overlap": overlap}[what]() if not given else epoch(what, int(given[0]))
        if told is not None:
            print(json.dumps(told))
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    for net in SAMPLES:
        for _ in range(options.rounds):
            for way, (ranks, threads) in WAYS.items():
                rows.setdefault(f"{net}, {way}", []).append(started(ranks, threads, net, str(BATCH)))
            rows.setdefault(f"{net}, small", []).append(started(1, 1, net, str(SMALL_BATCH)))
    paces = started(2, 1, "all-reduce")
    overlaps = [started(2, 1, "overlap") for _ in range(3)]
    text = table(rows, paces) + overlap_line(overlaps) + scaling(rows, paces)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"mpi-{time.strftime('%Y-%m-%d')}.json"
    report = {**circumstances("cpu"), "rows": rows, "all-reduce, seconds by bytes": paces}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"written: {path}")


def started(ranks: int, threads: int, *work: str) -> Any:
    """What the first of so many processes tells."""
    command = [sys.executable, "-m", "benchmarks.distributed", "--work", *work]
    if ranks > 1:
        here = str(Path(sys.executable).parent)
        mpiexec = shutil.which("mpiexec") or shutil.which("mpiexec", path=here)
        if mpiexec is None:
            raise SystemExit('there is no mpiexec. Run: pip install "xpnet[mpi]"')
        command = [mpiexec, "-n", str(ranks), "--bind-to", "core", *command]
    counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    environment = {**os.environ, **counts, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def epoch(net_name: str, batch: int) -> dict[str, float] | None:
    """{seconds of an epoch, seconds of it in all-reduces, bytes of each}, of the first rank."""
    import xpnet
    from benchmarks.peers.own import Own
    from benchmarks.samples import batch_of
    from xpnet.distributed import Communicator, started_by_mpi

    net = NETS[net_name]
    own = Own(net, batch, "cpu", "")
    x, y = batch_of(net, SAMPLES[net_name])
    ranks = Communicator() if started_by_mpi() else None
    waited = [0.0]
    if ranks:
        add_up = ranks.add_up

        def timed(array: Any) -> None:
            start = time.perf_counter()
            add_up(array)
            waited[0] += time.perf_counter() - start

        ranks.add_up = timed  # type: ignore[method-assign]

    class Clear(xpnet.callbacks.Callback):
        def on_epoch_begin(self, model: Any, epoch: int) -> None:
            waited[0] = 0.0

    history = own.model.fit(
        x, y, optimizer=own.optimizer, batch_size=batch, epochs=3, callbacks=[Clear()], verbose=0,
        distributed=ranks or False,
    )  # fmt: skip
    if ranks and ranks.rank:
        return None
    return {
        "seconds": history.seconds[-1],
        "all-reduce": waited[0],
        "steps": SAMPLES[net_name] / batch,
        "bytes": own.model.context.store.grads.nbytes,
    }


def all_reduces() -> dict[str, float] | None:
    """{bytes: seconds} of all-reduces in place."""
    from mpi4py import MPI

    comm, told = MPI.COMM_WORLD, {}
    for size in SIZES:
        numbers = numpy.ones(size // 4, dtype=numpy.float32)
        times = []
        for _ in range(30 if size > 2**20 else 300):
            comm.Barrier()
            start = time.perf_counter()
            comm.Allreduce(MPI.IN_PLACE, numbers)
            times.append(time.perf_counter() - start)
        told[str(size)] = statistics.median(times)
    return told if comm.rank == 0 else None


def overlap() -> dict[str, float] | None:
    """{way: seconds} of a layer's gradient of 784 x 512 and the sum of it and of the layer's above, 512 x 512.

    "after": one all-reduce of both, at the end.  "meanwhile": that of the layer above is under way during the product.
    """
    from mpi4py import MPI

    comm, rng = MPI.COMM_WORLD, numpy.random.default_rng(0)
    x, grad = (rng.random((256, width), dtype=numpy.float32) for width in (784, 512))
    product, flat = numpy.empty((784, 512), numpy.float32), numpy.ones(784 * 512 + 512 * 512, numpy.float32)
    own, above = flat[: 784 * 512], flat[784 * 512 :]

    def after() -> None:
        numpy.matmul(x.T, grad, out=product)
        comm.Allreduce(MPI.IN_PLACE, flat)

    def meanwhile() -> None:
        request = comm.Iallreduce(MPI.IN_PLACE, above)
        numpy.matmul(x.T, grad, out=product)
        comm.Allreduce(MPI.IN_PLACE, own)
        request.Wait()

    times: dict[str, list[float]] = {"after": [], "meanwhile": []}
    for _ in range(60):
        for way in (after, meanwhile):
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(5):
                way()
            times[way.__name__].append((time.perf_counter() - start) / 5)
    return {name: statistics.median(values) for name, values in times.items()} if comm.rank == 0 else None


def overlap_line(overlaps: list[dict[str, float]]) -> str:
    ratios = ", ".join(f"{o['meanwhile'] / o['after']:.2f}" for o in overlaps)
    took = 1e3 * statistics.median(o["after"] for o in overlaps)
    return (
        f"\nA product and an all-reduce of 2.6 MB take {took:.1f} ms. With 1 MB of it under way during the product: "
        f"{ratios} of that, in {len(overlaps)} runs.\n"
    )


def table(rows: dict[str, list[dict[str, Any]]], paces: dict[str, float]) -> str:
    lines = ["| epoch at batch 512 | samples/s | times one rank, 1 thread | share of all-reduce |", "|---|---|---|---|"]
    for name, rounds in rows.items():
        if name.endswith("small"):
            continue
        base = rows[f"{name.split(',')[0]}, one rank, 1 thread"]
        faster = statistics.median(b["seconds"] / r["seconds"] for b, r in zip(base, rounds, strict=True))
        rate = statistics.median(r["steps"] * BATCH / r["seconds"] for r in rounds)
        share = statistics.median(r["all-reduce"] / r["seconds"] for r in rounds)
        lines.append(f"| {name} | {rate:,.0f} | {faster:.2f} | {share:.1%} |")
    lines += ["", "| bytes of an all-reduce, 2 ranks | µs |", "|---|---|"]
    lines += [f"| {int(size):,} | {1e6 * seconds:,.1f} |" for size, seconds in paces.items()]
    return "\n".join(lines) + "\n"


def scaling(rows: dict[str, list[dict[str, Any]]], paces: dict[str, float]) -> str:
    """The model: fitted to what was measured, held against it, and extended on paper."""
    points = [(int(size), seconds) for size, seconds in paces.items() if int(size) <= IN_CACHE]
    latency = points[0][1]
    bandwidth = points[-1][0] / (points[-1][1] - latency)
    lines = [
        "",
        f"Measured: an all-reduce of 2 ranks takes {1e6 * latency:.1f} µs + bytes / {bandwidth / 1e9:.1f} GB/s.",
        "",
    ]
    heads = ["a step", "fixed, ms", "a row, µs", "2 ranks, model / measured"]
    heads += [f"{ranks} ranks" for ranks in RANKS[1:]]
    tables = []
    for net in SAMPLES:
        fixed, per_row, size = _fit(rows, net)
        measured = statistics.median(r["seconds"] / r["steps"] for r in rows[f"{net}, two ranks, 1 thread each"])
        here = fixed + per_row * BATCH / 2 + latency + size / bandwidth
        tables.append(
            f"| {net} | {1e3 * fixed:.3f} | {1e6 * per_row:.2f} | {1e3 * here:.2f} / {1e3 * measured:.2f} ms |"
        )
    lines += [f"| {' | '.join(heads[:4])} |", "|---|---|---|---|", *tables, ""]
    lines += [
        "On paper, times as fast as one rank: the same global batch of 512 (a share each), or 512 rows on each rank.",
        "",
        f"| net, network | {' | '.join(f'{r} ranks, same batch' for r in RANKS[1:])} "
        f"| {' | '.join(f'{r} ranks, 512 each' for r in RANKS[1:])} |",
        "|---|" + "---|" * (2 * len(RANKS[1:])),
    ]
    for net in SAMPLES:
        fixed, per_row, size = _fit(rows, net)
        for network, (wait, pace) in NETWORKS.items():
            alone = fixed + per_row * BATCH
            cells = []
            for ranks in RANKS[1:]:
                step = fixed + per_row * -(-BATCH // ranks) + all_reduce(ranks, size, wait, pace)
                cells.append(f"{alone / step:.1f}")
            sums = {ranks: all_reduce(ranks, size, wait, pace) for ranks in RANKS[1:]}
            cells += [f"{ranks * alone / (alone + seconds):.0f}" for ranks, seconds in sums.items()]
            lines.append(f"| {net}, {network} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _fit(rows: dict[str, list[dict[str, Any]]], net: str) -> tuple[float, float, float]:
    """(seconds of a step whatever its rows, seconds a row, bytes of the gradient), of one thread."""
    large, small = (
        statistics.median(r["seconds"] / r["steps"] for r in rows[f"{net}, {way}"])
        for way in ("one rank, 1 thread", "small")
    )
    per_row = (large - small) / (BATCH - SMALL_BATCH)
    return max(0.0, large - per_row * BATCH), per_row, rows[f"{net}, small"][0]["bytes"]


def all_reduce(ranks: int, size: float, latency: float, pace: float) -> float:
    """Seconds, by the better of two ways: a ring that sends each byte twice, or a halving tree in few messages."""
    ring = 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size / pace
    tree = math.log2(ranks) * (latency + size / pace)
    return min(ring, tree)


if __name__ == "__main__":
    main()
