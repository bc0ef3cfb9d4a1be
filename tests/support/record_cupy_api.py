"""Records the API of CuPy in cupy_api.json, so that tests without CuPy know what it would refuse.

Run it for each new version, with the wheel installed; it needs no GPU: `python tests/support/record_cupy_api.py`. All
facts come from the wheel: from signatures, or from the docstrings that Cython writes.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy

FILE = Path(__file__).with_name("cupy_api.json")

# Signatures are recorded as the arguments of a lambda, "a, axis=..., out=...", which Python can parse.
_DEFAULT = "=..."


def record(cupy: Any) -> dict[str, Any]:
    """The public API of this `cupy`, as data for JSON."""
    api: dict[str, Any] = {
        "version": cupy.__version__,
        "constants": [],  # numbers and None
        "modules": [],
        "same_as_numpy": [],  # the same objects as in NumPy: dtypes, finfo, promote_types…
        "classes": [],  # CuPy's own classes
        "functions": {},  # name: signature
        "ufuncs": {},  # name: signature
        "ufunc_loops": {},  # name: dtypes of inputs->outputs; the first loop is used that the inputs can be cast to
        "ufunc_methods": {"accumulate": [], "at": [], "reduce": [], "reduceat": []},
        "synchronizes": [],  # functions that may wait for the device, according to their documentation
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
            # Without E, bfloat16, which exists only together with the package ml_dtypes.
            api["ufunc_loops"][name] = " ".join(loop for loop in thing.types if "E" not in loop)
            for method in _ufunc_methods(thing):
                api["ufunc_methods"][method].append(name)
        elif inspect.isclass(thing):
            api["classes"].append(name)
        elif callable(thing):
            api["functions"][name] = _function_signature(thing)
            if re.search("may synchronize|performs device synchronization", inspect.getdoc(thing) or ""):
                api["synchronizes"].append(name)
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
        ufunc(**{keyword: None})  # always refused, since there are no inputs; an unknown keyword is refused before that
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
        except AttributeError:  # raised for None, which has no such method; so the ufunc has it
            methods.append(method)
    return methods


def _function_signature(function: Any) -> str:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # compiled code: Cython writes the signature into the first line of the docstring
        return _documented_signature(function)
    if hasattr(function, "_nin"):  # a generalized ufunc: *args are its inputs
        positional = [inspect.Parameter(f"x{i + 1}", inspect.Parameter.POSITIONAL_ONLY) for i in range(function._nin)]
        parameters = positional + parameters[1:]
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        # einsum and meshgrid pop known keywords from **kwargs and refuse the others.
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

    FILE.write_text(json.dumps(record(cupy), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{FILE}: CuPy {cupy.__version__}, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
