"""Passes: each simplifies the calls of a step, and changes no bit of what they compute.

A pass takes a list of calls and returns a new one. It looks at the calls of the main thread only: work that threads
share is one call to it, which reads and writes what its parts do.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.backends.step_numbers import StepNumber
from xpnet.capture.calls import Call, address_of, is_array, mapped, memory_of, same_view
from xpnet.capture.program import Cell, Load
from xpnet.capture.trace import Trace

#: Functions whose results NumPy does not round differently for other strides, as it does for exp of float64.
EXACT = frozenset((
    numpy.absolute, numpy.add, numpy.copysign, numpy.divide, numpy.equal, numpy.greater, numpy.greater_equal,
    numpy.less, numpy.less_equal, numpy.maximum, numpy.minimum, numpy.multiply, numpy.negative, numpy.not_equal,
    numpy.sqrt, numpy.square, numpy.subtract,
))  # fmt: skip

_FEW_COLUMNS = 4  # a reduction over so few columns takes longer than one call per column


def simplified(calls: list[Call], memory: "Memory") -> list[Call]:
    """The calls of a step, with fewer calls and copies."""
    calls = without_constants(calls, memory)
    calls = without_repetitions(calls, memory)
    calls = without_copies(calls, memory)
    return without_unused_results(calls, memory)


def for_numpy(calls: list[Call]) -> list[Call]:
    """The calls of a step in the forms that take NumPy the least time."""
    return with_arrays_for_numbers(with_methods(by_columns(calls)))


class Memory:
    """Where the arrays of a trace are in memory."""

    def __init__(self, trace: Trace) -> None:
        self.xp = trace.xp
        self._temporary = trace.temporary
        self._constant: set[int] = set()  # owners of memory that holds constants
        self._extents: dict[int, tuple[Array, int, int, int]] = {}  # by id of the array, which is kept alive

    def extent(self, array: Array) -> tuple[Array, int, int, int]:
        """(the array, the id of the owner of its memory, its first byte, the byte after its last)."""
        found = self._extents.get(id(array))
        if found is None:
            first = last = address_of(array)
            for size, stride in zip(array.shape, array.strides, strict=True):
                first, last = first + min(0, (size - 1) * stride), last + max(0, (size - 1) * stride)
            end = last + array.itemsize if array.size else first
            found = self._extents[id(array)] = array, id(memory_of(array)), first, end
        return found

    def owner(self, array: Array) -> int:
        """The id of the owner of an array's memory."""
        return self.extent(array)[1]

    def overlap(self, a: Array, b: Array) -> bool:
        """Whether two arrays may share elements."""
        _, owner, first, end = self.extent(a)
        _, other, other_first, other_end = self.extent(b)
        return owner == other and first < other_end and other_first < end

    def temporary(self, array: Array) -> bool:
        """Whether the array was made in the step, so that nothing else uses it."""
        return self.extent(array)[1] in self._temporary

    def own(self, array: Array) -> Array:
        """Count a new array as made in the step. Returns it."""
        memory = memory_of(array)
        self._temporary[id(memory)] = memory
        return array

    def hold(self, call: Call) -> None:
        """Mark what this call has written as constant: the call is not replayed, so its results must be kept."""
        self._constant.update(self.extent(a)[1] for a in call.writes)

    def reusable(self, array: Array) -> bool:
        """Whether other arrays may have the memory of this one before its first and after its last use in a step."""
        return self.temporary(array) and self.extent(array)[1] not in self._constant

    def touches(self, call: Call, array: Array) -> bool:
        """Whether a call reads or writes elements of this array."""
        return call.opaque or any(self.overlap(a, array) for a in _arrays(call))

    def depend(self, a: Call, b: Call) -> bool:
        """Whether the order of two calls matters."""
        if a.opaque or b.opaque:
            return True
        return any(self.overlap(x, y) for x in a.writes for y in _arrays(b)) or any(
            self.overlap(x, y) for x in a.reads for y in b.writes
        )

    def writes(self, call: Call, array: Array) -> bool:
        """Whether a call writes elements of this array."""
        return call.opaque or any(self.overlap(a, array) for a in call.writes)


