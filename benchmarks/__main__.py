"""Measure xpnet beside its peers and beside the matrix products alone.

    python -m benchmarks                                         # what docs/performance.md shows
    python -m benchmarks --measure step --nets mlp --threads 1 2 --batch 32 128 --peers torch jax
    python -m benchmarks --device gpu                            # the same on a CUDA GPU

Prints tables, and writes the figures with their circumstances to --out, benchmarks/results unless told otherwise.
A peer that is not installed is an error: leave it out by --peers. On a GPU every peer computes in float32 and in TF32,
and is compared with xpnet in the same precision; `python -m benchmarks.gpu_check` measures much less in a few minutes.
"""

import argparse
from pathlib import Path

from benchmarks import measures, report
from benchmarks.nets import NETS
from benchmarks.peers import KINDS

HERE = Path(__file__).parent
PEERS = {"torch": ["torch", "torch-channels-last"], "torch-compile": ["torch-compile"], "jax": ["jax"],
         "sklearn": ["sklearn"]}  # fmt: skip
_GPU_KINDS = {"torch": ["torch", "torch-graph", "torch-channels-last"], "torch-compile": ["torch-compile"],
              "jax": ["jax", "jax-scan"], "sklearn": []}  # fmt: skip
PEERS_ON_GPU = {
    peer: [f"{kind}-{precision}" for kind in kinds for precision in ("float32", "tf32")]
    for peer, kinds in _GPU_KINDS.items()
}
OWN = ["xpnet", "xpnet-plain", "floor"]
OWN_ON_GPU = ["xpnet", "xpnet-tf32", "xpnet-eager", "floor", "floor-tf32"]
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
    names = names_of(options.peers, gpu)
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


def names_of(peers: list[str], gpu: bool) -> list[str]:
    """What is measured: xpnet, its floor, and all kinds of these peers."""
    names = list(OWN_ON_GPU if gpu else OWN)
    names += [kind for peer in peers for kind in (PEERS_ON_GPU if gpu else PEERS)[peer]]
    assert set(names) <= KINDS.keys()
    return names


if __name__ == "__main__":
    main()
