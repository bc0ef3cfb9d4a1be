"""Optimizers: update rules, as a few elementwise lines over the flat vectors of weights and gradients.

An optimizer is configuration only. Its state for one model (momenta, the number of updates) is an `OptimizerState` that
belongs to the model, so one optimizer object can train several models. `Optimizer` explains the arguments that all of
them take: learning_rate, weight_decay, clip_norm and parameter_rates.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

from xpnet.backends import Array, Backend, DType
from xpnet.backends.step_numbers import of_step
from xpnet.config import (
    Configured,
    flag,
    integer,
    is_custom,
    is_number,
    items_of,
    missing_method,
    number,
    rate_or_schedule,
    resolve,
    scheduled_rate,
)
from xpnet.errors import ArgumentError, ArgumentTypeError, shown, suggestion, synonyms
from xpnet.parameters import Parameter, ParameterStore

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Muon", "Optimizer", "OptimizerState", "RMSprop", "get"]

Rate = float | Callable[[int], float]

_TRAINABLE = attrgetter("trainable")  # in C: a lambda takes longer
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # chosen by Jordan et al. for few steps
_SHOWN_NAMES = 20  # of parameters, in an error


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


class _Part(NamedTuple):
    """Parameters that are updated alike: by the formula of `rule`, at the learning rate times `factor`.

    trained, decayed: their slices of the flat vectors, and of these the ones with weight decay.
    """

    rule: "Optimizer"
    factor: float
    trained: list[slice]
    decayed: list[slice]


def _layout(store: ParameterStore) -> tuple[Backend, DType, int, list[slice]]:
    """What the vectors of an optimizer depend on: device, dtype, length, and where the parameters are."""
    return store.backend, store.dtype, int(store.values.size), [parameter.slot for parameter in store.parameters]


class Optimizer(Configured):
    """The base of every optimizer. A subclass defines `update`.

    learning_rate: a number, or a schedule, a function of the step.
    weight_decay: adds weight_decay · w to the gradient of parameters with `decay` (weights, not biases), but see AdamW.
    clip_norm: the largest norm of the gradient of all parameters together. A larger gradient is scaled down to it,
        before weight decay.
    parameter_rates: {pattern: factor} multiplies the learning rate of the parameters whose names match, such as
        `"0.weight"`, `"encoder.*"` or `"*.bias"` (with the wildcards of fnmatch). The first pattern that matches
        counts; parameters that match none have the factor 1. As in the parameter groups of PyTorch, the factor scales
        all that the rate does, also the decoupled decay of AdamW; 0 keeps a parameter as it is, but its state follows
        its gradients. Assign a new dict to change it. Training raises ArgumentError if a pattern matches no parameter
        of the model.
    """

    _advice = "optimizer"
    #: The names of the vectors that it keeps for each model.
    slots: ClassVar[tuple[str, ...]] = ()

    learning_rate: Rate
    weight_decay: float
    clip_norm: float | None
    parameter_rates: Mapping[str, float] | None = None

    @abstractmethod
    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        """Update w and the slots, the optimizer's own vectors, in place, by the gradient g and the learning rate.

        All are pieces of flat vectors, of one length, as is the scratch array t.  k: the number of the update, from 1.
        """
        raise missing_method(self, "update(xp, w, g, slots, t, rate, k)")

    def _attribute_hint(self, name: str) -> str:
        meant = synonyms(name, self._constructor_arguments)
        return f"It has {' and '.join(meant)}." if meant else super()._attribute_hint(name)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        # An inherited `fused` computes the inherited `update` and `decay`, not these.
        if ("update" in own or ("decay" in own and "fused_decay" not in own)) and "fused" not in own:
            cls.fused = Optimizer.fused  # type: ignore[method-assign]

    def __init__(
        self,
        learning_rate: Rate,
        weight_decay: float,
        clip_norm: float | None,
        *,
        parameter_rates: Mapping[str, float] | None = None,
    ) -> None:
        if clip_norm is not None:
            clip_norm = number(self, "clip_norm", clip_norm, above=0, also="None for no clipping")
        self.learning_rate, self.clip_norm = rate_or_schedule(self, "learning_rate", learning_rate), clip_norm
        self.weight_decay = number(self, "weight_decay", weight_decay, at_least=0, finite=True)
        self.parameter_rates = self._checked_rates(parameter_rates)

    def _checked_rates(self, rates: Any) -> dict[str, float] | None:
        """The argument `parameter_rates`, with Python numbers."""
        if rates is None:
            return None
        if not isinstance(rates, Mapping) or not all(isinstance(pattern, str) for pattern in rates):
            raise ArgumentTypeError(
                f"{type(self).__name__}: parameter_rates must be a dict of patterns and factors, such as "
                f'{{"*.bias": 2.0}}, not {shown(rates)}.'
            )
        name = "the factor of {!r} in parameter_rates"
        return {p: number(self, name.format(p), factor, at_least=0, finite=True) for p, factor in rates.items()}

    def check_parameters(self, store: ParameterStore) -> None:
        """Raise ArgumentError if a pattern matches no parameter of the store."""
        self._factors(store)

    def _factors(self, store: ParameterStore) -> tuple[float, ...]:
        """The factor of the learning rate of each parameter."""
        if not self.parameter_rates:
            return (1.0,) * len(store.parameters)
        owner, names = f"{type(self).__name__}: parameter_rates", tuple(p.name for p in store.parameters)
        factors = tuple(self.parameter_rates.values())
        return tuple(1.0 if k is None else factors[k] for k in _matches(owner, tuple(self.parameter_rates), names))

    def parts(self, store: ParameterStore) -> list[_Part]:
        """All trained parameters, grouped by how they are updated."""
        if self.parameter_rates:
            return self._parts_of(store, lambda parameter: True, self)
        decayed = store.slices(lambda p: p.trainable and p.decay) if self.weight_decay else []
        return [_Part(self, 1.0, store.slices(_TRAINABLE), decayed)]

    def _parts_of(
        self, store: ParameterStore, wanted: Callable[[Parameter], bool], rule: "Optimizer", factor: float = 1.0
    ) -> list[_Part]:
        """The trained parameters that are wanted, grouped by their factors, each of which is multiplied by `factor`."""
        factors = self._factors(store)
        own = dict(zip(store.parameters, factors, strict=True))
        parts = []
        for f in dict.fromkeys(factors):

            def is_in(p: Parameter, f: float = f) -> bool:
                return p.trainable and own[p] == f and wanted(p)

            if trained := store.slices(is_in):
                decayed = store.slices(lambda p: p.decay and is_in(p)) if self.weight_decay else []
                parts.append(_Part(rule, f * factor, trained, decayed))
        return parts

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
        if self.clip_norm is not None:
            backend.clip_norm(store.grads, store.slices(_TRAINABLE), self.clip_norm)
        state.step += 1
        self.prepare(store, state, gate)
        parts = self.parts(store)
        for part in parts:

            def rate_of(step: int, scale: float = part.factor) -> float:
                return self.rate_for(state, step) * factor() * scale

            own = rate if part.factor == 1.0 else rate * part.factor
            part.rule._update_part(store, state, part, rate_of, own, k, step, gate, last=part is parts[-1])

    def prepare(self, store: ParameterStore, state: OptimizerState, gate: Array | None) -> None:
        """Do what comes before the elementwise updates. May change the gradients. gate: see `apply`."""

    def _update_part(
        self, store: ParameterStore, state: OptimizerState, part: _Part, rate_of: Callable[[int], float], rate: float,
        k: int, step: int, gate: Array | None, *, last: bool,
    ) -> None:  # fmt: skip
        """Update the parameters of a part.

        rate_of: the learning rate as a function of the step.  rate, k: of this step.  last: whether it is the last part
        of the update.
        """
        backend, slots = store.backend, [state.slots[slot] for slot in self.slots]
        name, numbers = self.fused(rate, k)
        vectors = [store.values, store.grads, *slots]

        def numbers_of(step: int) -> tuple[float, ...]:
            rate = rate_of(step)
            return (*self.fused_decay(rate), *self.fused(rate, step + 1)[1])

        runs = (part.trained, part.decayed)
        if name and backend.whole_update(name, *runs, vectors, numbers_of, step, gate, last=last):
            return
        if not backend.replays_calls:
            backend.refuse_capture("%s has no fused update", type(self).__name__)
        before = None if gate is None else [(vector, vector.copy()) for vector in (store.values, *slots)]
        for run in part.decayed:
            self.decay(store.values[run], store.grads[run], rate)
        if not (name and backend.fused_update(name, part.trained, vectors, numbers)):
            for piece in _pieces(part.trained, backend.chunk_elements):
                t = state.scratch[: piece.stop - piece.start]
                pieces = [slot[piece] for slot in slots]
                self.update(backend.xp, store.values[piece], store.grads[piece], pieces, t, rate, k)
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
        parameter_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm, parameter_rates=parameter_rates)
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
        *,
        parameter_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm, parameter_rates=parameter_rates)
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
        *,
        parameter_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm, parameter_rates=parameter_rates)
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
        *,
        parameter_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm, parameter_rates=parameter_rates)
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


class _DecoupledDecay:
    """w ← (1 - rate · weight_decay) w before each update."""

    weight_decay: float

    def decay(self, w: Array, g: Array, rate: float) -> None:
        w *= 1.0 - rate * self.weight_decay

    def fused_decay(self, rate: float) -> tuple[float, float]:
        return 1.0 - rate * self.weight_decay, 0.0


class AdamW(_DecoupledDecay, Adam):
    """Adam with decoupled weight decay: w ← (1 - rate · weight_decay) w before each update. Loshchilov, Hutter 2017."""

    def __init__(
        self,
        learning_rate: Rate = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
        clip_norm: float | None = None,
        *,
        parameter_rates: Mapping[str, float] | None = None,
    ) -> None:
        settings = (beta1, beta2, epsilon, weight_decay, clip_norm)
        super().__init__(learning_rate, *settings, parameter_rates=parameter_rates)


class _Descent(_DecoupledDecay, SGD):
    """SGD with decoupled weight decay."""


class Muon(Optimizer):
    """w ← w - rate · √max(1, out / in) · NS(u): momentum, made nearly orthogonal, for matrices; AdamW for all else.

    m ← μ m + (1 - μ) g, where μ is `momentum`;  u = μ m + (1 - μ) g with Nesterov, else m.  NS(u), by `steps`
    Newton-Schulz iterations, has the singular vectors of u and singular values near 1: with X = u / ‖u‖,
    X ← a X + (b XXᵀ + c (XXᵀ)²) X, and a, b, c = 3.4445, -4.7750, 2.0315. Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks".

    Matrices are the weights of hidden layers: all parameters with weight decay and two axes or more, but not the tables
    of Embedding and PositionalEmbedding, nor the first and the last of these weights, which belong to the first layer
    and to the output layer. If the output layer is tied to an Embedding, the last one is a matrix too. Models with
    several inputs or outputs may need `matrices`: patterns of names, as in parameter_rates, for instance
    ["encoder.*", "1.weight"]; then the parameters that match and have two axes or more are matrices. The weights of a
    convolution, (kh, kw, in, out), are a matrix (kh · kw · in, out); those of the gates of a recurrent layer are one
    matrix together.

    All other parameters are trained by AdamW with beta1, beta2, epsilon and the learning rate times `adamw_factor`.
    The defaults are those of the authors: 0.02 for matrices and 0.0003 for AdamW. weight_decay is decoupled for all.
    """

    slots = ("means", "squares")

    def __init__(
        self,
        learning_rate: Rate = 0.02,
        momentum: float = 0.95,
        steps: int = 5,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        adamw_factor: float = 0.015,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-10,
        *,
        nesterov: bool = True,
        matrices: Iterable[str] | None = None,
        parameter_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, clip_norm, parameter_rates=parameter_rates)
        self.momentum = number(self, "momentum", momentum, at_least=0, below=1)
        self.steps, self.nesterov = integer(self, "steps", steps), flag(self, "nesterov", nesterov)
        self.adamw_factor = number(self, "adamw_factor", adamw_factor, at_least=0, finite=True)
        self.beta1 = number(self, "beta1", beta1, at_least=0, below=1)
        self.beta2 = number(self, "beta2", beta2, at_least=0, below=1)
        self.epsilon = number(self, "epsilon", epsilon, above=0, finite=True)
        self.matrices = self._checked_matrices(matrices)

    def _checked_matrices(self, matrices: Any) -> list[str] | None:
        """The argument `matrices` as a list."""
        if matrices is None:
            return None
        patterns = (matrices,) if isinstance(matrices, str) else items_of(matrices)
        if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
            raise ArgumentTypeError(
                f'Muon: matrices must be patterns of parameter names, such as ["encoder.*"], not {shown(matrices)}.'
            )
        return list(patterns)

    def check_parameters(self, store: ParameterStore) -> None:
        super().check_parameters(store)
        self._matrices_of(store)

    def _matrices_of(self, store: ParameterStore) -> set[Parameter]:
        """The parameters with orthogonal updates."""
        weights = [p for p in store.parameters if len(p.shape) > 1]
        patterns = self._checked_matrices(self.matrices)  # a list, which may have changed
        if patterns is not None:
            names = tuple(p.name for p in store.parameters)
            found = dict(zip(names, _matches("Muon: matrices", tuple(patterns), names), strict=True))
            return {p for p in weights if found[p.name] is not None}
        weights = [p for p in weights if p.decay]
        tied = any(p.is_tied for p in weights)
        hidden = weights[1:] if tied else weights[1:-1]
        return {p for p in hidden if not p.is_table}

    def parts(self, store: ParameterStore) -> list[_Part]:
        matrices = self._matrices_of(store)
        adamw = AdamW(1.0, self.beta1, self.beta2, self.epsilon, self.weight_decay)
        descent = _Descent(1.0, weight_decay=self.weight_decay)
        return [
            *self._parts_of(store, lambda p: p in matrices, descent),
            *self._parts_of(store, lambda p: p not in matrices, adamw, self.adamw_factor),
        ]

    def prepare(self, store: ParameterStore, state: OptimizerState, gate: Array | None) -> None:
        """Follow the momentum of each matrix, and write its update direction over its gradient."""
        backend, xp, matrices = store.backend, store.backend.xp, self._matrices_of(store)
        for p in store.parameters:
            if not p.trainable or p not in matrices:
                continue
            m, g = state.slots["means"][p.slot], store.grads[p.slot]
            old = None if gate is None else m.copy()
            m += (1.0 - self.momentum) * (g - m)
            u = self.momentum * m + (1.0 - self.momentum) * g if self.nesterov else m
            inputs, outputs = math.prod(p.shape[:-1]), p.shape[-1]
            direction = _orthogonalized(backend, u.reshape(inputs, outputs), self.steps)
            xp.multiply(direction.reshape(-1), math.sqrt(max(1.0, outputs / inputs)), out=g)
            if old is not None:
                m[...] = xp.where(gate == 0, old, m)

    def update(self, xp: Any, w: Array, g: Array, slots: list[Array], t: Array, rate: float, k: int) -> None:
        pass  # not used: the parts have the formulas of SGD and AdamW


def _orthogonalized(backend: Backend, u: Array, steps: int) -> Array:
    """A matrix (m, n) with the singular vectors of u and singular values near 1, by Newton-Schulz iterations.

    Zeros stay zeros. For the iteration, see `Muon`.
    """
    xp, (a, b, c) = backend.xp, _NEWTON_SCHULZ
    is_tall = u.shape[0] > u.shape[1]
    largest = xp.max(xp.abs(u))
    x = u / (largest + (largest == 0))  # so that squares do not overflow
    norm = xp.sqrt(xp.sum(xp.square(x)))
    x /= norm + (norm == 0)
    if is_tall:
        x = x.T.copy()
    small, size = x.shape
    gram, product, polynomial = (backend.empty((small, small), x.dtype) for _ in range(3))
    change = backend.empty((small, size), x.dtype)
    for _ in range(steps):
        rounded = backend.cast(x)
        backend.matmul(rounded, rounded.T, out=gram)
        factor = backend.cast(gram)
        backend.matmul(factor, factor, out=product)
        xp.multiply(gram, b, out=polynomial)
        product *= c
        polynomial += product
        backend.matmul(backend.cast(polynomial), rounded, out=change)
        x *= a
        x += change
    return x.T if is_tall else x


def get(spec: Any) -> Optimizer:
    """The optimizer of this name, with its defaults; or `spec` itself if it is an optimizer."""
    if not isinstance(spec, type) and (callable(spec) or is_number(spec)):
        raise ArgumentTypeError(
            f"optimizer must be a name or an object, not {shown(spec)}. If that is its learning rate, give it to an "
            f"optimizer, such as xpnet.optimizers.Adam({shown(spec)})."
        )
    optimizer: Optimizer = resolve("optimizer", spec, _NAMES, Optimizer)  # type: ignore[type-abstract]
    _check_settings(optimizer)
    return optimizer


def _check_settings(optimizer: Optimizer) -> None:
    """Raise ArgumentError for settings that are properties of a user's class, or that were not assigned as attributes.

    A call takes 2 µs.
    """
    rate, decay, norm = optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm
    if not (type(rate) is float and 0 <= rate < math.inf):
        rate_or_schedule(optimizer, "learning_rate", rate)
    if not (type(decay) is float and 0 <= decay < math.inf):
        number(optimizer, "weight_decay", decay, at_least=0, finite=True)
    if norm is not None:
        number(optimizer, "clip_norm", norm, above=0, also="None for no clipping")
    optimizer._checked_rates(optimizer.parameter_rates)  # a dict, which may have changed
    slots: Any = optimizer.slots
    if is_custom(type(optimizer)) and not (
        isinstance(slots, tuple | list)
        and all(isinstance(name, str) and name.isidentifier() for name in slots)
        and len(set(slots)) == len(slots)
    ):
        raise ArgumentError(
            f"{type(optimizer).__name__}: slots must be a tuple of different names, not {shown(slots)}."
        )


_NAMES: dict[str, type[Optimizer]] = {"sgd": SGD, "adagrad": Adagrad, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW,
                                     "muon": Muon}  # fmt: skip


@functools.lru_cache(maxsize=64)
def _matches(owner: str, patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[int | None, ...]:
    """For each name the number of the first pattern that matches, or None. Raises ArgumentError for one without any."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            listed = [*names[:_SHOWN_NAMES], *(["…"] if len(names) > _SHOWN_NAMES else [])]
            raise ArgumentError(
                f"{owner}: no parameter matches {pattern!r}. {suggestion(pattern, names)}The model has "
                f"{', '.join(listed) or 'no parameters'}."
            )
    found = (next((k for k, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None) for name in names)
    return tuple(found)


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
