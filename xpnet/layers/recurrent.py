"""Recurrent layers: SimpleRNN, LSTM, GRU, which read a sequence step by step, and Bidirectional.

With x_t the inputs of step t and h_t the state after it, all gates of a step come from x_t W + b and h_{t-1} U. The
first is one matrix product for all steps; the second needs the step before. Arrays of the steps are therefore
time-major, (T, N, ...), inside of these layers, and in the order in which the steps are read.
"""

from typing import Any, ClassVar, Self

from xpnet.backends import Array
from xpnet.config import flag, integer
from xpnet.errors import ArgumentError, ArgumentTypeError, shown
from xpnet.layers.base import Layer, checked_initializer
from xpnet.layers.containers import Container
from xpnet.layers.context import Shape
from xpnet.layers.executor import CallSite
from xpnet.layers.merging import Concatenate

#: elements of the recurrent weight: for smaller layers, threads cost more than they save
_MIN_WEIGHTS_TO_SPLIT = 2**14


class _Recurrent(Layer):
    """What all have in common: the arguments, the parameters, the order of the steps, and states that start as 0."""

    gates: ClassVar[int]
    accepts_integers = False

    def __init__(
        self,
        units: int,
        *,
        return_sequences: bool = True,
        reverse: bool = False,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        recurrent_weight_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.units = integer(self, "units", units)
        self.return_sequences = flag(self, "return_sequences", return_sequences)
        self.reverse, self.use_bias = flag(self, "reverse", reverse), flag(self, "use_bias", use_bias)
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)
        self.bias_initializer = checked_initializer(self, "bias_initializer", bias_initializer)
        checked_initializer(self, "recurrent_weight_initializer", recurrent_weight_initializer)
        self.recurrent_weight_initializer = recurrent_weight_initializer

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) != 2:
            raise self.refuse("sequences (N, T, features)", input_shape)
        self.keeps_mask, self.causal = self.return_sequences, not self.reverse
        steps, features = input_shape
        columns = self.gates * self.units
        self.weight = self.add_parameter("weight", (features, columns), self.weight_initializer)
        self.recurrent_weight = self.add_parameter(
            "recurrent_weight", (self.units, columns), self.recurrent_weight_initializer
        )
        if self.use_bias:
            self.bias = self.add_parameter("bias", (columns,), self.bias_initializer, decay=False)
        self.splits_batch = columns * self.units >= _MIN_WEIGHTS_TO_SPLIT
        return (steps, self.units) if self.return_sequences else (self.units,)

    def _begin(self, x: Array, states: int = 1) -> tuple[Any, ...]:
        """(x W + b for all steps, the mask, h or h and c), time-major, with the states before the first step.

        states: 1 for h, 2 for h and c.
        """
        work, backend = self.work, self.backend
        samples, steps = x.shape[:2]
        rows = self._by_time("x", x)
        work.x = backend.cast(rows.reshape(-1, x.shape[2]))
        gates = self._buffer("gates", (steps, samples, self.gates * self.units))
        backend.matmul(work.x, self.weight.value, out=gates.reshape(len(work.x), -1))
        if self.use_bias:
            backend.add_to_rows(gates.reshape(len(work.x), -1), self.bias.value)
        work.steps_mask = None if self.mask is None else self._by_time("steps_mask", self.mask)
        work.states = tuple(self._buffer(f"states {i}", (steps + 1, samples, self.units)) for i in range(states))
        for state, first in zip(work.states, getattr(self.past, "states", [0.0] * states), strict=True):
            state[0] = first
        work.gates = gates
        return gates, work.steps_mask, *work.states

    def _outputs(self) -> Array:
        """h after each step, 0 where a step does not count; or the last h."""
        hidden = self.work.states[0]
        if past := self.past:
            past.states = [states[-1].copy() for states in self.work.states]
        if not self.return_sequences:
            return hidden[-1]
        y = self._by_sample("y", hidden[1:])
        if self.mask is not None:
            y *= self.mask[:, :, None]
        return y

    def _begin_backward(self, grad_y: Array) -> tuple[Array | None, Array]:
        """(∂L/∂y_t for all steps, time-major, or None if all are 0; ∂L/∂h of the last state, to begin with)."""
        work = self.work
        last = work.buffer("grad_hidden", work.states[0].shape[1:])
        if not self.return_sequences:
            last[...] = grad_y
            return None, last
        last[...] = 0.0
        grad = self._by_time("grad", grad_y)
        if work.steps_mask is not None:
            grad *= work.steps_mask[:, :, None]
        return grad, last

    def _end_backward(self, grad_gates: Array, grad_products: Array) -> Array | None:
        """Sum the parameters' gradients over all steps, given those of x W + b and of h U; return ∂L/∂x if wanted."""
        work, backend = self.work, self.backend
        grad, hidden = grad_gates.reshape(len(work.x), -1), work.states[0][:-1].reshape(-1, self.units)
        backend.matmul(hidden.T, grad_products.reshape(grad.shape), out=self.recurrent_weight.grad)
        backend.matmul(work.x.T, grad, out=self.weight.grad)
        if self.use_bias:
            backend.sum_rows(grad, out=self.bias.grad)
        if not self.wants_input_grad:
            return None
        grad_rows = work.buffer("grad_rows", work.x.shape)
        backend.matmul(grad, self.weight.value.T, out=grad_rows)
        return self._by_sample("grad_x", grad_rows.reshape(*grad_gates.shape[:2], -1))

    def _by_time(self, name: str, a: Array) -> Array:
        """A copy (T, N, ...) of a (N, T, ...), in the order in which the steps are read."""
        return self._copied(name, self._in_order(a.swapaxes(0, 1)))

    def _by_sample(self, name: str, a: Array) -> Array:
        """A copy (N, T, ...) of a (T, N, ...), in the order of the inputs."""
        return self._copied(name, self._in_order(a).swapaxes(0, 1))

    def _in_order(self, a: Array) -> Array:
        return a[::-1] if self.reverse else a

    def _copied(self, name: str, a: Array) -> Array:
        copied = self._buffer(name, a.shape, a.dtype)
        copied[...] = a
        return copied

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """A buffer whose first two axes may both change from batch to batch."""
        return self.work.buffer(name, (shape[0] * shape[1], *shape[2:]), dtype).reshape(shape)


