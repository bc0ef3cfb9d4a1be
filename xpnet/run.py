"""One call of `fit` under way: where it stands, and the figures that it returns."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xpnet import resume
from xpnet.callbacks import Callback
from xpnet.data import Samples
from xpnet.layers.base import Workspace
from xpnet.layers.containers import Sequential
from xpnet.parameters import Snapshot
from xpnet.ranks import ALONE, Ranks
from xpnet.replay import Player
from xpnet.step import Figures, Step, TrainingState
from xpnet.streams import Streamed

_ORDER_STREAM = 2  # keeps epoch permutations apart from the draws of weights


class History(dict[str, list[float]]):
    """What `fit` returns: history["loss"], history["val_accuracy"], … are lists with a float an epoch.

    seconds: how long each epoch took, without compiling.  compile_seconds: how long kernels were compiled meanwhile:
    some seconds on a GPU whose kernels CuPy does not have on disk yet.  stopped: why training ended early
    ("interrupted", …), or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.compile_seconds = 0.0
        self.stopped: str | None = None

    def add(self, logs: Mapping[str, float], seconds: float) -> None:
        for name, value in logs.items():
            self.setdefault(name, []).append(value)
        self.seconds.append(seconds)


class Run:
    """One call of `fit`, as its callbacks see it in `self.run`.

    epochs: how many this call trains.  first_epoch: the model's count when it began.  steps: batches in an epoch.
    samples: training samples; both None where a stream of batches does not tell.  seen: how many of them in this epoch
    so far, of which `complete` says whether they are all.  batch_size.  history: the figures of the
    epochs so far.  state: the model's TrainingState, with step, epoch, learning_rate and rate_factor.  callbacks.
    ranks: the processes that train together, of which this is number `ranks.rank`.
    """

    def __init__(
        self,
        model: Sequential,
        state: TrainingState,
        data: Samples | Streamed,
        callbacks: Sequence[Callback],
        epochs: int,
        batch_size: int | None,
        accumulate: int,
        shuffle: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        assert state.memory is not None
        self.ranks = ranks
        self.model, self.state, self.data, self.callbacks = model, state, data, callbacks
        self.epochs, self.first_epoch, self.shuffle = epochs, state.epoch, shuffle
        self.history = History()
        self.samples, self.batch_size, self.accumulate = data.samples, batch_size or 1, accumulate
        self.steps: int | None = None
        if data.samples is not None:
            self.batch_size = min(batch_size or data.samples, data.samples)
            self.steps = math.ceil(data.samples / self.batch_size)
            self.accumulate = min(accumulate, self.steps)
        self.seen, self.complete = 0, False
        self.figures: Figures | None = None
        #: Whether an epoch has begun and not ended; the model and the step count at its start.
        self.under_way = False
        self.start_clock()
        self._compiled_before = model.backend.compile_seconds
        self.start, self.first_step = Snapshot(model.context.store, state.memory.slots.values()), state.step
        #: Does the updates; `player.why_not` says why none is played as a CUDA graph.
        self.player = Player(Step(model, state), isinstance(data, Streamed))
        self._work = Workspace(model.context)

    def logs(self) -> dict[str, Any]:
        """Loss and metrics of the epoch so far, of this rank's samples. Waits for the device: ask seldom."""
        return self.figures.read() if self.figures else {}

    def elapsed(self) -> float:
        """Seconds since the epoch began, without compiling, and without the time between a stop and its resumption."""
        return time.perf_counter() - self._began - (self.model.backend.compile_seconds - self._compiled)

    def start_clock(self, elapsed: float = 0.0) -> None:
        """The epoch begins now, or goes on after so many seconds."""
        self._began, self._compiled = time.perf_counter() - elapsed, self.model.backend.compile_seconds

    def compile_seconds(self) -> float:
        """Seconds that kernels were compiled since the run began."""
        return self.model.backend.compile_seconds - self._compiled_before

    def save(self, path: Any) -> None:
        """Write all that it takes to go on from here, between two updates, by `fit(..., resume_from=path)`.

        Of several ranks the first one writes; every one has to ask for it.
        """
        resume.write(path, self)

    def new_figures(self) -> Figures:
        return Figures(self.model, self.state.metrics, self.steps)

    def begin_epoch(self) -> None:
        """Begin an epoch, unless the resumed one is under way."""
        if not self.under_way:
            self.start.take()
            self.under_way, self.first_step = True, self.state.step
            self.start_clock()
            self.seen, self.complete = 0, False
            if self.figures is None or self.ranks.size > 1:
                self.figures = self.new_figures()
            else:
                self.figures.clear()

    def epoch(self) -> Iterator[None]:
        """Train what is left of the epoch, and yield after each update."""
        assert self.figures is not None
        key = [self.model.context.seed, _ORDER_STREAM, self.state.epoch] if self.shuffle else None
        with contextlib.closing(
            self.data.updates(self._work, self.batch_size, self.accumulate, key, self.seen, self.ranks)
        ) as updates:
            for update in updates:
                self.player(update, self.figures)
                self.seen += update.rows
                self.complete = self.seen == self.samples
                yield
        self.complete = True
