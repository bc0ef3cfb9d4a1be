"""Run the attacks: `python -m reliability [--only NAME ...] [--scale 1.0] [--seed 0] [--write docs/reliability.md]`."""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

#: The modules of this package that have `run(scale, seed, folder) -> list[Result]`, in the order of the summary.
PARTS: tuple[str, ...] = ("storage_faults", "memory_faults", "interrupts", "kills")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability", description="Attack xpnet, and count what breaks.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the attacks to run; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="times the full number of cases")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    bad = 0
    for part in options.only:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            results = importlib.import_module(f"reliability.{part}").run(options.scale, options.seed, Path(folder))
        for result in results:
            print(result, flush=True)
            bad += len(result.bad)
        print(f"    {part} took {time.monotonic() - start:.0f} s", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
