"""Checks of arguments; and Configured, which derives get_config, equality and repr from constructor arguments."""

import contextlib
import decimal
import fractions
import functools
import inspect
import math
import numbers
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy

from xpnet.backends.arrays import to_host
from xpnet.backends.shortage import is_shortage, shortage
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    ShapeError,
    UnknownNameError,
    XpnetError,
    advice_on,
    correction,
    shown,
    suggestion,
    unknown_name,
)

__all__ = ["Configured", "ExplainedArguments", "ExplainedAttributes", "MissingMethodError", "as_seed", "as_shape",
           "checked_samples", "choice", "explain_arguments", "fits", "flag", "float_dtype", "integer", "is_custom",
           "is_integer", "is_number", "items_of", "items_or_one", "missing_method", "number", "one_or_pair",
           "penalties", "python_number", "rate_or_schedule", "real_array", "refuse_non_finite_targets",
           "refuse_other_signatures", "resolve", "scheduled_rate"]  # fmt: skip

T = TypeVar("T")
N = TypeVar("N", int, float)
F = TypeVar("F", bound=Callable[..., Any])

#: Numbers that are not Python's; an array may be one.
_OTHER_NUMBERS = (numpy.generic, numpy.ndarray, fractions.Fraction, decimal.Decimal)


def explain_arguments(function: F) -> F:
    """Decorate a function: a call that does not fit its signature raises ArgumentTypeError with the reason.

    A shortage of memory in the call raises DeviceMemoryError.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:  # raised inside the function
                raise
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            name = function.__qualname__.removesuffix(".__init__")
            backend = getattr(args[0], "_wanted_backend", None) if args else None  # of a model
            raise shortage(f"{name}: there is not enough memory", error, backend) from error
        raise _misfit(function, args, kwargs)

    return wrapper  # type: ignore[return-value]


def is_custom(code: Any) -> bool:
    """Whether a class, function or method is not part of xpnet."""
    return str(code.__module__).partition(".")[0] != "xpnet"


def _checking_base(cls: "type[ExplainedArguments]") -> Callable[..., None]:
    """The constructor of this user's class, with a check that it has set what its base class reads."""
    init = cls.__init__

    @functools.wraps(init)
    def wrapper(self: "ExplainedArguments", *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        arguments = self._constructor_arguments
        missing = [name for name in arguments if not _has(self, name)]
        if missing:
            raise ArgumentTypeError(
                f"{cls.__name__}: its constructor must call super().__init__({', '.join(arguments)}), which "
                f"sets {', '.join(missing)}."
            )

    return wrapper


def _argument_names(cls: type) -> list[str]:
    """The names of the arguments that a constructor declares."""
    return [p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]


def _has(thing: Any, name: str) -> bool:
    """Whether it has the attribute, even if reading it raises an error of xpnet, as before build."""
    try:
        getattr(thing, name)
    except AttributeError:
        return False
    except XpnetError:
        return True
    return True


def _constructed(cls: type[T], config: Mapping[str, Any]) -> T:
    """An object made from these arguments, one of which may be `*arguments`."""
    starred = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.VAR_POSITIONAL]
    named = {name: value for name, value in config.items() if name not in starred}
    return cls(*(item for name in starred for item in items_or_one(config[name])), **named)


@functools.cache
def _settable_on(cls: Any) -> tuple[str, ...]:
    """The public attributes that users may set on an object of this class of xpnet."""
    known = {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}
    values = [name for name, held in known.items() if not callable(held) and getattr(held, "fset", cls) is not None]
    return (*cls._constructor_arguments, *values)


