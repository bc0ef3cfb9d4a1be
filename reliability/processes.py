"""Cases that run in a process of their own with a time limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

from reliability.results import Result

ROOT = Path(__file__).parents[1]


def in_a_process(module: str, name: str, cases: str, count: int, seed: int, seconds: float) -> Result:
    """Call module.CASES[name][-1](count, seed) in a process that may run for this long.

    It returns how many cases were tried, a line for each that went wrong, and perhaps a note.
    """
    code = f"import json, {module} as m; print('report', json.dumps(m.CASES[{name!r}][-1]({count}, {seed})))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT,
                              timeout=seconds, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        errors = (error.stderr or b"")[-2000:]
        return Result(cases, count, [f"{name}, seed {seed}: it still ran after {seconds:.0f} s: {errors!r}"])
    report = next((line for line in done.stdout.splitlines() if line.startswith("report ")), None)
    if done.returncode or report is None:
        return Result(cases, count, [f"{name}, seed {seed}: exit status {done.returncode}: {done.stderr[-2000:]}"])
    tried, bad, *note = json.loads(report.removeprefix("report "))
    return Result(cases, tried, [f"{name}, seed {seed}: {text}" for text in bad], *note)
