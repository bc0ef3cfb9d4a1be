"""Tracing a training step: the model sees traced arrays while the step runs once."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.backends.step_numbers import StepNumber
from xpnet.capture.calls import Call
from xpnet.capture.cpu import TracedCPU
from xpnet.capture.device import StepPosition
from xpnet.capture.gpu import TracedGPU
from xpnet.capture.program import Load
from xpnet.capture.trace import SideEffectError, Trace, TracedArray
from xpnet.config import is_custom
from xpnet.data.dataset import Batch, StepData, total_weight
from xpnet.errors import CaptureError
from xpnet.layers.base import Layer
from xpnet.layers.containers import Container, every_layer
from xpnet.layers.context import Context, Workspace
from xpnet.layers.structure import as_tuple
from xpnet.training.attributes import Attributes, mark_replaced, things_of
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.side_effects import KeptArrays, OneStepWorkspace, PythonState, refusing_the_outside
from xpnet.training.step import TrainingStep


def traced_step(step: TrainingStep, data: StepData, metrics: EpochMetrics, staged_sums: Array, fixed: bool) -> Trace:
    """Run a step once, and return the trace of it. The caller undoes what the step has changed.

    staged_sums: (3, batches), float64, where the sums of each batch go.  fixed: whether steps share one dataset. On a
    GPU, every step reads its samples where `data` has them.
    Raises CaptureError, or whatever a layer raises, if the step cannot be traced.
    """
    trace = Trace(step.model.backend.xp)
    with _recording(trace), _traced(step, metrics, trace):
        _run(step, data, metrics, trace, trace.wrap(staged_sums, writable=True), fixed)
    return trace


def traced_outputs(model: Container, batch: Batch, results: Sequence[Array]) -> Trace:
    """Compute the outputs of an inference pass of built-in layers into `results`, and return the trace of it.

    In the program (capture/program.py), x is loaded as all rows of the inputs.
    """
    trace = Trace(model.backend.xp)
    with _recording(trace), _traced_model(model, trace):
        loaded = Batch(**batch.replaced(functools.partial(_loaded, trace)))
        outputs = as_tuple(model.forward_in_context(loaded.x, inference=True))
        for result, output in zip(results, outputs, strict=True):
            trace.wrap(result, writable=True)[...] = output
    return trace


@contextlib.contextmanager
def _recording(trace: Trace) -> Iterator[None]:
    """A context at whose end a trace stops. An error also frees its memory."""
    try:
        yield
    except BaseException:
        trace.release()
        raise
    finally:
        trace.stop()


def _loaded(trace: Trace, name: str, array: Array) -> TracedArray:
    """A copy of an array that is an input of a pass. The program loads all of it."""
    copy = trace.own(array.copy())
    trace.record(Call(Load(name, 0, len(array), whole=True), (copy.values,), writes=(copy.values,)))
    return copy


def _run(
    step: TrainingStep, data: StepData, metrics: EpochMetrics, trace: Trace, staged_sums: TracedArray, fixed: bool
) -> None:
    state, columns = step.state, itertools.count(0, metrics.columns_per_batch)
    context = step.model.context
    inputs = _Inputs(trace, step, data, fixed) if isinstance(context.backend, TracedCPU) else data

    def add_metrics(per_sample: Array, batch: Batch, outputs: Array) -> None:
        with trace.within(place="metrics"):
            metrics.add_on_device(staged_sums, next(columns), per_sample, batch, outputs)

    before = state.optimizer_state.step
    try:
        with trace.within(place="loss"):  # and within layers, their names
            batches = _with_noise(context, inputs.batches())
            step.gradients(batches, inputs.total_weight(), add_metrics, data.batch_count)
        with trace.within(place="update"):
            if not is_custom(type(state.optimizer)):
                step.update()
                return
    finally:
        state.optimizer_state.step = before
    store, slots = step.model.context.store, state.optimizer_state.slots.values()
    arrays = tuple(a.values for a in (store.values, store.grads, *slots))
    trace.record(Call(_Update(step), (), reads=arrays, writes=arrays, opaque=True))


def _with_noise(context: Context, batches: Iterator[Batch]) -> Iterator[Batch]:
    """These batches. Before the first, but after `begin_step`, noise is made a function of the step."""
    context.noise_step = _noise_position(context)
    context.current_step = StepNumber(int, context.current_step)  # type: ignore[assignment]
    yield from batches


class _Update:
    """The update by a custom optimizer, which may do anything: it is called in every replay."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self.__name__ = type(step.state.optimizer).__name__

    def __call__(self) -> None:
        counter = self._step.state.optimizer_state
        before = counter.step
        try:
            self._step.update()
        finally:
            counter.step = before  # the replay counts the step


