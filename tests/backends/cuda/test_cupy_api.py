"""The package uses only names and arguments that CuPy has: its source is checked against the recorded API of CuPy."""

import ast
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record_cupy_api
from strict import API, signature

import xpnet

PACKAGE = Path(xpnet.__file__).parent
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MODULES = ("cuda",)  # the modules of CuPy that backends/ may use


def complaints(source: str, path: str) -> list[str]:
    """What CuPy does not support, or the architecture forbids, in the source of a file of the package."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = [f"{path}:{line}: imports {name}" for line, name in _imports(tree) if _may_not_import(path, name)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not _is_xp(node.value):
            continue
        parent = parents.get(id(node))
        method = parent.attr if isinstance(parent, ast.Attribute) else None
        if node.attr in API["modules"]:
            if node.attr not in MODULES or not path.startswith("backends/"):
                found.append(f"{path}:{node.lineno}: xp.{node.attr}.{method} may not be used here")
        elif reason := _complaint(node.attr, method, calls.get(id(node))):
            found.append(f"{path}:{node.lineno}: xp.{node.attr}: {reason}")
    return found


def _is_xp(node: ast.AST) -> bool:
    """Whether this is the name `xp` or an attribute `.xp`."""
    return (isinstance(node, ast.Name) and node.id == "xp") or (isinstance(node, ast.Attribute) and node.attr == "xp")


def _complaint(name: str, method: str | None, call: ast.Call | None) -> str | None:
    if name in API["ufuncs"] and method is not None:
        return None if name in API["ufunc_methods"].get(method, ()) else f"CuPy's ufunc has no {method}"
    parameters = API["functions"].get(name) or API["ufuncs"].get(name)
    if parameters is None:
        known = any(name in API[kind] for kind in ("same_as_numpy", "constants", "classes", "functions"))
        return None if known else "CuPy has no such name"
    if call is None:
        return None
    starred = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
    bind = signature(parameters).bind_partial if starred else signature(parameters).bind
    positional = [a for a in call.args if not isinstance(a, ast.Starred)]
    try:
        bind(*positional, **{k.arg: k.value for k in call.keywords if k.arg is not None})
    except TypeError as error:
        return f"CuPy takes ({parameters}): {error}"
    return None


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                yield node.lineno, str(node.args[0].value)


def _may_not_import(path: str, name: str) -> bool:
    top = name.partition(".")[0]
    if top in ("cupy", "cupyx", "cupy_backends"):
        return not path.startswith("backends/")
    mathematics = path.startswith("layers/") or path in ("augment.py", "losses.py", "optimizers.py", "metrics.py")
    return top == "numpy" and mathematics


@pytest.mark.parametrize("path", SOURCES)
def test_the_package_uses_only_what_cupy_has(path: str) -> None:
    assert complaints((PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("xp.vecdot(a, b)", "no such name"),
        ("with self.xp.errstate(all='ignore'): pass", "no such name"),
        ("f = backend.xp.block", "no such name"),
        ("self.context.backend.xp.sum(a, where=m)", "unexpected keyword argument 'where'"),
        ("xp.max(a, axis=0, initial=0)", "unexpected keyword argument 'initial'"),
        ("xp.take(a, i, mode='clip')", "unexpected keyword argument 'mode'"),
        ("xp.einsum('ij->i', a, out=b)", "unexpected keyword argument 'out'"),
        ("xp.add(a, b, where=m)", "unexpected keyword argument 'where'"),
        ("xp.exp(a, out, out)", "too many positional arguments"),
        ("xp.matmul(a, b, out)", "too many positional arguments"),
        ("xp.clip(a, 0)", "missing a required argument: 'a_max'"),
        ("xp.sum(*a, **b, initial=0)", "unexpected keyword argument 'initial'"),
        ("xp.maximum.reduce(a)", "no reduce"),
        ("xp.random.normal(3)", "may not be used"),
        ("xp.cuda.Stream()", "may not be used"),
        ("import numpy as np", "imports numpy"),
        ("from numpy.typing import NDArray", "imports numpy.typing"),
        ("import cupy", "imports cupy"),
        ("from cupyx import jit", "imports cupyx"),
        ("importlib.import_module('cupy.cuda.nccl')", "imports cupy.cuda.nccl"),
        ("__import__('cupy')", "imports cupy"),
    ],
)
def test_unsupported_source_has_a_complaint(source: str, complaint: str) -> None:
    (found,) = complaints(source, "layers/dense.py")
    assert complaint in found


def test_correct_source_has_no_complaints() -> None:
    allowed = """
        import math
        y = xp.add(a, b, out=c); xp.exp(a, c); xp.matmul(a, b, out=c); xp.sum(*a, axis=0); xp.add.at(a, i, b)
        z = xp.zeros((), dtype=self.xp.float32) + xp.pi if isinstance(a, xp.ndarray) else np.vecdot(a, b)
    """
    assert complaints(inspect.cleandoc(allowed), "layers/dense.py") == []
    assert complaints("import numpy", "model.py") == []
    assert complaints("importlib.import_module('cupy'); xp.cuda.Device(0)", "backends/cuda/backend.py") == []
    assert len(complaints("import cupy", "model.py")) == 1


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="ceil of integers was a float before 2.1")
def test_numpy_and_cupy_choose_the_same_dtypes() -> None:
    """The strict backend relies on it. CuPy uses the first loop that the inputs can safely be cast to."""
    dtypes = [np.dtype(char) for char in "?bBhHiIlLefd"]
    for name, loops in API["ufunc_loops"].items():
        ufunc = getattr(np, name, None)
        if not isinstance(ufunc, np.ufunc):
            continue
        for inputs in itertools.product(dtypes, repeat=ufunc.nin):
            try:
                chosen = ufunc.resolve_dtypes((*inputs, *[None] * ufunc.nout))
            except TypeError:
                continue  # NumPy refuses these too
            assert _first_loop(loops, inputs) == chosen[ufunc.nin :], (name, inputs)


def _first_loop(loops: str, inputs: tuple[np.dtype[Any], ...]) -> tuple[np.dtype[Any], ...] | None:
    for loop in loops.split():
        takes, gives = loop.split("->")
        if all(np.can_cast(dtype, char) for dtype, char in zip(inputs, takes, strict=True)):
            return tuple(map(np.dtype, gives))
    return None


def test_the_recorded_api_equals_that_of_the_installed_cupy() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    if cupy.__version__ != API["version"]:
        pytest.skip(f"the API was recorded from CuPy {API['version']}, and {cupy.__version__} is installed")
    assert record_cupy_api.record(cupy) == API
