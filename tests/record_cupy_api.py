"""Writes data/cupy_api.json: what an installed CuPy offers, so that tests without CuPy know what a GPU would refuse.

Run it after a new CuPy, where the wheel is installed (a GPU is not needed): `python tests/record_cupy_api.py`.
Every fact is asked of the wheel itself: signatures by inspection, or the docstrings that Cython writes.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy

FILE = Path(__file__).with_name("data") / "cupy_api.json"

# Signatures are recorded as the arguments of a lambda, "a, axis=..., out=...", which Python itself can read again.
_DEFAULT = "=..."


def record(cupy: Any) -> dict[str, Any]:
    """The public interface of this `cupy`, as plain data that JSON can hold."""
    api: dict[str, Any] = {
        "version": cupy.__version__,
        "constants": [],  # numbers and None
        "modules": [],
        "same_as_numpy": [],  # the very objects of NumPy: dtypes, finfo, promote_types…
        "classes": [],  # classes of CuPy's own
        "functions": {},  # name: signature
        "ufuncs": {},  # name: signature
        "ufunc_loops": {},  # name: dtype characters of inputs->outputs; the first that the inputs can be cast to runs
        "ufunc_methods": {"accumulate": [], "at": [], "reduce": [], "reduceat": []},
        "synchronises": [],  # functions that may wait for the device, by their own documentation
        "ndarray": {"attributes": [], "methods": {}},
    }
    for name in sorted(name for name in dir(cupy) if not name.startswith("_")):
        thing = getattr(cupy, name)
        if thing is None or isinstance(thing, (bool, int, float)):
            api["constants"].append(name)
        elif inspect.ismodule(thing):
            api["modules"].append(name)
        elif callable(thing) and thing is getattr(numpy, name, None):
            api["same_as_numpy"].append(name)
        elif isinstance(thing, cupy.ufunc):
            api["ufuncs"][name] = _ufunc_signature(thing)
            # Without those on E, bfloat16, which are there only beside the package ml_dtypes.
            api["ufunc_loops"][name] = " ".join(loop for loop in thing.types if "E" not in loop)
            for method in _ufunc_methods(thing):
                api["ufunc_methods"][method].append(name)
        elif inspect.isclass(thing):
            api["classes"].append(name)
        elif callable(thing):
            api["functions"][name] = _function_signature(thing)
            if re.search("may synchronize|performs device synchronization", inspect.getdoc(thing) or ""):
                api["synchronises"].append(name)
    for name in sorted(name for name in dir(cupy.ndarray) if not name.startswith("_")):
        member = getattr(cupy.ndarray, name)
        if callable(member):
            api["ndarray"]["methods"][name] = _method_signature(member)
        else:
            api["ndarray"]["attributes"].append(name)
    return api


def _ufunc_signature(ufunc: Any) -> str:
    inputs = ["x"] if ufunc.nin == 1 else [f"x{i + 1}" for i in range(ufunc.nin)]
    keywords = [name + _DEFAULT for name in ("casting", "dtype") if _takes(ufunc, name)]
    if ufunc.nout == 1:
        return ", ".join([*inputs, "/", "out" + _DEFAULT, "*", *keywords])
    outputs = [f"out{i + 1}{_DEFAULT}" for i in range(ufunc.nout)]
    return ", ".join([*inputs, *outputs, "/", "*", "out" + _DEFAULT, *keywords])


def _takes(ufunc: Any, keyword: str) -> bool:
    try:
        ufunc(**{keyword: None})  # refused in any case, for want of inputs; unknown keywords are refused before that
    except TypeError as error:
        return not str(error).startswith("Wrong arguments")
    raise AssertionError(f"{ufunc} took no inputs")


def _ufunc_methods(ufunc: Any) -> list[str]:
    methods = ["at"] if ufunc._scatter_op is not None else []
    for method, arguments in (("accumulate", [None]), ("reduce", [None]), ("reduceat", [None, None])):
        try:
            getattr(ufunc, method)(*arguments)
        except NotImplementedError:
            continue
        except AttributeError:  # None has no such method: so the ufunc has it
            methods.append(method)
    return methods


def _function_signature(function: Any) -> str:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # compiled: Cython wrote the signature as the docstring's first line
        return _documented_signature(function)
    if hasattr(function, "_nin"):  # a generalised ufunc: *args are its inputs
        positional = [inspect.Parameter(f"x{i + 1}", inspect.Parameter.POSITIONAL_ONLY) for i in range(function._nin)]
        parameters = positional + parameters[1:]
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        # einsum and meshgrid pop what they know from **kwargs and refuse the rest.
        code = re.sub("#.*", "", inspect.getsource(function))
        if popped := re.findall(r"kwargs\.pop\('(\w+)'", code):
            parameters.pop()
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in dict.fromkeys(popped)
            ]
    return _joined(parameters)


def _method_signature(method: Any) -> str:
    if inspect.isfunction(method) or hasattr(method, "__code__"):
        return _joined(list(inspect.signature(method).parameters.values())[1:])
    return _documented_signature(method)


def _documented_signature(function: Any) -> str:
    """From "ndarray.sum(self, axis=None, int n=1) -> ndarray", the part "axis=..., n=..."."""
    line = inspect.getdoc(function).split("\n")[0]  # type: ignore[union-attr]
    inside = re.match(r"[\w.]+\((.*)\)(?: -> .*)?$", line)
    if inside is None:
        raise ValueError(f"no signature in the documentation of {function}: {line!r}")
    parts = []
    for part in inside[1].split(", "):
        declaration, equals, _ = part.partition("=")
        name = declaration.split()[-1] if declaration else ""  # drops the C type
        if name not in ("", "self"):
            parts.append(name + (_DEFAULT if equals else ""))
    return ", ".join(parts)


def _joined(parameters: list[inspect.Parameter]) -> str:
    bare = [p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Ellipsis()) for p in parameters]
    return str(inspect.Signature(bare))[1:-1]


class _Ellipsis:
    def __repr__(self) -> str:
        return "..."


def main() -> None:
    import cupy

    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(record(cupy), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{FILE}: CuPy {cupy.__version__}, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