class _Inputs:
    """The batches of a step. The replay loads them from the dataset, whichever it is then."""

    def __init__(self, trace: Trace, step: TrainingStep, data: StepData, fixed: bool) -> None:
        self._trace, self._data = trace, data
        self._backend: Any = step.model.context.backend
        self._work, self._dtypes = Workspace(step.model.context), data.dataset.dtypes
        #: Whether the step always takes all samples as they are stored.
        self._all = fixed and data.order is None and data.rows == len(data.dataset)

    def batches(self) -> Iterator[Batch]:
        size = self._data.batch_size
        for first in range(0, self._data.rows, size):
            count = min(size, self._data.rows - first)
            rows = functools.partial(self._rows, first, count)
            yield Batch(**self._data.dataset.replaced(rows), first_row=first)

    def total_weight(self) -> Any:
        weights = self._data.dataset.weights
        if weights is None:
            return self._data.rows
        return total_weight(self._backend.xp, self._rows(0, self._data.rows, "weights", weights, "all weights"))

    def _rows(self, first: int, count: int, name: str, array: Array, buffer: str = "") -> Any:
        dtype = self._dtypes[name]
        if self._all and array.dtype == dtype and not self._data.dataset.private:
            return self._trace.wrap(array[first : first + count])
        out = self._work.buffer(buffer or name, (count, *array.shape[1:]), dtype)
        load, data = Load(name, first, count, whole=count == self._data.rows), self._data
        rows = slice(data.start + first, data.start + first + count)
        copy: Any = loader(self._backend.real, array, dtype, data.order is not None)
        copy(rows if data.order is None else data.order[rows], out.values)
        with self._trace.within(place="inputs"):
            self._trace.record(Call(load, (out.values,), writes=(out.values,)))
        return out


def loader(backend: Any, array: Array, dtype: Any, ordered: bool) -> Callable[[Any, Array], Any]:
    """A function of (rows, out) that copies these rows of an array. ordered: whether rows are an index array."""
    if not ordered:

        def copy(rows: slice, out: Array) -> None:
            out[...] = array[rows]

        return copy
    if array.dtype == dtype:
        take = array.take

        def gather(rows: Array, out: Array) -> None:
            take(rows, 0, out, "clip")

        return gather
    return lambda rows, out: backend.gather(array, rows, out)


@contextlib.contextmanager
def _traced(step: TrainingStep, metrics: EpochMetrics, trace: Trace) -> Iterator[None]:
    """A context in which the model, its training state and the metrics hold traced arrays, and a traced backend."""
    model, context, state = step.model, step.model.context, step.state
    things, attributes = things_of(step), Attributes(step, skip_live=False, arrays=False)
    python, optimizer_state = PythonState(step, attributes), state.optimizer_state
    with contextlib.ExitStack() as undo:
        undo.callback(python.restore)
        undo.enter_context(_traced_model(model, trace))
        replace = functools.partial(_replace, undo)

        def writable(array: Array) -> TracedArray:
            return trace.wrap(array, writable=True)

        # The step sets these two numbers: replacing each by itself restores it afterwards.
        replace(context, noise_step=context.noise_step, current_step=context.current_step)
        slots = {name: writable(vector) for name, vector in optimizer_state.slots.items()}
        replace(optimizer_state, slots=slots, scratch=writable(optimizer_state.scratch))
        sums = {name: writable(array) for name, array in metrics._sums.items()}
        replace(metrics, _sums=dict(sums))
        replace(step, _work=Workspace(context))
        if (scale := state.loss_scale) is not None:
            replace(scale, _backend=context.backend, state=writable(scale.state), gate=writable(scale.gate))
        for layer in every_layer(model):
            _name_calls(layer, layer is model, trace)
        custom = [thing for thing in things if is_custom(type(thing)) and thing is not state.optimizer]
        kept = KeptArrays(trace, custom)
        with refusing_the_outside(custom) if custom else contextlib.nullcontext():
            yield
        if changed := attributes.changed():
            raise SideEffectError(f"each step changes {changed}")
        python.refuse_random_numbers()
        if metrics._sums != sums:  # compared by identity
            raise CaptureError("a metric makes new arrays for its sums in each step")
        for thing, name in kept.replaced():
            mark_replaced(step, thing, name)


