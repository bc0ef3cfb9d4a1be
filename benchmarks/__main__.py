"""Measure xpnet beside its peers and beside the matrix products alone.

    python -m benchmarks                                         # what docs/performance.md shows
    python -m benchmarks --measure step --nets mlp --threads 1 2 --batch 32 128 --peers torch jax
    python -m benchmarks --device gpu                            # the same on a CUDA GPU

Prints tables, and writes the figures with their circumstances to --out, benchmarks/results unless told otherwise.
A peer that is not installed is an error: leave it out by --peers.
"""

import argparse
from pathlib import Path

from benchmarks import measures, report
from benchmarks.nets import NETS
from benchmarks.peers import KINDS

HERE = Path(__file__).parent
PEERS = {"torch": ["torch", "torch-channels-last"], "torch-compile": ["torch-compile"], "jax": ["jax"],
         "sklearn": ["sklearn"]}  # fmt: skip
PEERS_ON_GPU = {**PEERS, "torch": [*PEERS["torch"], "torch-graph"], "jax": ["jax", "jax-scan"], "sklearn": []}
SMALL = [name for name in NETS if name != "mlp-4096"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help='"cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU (default: 1 2)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["torch", "jax", "sklearn"])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=SMALL)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--measure", nargs="+", choices=measures.MEASURES, help="(default: all of this device)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="a folder for the figures")
    options = parser.parse_args()
    gpu = options.device.startswith("gpu")
    names = ["xpnet", "xpnet-call-by-call" if gpu else "xpnet-plain", "floor"]
    names += [kind for peer in options.peers for kind in (PEERS_ON_GPU if gpu else PEERS)[peer]]
    assert set(names) <= KINDS.keys()
    plan = measures.Plan(
        options.device, [1] if gpu else options.threads, names, options.nets, options.batch, options.rounds
    )

    wanted = options.measure or [name for name in measures.MEASURES if gpu or name not in measures.ONLY_ON_GPU]
    rows: list[measures.Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for what in wanted:
            print(f"\n{measures.MEASURES[what].__doc__}\n", flush=True)
            for row in measures.MEASURES[what](plan):
                print(report.line(row, first=not rows or rows[-1].measure != row.measure), flush=True)
                rows.append(row)
    finally:  # Ctrl-C keeps what stands
        if rows:
            path = report.save(options.out, plan, rows)
            print(f"\nwritten: {path}\n\n{path.with_suffix('.md').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