class ExplainedAttributes:
    """The base of classes whose objects explain an attribute that does not exist: what to use in its place."""

    #: The kind of object in `errors.advice_on`. "" leaves the error to Python.
    _advice: ClassVar[str] = ""

    @property
    def _described(self) -> str:
        """The start of the error for an unknown attribute, before "has no attribute"."""
        return type(self).__name__

    def _attribute_hint(self, name: str) -> str:
        """What to use in place of this attribute of other libraries; "" if that is not known."""
        return advice_on(self._advice, name)

    def _attribute_suggestion(self, name: str) -> str:
        """The hint for reading any other attribute."""
        return suggestion(name, self._suggestible())

    def _suggestible(self) -> Set[str]:
        """The public attributes that an error may suggest."""
        return {name for name in dir(self) if not name.startswith("_")}

    def _settable(self) -> Iterable[str]:
        """The public attributes that users may set."""
        return ()

    def _refuse_misnamed(self, name: str) -> None:
        """Raise UnknownNameError for a new attribute that nothing would read: another one was obviously meant."""
        if name[:1] == "_" or hasattr(type(self), name):
            return
        meant = correction(name, self._settable())
        if hint := f"Set {meant}." if meant else self._attribute_hint(name):
            raise UnknownNameError(f"{self._described} has no attribute {name!r}. {hint}")

    if not TYPE_CHECKING:  # type checkers would accept any name

        def __getattr__(self, name: str) -> Any:
            """Raise an AttributeError for a name that does not exist, with what was meant."""
            if hasattr(type(self), name):  # a property whose own error is an AttributeError
                return object.__getattribute__(self, name)
            if name.startswith("_") or not self._advice:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            hint = self._attribute_hint(name) or self._attribute_suggestion(name)
            raise UnknownNameError(f"{self._described} has no attribute {name!r}. {hint}".rstrip())


class ExplainedArguments(ExplainedAttributes):
    """The base of classes whose constructors explain what is wrong with a call, as `explain_arguments` does.

    An argument that is kept as an attribute of the same name can be assigned later; the constructor then checks it.
    """

    #: What to add to the error for too many arguments.
    _too_many_hint: ClassVar[str] = ""
    #: The nearest class of xpnet, and the names of its constructor's arguments.
    _constructor_class: "ClassVar[type[ExplainedArguments]]"
    _constructor_arguments: ClassVar[dict[str, None]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = explain_arguments(cls.__init__)  # type: ignore[method-assign]
        if not is_custom(cls):
            cls._constructor_class, cls._constructor_arguments = cls, dict.fromkeys(_argument_names(cls))
        elif "__init__" in cls.__dict__:
            cls.__init__ = _checking_base(cls)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            if name in self._constructor_arguments and value is not self.__dict__[name]:
                value = self._checked_assignment(name, value)
        elif self._constructor_class is type(self) and name not in self._constructor_arguments:
            self._refuse_misnamed(name)  # but objects of users' classes may have any attributes
        super().__setattr__(name, value)

    def _suggestible(self) -> Set[str]:
        return super()._suggestible() - {"from_config", "get_config"}

    def _settable(self) -> Iterable[str]:
        return _settable_on(type(self))  # type: ignore[arg-type]  # Configured objects have no hash

    def _checked_assignment(self, name: str, value: Any) -> Any:
        """The value that the constructor would keep for this argument, given all others. Raises its errors."""
        if not all(_has(self, argument) for argument in self._constructor_arguments):  # in the middle of a constructor
            return value
        config = {argument: getattr(self, argument) for argument in self._constructor_arguments}
        return getattr(_constructed(self._constructor_class, {**config, name: value}), name)

    @explain_arguments
    def __init__(self) -> None: ...


def _misfit(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ArgumentTypeError:
    """The error for a call with arguments that do not fit the signature of a function, method or constructor."""
    parameters, kind, hint = list(inspect.signature(function).parameters.values()), function.__name__, ""
    if parameters and parameters[0].name == "self":
        owner, args, parameters = type(args[0]), args[1:], parameters[1:]
        kind = owner.__name__ if kind == "__init__" else f"{owner.__name__}.{kind}"
        hint = getattr(owner, "_too_many_hint", "")
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    known = [*positional, *by_name]
    for name in kwargs:
        if name not in known:
            listed = f"It takes {', '.join(known)}." if known else "It takes no arguments."
            advice = suggestion(name, known, advice_on("argument", name))
            return ArgumentTypeError(f"{kind}: unknown argument {name!r}. {advice}{listed}")
        if name in positional[: len(args)]:
            return ArgumentTypeError(f"{kind}: {name} is given twice, by position and by name.")
    if len(args) > len(positional):
        takes = f"only {', '.join(positional)}" if positional else "nothing"
        others = f" The others are given by name: {', '.join(f'{name}=' for name in by_name)}." if by_name else ""
        first = args[len(positional)]
        return ArgumentTypeError(f"{kind}: takes {takes} by position, not also {shown(first)}.{others} {hint}".strip())
    required = [p.name for p in parameters[len(args) :] if p.name in known and p.default is p.empty]
    missing = [name for name in required if name not in kwargs]
    return ArgumentTypeError(f"{kind}: needs {' and '.join(missing)}. It takes {', '.join(known)}.")


class Configured(ExplainedArguments):
    """An object that keeps every constructor argument as an attribute of the same name.

    `get_config`, equality and repr are derived from these attributes; the repr reads like the call.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # A NumPy scalar among the arguments would turn float32 arithmetic into float64; a Python number does not. It is
        # converted after the check of the argument, whose error shows the value as it was given.
        super().__setattr__(name, value)
        if isinstance(held := self.__dict__.get(name), _OTHER_NUMBERS):
            super().__setattr__(name, python_number(held))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        names = _argument_names(type(self))
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise ArgumentTypeError(
                f"{type(self).__name__} must keep each constructor argument as an attribute of its name, or define "
                f"get_config; it does not keep {', '.join(missing)}."
            )
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A new object made from what `get_config` returned."""
        return _constructed(cls, config)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Configured)
        mine, theirs = self.get_config(), other.get_config()
        return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # attributes may change, so it cannot be a key of a dict

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        texts: list[str] = []
        for name, value in self.get_config().items():
            parameter = parameters.get(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
            default = parameter.default
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                texts += map(repr, value)
            elif default is inspect.Parameter.empty:
                texts.append(repr(value))
            elif isinstance(value, numpy.ndarray) or value != default:
                texts.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(texts)})"


