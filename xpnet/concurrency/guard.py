"""ModelGuard: one thread at a time uses a model, and one call of fit trains it."""

import threading
from typing import Any

from xpnet.concurrency.forks import forkable
from xpnet.errors import StateError


class ModelGuard:
    """The lock of a model. A copy of the model has its own.

    lock: held for a whole pass or a whole training step, since layers keep what they compute.  passing: the threads
    that are in a pass or wait for the lock to begin one.  turnstile: held from waiting for the lock to the end of the
    pass. A training thread takes the lock again right after each step. If other threads wait, it goes through the
    turnstile first; otherwise they could wait for a long time.  stream: the device stream of the training, in whose
    order all passes are; None is the default stream.
    """

    def __init__(self) -> None:
        self.lock, self.turnstile = threading.RLock(), threading.RLock()
        self.passing: set[int] = set()
        self.stream: Any = None
        self._training: object = None  # the call of fit that runs
        self._trainer = 0  # its thread
        forkable.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelGuard, ()

    def begin_training(self, training: object) -> None:
        """A call of fit begins. Raises StateError if another one runs."""
        with self.lock:
            self.refuse_during_training()
            self._trainer, self._training = threading.get_ident(), training

    def end_training(self, training: object) -> bool:
        """This call of fit has ended. Returns whether it had begun."""
        with self.lock:
            if self._training is not training:
                return False
            self._training = self.stream = None
            return True

    @property
    def in_training(self) -> bool:
        """Whether fit runs."""
        return self._training is not None

    def refuse_during_training(self) -> None:
        """Raise StateError while fit runs."""
        if self._training is not None:
            self.refuse_beside_training()
            raise StateError("fit is running on this model: a callback may read and evaluate it, not train or move it.")

    def refuse_beside_training(self) -> None:
        """Raise StateError while fit runs in another thread."""
        if self._training is not None and self._trainer != threading.get_ident():
            raise StateError(
                "fit is running on this model in another thread, and this call would disturb it. Meanwhile the model "
                "can predict and evaluate; to train or change it, wait for fit, or use a copy: copy.deepcopy(model)."
            )

    # Forks ------------------------------------------------------------------------------------------------------------

    def locks_for_fork(self) -> list[Any]:
        return [self.turnstile, self.lock]

    def wait_to_fork(self, waits: bool) -> None:
        (self.passing.add if waits else self.passing.discard)(threading.get_ident())

    def forget_other_threads(self, has_locks: bool) -> None:
        """The process was forked: calls in other threads have ended."""
        self.passing.intersection_update([threading.get_ident()])
        if not has_locks:
            self.lock, self.turnstile = threading.RLock(), threading.RLock()
        if self._trainer != threading.get_ident():
            self._training = self.stream = None
