"""Optimisers: a few elementwise lines over the flat vectors.

An optimiser is configuration only. What it remembers of a model (momenta, the step) is an `OptimizerState` that
belongs to the model, so one optimiser object can serve many.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from xpnet.backends import Array, Backend
from xpnet.config import Configured, is_number, resolve
from xpnet.errors import ArgumentError
from xpnet.parameters import ParameterStore

Rate = float | Callable[[int], float]


class OptimizerState:
    """Flat vectors beside a model's own, and the number of updates made."""

    def __init__(self, optimizer: "Optimizer", store: ParameterStore) -> None:
        self.step = 0
        self.slots = {name: store.backend.zeros(store.values.shape, store.dtype) for name in optimizer.slots}
        self.scratch = self._scratch(store)

    def move(self, source: Backend, store: ParameterStore) -> None:
        """Follow the store, which has moved from `source` to where it is now."""
        old = {name: source.to_numpy(vector) for name, vector in self.slots.items()}
        self.slots = {name: store.backend.zeros(store.values.shape, store.dtype) for name in old}
        for name, vector in old.items():
            self.slots[name][...] = store.backend.asarray(vector, dtype=store.dtype)
        self.scratch = self._scratch(store)

    def _scratch(self, store: ParameterStore) -> Array:
        """Room for one piece of the flat vector."""
        size = int(store.values.size)
        return store.backend.empty((min(size, store.backend.chunk_elements or size),), store.dtype)