_LARGEST_WEIGHT = 1e100  # so that no product of sums of weights overflows
_MOST_AXES = 24  # after the batch, which is CuPy's 25th
_FLOAT32 = numpy.finfo(numpy.float32)
_SMALLEST, _LARGEST = float(_FLOAT32.tiny), float(_FLOAT32.max)
_LARGEST_INTEGER = 2**63 - 1  # the largest size of an array

# Checks. Each returns a Python value, or raises ArgumentError: "Dropout: rate must be a number of at least 0 and
# below 1, not 1.5." `owner` is the object whose argument it is, or its name; "" if the argument's name is enough.
# `also` says in the error what else the argument may be; the caller checks for that first.

#: The limits of numbers: their words in an error, and the comparison of a value with them.
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def number(owner: Any, name: str, value: Any, *, finite: bool = False, also: str = "", **limits: float) -> float:
    """A real number within `at_least`, `above`, `at_most` and `below`, as a Python number. Refuses NaN and booleans.

    It may also be a NumPy scalar, an array without axes, a Fraction or a Decimal. Numbers that would be infinite in
    float32 are refused, and those that would be 0 if they must be above 0.
    """
    given, value = value, python_number(value)
    what = ("a finite number" if finite else "a number") + _range(limits)
    infinite = is_number(value) and abs(value) == math.inf
    if not (is_number(value) and _within(value, limits)) or (finite and infinite):
        raise _refusal(owner, name, what, given, also)
    if (abs(value) > _LARGEST and not infinite) or (limits.get("above") == 0 and value < _SMALLEST):
        raise _refusal(owner, name, f"{what}, in float32", given, also)
    return value  # type: ignore[no-any-return]


