"""Numbers that change from step to step, such as the learning rate, in a captured step.

An optimizer computes with ordinary numbers. While a step is captured it gets `StepNumber` objects instead, which record
the arithmetic. Each replay evaluates it anew.
"""

import operator
from collections.abc import Callable
from typing import Any, NoReturn

from xpnet.errors import CaptureError


class StepNumber:
    """A number that is a function of the step. Supports + - * / ** and `of_step`; its value cannot be read.

    function: of the values of `operands`, which are numbers or other StepNumbers; or, if there are none, of the number
    of the step.  value: in the step that is being captured.
    """

    __slots__ = ("function", "operands", "symbol", "value")
    __array_ufunc__ = None  # so that an array's operators leave the arithmetic to it

    def __init__(self, function: Callable[..., Any], value: Any, operands: tuple[Any, ...] = (), symbol: str = ""):
        self.function, self.value, self.operands, self.symbol = function, value, operands, symbol

    def __neg__(self) -> Any:
        return of_step(operator.neg, self)

    def _refuse(self, *_: Any) -> NoReturn:
        raise CaptureError("the step computes with a number that changes from step to step, in a way not known here")

    __float__ = __int__ = __index__ = __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __abs__ = __round__ = _refuse
    __hash__ = __str__ = _refuse  # for keys of dictionaries, and in strings


def of_step(function: Callable[..., Any], *numbers: Any) -> Any:
    """function(*numbers), evaluated anew in each replay if any of the numbers changes from step to step."""
    if not any(isinstance(n, StepNumber) for n in numbers):
        return function(*numbers)
    return StepNumber(function, function(*map(current, numbers)), numbers)


def current(number: Any) -> Any:
    """The value of a number in the step that is being captured."""
    return number.value if isinstance(number, StepNumber) else number


def _combined(symbol: str, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if not all(isinstance(n, int | float | StepNumber) for n in (a, b)):
        return NotImplemented
    return StepNumber(function, function(current(a), current(b)), (a, b), symbol)


def _operators(symbol: str, function: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """The operator of this symbol, and the one for a number on the left."""
    return (
        lambda number, other: _combined(symbol, function, number, other),
        lambda number, other: _combined(symbol, function, other, number),
    )


for _symbol, _name in {"+": "add", "-": "sub", "*": "mul", "/": "truediv", "**": "pow"}.items():
    _plain, _reflected = _operators(_symbol, getattr(operator, _name))
    setattr(StepNumber, f"__{_name}__", _plain)
    setattr(StepNumber, f"__r{_name}__", _reflected)
