"""Figures as lines of a table, and as a file that says how they came about."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import xpnet
from benchmarks.measures import Plan, Row
from benchmarks.rounds import Figure, ratio

UNITS = {"step": (1e3, "ms"), "epoch": (1.0, "s"), "memory": (2.0**-20, "MiB"), "inference": (1e3, "ms"),
         "imports": (1.0, "s"), "training": (1.0, "s"), "accuracy": (1.0, "")}  # fmt: skip


def line(row: Row, first: bool) -> str:
    """xpnet's figure, then each other's with the ratio of the two: below 1, xpnet takes less."""
    times, unit = UNITS[row.measure]
    own = row.figures["xpnet"]
    cells = [f"{row.situation:36s}", f"xpnet {own.median * times:9.4g} {unit}"]
    if len(row.figures) == 1:
        cells.append(f"({min(own.values) * times:.4g} to {max(own.values) * times:.4g})")
    for name, figure in row.figures.items():
        if name != "xpnet":
            cells.append(f"{name} {figure.median * times:.4g} ({ratio(own, figure):.2f})")
    heading = f"{'':36s}  medians; in brackets xpnet / the other, round by round\n" if first else ""
    return heading + "  ".join(cells)


def save(folder: Path, plan: Plan, rows: list[Row]) -> Path:
    """One JSON file of all rounds, with the machine, the versions, the commit and the date."""
    path = folder / f"{plan.device.replace(':', '-')}-{time.strftime('%Y-%m-%d-%H%M')}.json"
    report = {**circumstances(plan.device), "plan": plan._asdict(), "rows": [_as_json(row) for row in rows]}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def _as_json(row: Row) -> dict:
    own = row.figures["xpnet"]

    def figure(name: str, f: Figure) -> dict:
        result = {"median": f.median, "least": f.least, "values": [float(f"{v:.5g}") for v in f.values]}
        return result if name == "xpnet" else {"xpnet / this": round(ratio(own, f), 4), **result}

    return {
        "measure": row.measure,
        "situation": row.situation,
        "figures": {name: figure(name, f) for name, f in row.figures.items()},
    }


def circumstances(device: str) -> dict:
    backend = xpnet.get_backend(device)
    versions = {"Python": platform.python_version()}
    for name in ("numpy", "numba", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "scikit-learn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": ", ".join(text for _, text in backend.describe()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }
