"""Measure xpnet, other libraries ("peers"), and the matrix products alone ("floor").

    python -m benchmarks                                         # the measurements in docs/performance.md
    python -m benchmarks --measure step --nets mlp --threads 1 2 --batch 32 128 --peers torch jax
    python -m benchmarks --measure epoch --nets mlp --epoch-batch 32 128 512     # an epoch, and its steps alone
    python -m benchmarks --device gpu                            # the same on a CUDA GPU

Prints tables, and writes all measurements with the machine and the versions to --out. A peer that is not installed is
an error; leave it out with --peers. On a GPU every peer is measured in float32 and in TF32, and compared with xpnet in
the same precision. `python -m benchmarks.gpu_check` takes only a few minutes and measures less;
`python -m benchmarks.tiny_nets` compares `fit` with a plain NumPy script.
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
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (default: 1 2)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["torch", "jax", "sklearn"])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=SMALL)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--epoch-batch", type=int, nargs="+", default=[128], help="of epochs (default: 128)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--measure", nargs="+", choices=measures.MEASURES, help="(default: all for the device)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="a folder (default: benchmarks/results)")
    options = parser.parse_args()
    gpu = options.device.startswith("gpu")
    names = names_of(options.peers, gpu)
    threads = [1] if gpu else options.threads
    plan = measures.Plan(
        options.device, threads, names, options.nets, options.batch, options.epoch_batch, options.rounds
    )

    chosen = options.measure or [name for name in measures.MEASURES if gpu or name not in measures.ONLY_ON_GPU]
    rows: list[measures.Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in chosen:
            print(f"\n{measures.MEASURES[name].__doc__}\n", flush=True)
            for row in measures.MEASURES[name](plan):
                print(report.line(row, first=not rows or rows[-1].measure != row.measure), flush=True)
                rows.append(row)
    finally:  # after Ctrl-C, the measurements so far are written
        if rows:
            path = report.save(options.out, plan, rows)
            print(f"\nwritten: {path}\n\n{path.with_suffix('.md').read_text(encoding='utf-8')}")


def names_of(peers: list[str], gpu: bool) -> list[str]:
    """The names in benchmarks.peers.KINDS of xpnet, the floor, and all variants of these peers."""
    names = list(OWN_ON_GPU if gpu else OWN)
    names += [kind for peer in peers for kind in (PEERS_ON_GPU if gpu else PEERS)[peer]]
    assert set(names) <= KINDS.keys()
    return names


if __name__ == "__main__":
    main()