class SimpleRNN(_Recurrent):
    """A recurrent layer: h_t = tanh(x_t W + b + h_{t-1} U), for (N, T, features) → (N, T, units).

    weight W is (features, units), recurrent_weight U (units, units), bias b (units,); `use_bias=False` leaves it out.

    return_sequences: False returns the last state only, (N, units).  reverse: reads the steps from the last to the
    first; the outputs stay in the order of the inputs, and the last state is that after the first step.
    T may be None in the shape of the input, and differ from batch to batch.

    A step that a mask leaves out keeps the state, and its output is 0. A sample without any step has the state 0.

    U starts orthogonal, so that repeated products neither grow nor shrink the state.

    Elman 1990, "Finding structure in time".
    """

    gates = 1

    def forward(self, x: Array) -> Array:
        """h_t = tanh(x_t W + b + h_{t-1} U), with h_{-1} = 0."""
        gates, mask, hidden = self._begin(x)
        self.backend.rnn(gates, self.recurrent_weight.value, mask, hidden)
        return self._outputs()

    def backward(self, grad_y: Array) -> Array | None:
        """Backpropagation through time: h_t is in y_t = h_t and in h_{t+1}.

        With a_t = x_t W + b + h_{t-1} U and d_t = ∂L/∂a_t, from the last step to the first:

        ∂L/∂h_t = ∂L/∂y_t + d_{t+1} Uᵀ,   d_t = ∂L/∂h_t · (1 - h_t²),

        ∂L/∂U = Σ_t h_{t-1}ᵀ d_t,   ∂L/∂W = Σ_t x_tᵀ d_t,   ∂L/∂b = Σ_t d_t,   ∂L/∂x_t = d_t Wᵀ.

        The sums over t are single matrix products over all rows of all steps. A step that does not count passes
        ∂L/∂h_t on to h_{t-1}, and has d_t = 0.
        """
        work = self.work
        grad, grad_hidden = self._begin_backward(grad_y)
        grad_gates = self._buffer("grad_gates", work.gates.shape)
        self.backend.rnn_grad(
            grad, self.recurrent_weight.value, work.steps_mask, work.states[0], grad_gates, grad_hidden
        )
        return self._end_backward(grad_gates, grad_gates)


