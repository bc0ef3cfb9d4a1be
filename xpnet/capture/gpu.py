"""TracedGPU: the backend of a GPU while a step is traced. CallList: the calls of the step, for its CUDA graph."""

import functools
from collections.abc import Callable, Collection
from typing import Any

from xpnet.backends import Array, Backend, DType
from xpnet.backends.base import Device
from xpnet.backends.cuda.graphs import MOST_GATHERS, gatherable
from xpnet.backends.step_numbers import current
from xpnet.capture.array_module import TracedModule
from xpnet.capture.branches import branches
from xpnet.capture.calls import (
    Call,
    address_of,
    arrays_in,
    given_by_name,
    is_array,
    mapped,
    memory_of,
    same_view,
)
from xpnet.capture.device import NOISE, TracedDevice, methods_of, number_of
from xpnet.capture.fusion import copied_weights, fused, without_zeros
from xpnet.capture.memory import MemoryPlan
from xpnet.capture.passes import Memory, has_numbers, simplified
from xpnet.capture.trace import Trace
from xpnet.errors import CaptureError

#: The parameters that operators write, if these are others than `out`.
_WRITES = {
    "add_matmul": ("out", "scratch"), "add_to_rows": ("a",), "add_to_rows_max_pool": ("x", "out", "choice"),
    "add_to_rows_relu": ("a", "out"), "attention": ("out", "log_sums"),
    "attention_grad": ("grad_q", "grad_k", "grad_v"), "clip_norm": ("grads",), "convolve_weight_grad": ("out", "sums"),
    "cross_entropy": ("losses", "grad"), "cross_entropy_sums": ("losses", "grad", "loss_sum", "correct"),
    "dense_cross_entropy": ("losses", "grad", "correct", "grad_h"), "elementwise": ("outs",), "gelu": ("out", "slope"),
    "gru": ("gates", "hidden", "inner"), "gru_grad": ("grad_gates", "grad_products", "grad_hidden"),
    "lstm": ("gates", "hidden", "cells"), "lstm_grad": ("grad_gates", "grad_hidden", "grad_cell"),
    "matmul_sum_rows": ("out", "sums"), "max_pool": ("out", "choice"),
    "normalize_and_scale": ("normal", "sigma", "out"),
    "normalize_and_scale_grad": ("grad_gamma", "grad_beta", "out"), "normalize_rows": ("out", "sigma"),
    "relu_grad_sum_rows": ("out", "sums"), "rnn": ("hidden",), "rnn_grad": ("grad_gates", "grad_hidden"),
    "scale_rows": ("out", "sigma"), "sum_rows_and_products": ("sums", "products"),
    "whole_update": ("vectors",),
}  # fmt: skip
#: Those that they write after having read them, although their names are those of results.
_UPDATES = {"add_matmul": ("out",), "convolve_weight_grad": ("out",)}


#: The operators that hash noise from the number of the step, which is part of one of their arguments.
_NOISY = ("attention", "attention_grad")


