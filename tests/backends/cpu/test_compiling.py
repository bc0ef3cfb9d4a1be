"""Numba's absence and failures end in plain NumPy, and those of its cache in compiling without it."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from without_numba import formulas_only

import xpnet
from xpnet import __main__ as program
from xpnet.backends.cpu import operators

ROOT = Path(xpnet.__file__).parents[1]
NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not NUMBA, reason="Numba is not installed")

#: Uses one loop, which is compiled in half a second, and prints what it found.
PROGRAM = """
import numpy, xpnet
from xpnet.backends.cpu import operators
backend = xpnet.get_backend("cpu")
with backend.parallel_region():
    y = backend.relu(numpy.arange(-3.0, 3.0).reshape(2, 3), numpy.empty((2, 3)))
print(y.sum(), operators.compiled_loops() is not None, operators.loops_unavailable_reason(), sep="|")
"""


def run(code=PROGRAM, *, path=(), **environment):
    """(what this program prints, what it logs) in a process of its own."""
    folders = os.pathsep.join(map(str, (*path, ROOT)))
    env = os.environ | {"PYTHONPATH": folders} | {name: str(value) for name, value in environment.items()}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.splitlines()


def test_the_loops_can_be_turned_off():
    printed, logged = run(XPNET_FAST=0)
    assert printed.split("|")[1:] == ["False", "the environment variable XPNET_FAST=0 turns them off"]
    assert not logged


@needs_numba
def test_with_numba_the_loops_are_compiled(tmp_path):
    printed, logged = run(NUMBA_CACHE_DIR=tmp_path)
    assert printed == "3.0|True|None" and not logged
    assert list(tmp_path.rglob("*.nbi"))


HIDING = {
    "None": "import sys; sys.modules['numba'] = None",
    "not found": """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "numba" else found(name, *package)
""",
}


@pytest.mark.parametrize("hidden", HIDING)
def test_without_numba_the_formulas_are_used_without_a_warning(hidden):
    assert run(HIDING[hidden] + PROGRAM) == ("3.0|False|Numba is not installed", [])


BROKEN = {
    "another NumPy": ("numba", "raise ImportError('Numba needs NumPy 2.5 or less. Got NumPy 2.6.')"),
    "damaged": ("numba", "raise SystemError('initialization of _internal failed\\n without raising')"),
    "attribute": ("numba", "import math; math.nothing"),
    "empty": ("numba", ""),
    "no llvmlite": ("llvmlite", "raise OSError('could not find libllvmlite.so')"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_numba_that_cannot_be_imported_is_logged_once(tmp_path, why):
    package, code = BROKEN[why]
    if package == "llvmlite" and not NUMBA:
        pytest.skip("Numba is not installed")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(code, encoding="utf-8")
    printed, logged = run(path=[tmp_path])
    assert printed.startswith("3.0|False|Numba ") and " cannot be used: " in printed
    reason = printed.split("|")[2]
    assert logged == [f"no compiled loops, plain NumPy instead: {reason}"]


@needs_numba
def test_no_loop_runs_in_python_if_numba_is_told_not_to_compile():
    printed, logged = run(NUMBA_DISABLE_JIT=1)
    assert printed.startswith("3.0|False|") and "NUMBA_DISABLE_JIT" in printed and len(logged) == 1


@needs_numba
def test_without_a_folder_for_the_cache_the_loops_are_compiled_without_it():
    unwritable = """
import tempfile
def refuse(*args, **kwargs):
    raise PermissionError(30, "Read-only file system")
tempfile.TemporaryFile = refuse  # by which Numba tries whether it can write
"""
    printed, logged = run(unwritable + PROGRAM)
    assert printed == "3.0|True|None"
    (line,) = logged
    assert line.startswith(
        "Numba compiles anew in every process, because its cache cannot be used: cannot cache function"
    )
    assert line.endswith("Set the environment variable NUMBA_CACHE_DIR to a folder that can be written.")


@needs_numba
def test_a_full_disk_does_not_matter(tmp_path):
    full = """