def integer(owner: Any, name: str, value: Any, *, at_least: int | None = 1, also: str = "", **limits: int) -> int:
    """An integer of 64 bits within these limits, as a Python int. 3.0 counts as 3. at_least: None allows negatives."""
    limits = limits if at_least is None else {"at_least": at_least, **limits}
    given, value = value, python_number(value)
    if not (is_integer(value) and _within(value, limits)):
        raise _refusal(owner, name, "an integer" + _range(limits), given, also)
    if not -_LARGEST_INTEGER - 1 <= value <= limits.get("at_most", _LARGEST_INTEGER):
        raise _refusal(owner, name, f"an integer{_range(limits)}, of 64 bits", given, also)
    return int(value)


def as_seed(owner: Any, value: Any, *, also: str = "") -> int:
    """A seed: an integer from 0, below 2**64."""
    return integer(owner, "seed", value, at_least=0, at_most=2**64 - 1, also=also)


def float_dtype(dtype: Any) -> str:
    """The name of the dtype of a model, "float32" or "float64", given as NumPy takes it."""
    with contextlib.suppress(TypeError):
        dtype = numpy.dtype(dtype).name if isinstance(dtype, str | type | numpy.dtype) else dtype
    return choice("", "dtype", dtype, ("float32", "float64"))


def one_or_pair(check: Callable[..., N], owner: Any, name: str, value: Any, **limits: Any) -> N | tuple[N, N]:
    """What `check`, one of the functions above, accepts within these limits; or (vertical, horizontal), two of them."""
    value = value.tolist() if isinstance(value, numpy.ndarray) else value
    if isinstance(value, tuple | list) and len(value) == 2:
        with contextlib.suppress(ArgumentError):  # the error below shows both
            return check(owner, name, value[0], **limits), check(owner, name, value[1], **limits)
    return check(owner, name, value, also="two, (vertical, horizontal)", **limits)


def as_shape(shape: Any) -> tuple[Any, ...]:
    """(4,) from 4, [4] or (4,). Refuses anything but positive integers, apart from None as the first of several axes.

    None is the axis of a sequence of any length: (None, 8), or (None,) for integers of an Embedding.
    """
    shape = python_number(shape)
    sizes = items_or_one(shape)
    known = sizes[1:] if shape is not None and sizes and sizes[0] is None else sizes
    if not all(is_integer(n) and 1 <= n <= _LARGEST_INTEGER for n in known) or len(sizes) > _MOST_AXES:
        expected = "one or more positive integers, without the batch"
        raise _refusal("", "a shape", expected, shape, also="None in the first place for sequences of any length")
    return (*sizes[: len(sizes) - len(known)], *map(int, known))


def items_of(value: Any) -> tuple[Any, ...] | None:
    """The items of a list, a tuple, an array with one axis and the like; None for text, sets, dicts and all else."""
    unordered = isinstance(value, str | bytes | bytearray | memoryview | Set | Mapping | type | numpy.ma.MaskedArray)
    if unordered or getattr(value, "ndim", 1) != 1 or not hasattr(value, "__iter__"):
        return None
    return tuple(map(python_number, value))


def items_or_one(value: Any) -> tuple[Any, ...]:
    """The items of a list and the like, as `items_of` gives them; or only the value itself."""
    items = items_of(value)
    return (python_number(value),) if items is None else items


def fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether an array without its batch axis has the expected shape, in which None stands for any length."""
    return len(shape) == len(expected) and all(e is None or e == n for n, e in zip(shape, expected, strict=True))


def penalties(owner: Any, l1: Any, l2: Any) -> tuple[float, float]:
    """Check the arguments l1 and l2 of a layer, the penalties on its weight."""
    owner = f"{type(owner).__name__}: weight"
    return number(owner, "l1", l1, at_least=0, finite=True), number(owner, "l2", l2, at_least=0, finite=True)


def rate_or_schedule(owner: Any, name: str, value: Any) -> float | Callable[[int], float]:
    """A learning rate, or a function of the step that returns one."""
    if callable(value) and not isinstance(value, type):
        try:
            inspect.signature(value).bind(0)
        except ValueError:  # some functions in C have no signature
            pass
        except TypeError as error:
            kind = owner if isinstance(owner, str) else type(owner).__name__
            raise ArgumentError(f"{kind}: {name}: a schedule must take one argument, the step: {error}.") from error
        return value  # type: ignore[no-any-return]
    return number(owner, name, value, at_least=0, finite=True, also="a schedule")


def scheduled_rate(owner: Any, schedule: Callable[[int], Any], step: int) -> float:
    """The learning rate that a schedule gives for a step. Raises ArgumentError for other values."""
    given = schedule(step)
    rate = python_number(given)
    if not (is_number(rate) and 0 <= rate < math.inf):
        raise ArgumentError(
            f"{type(owner).__name__}: the schedule of its rate must return a finite number of at least 0, but returned "
            f"{shown(given)} for step {step}."
        )
    return float(rate)


def flag(owner: Any, name: str, value: Any) -> bool:
    """A Python or NumPy boolean, as a Python bool."""
    if value is True or value is False:  # at once, since forward of a small net takes microseconds
        return value
    given, value = value, python_number(value)
    if not isinstance(value, bool):
        raise _refusal(owner, name, "True or False", given)
    return value


def choice(owner: Any, name: str, value: Any, options: Sequence[T], *, also: str = "") -> T:
    """One of these strings, or None if it is among them."""
    if isinstance(value, str | None) and value in options:
        return value  # type: ignore[return-value]
    *first, last = [f'"{option}"' if isinstance(option, str) else str(option) for option in options]
    expected = f"{', '.join(first)} or {last}" if first else last
    error = _refusal(owner, name, expected, value, also)
    near = suggestion(value, (o for o in options if isinstance(o, str))) if isinstance(value, str) else ""
    raise ArgumentError(f"{error} {near}".strip())


class MissingMethodError(ArgumentTypeError, NotImplementedError):
    """An ArgumentTypeError for users, and Python's error for a method that a subclass must define."""


def missing_method(owner: Any, method: str) -> ArgumentTypeError:
    """The error for a subclass that does not define `method`, written with its arguments."""
    return MissingMethodError(f"{type(owner).__name__} must define {method}.")


def is_number(value: Any) -> bool:
    """Whether this is a real number of Python or NumPy, and not a boolean or NaN."""
    value = python_number(value)
    return not isinstance(value, bool) and isinstance(value, int | float) and value == value


def is_integer(value: Any) -> bool:
    """Whether this is a real number without a fraction."""
    value = python_number(value)
    return is_number(value) and bool(value == value // 1)


def real_array(a: Any, name: str) -> Any:
    """An array of any library, a list or a number as a NumPy array. Raises ArgumentTypeError if it is not real."""
    try:
        array = numpy.asarray(to_host(a))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} cannot be converted to an array: {error}") from error
    if array.dtype.kind not in "fiub":
        what = "text or objects" if array.dtype.kind in "OSU" else f"dtype {array.dtype}"
        raise ArgumentTypeError(f"{name} must be an array of real numbers, but it contains {what}.")
    return array


def checked_samples(name: str, outputs: Any, targets: Any, sample_weight: Any) -> tuple[Any, Any, Any | None]:
    """The arguments of the loss or metric called `name` as NumPy arrays (N, ...): outputs and weights in float64.

    Raises ShapeError or DataError for arrays that are empty or differ in length, and for invalid weights;
    ArgumentTypeError for anything but real numbers.
    """
    outputs, targets = real_array(outputs, f"{name}: outputs"), real_array(targets, f"{name}: targets")
    for what, array in (("outputs", outputs), ("targets", targets)):
        if array.ndim == 0:
            raise ShapeError(f"{name}: {what} must have one entry per sample, (N, ...), but are a single number.")
        if array.size == 0:
            raise DataError(f"{name}: {what} are empty: their shape is {array.shape}.")
    if len(outputs) != len(targets):
        raise ShapeError(f"{name}: {len(outputs)} outputs but {len(targets)} targets.")
    outputs = outputs.astype("float64")  # float16 sums would overflow, and differences of unsigned integers wrap
    if sample_weight is None:
        return outputs, targets, None
    weights = real_array(sample_weight, f"{name}: sample_weight").astype("float64")
    if weights.shape != (len(outputs),):
        raise ShapeError(f"{name}: sample_weight must have shape ({len(outputs)},), not {weights.shape}.")
    if not (weights.min() >= 0 and 0 < weights.max() <= _LARGEST_WEIGHT):
        raise DataError(
            f"{name}: sample_weight must be from 0 to {_LARGEST_WEIGHT:g}, and not zero for all samples, but ranges "
            f"from {weights.min():g} to {weights.max():g}."
        )
    return outputs, targets, weights


