"""`import xpnet` is light: no CuPy, no optional room, no time to speak of; and arrows point down only."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import xpnet

PACKAGE = Path(xpnet.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def python(code):
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ["cupy", "matplotlib", "pooch", "requests", "safetensors", "scipy", "threadpoolctl", "tqdm"]


@pytest.mark.parametrize("code", [
    "import xpnet",
    "import xpnet, numpy; m = xpnet.Sequential([xpnet.layers.Dense(2)], (3,), 'cpu'); x = numpy.ones((4, 3)); "
    "m.fit(x, [0, 1, 0, 1], verbose=0); m.predict(x); xpnet.datasets.digits(); xpnet.get_backend('cpu')",
])  # fmt: skip
def test_neither_import_nor_training_on_the_cpu_load_what_they_do_not_need(code):
    assert python(f"{code}; import sys; print([n for n in {HEAVY} if n in sys.modules])") == "[]"


@pytest.mark.slow
def test_import_costs_less_than_0_3_s_beyond_numpys():
    code = "import time, numpy; began = time.perf_counter(); import xpnet; print(time.perf_counter() - began)"
    assert statistics.median(float(python(code)) for _ in range(5)) < 0.3


def test_every_public_name_is_there():
    assert sorted(xpnet.__all__) == sorted(set(xpnet.__all__))
    for module in (xpnet, xpnet.augment, xpnet.layers, xpnet.datasets, xpnet.backends):
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_the_version_is_a_version():
    assert [part.isdigit() for part in xpnet.__version__.split(".")][:2] == [True, True]


def names_of(node):
    """What an import statement, or a call of import_module, imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    called = node.func if isinstance(node, ast.Call) else None
    name = getattr(called, "attr", getattr(called, "id", ""))
    if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        return [node.args[0].value]
    return []


def imported_by(path, everywhere=True):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    return {name for node in nodes for name in names_of(node)}


def roots(names):
    return {name.split(".")[0] for name in names}


def test_only_the_backends_import_cupy():
    users = [p.relative_to(PACKAGE).as_posix() for p in SOURCES if roots(imported_by(p)) & {"cupy", "cupyx"}]
    assert users == ["backends/gpu.py"]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "layers"
                                  or p.name in ("augment.py", "losses.py", "metrics.py", "optimizers.py",
                                                "schedules.py")],
                         ids=lambda p: p.name)  # fmt: skip
def test_what_computes_imports_no_array_library(path):
    assert not roots(imported_by(path)) & {"numpy", "cupy", "cupyx", "scipy", "torch"}


FLOORS = [
    ["errors"],
    ["backends"],
    ["config", "ranks"],
    ["initializers"],
    ["parameters"],
    ["loss_scaling"],
    ["augment", "layers", "losses", "schedules", "optimizers", "metrics"],
    ["callbacks", "checkpoints", "data", "resume"],
    ["streams"],
    ["step"],
    ["replay"],
    ["run"],
    ["gradient_check", "training"],
    ["model"],
]
HEIGHT = {name: i for i, floor in enumerate(FLOORS) for name in floor}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name not in ("__init__.py", "__main__.py")],
                         ids=lambda p: p.relative_to(PACKAGE).as_posix())  # fmt: skip
def test_arrows_point_down_only(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported_by(path, everywhere=False):
        parts = name.split(".")
        if parts[0] == "xpnet" and len(parts) > 1 and parts[1] in HEIGHT:
            assert HEIGHT[parts[1]] <= HEIGHT.get(here, len(FLOORS)), f"{here} imports {name}"


@pytest.mark.parametrize("core", sorted(HEIGHT))
def test_the_core_imports_no_optional_room(core):
    files = [PACKAGE / f"{core}.py"] if (PACKAGE / f"{core}.py").exists() else sorted((PACKAGE / core).rglob("*.py"))
    assert files
    for path in files:
        rooms = {f"xpnet.{room}" for room in ("datasets", "plots", "estimators", "onnx", "distributed")}
        opened = {"xpnet.distributed"} if core == "model" else set()  # by fit(distributed=True), when it is called
        assert imported_by(path) & rooms == opened
        assert not imported_by(path, everywhere=False) & rooms