class Optimizer(Configured):
    """The base of every optimiser.

    learning_rate: a number, or a schedule: a function of the step.
    weight_decay: added to the gradient as weight_decay · w, of parameters whose `decay` is True (weights, not biases).
    clip_norm: where the norm of the whole gradient exceeds it, the gradient is scaled down to it, before any decay.
    """

    #: Names of the vectors that it remembers.
    slots: ClassVar[tuple[str, ...]] = ()

    learning_rate: Rate
    weight_decay: float
    clip_norm: float | None

    @abstractmethod
    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        """Change w (and the slots) in place, by the gradient g at learning rate `rate`, in the k-th update from 1.

        All are pieces of flat vectors of one length; t is scratch.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        # What is inherited is not this `update`, nor with this `decay`.
        if ("update" in own or ("decay" in own and "fused_decay" not in own)) and "fused" not in own:
            cls.fused = Optimizer.fused  # type: ignore[method-assign]

    def __init__(self, learning_rate: Rate, weight_decay: float, clip_norm: float | None) -> None:
        name = type(self).__name__
        if isinstance(learning_rate, type) or not (callable(learning_rate) or _at_least_0(learning_rate)):
            raise ArgumentError(f"{name}: learning_rate must be a number ≥ 0 or a schedule, not {learning_rate!r}.")
        if not _at_least_0(weight_decay):
            raise ArgumentError(f"{name}: weight_decay must be at least 0, not {weight_decay!r}.")
        if clip_norm is not None and not (is_number(clip_norm) and clip_norm > 0):
            raise ArgumentError(f"{name}: clip_norm must be positive, or None for no clipping, not {clip_norm!r}.")
        self.learning_rate, self.weight_decay, self.clip_norm = learning_rate, weight_decay, clip_norm

    def rate(self, step: int) -> float:
        """The learning rate of the update after `step` updates."""
        return float(self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate)

    def apply(
        self,
        store: ParameterStore,
        state: OptimizerState,
        factor: Callable[[], float] = lambda: 1.0,
        gate: Array | None = None,
    ) -> None:
        """One update of every trainable parameter from its gradient. May clip and decay the gradients in place.

        factor: what the learning rate is multiplied by.  gate: an array on the device that holds 0 where there is
        nothing to be updated after all; the step counts nevertheless.
        """
        backend, step = store.backend, state.step
        trained = store.runs(lambda p: p.trainable)
        decayed = store.runs(lambda p: p.trainable and p.decay) if self.weight_decay else []
        if self.clip_norm is not None:
            backend.clip_norm(store.grads, trained, self.clip_norm)
        state.step += 1
        rate = self.rate(step) * factor()
        name, numbers = self.fused(rate, state.step)
        vectors = [store.values, store.grads, *state.slots.values()]

        def numbers_of(step: int) -> tuple[float, ...]:
            rate = self.rate(step) * factor()
            return (*self.fused_decay(rate), *self.fused(rate, step + 1)[1])

        if name and backend.whole_update(name, trained, decayed, vectors, numbers_of, step, gate):
            return
        backend.refuse_recording(f"{type(self).__name__} has no fused update")
        before = None if gate is None else [(vector, vector.copy()) for vector in (store.values, *state.slots.values())]
        for run in decayed:
            self.decay(store.values[run], store.grads[run], rate)
        if not (name and backend.fused_update(name, trained, vectors, numbers)):
            for piece in _pieces(trained, backend.chunk_elements):
                slots = [slot[piece] for slot in state.slots.values()]
                t = state.scratch[: piece.stop - piece.start]
                self.update(backend.xp, store.values[piece], store.grads[piece], slots, t, rate, state.step)
        for vector, old in before or ():
            backend.xp.copyto(vector, old, where=gate == 0)

    def fused(self, rate: float, k: int) -> tuple[str, tuple[float, ...]]:
        """What a device may have fused that is the same as `update`: its name, or "", and the numbers that it takes."""
        return "", ()

    def fused_decay(self, rate: float) -> tuple[float, float]:
        """`decay` as two numbers: what it multiplies w by, and what it adds of w to g."""
        return 1.0, self.weight_decay

    def decay(self, w: Array, g: Array, rate: float) -> None:
        """L2 decay: the gradient of ½ weight_decay Σw²."""
        g += self.weight_decay * w


class SGD(Optimizer):
    """w ← w - rate · g; with momentum μ, v ← μ v + g and w ← w - rate · v; Nesterov: w ← w - rate · (g + μ v).

    Polyak 1964; Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    def __init__(
        self,
        learning_rate: Rate = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm)
        self.momentum, self.nesterov = _fraction("SGD", "momentum", momentum), nesterov
        if nesterov and not momentum:
            raise ArgumentError("SGD: nesterov=True needs a momentum above 0.")

    @property
    def slots(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("velocity",) if self.momentum else ()

    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        direction = g
        if self.momentum:
            (v,) = slots
            v *= self.momentum
            v += g
            direction = v
            if self.nesterov:
                xp.multiply(v, self.momentum, out=t)
                direction = xp.add(t, g, out=t)
        xp.multiply(direction, rate, out=t)
        w -= t

    def fused(self, rate: float, k: int) -> tuple[str, tuple[float, ...]]:
        return ("momentum", (rate, self.momentum, float(self.nesterov))) if self.momentum else ("sgd", (rate,))


class Adagrad(Optimizer):
    """s ← s + g²; w ← w - rate · g / (√s + epsilon). Duchi et al. 2011, "Adaptive subgradient methods…"."""

    slots = ("squares",)

    def __init__(
        self,
        learning_rate: Rate = 0.01,
        epsilon: float = 1e-10,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm)
        self.epsilon = _positive("Adagrad", "epsilon", epsilon)

    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        (s,) = slots
        xp.square(g, out=t)
        s += t
        _scaled_step(xp, w, g, s, t, rate, self.epsilon)

    def fused(self, rate: float, k: int) -> tuple[str, tuple[float, ...]]:
        return "adagrad", (rate, self.epsilon)


class RMSprop(Optimizer):
    """s ← ρ s + (1 - ρ) g²; w ← w - rate · g / (√s + epsilon). Tieleman and Hinton 2012, lecture 6.5."""

    slots = ("squares",)

    def __init__(
        self,
        learning_rate: Rate = 0.001,
        rho: float = 0.9,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm)
        self.rho, self.epsilon = _fraction("RMSprop", "rho", rho), _positive("RMSprop", "epsilon", epsilon)

    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        (s,) = slots
        _average_square(xp, s, g, t, self.rho)
        _scaled_step(xp, w, g, s, t, rate, self.epsilon)

    def fused(self, rate: float, k: int) -> tuple[str, tuple[float, ...]]:
        return "rmsprop", (rate, self.rho, self.epsilon)


class Adam(Optimizer):
    """m ← β₁ m + (1 - β₁) g;  s ← β₂ s + (1 - β₂) g²;  w ← w - rate · m̂ / (√ŝ + epsilon).

    m̂ = m / (1 - β₁ᵏ) and ŝ = s / (1 - β₂ᵏ) undo the start from zero. Kingma and Ba 2014, "Adam".
    """

    slots = ("means", "squares")

    def __init__(
        self,
        learning_rate: Rate = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm)
        name = type(self).__name__
        self.beta1, self.beta2 = _fraction(name, "beta1", beta1), _fraction(name, "beta2", beta2)
        self.epsilon = _positive(name, "epsilon", epsilon)

    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        m, s = slots
        xp.subtract(g, m, out=t)
        t *= 1.0 - self.beta1
        m += t
        _average_square(xp, s, g, t, self.beta2)
        _scaled_step(xp, w, m, s, t, *self._corrected(rate, k))

    def fused(self, rate: float, k: int) -> tuple[str, tuple[float, ...]]:
        rate, epsilon = self._corrected(rate, k)
        return "adam", (rate, self.beta1, self.beta2, epsilon)

    def _corrected(self, rate: float, k: int) -> tuple[float, float]:
        """Rate and ε with which m / (√s + ε) is m̂ / (√ŝ + ε): both corrections, out of the elementwise work."""
        correction = math.sqrt(1.0 - self.beta2**k)
        return rate * correction / (1.0 - self.beta1**k), self.epsilon * correction


class AdamW(Adam):
    """Adam with w ← (1 - rate · weight_decay) w beside the step, not in the gradient. Loshchilov and Hutter 2017."""

    def __init__(
        self,
        learning_rate: Rate = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(learning_rate, beta1, beta2, epsilon, weight_decay, clip_norm)

    def decay(self, w: Array, g: Array, rate: float) -> None:
        w *= 1.0 - rate * self.weight_decay

    def fused_decay(self, rate: float) -> tuple[float, float]:
        return 1.0 - rate * self.weight_decay, 0.0


def get(spec: Any) -> Optimizer:
    """An optimiser from its name or itself."""
    return resolve("optimizer", spec, _NAMES, Optimizer)  # type: ignore[type-abstract]


_NAMES: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
}


def _average_square(xp: Any, s: Array, g: Array, t: Array, rho: float) -> None:
    """s ← ρ s + (1 - ρ) g²."""
    xp.square(g, out=t)
    t *= 1.0 - rho
    s *= rho
    s += t


def _scaled_step(xp: Any, w: Array, direction: Array, s: Array, t: Array, rate: float, epsilon: float) -> None:
    """w ← w - rate · direction / (√s + ε)."""
    xp.sqrt(s, out=t)
    t += epsilon
    xp.divide(direction, t, out=t)
    t *= rate
    w -= t


def _pieces(runs: list[slice], length: int | None) -> Iterator[slice]:
    """The runs cut into pieces of at most `length` elements, which stay in cache through an elementwise chain."""
    for run in runs:
        step = length or max(1, run.stop - run.start)
        for start in range(run.start, run.stop, step):
            yield slice(start, min(start + step, run.stop))


def _at_least_0(value: Any) -> bool:
    return is_number(value) and bool(value >= 0)


def _fraction(optimizer: str, name: str, value: float) -> float:
    if not (is_number(value) and 0 <= value < 1):
        raise ArgumentError(f"{optimizer}: {name} must be at least 0 and below 1, not {value!r}.")
    return value


def _positive(optimizer: str, name: str, value: float) -> float:
    if not (is_number(value) and value > 0):
        raise ArgumentError(f"{optimizer}: {name} must be positive, not {value!r}.")
    return value
