"""Context and Workspace: what the layers of one model share, and what each of them keeps from forward to backward."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeAlias, TypeVar

from xpnet.backends import Array, Backend, DType
from xpnet.concurrency.guard import ModelGuard
from xpnet.concurrency.interrupts import deferring
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.distributed.statistics import moments_over_ranks, sums_over_ranks
from xpnet.errors import StateError
from xpnet.layers.past import Continuation
from xpnet.parameters import ParameterStore

Shape: TypeAlias = tuple[int, ...]
P = ParamSpec("P")
T = TypeVar("T")

_BY_HAND = 2**63  # keeps the noise of passes outside of fit apart from that of its steps


@dataclass
class Context:
    """What all layers of one model share: the device, the parameters, and the pass that is running.

    training: dropout is on, and BatchNorm normalizes by the batch.  inference: no backward will follow, and layers use
    another workspace.  precision: of matrix products, see Sequential.  first_row: the number of the first row of x in
    the batch of all ranks.  current_step: the number of updates so far.  noise_step: the part of the noise's key that
    changes from pass to pass.  group: the processes that train this model.  has_no_rows: this rank has no rows of the
    batch, and computes with one placeholder row that must not count.  mixup: the augment.MixUp of the model, whose
    shares and partners mix the loss too; None if there is none.  continuation: what layers keep of earlier steps, in
    inference passes that continue sequences; None in other passes.  forward_thread: the thread whose `forward` filled
    the workspaces that backward reads; 0 if it was a training step.  shapes_only: the layers are built only to find
    the shapes of their outputs.  lone_outputs: the shapes of the latest outputs of a layer outside a model.
    """

    backend: Backend
    store: ParameterStore
    seed: int
    training: bool = False
    inference: bool = False
    precision: str | None = None
    first_row: int = 0
    current_step: int = 0
    noise_step: int = 0
    group: ProcessGroup = SINGLE_PROCESS
    has_no_rows: bool = False
    mixup: Any = None
    continuation: Continuation | None = None
    forward_thread: int = 0
    shapes_only: bool = False
    lone_outputs: tuple[tuple[int, ...], ...] | None = None
    _steps_begun: int = 0
    _passes_by_hand: int = 0  # since that step
    _scratch: dict[tuple[Any, ...], Array] = field(default_factory=dict)

    @property
    def dtype(self) -> DType:
        return self.store.dtype

    @property
    def guard(self) -> ModelGuard:
        return self.store.guard

    def exclusively(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` as one pass on the device: other threads wait for its end, and so does Ctrl-C."""
        guard = self.store.guard
        if guard.lock._is_owned():  # type: ignore[attr-defined]  # for the turnstile, another thread may wait
            return work(*args, **kwargs)
        thread = threading.get_ident()
        try:
            guard.passing.add(thread)
            with guard.turnstile, guard.lock:
                if not self.backend.has_streams:
                    return deferring(work, *args, **kwargs)
                return deferring(lambda: self._in_turn(lambda: work(*args, **kwargs)))
        finally:
            guard.passing.discard(thread)

    def _in_turn(self, work: Callable[[], T]) -> T:
        with self.backend.device(), self.backend.in_turn(self.guard.stream):
            return work()

    @property
    def step(self) -> int:
        """The number of updates so far. A step that reads it cannot be captured; noise does not need it."""
        self.backend.refuse_capture("a layer reads the number of the step")
        return self.current_step

    @step.setter
    def step(self, value: int) -> None:
        self.begin_step(value)
        self._steps_begun = value

    def begin_step(self, step: int) -> None:
        """A training step begins. Its noise is a function of its number, unless a pass by hand has had that noise."""
        self.current_step = self.noise_step = step
        if self._passes_by_hand:
            if not self.guard.in_training:
                self.noise_step = self._noise_by_hand()
            self._passes_by_hand = 0
        self._steps_begun = step + 1

    def begin_forward(self, training: bool) -> None:
        """A user calls `forward`. The noise of a training pass is a function of the number of such passes.

        Outside of fit, the first pass since the latest update has the noise that the next step would have.
        """
        self.forward_thread = 0  # until the pass is complete
        if training:
            first = not self._passes_by_hand and not self.guard.in_training
            self.noise_step = self._steps_begun if first else self._noise_by_hand()
            self._passes_by_hand += 1

    def _noise_by_hand(self) -> int:
        return _BY_HAND | self._steps_begun << 32 | self._passes_by_hand

    def end_forward(self) -> None:
        self.forward_thread = threading.get_ident()

    def check_forward(self) -> None:
        """Raise StateError unless the latest pass that backward can follow is a `forward` of this thread."""
        if not self.forward_thread:
            raise StateError("backward needs a forward pass before it: call model.forward(x) first.")
        if self.forward_thread != threading.get_ident():
            raise StateError(
                "another thread has called forward since this thread did, so backward would mix two passes. Call "
                "forward and backward from one thread, or give each thread a copy of the model."
            )

    def batch_moments(self, rows: Array) -> tuple[Array, Array, int]:
        """(mean, variance) of each column over the batch, and the number of its rows.

        The batch is that of all ranks, unless the process group says that each rank normalizes by its own rows.
        """
        if self.group.size > 1 and self.group.synchronized:
            return moments_over_ranks(self.backend, self.group, rows, self.has_no_rows)
        return *self.backend.moments(rows), len(rows)

    def batch_sums(self, *sums: Array) -> tuple[Array, ...]:
        """These sums over x's rows as sums over the batch of `batch_moments`. The arguments keep their values."""
        if self.group.size > 1 and self.group.synchronized:
            return sums_over_ranks(self.group, sums, self.has_no_rows)
        return sums

    def scratch(self, name: str, shape: Shape, worker: int = 0) -> Array:
        """An uninitialized array that all layers share. Its contents last until the next call with the same name."""
        size, key = math.prod(shape), (self.inference, name, worker)
        kept = self._scratch.get(key)
        if kept is None or kept.size < size:
            with self.backend.lasting_memory():
                kept = self._scratch[key] = self.backend.empty((size,), self.dtype)
        return kept[:size].reshape(shape)

    def drop_scratch(self, inference_only: bool = False) -> None:
        """Free the scratch arrays, or only those of inference."""
        self._scratch = {key: a for key, a in self._scratch.items() if inference_only and not key[0]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": {}, "group": SINGLE_PROCESS, "forward_thread": 0}


class Workspace(SimpleNamespace):
    """What one layer keeps from forward to backward, as attributes, and the buffers for its results."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self._buffers: dict[str, Array] = {}

    def buffer(self, name: str, shape: Shape, dtype: DType = None) -> Array:
        """An uninitialized array of this shape, the same one in every call with this name.

        It grows to the largest batch; a smaller batch gets its first rows.
        """
        kept = self._buffers.get(name)
        dtype = self.context.store.dtype if dtype is None else dtype
        if kept is not None and kept.shape == shape and kept.dtype == dtype:
            return kept
        if kept is None or len(kept) < shape[0] or kept.shape[1:] != shape[1:] or kept.dtype != dtype:
            with self.context.backend.lasting_memory():
                kept = self._buffers[name] = self.context.backend.empty(shape, dtype)
        return kept if len(kept) == shape[0] else kept[: shape[0]]

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def __getattr__(self, name: str) -> Any:  # called for attributes that do not exist
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingForwardError(
            f"backward uses work.{name}, but forward did not keep it, or no forward pass came before backward."
        )


class MissingForwardError(StateError, AttributeError):
    """A StateError for users, and an AttributeError so that `hasattr` and `getattr(work, name, default)` work."""