# Passes --------------------------------------------------------------------------------------------------------------


def without_constants(calls: list[Call], memory: Memory) -> list[Call]:
    """Leave out calls whose results are the same in every step: the trace has made them already."""
    while True:
        writers: dict[int, list[tuple[Call, Array]]] = {}  # what calls write, by owner
        for call in calls:
            for a in call.writes:
                writers.setdefault(memory.owner(a), []).append((call, a))
        constant = [call for call in calls if _is_constant(call, writers, memory)]
        if not constant:
            return calls
        for call in constant:
            memory.hold(call)
        calls = [call for call in calls if call not in constant]


def _is_constant(call: Call, writers: dict[int, list[tuple[Call, Array]]], memory: Memory) -> bool:
    if call.opaque or call.parts is not None or isinstance(call.function, Load) or has_numbers(call):
        return False
    if not call.writes or any(memory.overlap(a, b) for a in call.reads for b in call.writes):
        return False
    return all(
        memory.temporary(a)
        and not any(other is not call and memory.overlap(a, b) for other, b in writers.get(memory.owner(a), ()))
        for a in _arrays(call)
    )


def without_repetitions(calls: list[Call], memory: Memory) -> list[Call]:
    """Compute a result once that two calls compute from the same unchanged arrays."""
    calls, seen = list(calls), dict[tuple[Any, ...], int]()
    i = 0
    while i < len(calls):
        if _is_pure(calls[i], memory):
            key = (calls[i].function, *(memory.extent(a)[1:] for a in calls[i].reads))
            first = seen.get(key)
            if first is not None and (merged := _merged(calls, first, i, memory)) is not None:
                calls = merged
                continue
            seen[key] = i
        i += 1
    return calls


def _is_pure(call: Call, memory: Memory) -> bool:
    """Whether a call reads some arrays and writes all of one other array, which was made in the step."""
    if call.opaque or call.parts is not None or isinstance(call.function, Load) or len(call.writes) != 1:
        return False
    (target,) = call.writes
    return memory.temporary(target) and not any(memory.overlap(target, a) for a in call.reads)


def _merged(calls: list[Call], first: int, second: int, memory: Memory) -> list[Call] | None:
    """The calls without the second of two, with the result of the first in its place; None if they are not equal."""
    if not _same_computation(calls[first], calls[second]):
        return None
    a, b = calls[first].writes[0], calls[second].writes[0]
    between = calls[first + 1 : second]
    if any(memory.writes(call, array) for call in between for array in calls[first].reads):
        return None
    users = [i for i, call in enumerate(calls) if i != second and memory.touches(call, b)]
    last = max(users, default=second)
    if (users and users[0] < second) or not all(_uses_only(calls[i], b) for i in users) or not a.flags.c_contiguous:
        return None
    if any(memory.writes(call, a) for call in calls[first + 1 : last + 1]) or any(
        b is x for i in users for x in calls[i].writes
    ):
        return None
    view = a.reshape(b.shape)
    return [_replaced(call, b, view) for i, call in enumerate(calls) if i != second]


def _same_computation(a: Call, b: Call) -> bool:
    """Whether two calls compute the same numbers, apart from axes of length 1 that a reduction keeps."""
    if len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys() or a.writes[0].size != b.writes[0].size:
        return False
    if a.writes[0].dtype != b.writes[0].dtype or (a.result is None) != (b.result is None):
        return False
    if a.writes[0].shape != b.writes[0].shape and not _is_reduction(a):
        return False
    pairs = [*zip(a.args, b.args, strict=True), *((a.kwargs[name], b.kwargs[name]) for name in a.kwargs)]
    if _is_reduction(a):
        del pairs[4]
    return all(_same_argument(x, y) or (x is a.writes[0] and y is b.writes[0]) for x, y in pairs)


def _same_argument(a: Any, b: Any) -> bool:
    if is_array(a) and is_array(b):
        return same_view(a, b)
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and repr(a) == repr(b))  # 0.0 is not -0.0


