"""Optimizers: update rules, as a few elementwise lines over the flat vectors of weights and gradients.

An optimizer is configuration only. Its state for one model (momenta, the number of updates) is an `OptimizerState` that
belongs to the model, so one optimizer object can train several models. `Optimizer` explains the arguments that all of
them take: learning_rate, weight_decay and clip_norm.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, ClassVar

from xpnet.backends import Array, Backend, DType
from xpnet.backends.step_numbers import of_step
from xpnet.config import Configured, flag, is_custom, missing_method, number, rate_or_schedule, resolve, scheduled_rate
from xpnet.errors import ArgumentError, ArgumentTypeError, shown
from xpnet.parameters import ParameterStore

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "OptimizerState", "RMSprop", "get"]

Rate = float | Callable[[int], float]

_TRAINABLE = attrgetter("trainable")  # in C: a lambda takes longer


class OptimizerState:
    """The vectors that an optimizer keeps for one model, each as long as the flat ones, and the number of updates.

    constant_rate: replaces the learning rate of an optimizer without a schedule; set by callbacks. None: not replaced.
    """

    constant_rate: float | None = None

    def __init__(self, optimizer: "Optimizer", store: ParameterStore) -> None:
        if not (isinstance(optimizer, Optimizer) and isinstance(store, ParameterStore)):
            raise ArgumentTypeError(
                f"OptimizerState: optimizer must be an Optimizer, and store the ParameterStore of a model, not "
                f"{shown(optimizer)} and {shown(store)}."
            )
        self.step = 0
        self._allocate(store, optimizer.slots)

    def move(self, source: Backend, store: ParameterStore) -> None:
        """Move to the device and dtype of the store, which was on `source` before, and to its slots if it has grown."""
        if self._layout == _layout(store):
            return
        slots, old = self._layout[-1], self.slots
        host = {name: source.to_numpy(vector) for name, vector in old.items()}
        self._allocate(store, old)
        for name, vector in host.items():
            for parameter, slot in zip(store.parameters, slots, strict=True):
                self.slots[name][parameter.slot] = store.backend.asarray(vector[slot], dtype=store.dtype)

    @property
    def nbytes(self) -> int:
        """The bytes of all vectors, and of the scratch array."""
        return sum(vector.nbytes for vector in (*self.slots.values(), self.scratch))

    def _allocate(self, store: ParameterStore, names: Iterable[str]) -> None:
        """Make the vectors, all 0, and a scratch array for one piece of them."""
        self._layout = _layout(store)
        backend, size = store.backend, int(store.values.size)
        self.slots = {name: backend.zeros((size,), store.dtype) for name in names}
        self.scratch = backend.empty((min(size, backend.chunk_elements or size),), store.dtype)


def _layout(store: ParameterStore) -> tuple[Backend, DType, int, list[slice]]:
    """What the vectors of an optimizer depend on: device, dtype, length, and where the parameters are."""
    return store.backend, store.dtype, int(store.values.size), [parameter.slot for parameter in store.parameters]


class Optimizer(Configured):
    """The base of every optimizer. A subclass defines `update`.

    learning_rate: a number, or a schedule, a function of the step.
    weight_decay: adds weight_decay · w to the gradient of parameters with `decay` (weights, not biases), but see AdamW.
    clip_norm: the largest norm of the gradient of all parameters together. A larger gradient is scaled down to it,
        before weight decay.
    """

    #: The names of the vectors that it keeps for each model.
    slots: ClassVar[tuple[str, ...]] = ()

    learning_rate: Rate
    weight_decay: float
    clip_norm: float | None

    @abstractmethod
    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        """Update w and the slots, the optimizer's own vectors, in place, by the gradient g and the learning rate.

        All are pieces of flat vectors, of one length, as is the scratch array t.  k: the number of the update, from 1.
        """
        raise missing_method(self, "update(xp, w, g, slots, t, rate, k)")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        # An inherited `fused` computes the inherited `update` and `decay`, not these.
        if ("update" in own or ("decay" in own and "fused_decay" not in own)) and "fused" not in own:
            cls.fused = Optimizer.fused  # type: ignore[method-assign]

    def __init__(self, learning_rate: Rate, weight_decay: float, clip_norm: float | None) -> None:
        if clip_norm is not None:
            clip_norm = number(self, "clip_norm", clip_norm, above=0, also="None for no clipping")
        self.learning_rate, self.clip_norm = rate_or_schedule(self, "learning_rate", learning_rate), clip_norm
        self.weight_decay = number(self, "weight_decay", weight_decay, at_least=0, finite=True)

    def rate(self, step: int) -> float:
        """The learning rate of the next update, after `step` updates."""
        if not callable(self.learning_rate):
            return float(self.learning_rate)
        return scheduled_rate(self, self.learning_rate, step)

    def rate_for(self, state: OptimizerState, step: int) -> float:
        """`rate(step)` for the model with this state, in which a callback may have replaced a constant rate."""
        if state.constant_rate is not None:
            return state.constant_rate
        return scheduled_rate(self, self.rate, step) if is_custom(type(self)) else self.rate(step)

    def apply(
        self,
        store: ParameterStore,
        state: OptimizerState,
        factor: Callable[[], float] = lambda: 1.0,
        gate: Array | None = None,
    ) -> None:
        """Update every trainable parameter from its gradient. May clip and decay the gradients in place.

        factor: returns a number that multiplies the learning rate.  gate: a device array; if it is 0, nothing is
        updated, but the step is counted.
        """
        backend, step = store.backend, state.step
        rate = backend.step_number(lambda step: self.rate_for(state, step) * factor(), step)
        k = backend.step_number(lambda step: step + 1, step)
        trained = store.slices(_TRAINABLE)
        decayed = store.slices(lambda p: p.trainable and p.decay) if self.weight_decay else []
        if self.clip_norm is not None:
            backend.clip_norm(store.grads, trained, self.clip_norm)
        state.step += 1
        name, numbers = self.fused(rate, k)
        vectors = [store.values, store.grads, *state.slots.values()]

        def numbers_of(step: int) -> tuple[float, ...]:
            rate = self.rate_for(state, step) * factor()
            return (*self.fused_decay(rate), *self.fused(rate, step + 1)[1])

        if name and backend.whole_update(name, trained, decayed, vectors, numbers_of, step, gate):
            return
        if not backend.replays_calls:
            backend.refuse_capture("%s has no fused update", type(self).__name__)
        before = None if gate is None else [(vector, vector.copy()) for vector in (store.values, *state.slots.values())]
        for part in decayed:
            self.decay(store.values[part], store.grads[part], rate)
        if not (name and backend.fused_update(name, trained, vectors, numbers)):
            for piece in _pieces(trained, backend.chunk_elements):
                slots = [slot[piece] for slot in state.slots.values()]
                t = state.scratch[: piece.stop - piece.start]
                self.update(backend.xp, store.values[piece], store.grads[piece], slots, t, rate, k)
        for vector, old in before or ():
            backend.xp.copyto(vector, old, where=gate == 0)

    def fused(self, rate: float, k: int) -> tuple[str, tuple[float, ...]]:
        """(name, numbers) of a backend's fused operator that equals `update`; ("", ()) if there is none."""
        return "", ()

    def fused_decay(self, rate: float) -> tuple[float, float]:
        """`decay` as two numbers: the factor of w, and the multiple of w that is added to g."""
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
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        *,
        nesterov: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm)
        self.momentum = number(self, "momentum", momentum, at_least=0, below=1)
        self.nesterov = flag(self, "nesterov", nesterov)
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
        self.epsilon = number(self, "epsilon", epsilon, above=0, finite=True)

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
        self.rho = number(self, "rho", rho, at_least=0, below=1)
        self.epsilon = number(self, "epsilon", epsilon, above=0, finite=True)

    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        (s,) = slots
        _average_square(xp, s, g, t, self.rho)
        _scaled_step(xp, w, g, s, t, rate, self.epsilon)

    def fused(self, rate: float, k: int) -> tuple[str, tuple[float, ...]]:
        return "rmsprop", (rate, self.rho, self.epsilon)