from numba.core import caching
def refuse(*args):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile._save_data = refuse
"""
    printed, logged = run(full + PROGRAM, NUMBA_CACHE_DIR=tmp_path)
    assert printed == "3.0|True|None"
    assert len(logged) == 1 and "No space left on device" in logged[0]


@needs_numba
def test_damaged_files_in_the_cache_do_not_matter(tmp_path):
    run(NUMBA_CACHE_DIR=tmp_path)
    files = [*tmp_path.rglob("*.nbi"), *tmp_path.rglob("*.nbc")]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:20])
    printed, logged = run(NUMBA_CACHE_DIR=tmp_path)
    assert printed == "3.0|True|None" and len(logged) == 1


@needs_numba
def test_small_nets_do_not_load_numba():
    code = """
import sys, numpy, xpnet
from xpnet import layers
xpnet.available_backends(), xpnet.get_backend("cpu").environment()
model = xpnet.Sequential([layers.Dense(8), layers.ReLU(), layers.Dense(2)], (4,), backend="cpu")
model.fit(numpy.ones((6, 4)), numpy.ones(6, int), verbose=0)
assert "numba" not in sys.modules
model = xpnet.Sequential([layers.Dense(800), layers.ReLU(), layers.Dense(2)], (40,), backend="cpu")
model.fit(numpy.ones((6, 40)), numpy.ones(6, int), verbose=0)
assert "numba" in sys.modules
"""
    run(code)


def test_info_says_whether_loops_are_compiled(monkeypatch):
    def shown():
        (line,) = [line for line in program.info() if line.startswith("  loops ")]
        return line.removeprefix("  loops   ")

    if NUMBA:
        import numba

        assert shown() == f"compiled by Numba {numba.__version__}"
    else:
        assert shown() == "plain NumPy, not compiled: Numba is not installed"
    monkeypatch.setenv("XPNET_FAST", "0")
    assert shown() == "plain NumPy, not compiled: the environment variable XPNET_FAST=0 turns them off"
    assert operators.loop_compiler() == "none"


# The dependency ------------------------------------------------------------------------------------------------------

#: sys_platform, platform_machine, Python, implementation; whether numba and llvmlite have wheels.
SYSTEMS = [
    ("linux", "x86_64", "3.11", "CPython", True),
    ("linux", "x86_64", "3.15", "CPython", True),
    ("linux", "aarch64", "3.12", "CPython", True),
    ("darwin", "arm64", "3.14", "CPython", True),
    ("win32", "AMD64", "3.13", "CPython", True),
    ("linux", "x86_64", "3.16", "CPython", False),
    ("linux", "x86_64", "3.11", "PyPy", False),
    ("linux", "i686", "3.12", "CPython", False),
    ("linux", "armv7l", "3.12", "CPython", False),
    ("linux", "riscv64", "3.12", "CPython", False),
    ("linux", "ppc64le", "3.12", "CPython", False),
    ("darwin", "x86_64", "3.12", "CPython", False),
    ("win32", "ARM64", "3.11", "CPython", False),
    ("emscripten", "wasm32", "3.13", "CPython", False),
    ("freebsd14", "amd64", "3.12", "CPython", False),
    ("android", "aarch64", "3.13", "CPython", False),
    ("ios", "arm64", "3.13", "CPython", False),
]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: " ".join(map(str, system)))
def test_numba_is_required_where_it_has_wheels(system):
    platform, machine, python, implementation, expected = system
    environment = {
        "sys_platform": platform,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_python_implementation": implementation,
    }
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (numba,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "numba"]
    assert numba.marker.evaluate(environment) == expected
    assert project["optional-dependencies"]["fast"] == []  # `pip install xpnet[fast]` still works


def test_results_with_and_without_loops_agree_within_rounding():
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype("float32")
    model = xpnet.Sequential([xpnet.layers.Conv2D(3, 3), xpnet.layers.ReLU()], (8, 8, 2), backend="cpu")
    want = model.predict(x)
    with formulas_only():
        got = model.predict(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
