"""Imports of the package: fast, without optional packages and without cycles; public names are complete."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xpnet

PACKAGE = Path(xpnet.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    return ".".join(["xpnet", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_of(path) for path in SOURCES}


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
def test_import_and_training_on_the_cpu_import_no_heavy_packages(code):
    assert python(f"{code}; import sys; print([n for n in {HEAVY} if n in sys.modules])") == "[]"


#: Modules that are slow to import and that few programs need: those of processes, networks, archives and e-mail (which
#: importlib.metadata reads), and parts of xpnet.
SLOW = ["argparse", "asyncio", "difflib", "email", "gzip", "html", "http", "importlib.metadata", "multiprocessing",
        "socket", "sqlite3", "ssl", "subprocess", "tempfile", "unittest", "urllib.request", "xml", "zipfile",
        "xpnet.attribution", "xpnet.backends.cpu.loops", "xpnet.backends.cuda.backend", "xpnet.backends.cuda.probe",
        "xpnet.datasets", "xpnet.estimators", "xpnet.onnx", "xpnet.plots"]  # fmt: skip


def test_import_loads_no_slow_module_and_of_other_packages_only_numpy():
    code = "import sys, numpy, numpy.random; before = {*sys.modules}; import xpnet; print(*{*sys.modules} - before)"
    loaded = python(code).split()
    assert "xpnet.model" in loaded
    assert [name for name in SLOW if name in loaded] == []
    known = {"numpy", "xpnet", *sys.stdlib_module_names}
    assert [name for name in loaded if name.partition(".")[0] not in known] == []


LAZY = ["estimators", "export_onnx", "import_onnx", "onnx", "plots"]
PUBLIC = ["attribution", "augment", "backends", "callbacks", "config", "datasets", "distributed", "errors",
          "estimators", "initializers", "layers", "losses", "metrics", "model", "onnx", "optimizers", "parameters",
          "plots", "schedules"]  # fmt: skip


@pytest.mark.parametrize("name", ["xpnet", *(f"xpnet.{name}" for name in PUBLIC)])
def test_the_public_names_of_a_module_are_complete(name):
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
    defined = {key for key, value in vars(module).items()
               if getattr(value, "__module__", "") == name and callable(value) and not key.startswith("_")}  # fmt: skip
    assert defined <= set(module.__all__)


def test_every_layer_is_exported():
    modules = [importlib.import_module(f"xpnet.layers.{path.stem}") for path in (PACKAGE / "layers").glob("[!_]*.py")]
    classes = {key: value for module in modules for key, value in vars(module).items() if isinstance(value, type)}
    defined = {key for key, cls in classes.items() if issubclass(cls, xpnet.layers.Layer) and not key.startswith("_")}
    assert defined == {*xpnet.layers.__all__, "Container", "Graph"}  # the bases of Sequential and of xpnet.Model


@pytest.mark.parametrize("name", PUBLIC)
def test_dir_of_a_module_lists_what_is_public(name):
    module = importlib.import_module(f"xpnet.{name}")
    assert dir(module) == sorted(module.__all__)


def test_dir_of_the_package_lists_all_names_including_lazily_imported_ones():
    assert set(dir(xpnet)) == {*xpnet.__all__, *LAZY, *(name for name in PUBLIC if name != "backends")}
    assert "plots" not in python(
        "import xpnet; dir(xpnet); import sys; print([m for m in sys.modules if 'plots' in m])"
    )
    with pytest.raises(AttributeError, match="module 'xpnet' has no attribute 'Modle'. Did you mean"):
        xpnet.Modle  # noqa: B018


def test_type_checkers_know_every_name_and_reject_misspelled_ones(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    known = [*xpnet.__all__, *LAZY, "plots.curves", "estimators.XPClassifier"]
    lines = ["import xpnet", *(f"xpnet.{name}" for name in known), "xpnet.Modle"]
    (tmp_path / "names.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "names.py"]
    (tmp_path / "xpnet").symlink_to(PACKAGE)  # mypy refuses site-packages in MYPYPATH
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if line.startswith("names.py")]
    expected = [f'names.py:{len(lines)}: error: Module has no attribute "Modle"; maybe "Model"?  [attr-defined]']
    assert errors == expected, done.stdout + done.stderr


def test_the_version_starts_with_two_numbers():
    assert [part.isdigit() for part in xpnet.__version__.split(".")][:2] == [True, True]


def names_of(node):
    """The modules that an import statement or a call of import_module imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        # `from xpnet import layers` imports xpnet.layers, and nothing that xpnet/__init__.py defines.
        return [name if name in MODULES else node.module for name in full]
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


def test_only_the_probe_imports_cupy():
    users = [p.relative_to(PACKAGE).as_posix() for p in SOURCES if roots(imported_by(p)) & {"cupy", "cupyx"}]
    assert users == ["backends/cuda/probe.py"]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "layers"
                                  or p.name in ("augment.py", "losses.py", "metrics.py", "optimizers.py",
                                                "schedules.py")],
                         ids=lambda p: p.name)  # fmt: skip
def test_layers_losses_metrics_and_optimizers_import_no_array_library(path):
    assert not roots(imported_by(path)) & {"numpy", "cupy", "cupyx", "scipy", "torch"}


#: The parts of the package, lowest first. A part may import parts of lower levels or of its own level.
LAYERS = [
    ["_version", "errors"],
    ["concurrency"],
    ["backends"],
    ["capture"],
    ["config", "display", "distributed"],
    ["initializers"],
    ["parameters"],
    ["layers", "augment", "losses", "schedules", "optimizers", "metrics"],
    ["data"],
    ["callbacks"],
    ["training"],
    ["model"],
    ["attribution", "datasets", "estimators", "onnx", "plots"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OPTIONAL = {"datasets", "estimators", "onnx", "plots"}


def modules_imported_by(path):
    """The modules of xpnet that a file imports anywhere, including imports for types and inside functions."""
    return {name for name in imported_by(path) if name in MODULES and name != module_of(path)}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE or p.stem in LEVEL],
                         ids=lambda p: p.relative_to(PACKAGE).as_posix())  # fmt: skip
def test_imports_point_from_higher_to_lower_parts(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in modules_imported_by(path):
        imported = name.split(".")[1] if "." in name else None
        if imported is not None:
            assert LEVEL[imported] <= LEVEL[part], f"{path.relative_to(PACKAGE)} imports {name}"
            assert imported == part or imported not in OPTIONAL or part == "estimators"


def test_there_are_no_import_cycles():
    edges = {module_of(path): modules_imported_by(path) for path in SOURCES}
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, " imports ".join([*under_way[under_way.index(module) :], module])
        if module not in done:
            under_way.append(module)
            for name in sorted(edges[module]):
                visit(name)
            under_way.pop()
            done.add(module)

    for module in sorted(edges):
        visit(module)


def test_the_root_contains_only_modules_for_users():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {
        "__init__", "__main__", "_version", "attribution", "augment", "callbacks", "config", "errors", "estimators",
        "initializers", "losses", "metrics", "model", "optimizers", "parameters", "schedules"
    }  # fmt: skip