class LSTM(_Recurrent):
    """A long short-term memory: (N, T, features) → (N, T, units). With the columns of four gates in a_t,

        a_t = x_t W + b + h_{t-1} U,   i, f, o = sigmoid(a_t),   g = tanh(a_t),

        c_t = f · c_{t-1} + i · g,   h_t = o · tanh(c_t).

    weight W is (features, 4 · units), recurrent_weight U (units, 4 · units), bias b (4 · units,), each with the columns
    of i, f, g, o in this order, as in PyTorch, whose two biases add up to this one; `use_bias=False` leaves it out.

    return_sequences, reverse and masks are as in SimpleRNN; the last state is h.

    The bias starts as 1 for the forget gate f, so that cells remember until they have learned to forget, and as 0 for
    the others. U starts with orthonormal rows.

    Hochreiter and Schmidhuber 1997, "Long short-term memory"; Gers, Schmidhuber and Cummins 2000, "Learning to
    forget"; for the bias Jozefowicz, Zaremba and Sutskever 2015, "An empirical exploration of recurrent network
    architectures".
    """

    gates = 4

    def __init__(
        self,
        units: int,
        *,
        return_sequences: bool = True,
        reverse: bool = False,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        recurrent_weight_initializer: Any = "orthogonal",
        bias_initializer: Any = "forget_gate",
        name: str | None = None,
    ) -> None:
        super().__init__(
            units, return_sequences=return_sequences, reverse=reverse, use_bias=use_bias,
            weight_initializer=weight_initializer, recurrent_weight_initializer=recurrent_weight_initializer,
            bias_initializer=bias_initializer, name=name,
        )  # fmt: skip

    def forward(self, x: Array) -> Array:
        """c_t = f · c_{t-1} + i · g and h_t = o · tanh(c_t), with states that start as 0."""
        gates, mask, hidden, cells = self._begin(x, states=2)
        self.backend.lstm(gates, self.recurrent_weight.value, mask, hidden, cells)
        return self._outputs()

    def backward(self, grad_y: Array) -> Array | None:
        """Backpropagation through time: h_t is in y_t = h_t and a_{t+1}, and c_t in h_t and c_{t+1}.

        With d_t = ∂L/∂a_t, whose columns are those of the gates, from the last step to the first:

        ∂L/∂h_t = ∂L/∂y_t + d_{t+1} Uᵀ,

        ∂L/∂c_t = ∂L/∂h_t · o · (1 - tanh²(c_t)) + ∂L/∂c_{t+1} · f_{t+1};

        since σ' = σ (1 - σ) and tanh' = 1 - tanh², the columns of d_t are

        i: ∂L/∂c_t · g · i (1 - i),          f: ∂L/∂c_t · c_{t-1} · f (1 - f),

        g: ∂L/∂c_t · i · (1 - g²),           o: ∂L/∂h_t · tanh(c_t) · o (1 - o);

        ∂L/∂U = Σ_t h_{t-1}ᵀ d_t,   ∂L/∂W = Σ_t x_tᵀ d_t,   ∂L/∂b = Σ_t d_t,   ∂L/∂x_t = d_t Wᵀ.

        A step that does not count passes the gradients of both states on to those before it, and has d_t = 0.
        """
        work = self.work
        grad, grad_hidden = self._begin_backward(grad_y)
        grad_gates = self._buffer("grad_gates", work.gates.shape)
        grad_cell = work.buffer("grad_cell", grad_hidden.shape)
        grad_cell[...] = 0.0
        weight, mask, cells = self.recurrent_weight.value, work.steps_mask, work.states[1]
        self.backend.lstm_grad(grad, work.gates, weight, mask, cells, grad_gates, grad_hidden, grad_cell)
        return self._end_backward(grad_gates, grad_gates)


