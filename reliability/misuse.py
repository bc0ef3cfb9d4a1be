"""Misuse: wrong calls of the public interface, in tests/misuse, which must end in errors of xpnet that say what to do.

Most of tests/misuse is one test for each row. test_constructors.py has one test for each class, which counts its own
rows: every parameter with every value.
"""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from reliability.results import Result

_ROOT = Path(__file__).parent.parent
_GENERATED = "test_constructors"


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    """All rows; scale and seed do not matter."""
    report = folder / "misuse.xml"
    command = [sys.executable, "-m", "pytest", "-q", "tests/misuse", f"--junit-xml={report}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    result = Result("wrong calls")
    if not report.exists():
        result.bad.append(f"pytest did not run: {(done.stdout + done.stderr)[-500:]}")
        return [result]
    generated = _load_generated()
    rows = {f"test_each_argument_works_or_is_refused_by_name[{target.name}]": target for target in generated.TARGETS}
    skipped = 0
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        module, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        if case.find("skipped") is not None:
            skipped += 1
            continue
        target = rows.get(name) if module == _GENERATED else None
        result.tried += len(target.parameters) * len(generated.VALUES) if target else 1
        for kind in ("failure", "error"):
            for found in case.iter(kind):
                result.bad += _faults(
                    f"{module}::{name}", found.get("message", "") or (found.text or "")[-300:], target
                )
    if skipped:
        result.note = f"{skipped} skipped"
    return [result]


def _load_generated() -> Any:
    """The module of tests that counts its rows."""
    for folder in ("support", "misuse"):
        sys.path.insert(0, str(_ROOT / "tests" / folder))
    spec = importlib.util.find_spec(_GENERATED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _faults(place: str, message: str, target: Any) -> list[str]:
    """One line for each bad row of a test: that of a class has a line for each, after its first."""
    lines = [line for line in message.replace("AssertionError: ", "").split("\n") if line.strip()]
    if target is None:
        return [f"{place}: {' '.join(lines)[:300]}"]
    return [f"{target.name}({line[:300]})" for line in lines[1:] if "=" in line and not line.startswith("assert")]