def without_copies(calls: list[Call], memory: Memory) -> list[Call]:
    """Let a call write its result where a later call would copy it."""
    calls = list(calls)
    users: dict[int, list[Call]] = {}  # the calls that use an array, by owner
    for call in calls:
        for owner in {memory.owner(a) for a in _arrays(call)}:
            users.setdefault(owner, []).append(call)
    for copy in list(calls):
        source = _copied(copy, memory)
        if source is None or not memory.temporary(source):
            continue
        others = [call for call in users[memory.owner(source)] if call is not copy]
        if len(others) != 1 or not _makes(others[0], source):
            continue
        (maker,), target = others, copy.args[0]
        first, last = calls.index(maker), calls.index(copy)
        if first > last or not _can_write(maker, source, target, memory):
            continue
        if any(memory.touches(call, target) for call in calls[first + 1 : last]):
            continue
        calls[first] = _replaced(maker, source, target)
        del calls[last]
        for owner in {memory.owner(a) for a in _arrays(calls[first])}:
            users[owner] = [c for c in users[owner] if c is not copy and c is not maker] + [calls[first]]
    return calls


def _copied(call: Call, memory: Memory) -> Array | None:
    """The array that a call copies, in its shape and dtype; None if it does anything else."""
    if call.function is not memory.xp.copyto or "where" in call.kwargs or not is_array(call.args[1]):
        return None
    target, source = call.args
    return source if target.shape == source.shape and target.dtype == source.dtype else None


def _makes(call: Call, array: Array) -> bool:
    """Whether a call writes this array, and nothing else."""
    return call.parts is None and not call.opaque and len(call.writes) == 1 and call.writes[0] is array


def _can_write(call: Call, source: Array, target: Array, memory: Memory) -> bool:
    """Whether a call can write into `target` instead of `source`."""
    apart = not any(memory.overlap(a, target) for a in call.reads)
    contiguous = bool(target.flags.c_contiguous and source.flags.c_contiguous)
    if call.result is not None and memory.xp is not numpy:
        return False  # a GPU takes the array that is returned, without a copy
    if isinstance(call.function, Load) or call.result is source:
        return apart
    if _is_reduction(call):
        return apart and (contiguous or target.ndim < 2)  # strides of more axes may change the order of the terms
    if hasattr(call.function, "nin") and call.function is not numpy.matmul:  # a ufunc
        same = contiguous or memory.xp is not numpy or call.function in EXACT
        return same and all(same_view(a, target) or not memory.overlap(a, target) for a in call.reads)
    return apart and contiguous


def without_unused_results(calls: list[Call], memory: Memory) -> list[Call]:
    """Leave out calls whose results no later call reads, and which are not the model's either."""
    kept: list[Call] = []
    read: dict[int, list[Array]] = {}
    for call in reversed(calls):
        unused = not call.opaque and all(
            memory.temporary(a) and not any(memory.overlap(a, b) for b in read.get(memory.owner(a), ()))
            for a in call.writes
        )
        if unused:
            continue
        kept.append(call)
        for a in call.reads:
            read.setdefault(memory.owner(a), []).append(a)
    return kept[::-1]


def by_columns(calls: list[Call]) -> list[Call]:
    """Reduce over a short last axis by a call for each column, which takes less time than a reduction of each row."""
    return [part for call in calls for part in (_columns(call) or [call])]


def _columns(call: Call) -> list[Call] | None:
    ufunc: Any = getattr(call.function, "__self__", None)
    if not _is_reduction(call) or ufunc not in (numpy.add, numpy.maximum, numpy.minimum):
        return None
    a, axis, dtype, target, _ = call.args
    if a.ndim != 2 or axis not in (1, -1) or not 2 <= a.shape[1] <= _FEW_COLUMNS:
        return None
    if dtype is not None or a.dtype != target.dtype or a.dtype.kind != "f" or not a.flags.c_contiguous:
        return None
    columns, out = a.T, target.reshape(-1)
    if not numpy.shares_memory(out, target):
        return None
    # A sum starts from 0, which turns -0 into 0.
    first: Any = numpy.zeros((), a.dtype) if ufunc is numpy.add else columns[1]
    pairs = [(columns[0], first), *((out, column) for column in columns[1 if ufunc is numpy.add else 2 :])]
    return [
        replace(call, function=ufunc, args=(*pair, out), reads=tuple(b for b in pair if b.ndim), writes=(out,))
        for pair in pairs
    ]


