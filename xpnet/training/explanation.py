"""Explanations of steps: the calls of a training step before and after passes, their bytes, operations and times."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xpnet import optimizers
from xpnet.capture.branches import operations
from xpnet.capture.calls import Call
from xpnet.capture.program import Load, compiled
from xpnet.data.dataset import Dataset, StepData
from xpnet.display.tables import Summary, html_table, text_table
from xpnet.errors import CaptureError
from xpnet.layers.base import Layer
from xpnet.layers.containers import Container, every_layer
from xpnet.layers.context import Shape, Workspace
from xpnet.layers.positions import PositionalEmbedding
from xpnet.layers.structure import as_tuple, mapped, one_or_tuple, shapes_of
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.training.arguments import choose_loss_and_metrics
from xpnet.training.captured_step import reason_of
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.graph_step import listed_step
from xpnet.training.outputs import last_layers
from xpnet.training.replayed_step import PlannedStep, free_workspaces, planned_step
from xpnet.training.side_effects import unchanged_python
from xpnet.training.snapshots import snapshot
from xpnet.training.state import TrainingState
from xpnet.training.step import TrainingStep, ignoring_float_errors

_LENGTH = 32  # of sequences that may have any length, if the model takes as many
_TIMED_REPLAYS = 30
_REPEATED, _TIMED_GRAPHS = 30, 7  # a call in a graph, which has cells for 64 calls; replays of the graph
_PRODUCTS = ("matmul", "dot", "packed_product")


@dataclass(frozen=True)
class ExplainedCall:
    """One call of a step.

    place: the layer and its method, "inputs", "loss", "metrics" or "update".  operator: the operator of the backend, or
    "".  name: what is called.  shapes: of the arrays that it reads and of those that it writes.  bytes: of all of
    them.  operations: of arithmetic, about.  seconds: the median of several replays, or None.
    """

    place: str
    operator: str
    name: str
    shapes: str
    bytes: int
    operations: int
    seconds: float | None = None


class StepExplanation(Summary):
    """What `explain_step` returns: a text to print, which a notebook shows as a table.

    recorded, replayed: the calls before and after passes.  shared_bytes: of the memory that the temporary arrays of a
    step share.  temporary_bytes: of these arrays without sharing.
    """

    recorded: list[ExplainedCall]
    replayed: list[ExplainedCall]
    shared_bytes: int
    temporary_bytes: int


def explain(
    model: Container, batch_size: int, loss: Loss, metrics: list[Metric], optimizer: Any, times: bool
) -> StepExplanation:
    """What `model.explain_step` returns."""
    plan, step = _planned(model, batch_size, loss, metrics, optimizer)
    seconds = model.context.exclusively(_seconds, plan, step) if times else [None] * len(plan.calls)
    recorded = [_explained(call, None) for call in plan.trace.calls]
    replayed = [_explained(call, s) for call, s in zip(plan.calls, seconds, strict=True)]
    text = f"{_table('Recorded', recorded)}\n\n{_table('Replayed', replayed)}\n\n{_memory_text(plan, model)}"
    explanation = StepExplanation(text)
    explanation.recorded, explanation.replayed = recorded, replayed
    explanation.shared_bytes, explanation.temporary_bytes = plan.shared_bytes, plan.temporary_bytes
    header, rows = _rows(replayed)
    explanation.html = html_table(f"A step of {batch_size} samples", header, rows, _memory_text(plan, model), 4)
    return explanation


def memory_of_a_step(model: Container, batch_size: int, loss: Loss | None, optimizer: Any) -> str:
    """A sentence on the memory of a training step, or why it is not known. loss: None means one that fits."""
    chosen, _ = choose_loss_and_metrics(model, fitting_loss(model) if loss is None else loss, [])
    try:
        plan, _ = _planned(model, batch_size, chosen, [], optimizer)
    except CaptureError as error:
        return f"memory of a training step: not known, because {error}"
    return _memory_text(plan, model)


def _planned(
    model: Container, batch_size: int, loss: Loss, metrics: list[Metric], optimizer: Any
) -> tuple[PlannedStep, TrainingStep]:
    if not model.backend.replays_calls and model.backend.graph_capture() is None:
        raise CaptureError(f"{model.backend.name} does not capture steps")
    return model.context.exclusively(_trace, model, batch_size, loss, metrics, optimizers.get(optimizer))


def fitting_loss(model: Container) -> dict[str, str]:
    """The name of a loss that fits each output of a model."""
    fitting = map(_loss_of_output, shapes_of(model.output_shape), last_layers(model))
    return dict(zip(model.output_names, fitting, strict=True))


def _loss_of_output(output_shape: Shape, last: Layer | None) -> str:
    """The name of a loss that fits an output of this shape, of this last layer."""
    gives_probabilities = last is not None and last.gives_probabilities
    several = len(output_shape) == 1 and output_shape[0] > 1 and not gives_probabilities
    return "softmax_cross_entropy" if several else "mse"


def _trace(
    model: Container, batch_size: int, loss: Any, metrics: list[Any], optimizer: Any
) -> tuple[PlannedStep, TrainingStep]:
    context, backend = model.context, model.backend
    with _unchanged(model):
        state = TrainingState(context, loss, metrics, optimizer)
        step = TrainingStep(model, state)
        data = _zeros(model, loss, batch_size)
        epoch = EpochMetrics(model, loss, metrics, 1)
        sums = backend.zeros(epoch.batch_sums.shape, "float64")
        with _undone(step, epoch):
            try:
                step(data.batches(), data.total_weight(), epoch.add)  # makes the sums of the metrics
                data = data._replace(work=Workspace(context))  # without buffers
                plan = (planned_step if backend.replays_calls else listed_step)(step, data, epoch, sums, fixed=True)
            except CaptureError:
                raise
            except Exception as error:  # of a user's layer, on zeros or on traced arrays
                raise CaptureError(reason_of(error)) from error
    return plan, step


def _zeros(model: Container, loss: Any, batch_size: int) -> StepData:
    backend, dtype = model.backend, model.context.dtype
    input_shape, output_shape = _known_shapes(model)

    def inputs(shape: Shape, takes_integers: bool) -> Any:
        return backend.zeros((batch_size, *shape), "int64" if takes_integers else dtype)

    def targets(loss: Loss, shape: Shape) -> Any:
        if loss.classifies and loss.decision_threshold is None:
            return backend.zeros((batch_size, *(shape[:-1] if loss.by_label else ())), "int64")
        return backend.zeros((batch_size, *shape), dtype)

    x = one_or_tuple(list(map(inputs, shapes_of(input_shape), as_tuple(model.accepts_integers))))
    parts = [part for part, _ in loss.by_output]
    y = one_or_tuple(list(map(targets, parts, shapes_of(output_shape))))
    x_dtype = mapped(lambda a: a.dtype, x)
    rows = backend.asarray(range(batch_size), "int64")
    # In the shuffled order of an epoch, so that the rows are gathered as in most trainings.
    return StepData(Dataset(x, y, None, None, x_dtype), Workspace(model.context), rows, 0, batch_size, batch_size)


def _known_shapes(model: Container) -> tuple[Any, Any]:
    """The input and output shapes of a model, without None."""
    given: Any = model.input_shape
    most = min([_LENGTH, *(layer.max_length for layer in every_layer(model) if isinstance(layer, PositionalEmbedding))])
    known = [tuple(most if n is None else n for n in shape) for shape in shapes_of(given)]
    input_shape = known if isinstance(given, list) else known[0]
    return input_shape, model.shape_for(input_shape)


@contextlib.contextmanager
def _unchanged(model: Container) -> Iterator[None]:
    """A context after which the numbers and modes of the passes are as before.

    No `backward` may follow, since the workspaces are overwritten. They are freed.
    """
    numbers = {name: value for name, value in vars(model.context).items() if isinstance(value, bool | int)}
    try:
        yield
    finally:
        vars(model.context).update(numbers)
        free_workspaces(model)


@contextlib.contextmanager
def _undone(step: TrainingStep, metrics: EpochMetrics) -> Iterator[None]:
    """A context in which a step runs, and after which all that it has changed is as before."""
    before = snapshot(step, metrics)
    try:
        with unchanged_python(step), ignoring_float_errors(), step.model.execution_context():
            yield
    finally:
        before.restore()


def _seconds(plan: PlannedStep, step: TrainingStep) -> list[float]:
    """The median time of each call. The calls change the model, which is put back."""
    if not step.model.backend.replays_calls:
        return _seconds_on_gpu(plan, step)
    functions = [compiled([call], plan.loaders) for call in plan.calls]
    times = [list[float]() for _ in functions]
    with _undone(step, plan.metrics):
        for _ in range(_TIMED_REPLAYS):
            for function, taken in zip(functions, times, strict=True):
                start = time.perf_counter()
                function(0, plan.rows, *plan.loaders.values())
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _seconds_on_gpu(plan: PlannedStep, step: TrainingStep) -> list[float]:
    """The median time of each call, repeated in a CUDA graph, so that its launch by the host is not measured."""
    capture = step.model.backend.graph_capture()
    with step.model.backend.stream(), _undone(step, plan.metrics):
        return [_seconds_in_a_graph(capture, plan.metrics, call) for call in plan.calls]


def _seconds_in_a_graph(capture: Any, metrics: EpochMetrics, call: Call) -> float:
    graph, cells, backend = capture.graph(), capture.cells(1, 1, 1, metrics.batch_sums), capture.backend

    def repeat() -> None:
        with backend.step_cells(cells):
            for _ in range(_REPEATED):
                call.make()

    taken = []
    with graph.memory_pool():
        repeat()
    graph.capture(repeat)
    for _ in range(_TIMED_GRAPHS):
        backend.synchronize()
        start = time.perf_counter()
        graph.replay()
        backend.synchronize()
        taken.append((time.perf_counter() - start) / _REPEATED)
    return statistics.median(taken)


def _explained(call: Call, seconds: float | None) -> ExplainedCall:
    arrays = {id(a): a for a in (*call.reads, *call.writes)}
    if call.parts is not None:
        names = [part.name for part in call.parts[0]]
        name = f"{len(call.parts)} threads: " + ", ".join(dict.fromkeys(names))
        arithmetic = sum(_operations(c) for part in call.parts for c in part)
    else:
        name, arithmetic = call.name, _operations(call)
    reads, writes = (" ".join(_shape(a) for a in given) for given in (call.reads[:3], call.writes[:2]))
    size = sum(a.nbytes for a in arrays.values())
    return ExplainedCall(call.place, call.operator, name, f"{reads} → {writes}".strip(), size, arithmetic, seconds)


def _shape(array: Any) -> str:
    return "×".join(map(str, array.shape)) or "1"


def _operations(call: Call) -> int:
    if isinstance(call.function, Load) or call.name in ("copyto", "getitem", "pack", "setitem", "take"):
        return 0
    largest = max((a.size for a in (*call.reads, *call.writes)), default=0)
    if call.name in _PRODUCTS and len(call.reads) == 2 and call.writes:
        a, out = call.reads[0], call.writes[0]
        inner = call.reads[1].shape[0] if a.ndim == 1 else a.shape[-1]
        return 2 * int(out.size) * int(inner)
    return operations(call) or int(largest)


def _rows(calls: Sequence[ExplainedCall]) -> tuple[list[str], list[list[str]]]:
    timed = any(call.seconds is not None for call in calls)
    header = ["place", "operator", "call", "arrays", "bytes", "operations", *(["µs"] if timed else [])]
    rows = [
        [call.place, call.operator, call.name, call.shapes, f"{call.bytes:,}", f"{call.operations:,}",
         *([f"{1e6 * (call.seconds or 0.0):.2f}"] if timed else [])]
        for call in calls
    ]  # fmt: skip
    return header, rows


def _table(title: str, calls: Sequence[ExplainedCall]) -> str:
    header, rows = _rows(calls)
    operations = sum(call.operations for call in calls)
    return f"{title}: {len(calls)} calls, {operations:,} operations\n{text_table([header, *rows], 4)}"


def _memory_text(plan: PlannedStep, model: Container) -> str:
    store = model.context.store
    kept = 2 * store.values.nbytes + plan.slot_bytes + sum(b.value.nbytes for b in store.buffers)
    return (
        f"memory of a training step: {_size(plan.shared_bytes + kept)}: {_size(kept)} for weights, gradients and "
        f"optimizer, and {_size(plan.shared_bytes)} that all other arrays share ({_size(plan.temporary_bytes)} without "
        "sharing)"
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:,.1f} KiB"
