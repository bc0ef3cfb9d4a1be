"""Tables of measurements, and files with the measurements, the machine and the versions."""

import contextlib
import json
import os
import re
import time
from pathlib import Path

import xpnet
from benchmarks.measures import Plan, Row
from benchmarks.peers import compared_with, label, precision_of
from benchmarks.rounds import Measurement, ratio
from benchmarks.versions import commit, versions

UNITS = {"step": (1e3, "ms"), "epoch": (1.0, "s"), "memory": (2.0**-20, "MiB"), "inference": (1e3, "ms"),
         "imports": (1.0, "s"), "training": (1.0, "s"), "accuracy": (1.0, ""), "rate": (1e3, "ms"),
         "profile": (1e6, "µs")}  # fmt: skip


def line(row: Row, first: bool) -> str:
    """One line of the table on the terminal: the median of xpnet, then of each peer with the ratio xpnet / peer."""
    factor, unit = UNITS[row.measure]
    own, mixed = row.measurements["xpnet"], any(precision_of(name) != "float32" for name in row.measurements)
    cells = [f"{row.situation:36s}", f"{column('xpnet', mixed)} {own.median * factor:9.4g} {unit}"]
    if len(row.measurements) == 1:
        cells.append(f"({min(own.values) * factor:.4g} to {max(own.values) * factor:.4g})")
    for name, peer in row.measurements.items():
        if name != "xpnet":
            own = row.measurements.get(compared_with(name))
            in_brackets = "" if own is None else f" ({ratio(own, peer):.2f})"
            cells.append(f"{column(name, mixed)} {peer.median * factor:.4g}{in_brackets}")
    legend = "medians, in float32 unless named; in brackets the ratio xpnet / peer in the same precision"
    heading = f"{'':36s}  {legend}\n" if first else ""
    return heading + "  ".join(cells)


def save(folder: Path, plan: Plan, rows: list[Row]) -> Path:
    """Write all rounds, the machine, the versions, the commit and the date as JSON, and tables and bars beside it."""
    path = folder / f"{plan.device.replace(':', '-')}-{time.strftime('%Y-%m-%d-%H%M')}.json"
    report = {**circumstances(plan.device), "plan": plan._asdict(), "rows": [_as_json(row) for row in rows]}
    path.write_text(as_text(report), encoding="utf-8")
    packages = " · ".join(f"{name} {version}" for name, version in report["versions"].items())
    first = f"{report['date']}, commit {report['commit']}, {report['machine']}, {report['cores']} cores; {packages}"
    precision = "Matrix products are in float32, except in columns that name another precision."
    path.with_suffix(".md").write_text(f"{first}\n\n{precision}\n\n{markdown(rows)}", encoding="utf-8")
    if any(row.measure == "step" for row in rows):
        with contextlib.suppress(ImportError):
            bars(path.with_suffix(".png"), rows)
    return path


def as_text(report: dict) -> str:
    """JSON with each list of numbers on one line."""
    return re.sub(r"\[[^\[\]{}]*\]", _on_one_line, json.dumps(report, indent=1)) + "\n"


def _on_one_line(part: re.Match[str]) -> str:
    return " ".join(part[0].split())


def markdown(rows: list[Row]) -> str:
    """One table per measure: the medians of xpnet, and the ratios xpnet / peer, below 1 if xpnet takes less.

    A peer is compared with xpnet in the same precision of matrix products, which its column names.
    """
    parts = []
    for measure in dict.fromkeys(row.measure for row in rows):
        selected = [row for row in rows if row.measure == measure]
        others = dict.fromkeys(name for row in selected for name in row.measurements if name != "xpnet")
        factor, unit = UNITS[measure]
        mixed = any(precision_of(name) != "float32" for name in others)
        heads = [measure, f"{column('xpnet', mixed)}, {unit}" if unit else column("xpnet", mixed)]
        heads += [
            f"to {column(name, mixed)}" if compared_with(name) == "xpnet" else f"{compared_with(name)} to {name}"
            for name in others
        ]
        lines = [heads, ["---"] * len(heads)]
        for row in selected:
            lines.append([row.situation, f"{row.measurements['xpnet'].median * factor:.4g}"])
            for name in others:
                own, peer = row.measurements.get(compared_with(name)), row.measurements.get(name)
                lines[-1].append("" if own is None or peer is None else f"{ratio(own, peer):.2f}")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


def column(name: str, mixed: bool) -> str:
    """The name of a column; in a table that mixes precisions, with its precision."""
    return label(name) if mixed else name


def bars(path: Path, rows: list[Row]) -> None:
    """Draw training steps as bars, in multiples of the floor. Needs matplotlib."""
    from matplotlib.figure import Figure

    steps = [row for row in rows if row.measure == "step" and "floor" in row.measurements]
    names = [
        name for name in dict.fromkeys(n for row in steps for n in row.measurements) if name not in ("floor", "sklearn")
    ]
    figure = Figure(figsize=(8, 1 + 0.14 * len(steps) * (len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(names):
        measured = [(i, row.measurements) for i, row in enumerate(steps) if name in row.measurements]
        positions = [i + 0.8 * k / len(names) for i, _ in measured]
        lengths = [1 / ratio(row["floor"], row[name]) for _, row in measured]
        axes.barh(positions, lengths, height=0.8 / len(names), label=name, align="edge")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([i + 0.4 for i in range(len(steps))], [row.situation for row in steps])
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step, in multiples of its matrix products alone")
    axes.legend(loc="upper right")
    figure.savefig(path)


def _as_json(row: Row) -> dict:
    def as_json(name: str, m: Measurement) -> dict:
        result = {"median": m.median, "least": m.minimum, "values": [float(f"{v:.5g}") for v in m.values]}
        own = compared_with(name)
        if name == "xpnet" or own not in row.measurements:
            return result
        return {f"{own} / this": round(ratio(row.measurements[own], m), 4), **result}

    return {
        "measure": row.measure,
        "situation": row.situation,
        "measurements": {name: as_json(name, m) for name, m in row.measurements.items()},
    }


def circumstances(device: str) -> dict:
    """The date, the commit, the machine and the versions."""
    backend = xpnet.get_backend(device)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": ", ".join(text for _, text in backend.describe()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
    }