def with_methods(calls: list[Call]) -> list[Call]:
    """Call methods of arrays in place of the functions that call them, where these take long to decide that."""
    return [_method(call) or call for call in calls]


def _method(call: Call) -> Call | None:
    function, args, kwargs = call.function, call.args, call.kwargs
    if function is numpy.matmul and not kwargs:
        a, b, out = args
        plain = a.ndim == b.ndim == 2 and a.dtype == b.dtype == out.dtype and out.flags.c_contiguous
        same = plain and a.dtype.char in "fd" and _multiplied_alike(a, b)
        return replace(call, function=a.dot, args=(b, out)) if same else None
    if function is numpy.dot and kwargs.keys() == {"out"} and len(args) == 2:
        return replace(call, function=args[0].dot, args=(args[1], kwargs["out"]), kwargs={})
    if function in (numpy.argmax, numpy.argmin) and kwargs.keys() <= {"axis", "out"} and "out" in kwargs and args:
        axis = args[1] if len(args) > 1 else kwargs.get("axis")
        return replace(call, function=getattr(args[0], function.__name__), args=(axis, kwargs["out"]), kwargs={})
    return None


def _multiplied_alike(a: Array, b: Array) -> bool:
    """Whether `dot` and `matmul` add up in the same order. Where one side of the product is 1, strides decide that."""
    if len(a) > 1 and b.shape[1] > 1:
        return True
    return a.size > 1 and all(c.flags.c_contiguous or c.flags.f_contiguous for c in (a, b))


def with_arrays_for_numbers(calls: list[Call]) -> list[Call]:
    """Give ufuncs arrays without axes in place of Python's numbers, which they would convert in each call."""
    return [_array_numbers(call) for call in calls]


def _array_numbers(call: Call) -> Call:
    if not isinstance(call.function, numpy.ufunc) or call.function is numpy.matmul:
        return call
    inputs = call.args[: call.function.nin]
    dtypes = {a.dtype for a in inputs if isinstance(a, numpy.ndarray)}
    if len(dtypes) != 1 or (dtype := dtypes.pop()).kind != "f":
        return call
    given = [
        numpy.asarray(a, dtype) if type(a) in (int, float) else Cell(a, dtype) if isinstance(a, StepNumber) else a
        for a in inputs
    ]
    return replace(call, args=(*given, *call.args[call.function.nin :]))


# Properties of calls and arrays --------------------------------------------------------------------------------------


def has_numbers(call: Call) -> bool:
    """Whether an argument changes from step to step."""
    return any(isinstance(item, StepNumber) for item in _items(call.args))


def _items(value: Any) -> Iterator[Any]:
    """The items of a value, and of the lists and tuples in it."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)
    else:
        yield value


def _is_reduction(call: Call) -> bool:
    return getattr(call.function, "__name__", "") == "reduce" and isinstance(
        getattr(call.function, "__self__", None), numpy.ufunc
    )


def _arrays(call: Call) -> tuple[Array, ...]:
    return (*call.reads, *call.writes)


def _uses_only(call: Call, array: Array) -> bool:
    """Whether a call uses this array as a whole, and no other view of its memory."""
    same = [a for a in _arrays(call) if memory_of(a) is memory_of(array)]
    return call.parts is None and not call.opaque and all(a is array for a in same)


def _replaced(call: Call, old: Array, new: Array) -> Call:
    """A call with one array in place of another."""

    def swap(value: Any) -> Any:
        return mapped(lambda item: new if item is old else item, value)

    if not any(a is old for a in _arrays(call)):
        return call
    return replace(
        call,
        args=swap(call.args),
        kwargs=swap(call.kwargs),
        result=swap(call.result),
        reads=swap(call.reads),
        writes=swap(call.writes),
    )