class Adam(Optimizer):
    """m ← β₁ m + (1 - β₁) g;  s ← β₂ s + (1 - β₂) g²;  w ← w - rate · m̂ / (√ŝ + epsilon).

    m̂ = m / (1 - β₁ᵏ) and ŝ = s / (1 - β₂ᵏ) correct the bias towards the initial 0. Kingma and Ba 2014, "Adam".
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
        self.beta1 = number(self, "beta1", beta1, at_least=0, below=1)
        self.beta2 = number(self, "beta2", beta2, at_least=0, below=1)
        self.epsilon = number(self, "epsilon", epsilon, above=0, finite=True)

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
        """(rate', ε') with rate' · m / (√s + ε') = rate · m̂ / (√ŝ + ε), which saves elementwise operations."""
        correction = of_step(math.sqrt, 1.0 - self.beta2**k)
        return rate * correction / (1.0 - self.beta1**k), self.epsilon * correction


class AdamW(Adam):
    """Adam with decoupled weight decay: w ← (1 - rate · weight_decay) w before each update. Loshchilov, Hutter 2017."""

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
    """The optimizer of this name, with its defaults; or `spec` itself if it is an optimizer."""
    optimizer: Optimizer = resolve("optimizer", spec, _NAMES, Optimizer)  # type: ignore[type-abstract]
    _check_settings(optimizer)
    return optimizer


def _check_settings(optimizer: Optimizer) -> None:
    """Raise ArgumentError for attributes that were set later, or never. A call takes two microseconds."""
    missing = [name for name in ("learning_rate", "weight_decay", "clip_norm") if not hasattr(optimizer, name)]
    if missing:
        raise ArgumentError(
            f"{type(optimizer).__name__} has no {missing[0]}: call super().__init__(learning_rate, weight_decay, "
            "clip_norm) in its constructor."
        )
    rate, decay, norm = optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm
    if not (type(rate) is float and 0 <= rate < math.inf):
        rate_or_schedule(optimizer, "learning_rate", rate)
    if not (type(decay) is float and 0 <= decay < math.inf):
        number(optimizer, "weight_decay", decay, at_least=0, finite=True)
    if norm is not None:
        number(optimizer, "clip_norm", norm, above=0, also="None for no clipping")
    slots: Any = optimizer.slots
    if is_custom(type(optimizer)) and not (
        isinstance(slots, tuple | list)
        and all(isinstance(name, str) and name.isidentifier() for name in slots)
        and len(set(slots)) == len(slots)
    ):
        raise ArgumentError(f"{type(optimizer).__name__}: slots must be a tuple of different names, not {slots!r}.")


_NAMES: dict[str, type[Optimizer]] = {"sgd": SGD, "adagrad": Adagrad, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW}


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


def _pieces(slices: list[slice], length: int | None) -> Iterator[slice]:
    """The slices cut into pieces of at most `length` elements, which stay in cache through an elementwise chain."""
    for part in slices:
        step = length or max(1, part.stop - part.start)
        for start in range(part.start, part.stop, step):
            yield slice(start, min(start + step, part.stop))
