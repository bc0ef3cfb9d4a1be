"""TracedCPU: the CPU backend while a step is traced. Its operators run as usual, so that the trace sees their calls."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from xpnet.backends import Array, Backend, DType
from xpnet.backends.cpu.operators import CPUOperators
from xpnet.backends.cpu.thread_pool import slices
from xpnet.backends.step_numbers import StepNumber
from xpnet.capture.array_module import TracedModule
from xpnet.capture.calls import Call
from xpnet.capture.device import TracedDevice, operators_of
from xpnet.capture.trace import Trace, TracedArray

#: The parameters that compiled loops write.
_LOOP_RESULTS = {
    "add_powers": ("totals",), "add_products": ("totals",), "add_rows": ("totals",), "add_squares": ("totals",),
    "add_to_rows": ("a",),
    "adagrad": ("w", "s"), "adam": ("w", "m", "s"), "attention_probabilities": ("scores", "log_sums"),
    "attention_probabilities_again": ("scores",), "attention_score_grads": ("grads",),
    "cross_entropy": ("losses", "grad"), "gelu": ("out", "slope"),
    "gru_grad": ("grad_gates", "grad_products", "grad_before"), "gru_inner": ("gates",), "gru_state": ("hidden",),
    "gru_sums": ("gates", "inner"), "lstm_cell": ("gates", "cell"), "lstm_grad": ("grad_gates", "grad_before"),
    "lstm_sums": ("gates",), "max_pool": ("out", "choice"), "momentum": ("w", "v"),
    "normalize_and_scale": ("normal", "sigma", "out"), "normalize_and_scale_grad": ("totals", "out"),
    "pack": ("packed",), "rmsprop": ("w", "s"), "sgd": ("w",),
}  # fmt: skip


class TracedCPU(TracedDevice, CPUOperators):
    """A CPU backend whose arrays are traced. It computes what `real` does."""

    def __init__(self, real: CPUOperators, trace: Trace) -> None:
        self.__dict__.update(real.__dict__)
        self.real, self.trace, self.chunk_elements = real, trace, real.chunk_elements
        self.xp = TracedModule(trace)
        self.threads = _TracedThreads(real.threads, trace)  # type: ignore[assignment]
        for name in operators_of(type(real)):
            setattr(self, name, self._named(name, getattr(self, name)))

    def _named(self, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            if self.trace.in_operator:
                return operator(*args, **kwargs)
            with self.trace.within(operator=name):
                return operator(*args, **kwargs)

        return within

    # Arrays ----------------------------------------------------------------------------------------------------------

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        return self.xp.asarray(a if isinstance(a, TracedArray) else self.real.asarray(a, dtype), dtype=dtype)

    def _matrix(self, shape: tuple[int, int], dtype: DType) -> Array:
        return self.empty(shape, dtype)

    def rotations(self, steps: int, pairs: int, dtype: DType) -> tuple[Array, Array]:
        tables: tuple[Array, Array] = self.real.rotations(steps, pairs, dtype)
        return tables

    def step_number(self, of: Callable[[int], float], step: int) -> Any:
        return StepNumber(of, of(step))

    # Operators -------------------------------------------------------------------------------------------------------

    def loops(self, arguments: Sequence[Any]) -> Any:
        given = [a.values if isinstance(a, TracedArray) else a for a in arguments]
        loops = self.real.loops(given)
        return None if loops is None else _TracedLoops(loops, self.trace)

    def count_correct(self, outputs: Array, labels: Array) -> Array:
        if self.loops((outputs, labels)) is not None:
            return self.trace.operator(self.real.count_correct, (outputs, labels), {})
        return Backend.count_correct(self, outputs, labels)  # without the branch, which reads a number on the host

    def count_pairs(self, a: Array, b: Array, shape: tuple[int, int], weights: Array | None) -> Array:
        return self.trace.operator(self.real.count_pairs, (a, b, shape, weights), {})


class _TracedLoops:
    """Compiled loops that record their calls."""

    def __init__(self, loops: Any, trace: Trace) -> None:
        self._loops, self._trace = loops, trace

    def __getattr__(self, name: str) -> Any:
        loop = getattr(self._loops, name)  # AttributeError if there is none
        if not hasattr(loop, "py_func"):  # not compiled, so no work on arrays
            return loop
        writes = _LOOP_RESULTS.get(name, ("out",))
        return lambda *args: self._trace.operator(loop, args, {}, writes)


class _TracedThreads:
    """The thread pool while a step is traced: each worker's part is recorded as a list of its own."""

    def __init__(self, real: Any, trace: Trace) -> None:
        self._real, self._trace = real, trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def parallel_region(self, split: bool = True) -> AbstractContextManager[Any]:
        region: AbstractContextManager[Any] = self._real.parallel_region(split)
        return region

    def parallel_for(self, count: int, work: Callable[[slice, int], None]) -> None:
        parts = min(self._real.region_workers or 1, count)
        if parts <= 1:
            work(slice(0, count), 0)
            return
        trace, lists = self._trace, []
        for worker, rows in enumerate(slices(count, parts)):
            before, trace.calls = trace.calls, []
            try:
                with self._real.inside_a_part():
                    work(rows, worker)
                lists.append(trace.calls)
            finally:
                trace.calls = before
        calls = [call for part in lists for call in part]
        trace.record(Call(self._real.run_parts, (), parts=lists,
                          reads=tuple(a for call in calls for a in call.reads),
                          writes=tuple(a for call in calls for a in call.writes)))  # fmt: skip
