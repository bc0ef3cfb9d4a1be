"""Run all tutorial programs, and print one table that compares their results with the tutorials.

    python -m examples.tutorials                       # or: python examples/tutorials
    python -m examples.tutorials --plots docs/pictures

Each program can also be run alone, and then prints what its tutorial prints: python examples/tutorials/neuron.py
"""

import contextlib
import importlib
import io
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that the programs can be imported

from common import main

PROGRAMS = (
    "perceptron",
    "exam_scores",
    "neuron",
    "two_two_one",
    "weight_height",
    "xor",
    "or_gate_graph",
    "or_gate_batch",
    "learning_rates",
    "gradient_descent",
    "loops_and_matrices",
    "weight_and_bias",
    "attention",
    "handwritten_digits",
)


def run(backend, seed=0, plots=None):
    rows = []
    for name in PROGRAMS:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # only the table is printed
            rows += importlib.import_module(name).run(backend, seed, plots)
        print(f"{name:20s}{time.perf_counter() - start:6.1f} s", flush=True)
    return rows


if __name__ == "__main__":
    main(run)