class GRU(_Recurrent):
    """Gated recurrent units: (N, T, features) → (N, T, units). With the columns of three gates in a_t and p_t,

        a_t = x_t W + b,   p_t = h_{t-1} U + b',   r, z = sigmoid(a_t + p_t),   n = tanh(a_t + r · p_t),

        h_t = (1 - z) · n + z · h_{t-1}.

    weight W is (features, 3 · units), recurrent_weight U (units, 3 · units), bias b and recurrent_bias b' (3 · units,),
    each with the columns of r, z, n in this order, as in PyTorch; `use_bias=False` leaves both biases out. The reset
    gate r multiplies p_t with its bias.

    return_sequences, reverse and masks are as in SimpleRNN.

    U starts with orthonormal rows.

    Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder for statistical machine translation".
    """

    gates = 3

    def __init__(
        self,
        units: int,
        *,
        return_sequences: bool = True,
        reverse: bool = False,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        recurrent_weight_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        recurrent_bias_initializer: Any = "zeros",
        name: str | None = None,
    ) -> None:
        super().__init__(
            units, return_sequences=return_sequences, reverse=reverse, use_bias=use_bias,
            weight_initializer=weight_initializer, recurrent_weight_initializer=recurrent_weight_initializer,
            bias_initializer=bias_initializer, name=name,
        )  # fmt: skip
        checked_initializer(self, "recurrent_bias_initializer", recurrent_bias_initializer)
        self.recurrent_bias_initializer = recurrent_bias_initializer

    def build(self, input_shape: Shape) -> Shape:
        output_shape = super().build(input_shape)
        if self.use_bias:
            shape, initializer = (3 * self.units,), self.recurrent_bias_initializer
            self.recurrent_bias = self.add_parameter("recurrent_bias", shape, initializer, decay=False)
        return output_shape

    def forward(self, x: Array) -> Array:
        """h_t = (1 - z) · n + z · h_{t-1}, with h_{-1} = 0."""
        work = self.work
        gates, mask, hidden = self._begin(x)
        work.inner = self._buffer("inner", hidden[1:].shape)
        bias = self.recurrent_bias.value if self.use_bias else None
        self.backend.gru(gates, self.recurrent_weight.value, bias, mask, hidden, work.inner)
        return self._outputs()

    def backward(self, grad_y: Array) -> Array | None:
        """Backpropagation through time: h_t is in y_t = h_t, in p_{t+1} and in h_{t+1}.

        With d_t = ∂L/∂a_t and e_t = ∂L/∂p_t, whose columns are those of the gates, from the last step to the first:

        ∂L/∂h_t = ∂L/∂y_t + e_{t+1} Uᵀ + ∂L/∂h_{t+1} · z_{t+1};

        since σ' = σ (1 - σ) and tanh' = 1 - tanh², the columns of d_t are

        n: ∂L/∂h_t · (1 - z) · (1 - n²),     r: d_n · p_n · r (1 - r),     z: ∂L/∂h_t · (h_{t-1} - n) · z (1 - z).

        Those of e_t are the same, but for n: d_n · r. Then

        ∂L/∂U = Σ_t h_{t-1}ᵀ e_t,   ∂L/∂b' = Σ_t e_t,   ∂L/∂W = Σ_t x_tᵀ d_t,   ∂L/∂b = Σ_t d_t,   ∂L/∂x_t = d_t Wᵀ.

        A step that does not count passes ∂L/∂h_t on to h_{t-1}, and has d_t = e_t = 0.
        """
        work, shape = self.work, self.work.gates.shape
        grad, grad_hidden = self._begin_backward(grad_y)
        grad_gates, grad_products = self._buffer("grad_gates", shape), self._buffer("grad_products", shape)
        self.backend.gru_grad(
            grad, work.gates, self.recurrent_weight.value, work.steps_mask, work.states[0], work.inner,
            grad_gates, grad_products, grad_hidden,
        )  # fmt: skip
        if self.use_bias:
            self.backend.sum_rows(grad_products.reshape(len(work.x), -1), out=self.recurrent_bias.grad)
        return self._end_backward(grad_gates, grad_products)


class Bidirectional(Container):
    """Reads sequences in both directions, and joins the outputs: (N, T, features) → (N, T, 2 · units).

    layer: a recurrent layer, such as `LSTM(32)`, for the forward direction. A copy of it, with parameters of its own,
    reads from the last step to the first. The first half of the output features is that of the forward direction. With
    `return_sequences=False`, the output (N, 2 · units) joins both last states, those after the last and the first step.

    The names of parameters begin with "forward." and "backward.".

    Schuster and Paliwal 1997, "Bidirectional recurrent neural networks".
    """

    accepts_integers = False
    causal = False

    def __init__(self, layer: Layer, *, name: str | None = None) -> None:
        super().__init__(name=name)
        if not isinstance(layer, _Recurrent):
            raise ArgumentTypeError(
                f"Bidirectional: layer must be a recurrent layer, such as layers.LSTM(32), not {shown(layer)}."
            )
        if layer.reverse:
            raise ArgumentError(
                "Bidirectional: layer must read forward: leave out reverse=True, which its copy for the other "
                "direction gets."
            )
        config = {**layer.get_config(), "reverse": True, "name": None}
        backward = type(layer).from_config(config)
        backward.trainable = layer.trainable
        self.layers = (layer, backward, Concatenate())

    @property
    def layer(self) -> Layer:
        """The layer of the forward direction."""
        return self.layers[0]

    def _keys(self) -> list[str]:
        return ["forward", "backward", "join"]

    def build(self, input_shape: Shape) -> Shape:
        forward, backward, join = self._placed = self.layers
        paths = [self._qualified(key) for key in self._keys()]
        half = forward.place(self.context, paths[0], input_shape)
        backward.place(self.context, paths[1], input_shape)
        joined: Any = join.place(self.context, paths[2], [half, half])
        calls = [CallSite(forward, 0, 1, half), CallSite(backward, 0, 2, half), CallSite(join, (1, 2), 3, joined)]
        self._execute(calls, 1, [3])
        return joined  # type: ignore[no-any-return]

    def shared_copy(self) -> Self:
        twin = super().shared_copy()
        twin.layers = tuple(layer.shared_copy() for layer in self.inner_layers)
        return twin

    def get_config(self) -> dict[str, Any]:
        return self._with_name({"layer": self.layer})