class TracedGPU(TracedDevice):
    """A GPU whose arrays are traced: each operator that launches kernels or calls cuBLAS is recorded as one call.

    Operators that the GPU computes by their formulas are recorded as the operators and functions in these.
    """

    def __init__(self, real: Any, trace: Trace) -> None:
        super().__init__(real.name, TracedModule(trace))
        self.real, self.trace = real, trace
        self.workspace_bytes, self.has_streams = real.workspace_bytes, real.has_streams
        for name in methods_of(Device):
            if getattr(type(self), name) is getattr(Device, name):
                setattr(self, name, getattr(real, name))
        for name in whole_operators(type(real)):
            if getattr(type(self), name) is getattr(Backend, name):
                setattr(self, name, functools.partial(self._recorded, name))

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        return self.xp.asarray(a, dtype=dtype)

    def _recorded(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        operator, trace = getattr(self.real, name), self.trace
        if name in _NOISY:
            args, kwargs = mapped(number_of, args), mapped(number_of, kwargs)
        with trace.within(operator=name):
            result = trace.operator(operator, args, kwargs, _WRITES.get(name, ("out",)), _UPDATES.get(name, ()))
        if result is False and trace.active:  # the operator has not done anything
            trace.calls.pop()
        return result


def whole_operators(gpu: type) -> list[str]:
    """The operators for which a GPU has more than the formula."""
    formulas = methods_of(Backend)
    return [
        name
        for name, method in methods_of(gpu).items()
        if name in formulas and method is not formulas[name] and not hasattr(Device, name)
    ]


class CallList:
    """The simplified and fused calls of a traced step. They are made once to warm up, and then while a graph captures.

    rows: the array with the numbers of the step's samples, or None.
    arena: the memory of the temporary arrays.  temporary_bytes: their bytes if they did not share memory.  gathers:
    (array, out) pairs, at most `MOST_GATHERS`. Before the calls are made, `out` must have these rows of the array.

    What a call returns is new in each run, and is used in place of what it returned in the trace. It is kept until all
    calls are made, since calls on several streams may use it.
    """

    def __init__(self, trace: Trace, backend: Any, rows: Array | None = None) -> None:
        quiet = (call for call in trace.calls if call.function not in NOISE and call.operator not in _NOISY)
        if any(map(has_numbers, quiet)):
            raise CaptureError("the step uses its number")
        memory = Memory(trace)
        calls = simplified(without_zeros(trace.calls, memory, backend), memory)
        gathers, calls = _gathers_first(fused(calls, memory, backend), rows, memory, backend)
        #: Whether the last call, which waits for all others, updates the weights.
        self.ends_with_update = bool(calls) and calls[-1].function == backend.whole_update
        self._backend, self._placed = backend, branches(calls, memory, last_waits=self.ends_with_update)
        first = len(gathers)
        before: list[Collection[int]] = [range(i) for i in range(first)]
        before += [{*range(first), *[first + other for other in place.before]} for place in self._placed]
        calls = [*gathers, *[place.call for place in self._placed]]
        returned = {memory.owner(a) for call in calls for a in arrays_in(call.result)}
        plan = MemoryPlan(calls, memory, elsewhere=returned, before=before)
        self.arena, self.temporary_bytes = backend.empty((plan.size,), "uint8"), plan.unshared
        calls = plan.applied(calls, functools.partial(self._in_arena, memory))
        self.gathers, self.calls = [_gathered(call) for call in calls[:first]], calls[first:]

    def _in_arena(self, memory: Memory, like: Array, offset: int) -> Array:
        """An array like another one, from this byte of the arena on."""
        _, _, lowest, _ = memory.extent(like)
        return _view(self.arena, offset + address_of(like) - lowest, like)

    def refresh(self) -> None:
        """Round the weights anew of which the calls use copies in 16 bits, since something else has changed them."""
        for weights, copy in copied_weights(self.calls, self._backend):
            self._backend.to_halves(weights, copy)

    @property
    def arrays(self) -> list[Array]:
        """All arrays that the calls use."""
        return [self.arena, *arrays_in([(call.args, call.kwargs, call.reads, call.writes) for call in self.calls])]

    def __call__(self) -> None:
        new: dict[int, tuple[Array, Array]] = {}  # by the owner of the memory of the first: an old array, the new one

        def now(value: Any) -> Any:
            if not is_array(value):
                return current(value)
            old, made = new.get(id(memory_of(value)), (None, None))
            return value if made is None else _view(made, address_of(value) - address_of(old), value)

        streams = self._backend.side_streams(max(place.stream for place in self._placed))
        events: dict[int, Any] = {}  # after the calls that calls on other streams wait for
        awaited = {position for place in self._placed for position in place.after}
        main = self._backend.current_stream()
        for stream in streams:
            stream.wait_event(main.record())
        for position, (call, place) in enumerate(zip(self.calls, self._placed, strict=True)):
            stream = streams[place.stream - 1] if place.stream else main
            for other in place.after:
                stream.wait_event(events[other])
            with stream:
                self._make(call, now, new)
            if position in awaited:
                events[position] = stream.record()
        for stream in streams:
            main.wait_event(stream.record())

    def _make(self, call: Call, now: Callable[[Any], Any], new: dict[int, tuple[Array, Array]]) -> None:
        """Make a call with the arrays and numbers of `now`, and add the arrays that it returns to `new`."""
        value = call.make(now)
        if call.result is not None:
            for old, made in zip(arrays_in(call.result), arrays_in(value), strict=True):
                if (old.shape, old.strides, old.dtype) != (made.shape, made.strides, made.dtype):
                    raise CaptureError(f"{call.name} returns another kind of array in each step")
                new[id(memory_of(old))] = old, made


def _gathers_first(
    calls: list[Call], rows: Array | None, memory: Memory, backend: Any
) -> tuple[list[Call], list[Call]]:
    """The gathers of these rows that can be made at the same time before all other calls, and the other calls."""
    gathers: list[Call] = []
    for position, call in enumerate(calls):
        if rows is None or len(gathers) == MOST_GATHERS or call.function != backend.gather:
            continue
        a, out = _gathered(call)
        if not same_view(given_by_name(call)["rows"], rows) or not gatherable(a, out):
            continue
        if not any(memory.touches(other, out) for other in calls[:position]):
            gathers.append(call)
    return gathers, [call for call in calls if not any(call is gather for gather in gathers)]


def _gathered(gather: Call) -> tuple[Array, Array]:
    given = given_by_name(gather)
    return given["a"], given["out"]


def _view(memory: Array, offset: int, like: Array) -> Array:
    """An array like another one, whose first element is this many bytes behind that of `memory`."""
    if not offset and (memory.shape, memory.strides, memory.dtype) == (like.shape, like.strides, like.dtype):
        return memory
    return type(memory)(like.shape, like.dtype, memory.data + offset, like.strides)
