"""Figures as lines of a table, and as a file that says how they came about."""

import contextlib
import json
import os
import re
import time
from pathlib import Path

import xpnet
from benchmarks.measures import Plan, Row
from benchmarks.peers import compared_with, label, precision_of
from benchmarks.rounds import Figure, ratio
from benchmarks.versions import commit, versions

UNITS = {"step": (1e3, "ms"), "epoch": (1.0, "s"), "memory": (2.0**-20, "MiB"), "inference": (1e3, "ms"),
         "imports": (1.0, "s"), "training": (1.0, "s"), "accuracy": (1.0, ""), "rate": (1e3, "ms"),
         "profile": (1e6, "µs")}  # fmt: skip


def line(row: Row, first: bool) -> str:
    """xpnet's figure, then each other's with the ratio of xpnet's to it: below 1, xpnet takes less."""
    times, unit = UNITS[row.measure]
    own, mixed = row.figures["xpnet"], any(precision_of(name) != "float32" for name in row.figures)
    cells = [f"{row.situation:36s}", f"{column('xpnet', mixed)} {own.median * times:9.4g} {unit}"]
    if len(row.figures) == 1:
        cells.append(f"({min(own.values) * times:.4g} to {max(own.values) * times:.4g})")
    for name, figure in row.figures.items():
        if name != "xpnet":
            own = row.figures.get(compared_with(name))
            beside = "" if own is None else f" ({ratio(own, figure):.2f})"
            cells.append(f"{column(name, mixed)} {figure.median * times:.4g}{beside}")
    told = "medians, in float32 unless named; in brackets xpnet in that precision / the other, round by round"
    heading = f"{'':36s}  {told}\n" if first else ""
    return heading + "  ".join(cells)


def save(folder: Path, plan: Plan, rows: list[Row]) -> Path:
    """A JSON file of all rounds, with the machine, the versions, the commit and the date; tables and bars beside it."""
    path = folder / f"{plan.device.replace(':', '-')}-{time.strftime('%Y-%m-%d-%H%M')}.json"
    report = {**circumstances(plan.device), "plan": plan._asdict(), "rows": [_as_json(row) for row in rows]}
    text = json.dumps(report, indent=1)
    path.write_text(re.sub(r"\[[^\[\]{}]*\]", _on_one_line, text) + "\n", encoding="utf-8")
    told = " · ".join(f"{name} {text}" for name, text in report["versions"].items())
    first = f"{report['date']}, commit {report['commit']}, {report['machine']}, {report['cores']} cores; {told}"
    precision = "Matrix products are in float32, except in columns that name another precision."
    path.with_suffix(".md").write_text(f"{first}\n\n{precision}\n\n{markdown(rows)}", encoding="utf-8")
    if any(row.measure == "step" for row in rows):
        with contextlib.suppress(ImportError):
            bars(path.with_suffix(".png"), rows)
    return path


def _on_one_line(part: re.Match[str]) -> str:
    return " ".join(part[0].split())


def markdown(rows: list[Row]) -> str:
    """A table a measure: xpnet's medians, and the ratio of xpnet to each other. Below 1, xpnet takes less.

    A peer is compared with xpnet in the same precision of products, which its column names.
    """
    parts = []
    for measure in dict.fromkeys(row.measure for row in rows):
        those = [row for row in rows if row.measure == measure]
        others = dict.fromkeys(name for row in those for name in row.figures if name != "xpnet")
        times, unit = UNITS[measure]
        mixed = any(precision_of(name) != "float32" for name in others)
        heads = [measure, f"{column('xpnet', mixed)}, {unit}" if unit else column("xpnet", mixed)]
        heads += [
            f"to {column(name, mixed)}" if compared_with(name) == "xpnet" else f"{compared_with(name)} to {name}"
            for name in others
        ]
        lines = [heads, ["---"] * len(heads)]
        for row in those:
            lines.append([row.situation, f"{row.figures['xpnet'].median * times:.4g}"])
            for name in others:
                own, figure = row.figures.get(compared_with(name)), row.figures.get(name)
                lines[-1].append("" if own is None or figure is None else f"{ratio(own, figure):.2f}")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


def column(name: str, mixed: bool) -> str:
    """A column's name: with the precision where a table mixes several; all else is in float32."""
    return label(name) if mixed else name


def bars(path: Path, rows: list[Row]) -> None:
    """Training steps as bars, each situation in multiples of its floor. Needs matplotlib."""
    from matplotlib.figure import Figure as Picture

    steps = [row for row in rows if row.measure == "step" and "floor" in row.figures]
    names = [
        name for name in dict.fromkeys(n for row in steps for n in row.figures) if name not in ("floor", "sklearn")
    ]
    picture = Picture(figsize=(8, 1 + 0.14 * len(steps) * (len(names) + 1)), layout="constrained")
    axes = picture.subplots()
    for k, name in enumerate(names):
        places = [i + 0.8 * k / len(names) for i, row in enumerate(steps) if name in row.figures]
        lengths = [1 / ratio(row.figures["floor"], row.figures[name]) for row in steps if name in row.figures]
        axes.barh(places, lengths, height=0.8 / len(names), label=name, align="edge")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([i + 0.4 for i in range(len(steps))], [row.situation for row in steps])
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step, in multiples of its matrix products alone")
    axes.legend(loc="upper right")
    picture.savefig(path)


def _as_json(row: Row) -> dict:
    def figure(name: str, f: Figure) -> dict:
        result = {"median": f.median, "least": f.least, "values": [float(f"{v:.5g}") for v in f.values]}
        own = compared_with(name)
        if name == "xpnet" or own not in row.figures:
            return result
        return {f"{own} / this": round(ratio(row.figures[own], f), 4), **result}

    return {
        "measure": row.measure,
        "situation": row.situation,
        "figures": {name: figure(name, f) for name, f in row.figures.items()},
    }


def circumstances(device: str) -> dict:
    backend = xpnet.get_backend(device)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": ", ".join(text for _, text in backend.describe()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
    }