@contextlib.contextmanager
def _traced_model(model: Container, trace: Trace) -> Iterator[None]:
    """A context in which a model has traced arrays, a traced backend, and new workspaces."""
    context, store = model.context, model.context.store
    real: Any = context.backend
    backend: Any = (TracedCPU if real.replays_calls else TracedGPU)(real, trace)
    with contextlib.ExitStack() as undo:
        undo.callback(_keep_only, backend, "real", "trace")
        replace = functools.partial(_replace, undo)

        def writable(array: Array) -> TracedArray:
            return trace.wrap(array, writable=True)

        replace(context, backend=backend, _scratch={})
        undo.callback(vars(context).pop, "scratch", None)
        vars(context)["scratch"] = _scratch_by_place(context.scratch, trace)
        replace(store, backend=backend, values=writable(store.values), grads=writable(store.grads))
        for parameter in store.parameters:
            replace(parameter, _value=writable(parameter._value), _grad=writable(parameter._grad))
        for buffer in store.buffers:
            replace(buffer, _value=writable(buffer._value))
        for layer in every_layer(model):
            replace(layer, _workspaces={False: OneStepWorkspace(context)} if is_custom(type(layer)) else {})
        yield


def _replace(undo: contextlib.ExitStack, thing: Any, **attributes: Any) -> None:
    """Set attributes until `undo` is left."""
    for name, value in attributes.items():
        undo.callback(vars(thing).__setitem__, name, vars(thing)[name])
        vars(thing)[name] = value


def _keep_only(backend: Any, *names: str) -> None:
    """Delete all other attributes of a traced backend.

    Its methods refer to it, so only the garbage collector would free it. Another thread may still use it: it then finds
    what the real backend has.
    """
    for name in vars(backend).keys() - set(names):
        del vars(backend)[name]


def _scratch_by_place(scratch: Callable[..., Array], trace: Trace) -> Callable[..., Array]:
    """`Context.scratch` with arrays for each place of the model, so that its parts do not depend on one another."""
    return lambda name, shape, worker=0: scratch(f"{trace.place} {name}", shape, worker)


def _noise_position(context: Context) -> Any:
    """The part of the noise's key that changes from step to step, as `begin_step` sets it."""
    now = context.noise_step
    return StepPosition(StepNumber(lambda _: context.noise_step, now))


def _name_calls(layer: Layer, is_model: bool, trace: Trace) -> None:
    """Make the calls of a layer known by the layer's name."""
    for method in ("_run_forward", "_run_backward") if is_model else ("forward", "backward"):
        place = f"{layer.path or 'model'} {type(layer).__name__}.{method.removeprefix('_run_')}"
        vars(layer)[method] = _placed(trace, place, getattr(layer, method), vars(layer).get(method))


def _placed(trace: Trace, place: str, method: Callable[..., Any], untraced: Any) -> Callable[..., Any]:
    def placed(*args: Any) -> Any:
        with trace.within(place=place):
            return method(*args)

    placed.untraced = untraced  # type: ignore[attr-defined]
    return placed