def refuse_non_finite_targets(name: str, targets: Any) -> None:
    """Raise DataError for NaN or infinity. Reads the device."""
    if not (math.isfinite(targets.min()) and math.isfinite(targets.max())):
        raise DataError(f"{name}: targets contain NaN or infinity.")


_checked_signatures: "weakref.WeakSet[type]" = weakref.WeakSet()


def refuse_other_signatures(thing: Any, base: type) -> None:
    """Raise ArgumentTypeError if a method of a user's class does not take the arguments that `base` declares for it."""
    kind = type(thing)
    if kind in _checked_signatures or not is_custom(kind):
        return
    for name, declared in inspect.getmembers(base, inspect.isfunction):
        if name.startswith("_") or getattr(kind, name) is declared:
            continue
        own, parameters = getattr(thing, name), list(inspect.signature(declared).parameters.values())[1:]
        if not callable(own):
            raise ArgumentTypeError(f"{kind.__name__}: {name} must be a method, not {shown(own)}.")
        try:
            inspect.signature(own).bind(
                *[p.name for p in parameters if p.default is p.empty],
                **{p.name: None for p in parameters if p.default is not p.empty},
            )
        except TypeError as error:
            wanted = ", ".join(["self", *(str(p.replace(annotation=p.empty)) for p in parameters)])
            raise ArgumentTypeError(
                f"{kind.__name__}: {name} must take the arguments of {base.__name__}.{name}({wanted}): {error}."
            ) from error
    _checked_signatures.add(kind)


def python_number(value: Any) -> Any:
    """Convert a NumPy scalar, an array without axes, a Fraction or a Decimal to a Python number; return all else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item") and isinstance(value.item(), numbers.Number):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real | decimal.Decimal):
        with contextlib.suppress(OverflowError, ValueError):  # too large for a float: not a number
            return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _within(value: Any, limits: Mapping[str, float]) -> bool:
    return all(_LIMITS[name][1](value, limit) for name, limit in limits.items())


def _range(limits: Mapping[str, float]) -> str:
    if limits.keys() == {"at_least", "at_most"}:
        return f" from {limits['at_least']} to {limits['at_most']}"
    return " and".join(f" {_LIMITS[name][0]} {limit}" for name, limit in limits.items())


def _refusal(owner: Any, name: str, expected: str, value: Any, also: str = "") -> ArgumentError:
    kind = owner if isinstance(owner, str) else type(owner).__name__
    place = f"{kind}: " if kind else ""
    return ArgumentError(f"{place}{name} must be {expected}{f', or {also}' if also else ''}, not {shown(value)}.")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, numpy.ndarray) or isinstance(b, numpy.ndarray):
        return numpy.array_equal(a, b)
    return bool(a == b)


def resolve(kind: str, spec: Any, table: Mapping[str, type[T]], base: type[T]) -> T:
    """`spec` itself if it is a `base`; if it is a string of `table`, a default object of that class."""
    if isinstance(spec, base):
        refuse_other_signatures(spec, base)
        return spec
    if isinstance(spec, str):
        name = spec.strip().lower().replace("-", "_")
        if name not in table:
            raise unknown_name(kind, spec, table)
        return table[name]()
    if isinstance(spec, type) and issubclass(spec, base):
        raise ArgumentTypeError(f"{kind}: pass an object, {spec.__name__}(...), not the class {spec.__name__}.")
    raise ArgumentTypeError(f"{kind} must be a name ({', '.join(sorted(table))}) or an object, not {shown(spec)}.")
