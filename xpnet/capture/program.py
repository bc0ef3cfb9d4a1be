"""Program: the calls of a step as one Python function, which replays them."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy

from xpnet.backends.step_numbers import StepNumber
from xpnet.capture.calls import Call

#: The arrays of a dataset that a step loads rows of, if there is one array of inputs and one of targets.
INPUTS = ("x", "y", "weights", "counts")


class Cell:
    """An array without axes that holds a number of the step, in each step anew."""

    def __init__(self, number: StepNumber, dtype: Any) -> None:
        self.number, self.array = number, numpy.zeros((), dtype)


class Load:
    """Loads `count` rows of an array of the dataset, from row `first` of the step on, into an array.

    name: of the array, such as one of the INPUTS.

    whole: whether these are all rows of the step.
    """

    def __init__(self, name: str, first: int, count: int, whole: bool) -> None:
        self.name, self.first, self.count, self.whole = name, first, count, whole
        self.__name__ = f"load {name}"

    def __call__(self, *_: Any) -> None:
        raise NotImplementedError("a Load is compiled, not called")


def every_call(calls: Iterable[Call]) -> Iterator[Call]:
    """These calls, with the parts of parallel work in place of it."""
    for call in calls:
        if call.parts is None:
            yield call
        else:
            for part in call.parts:
                yield from every_call(part)


def compiled(calls: list[Call], inputs: Iterable[str] = INPUTS) -> Callable[..., None]:
    """One function of (step, rows, *loaders) that makes these calls.

    step: the number of the step.  rows: the rows of the dataset, an index array or a slice.  loaders: for each of the
    inputs, a function of (rows, out) that copies these rows, or None if it is not used.
    """
    source = _Source()
    body = source.block(calls)
    lines = [
        f"def replay(step, rows, {', '.join(f'load_{name}' for name in inputs)}):",
        *source.numbers,
        *body,
        " return",
    ]
    exec(_code("\n".join(lines)), source.names)  # generated from the calls alone
    replay: Callable[..., None] = source.names["replay"]
    return replay


@functools.lru_cache(maxsize=64)
def _code(text: str) -> Any:
    """The compiled text, which is the same for equal models."""
    return compile(text, "<captured step>", "exec")


def part_of(rows: Any, first: int, end: int) -> Any:
    """Some of these rows, which are an index array or a slice."""
    return slice(rows.start + first, rows.start + end) if isinstance(rows, slice) else rows[first:end]


class _Source:
    """The text of a function, and the objects that its names stand for."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"copyto": numpy.copyto, "part": part_of}
        self.numbers: list[str] = []  # the lines that compute the numbers of the step
        self._known: dict[tuple[str, int], str] = {}

    def block(self, calls: list[Call], indent: str = " ") -> list[str]:
        lines: list[str] = []
        for call in calls:
            if call.parts is not None:
                names = [f"part_{len(lines)}_{i}" for i in range(len(call.parts))]
                for name, part in zip(names, call.parts, strict=True):
                    lines += [f"{indent}def {name}():", *self.block(part, indent + " "), f"{indent} return"]
                lines.append(f"{indent}{self._name(call.function, 'f')}([{', '.join(names)}])")
            elif isinstance(call.function, Load):
                load = call.function
                rows = "rows" if load.whole else f"part(rows, {load.first}, {load.first + load.count})"
                lines.append(f"{indent}load_{load.name}({rows}, {self._value(call.args[0])})")
            else:
                lines.append(indent + self._call(call))
        return lines

    def _call(self, call: Call) -> str:
        function, args = call.function, call.args
        given = [self._value(a) for a in args]
        if function in (numpy.maximum, numpy.minimum):  # a third positional argument is deprecated
            given[2] = f"out={given[2]}"
        given += [f"{name}={self._value(value)}" for name, value in call.kwargs.items()]
        text = f"{self._name(function, 'f')}({', '.join(given)})"
        return text if call.result is None else f"copyto({self._value(call.result)}, {text})"

    def _value(self, value: Any) -> str:
        if isinstance(value, StepNumber):
            return self._number(value)
        if isinstance(value, Cell):
            return self._cell(value)
        if value is None or isinstance(value, bool) or type(value) is int or type(value) is str:
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        if isinstance(value, tuple | list) and any(isinstance(item, StepNumber) for item in value):
            raise NotImplementedError("a number of the step inside a list")
        return self._name(value, "a")

    def _name(self, thing: Any, kind: str) -> str:
        """The name that stands for an object."""
        key = (kind, id(thing))
        if key not in self._known:
            name = self._known[key] = f"{kind}{len(self._known)}"
            self.names[name] = thing  # which keeps it alive, so that its id stays its own
        return self._known[key]

    def _cell(self, cell: "Cell") -> str:
        """The name of an array for a number of the step, which the function fills first."""
        name = self._name(cell.array, "a")
        if ("cell", id(cell)) not in self._known:
            self._known["cell", id(cell)] = name
            self.numbers.append(f" {name}[()] = {self._number(cell.number)}")
        return name

    def _number(self, number: StepNumber) -> str:
        """The name of a number of the step, which the function computes first."""
        key = ("s", id(number))
        if key in self._known:
            return self._known[key]
        operands = [self._value(n) for n in number.operands]
        if number.symbol:
            text = f"(({operands[0]}) {number.symbol} ({operands[1]}))"  # of -2 ** s, Python makes -(2 ** s)
        else:
            text = f"{self._name(number.function, 'f')}({', '.join(operands) or 'step'})"
        self.names[f"number {len(self._known)}"] = number
        name = self._known[key] = f"s{len(self._known)}"
        self.numbers.append(f" {name} = {text}")
        return name
