"""TransformerBlock: pre-norm attention and a feed-forward network, each with a residual connection."""

from typing import Any, Self

from xpnet.config import choice, flag, integer, number
from xpnet.layers.activations import GELU, ReLU, SiLU
from xpnet.layers.attention import MultiHeadAttention
from xpnet.layers.base import Layer, checked_initializer
from xpnet.layers.containers import Container
from xpnet.layers.context import Shape
from xpnet.layers.dense import Dense
from xpnet.layers.dropout import Dropout
from xpnet.layers.executor import CallSite
from xpnet.layers.merging import Add
from xpnet.layers.normalization import LayerNorm, RMSNorm

_ACTIVATIONS = {"gelu": GELU, "relu": ReLU, "silu": SiLU}


class TransformerBlock(Container):
    """A pre-norm block of a transformer: (N, T, C) → (N, T, C).

        h = x + dropout(attention(norm1(x)))
        y = h + dropout(contract(activation(expand(norm2(h)))))

    attention is a `MultiHeadAttention`; expand and contract are `Dense` layers from C to mlp_ratio · C features and
    back; the norms are `LayerNorm` (norm="layer") or `RMSNorm` ("rms"). Parameters are called "attention.query_weight",
    "expand.weight" and so on.

    heads, causal, rotary: as in `MultiHeadAttention`.  dropout: the rate of both dropouts above, and of that of the
    attention's probabilities.  activation: "gelu", "relu" or "silu". `use_bias=False` leaves out all biases, and beta
    of the norms.

    Vaswani et al. 2017, "Attention is all you need"; Xiong et al. 2020, "On layer normalization in the transformer
    architecture".
    """

    takes_list = False
    accepts_integers = False

    def __init__(
        self,
        heads: int,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        norm: str = "layer",
        activation: str = "gelu",
        *,
        causal: bool = True,
        rotary: bool = False,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.heads, self.mlp_ratio = integer(self, "heads", heads), integer(self, "mlp_ratio", mlp_ratio)
        self.causal, self.dropout = flag(self, "causal", causal), number(self, "dropout", dropout, at_least=0, below=1)
        self.norm = choice(self, "norm", norm, ("layer", "rms"))
        self.activation = choice(self, "activation", activation, tuple(_ACTIVATIONS))
        self.rotary, self.use_bias = flag(self, "rotary", rotary), flag(self, "use_bias", use_bias)
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)
        self.layers = ()  # until the number of features is known

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) != 2:
            raise self.refuse("sequences (N, T, C)", input_shape)
        if self._shared_with is None:  # a copy has its layers already
            self.layers = self._made(input_shape[1])
            if not self._trainable:
                self.trainable = False
        norm1, attention, dropout1, add1, norm2, expand, activation, contract, dropout2, add2 = self.layers
        # Each layer with the number of the value that it takes. Value 0 is x, and layer i gives value i + 1.
        sites: list[tuple[Layer, Any]] = [
            (norm1, 0), (attention, 1), (dropout1, 2), (add1, (0, 3)),
            (norm2, 4), (expand, 5), (activation, 6), (contract, 7), (dropout2, 8), (add2, (4, 9)),
        ]  # fmt: skip
        shapes, placed = [input_shape], list[CallSite]()
        for output, (layer, inputs) in enumerate(sites, 1):
            given = shapes[inputs] if isinstance(inputs, int) else [shapes[i] for i in inputs]
            self._placed = (*self._placed, layer)
            shapes.append(layer.place(self.context, self._qualified(str(layer.name)), given))
            placed.append(CallSite(layer, inputs, output, shapes[-1]))
        self._execute(placed, 1, [len(sites)])
        return shapes[-1]

    def shared_copy(self) -> Self:
        twin = super().shared_copy()
        twin.layers = tuple(layer.shared_copy() for layer in self.layers)
        return twin

    def _made(self, features: int) -> tuple[Layer, ...]:
        """The layers, in the order of the formulas above."""

        def norm(name: str) -> Layer:
            return RMSNorm(name=name) if self.norm == "rms" else LayerNorm(center=self.use_bias, name=name)

        options = {"use_bias": self.use_bias, "weight_initializer": self.weight_initializer}
        flags = {"causal": self.causal, "rotary": self.rotary}
        attention = MultiHeadAttention(self.heads, self.dropout, name="attention", **flags, **options)
        return (
            norm("norm1"), attention, Dropout(self.dropout, name="dropout1"), Add(name="add1"),
            norm("norm2"), Dense(self.mlp_ratio * features, name="expand", **options),
            _ACTIVATIONS[self.activation](name="activation"), Dense(features, name="contract", **options),
            Dropout(self.dropout, name="dropout2"), Add(name="add2"),
        )  # fmt: skip
