"""Examples of every public layer, loss and optimizer, found through `__all__`, so that no test forgets a new one."""

from xpnet import layers, losses, optimizers, schedules

IMAGE = (5, 6, 4)


def examples_of(module, base, examples, without=()):
    """The examples of each subclass of `base` in `module.__all__`, in that order, but not of the classes `without`."""
    public = [getattr(module, name) for name in module.__all__]
    classes = [thing for thing in public if isinstance(thing, type) and issubclass(thing, base) and thing is not base]
    classes = [cls for cls in classes if cls not in without]
    missing = [cls.__name__ for cls in classes if cls not in examples]
    assert not missing, f"{module.__name__}: add examples of {', '.join(missing)} to tests/support/every.py"
    return [example for cls in classes for example in examples[cls]]


#: Layers with several inputs, by class: (input shapes, layer).
MERGING = {
    layers.Add: [([(3, 4), (3, 4), (1, 4)], layers.Add())],
    layers.Average: [([(4,), (4,), (4,)], layers.Average())],
    layers.Concatenate: [
        ([(2, 4), (2, 1), (2, 3)], layers.Concatenate()),
        ([(2, 4), (1, 4)], layers.Concatenate(0)),
    ],
    layers.Dot: [([(3, 4), (3, 4)], layers.Dot())],
    layers.Maximum: [([(4,), (4,), (1,)], layers.Maximum())],
    layers.Multiply: [([(2, 3, 4), (1, 1, 4), (2, 3, 4)], layers.Multiply())],
    layers.Subtract: [([(3, 4), (3, 1)], layers.Subtract())],
}

#: (input shape, layer): unbuilt layers, mostly with other arguments than the defaults. Copy a layer before building it.
LAYERS = examples_of(
    layers,
    layers.Layer,
    {
        layers.AvgPool1D: [((5, 4), layers.AvgPool1D(3, 2, padding=1, count_include_pad=False))],
        layers.AvgPool2D: [(IMAGE, layers.AvgPool2D(2, padding=1, count_include_pad=False))],
        layers.BatchNorm: [((3, 4), layers.BatchNorm(momentum=0.2, epsilon=1e-3, center=False))],
        layers.Bidirectional: [
            ((2, 2), layers.Bidirectional(layers.GRU(1))),
            ((2, 2), layers.Bidirectional(layers.LSTM(1, return_sequences=False))),
        ],
        layers.Conv1D: [
            ((5, 4), layers.Conv1D(6, 2, 2, "same", dilation=2, groups=2, bias_initializer=0.5, l1=0.1, l2=0.2)),
            ((5, 4), layers.Conv1D(3, 3, padding="causal", use_bias=False)),
        ],
        layers.Conv2D: [
            (IMAGE, layers.Conv2D(4, (2, 1), (1, 2), "same", dilation=2, groups=2, use_bias=False, l1=0.1, l2=0.2))
        ],
        layers.Conv2DTranspose: [
            (IMAGE, layers.Conv2DTranspose(4, 2, strides=2, groups=2, output_padding=1, bias_initializer=0.5))
        ],
        layers.Dense: [
            ((4,), layers.Dense(3, use_bias=False, weight_initializer="he_normal", l1=0.1, l2=0.2)),
            ((3, 4), layers.Dense(3, bias_initializer=0.5)),
        ],
        layers.DepthwiseConv2D: [
            (IMAGE, layers.DepthwiseConv2D(2, padding=1, depth_multiplier=2, weight_initializer="he_normal"))
        ],
        layers.Dropout: [((4,), layers.Dropout(0.25))],
        layers.ELU: [((4,), layers.ELU(0.5))],
        layers.Embedding: [
            ((4,), layers.Embedding(9, 2, weight_initializer="uniform", l1=0.1)),
            ((4,), layers.Embedding(9, 2, padding_index=2)),
        ],
        layers.Flatten: [((2, 3), layers.Flatten())],
        layers.GELU: [((4,), layers.GELU(approximate="tanh")), ((4,), layers.GELU())],
        layers.GlobalAveragePool1D: [((5, 4), layers.GlobalAveragePool1D())],
        layers.GlobalAveragePool2D: [(IMAGE, layers.GlobalAveragePool2D())],
        layers.GlobalMaxPool1D: [((5, 4), layers.GlobalMaxPool1D())],
        layers.GlobalMaxPool2D: [(IMAGE, layers.GlobalMaxPool2D())],
        layers.GroupNorm: [
            (IMAGE, layers.GroupNorm(2, epsilon=1e-3, center=False)),
            ((6,), layers.GroupNorm(2)),
        ],
        layers.GRU: [((3, 2), layers.GRU(2, reverse=True, recurrent_bias_initializer=0.3))],
        layers.HardSigmoid: [((4,), layers.HardSigmoid())],
        layers.HardSwish: [((4,), layers.HardSwish())],
        layers.HardTanh: [((4,), layers.HardTanh(-0.05, 1.05))],
        layers.Identity: [((4,), layers.Identity())],
        layers.InstanceNorm: [(IMAGE, layers.InstanceNorm(epsilon=1e-3))],
        layers.LSTM: [
            ((2, 3), layers.LSTM(2, reverse=True)),
            ((3, 2), layers.LSTM(2, return_sequences=False, use_bias=False)),
        ],
        layers.LayerNorm: [((3, 4), layers.LayerNorm(epsilon=1e-3, scale=False))],
        layers.LeakyReLU: [((4,), layers.LeakyReLU(0.2))],
        layers.LogSoftmax: [((4,), layers.LogSoftmax())],
        layers.Masking: [((3, 4), layers.Masking(0.5))],
        layers.MaxPool1D: [((5, 4), layers.MaxPool1D(3, strides=1, padding="same"))],
        layers.MaxPool2D: [(IMAGE, layers.MaxPool2D((2, 1), strides=1, padding="same"))],
        layers.Mish: [((4,), layers.Mish())],
        layers.MultiHeadAttention: [
            ((3, 8), layers.MultiHeadAttention(2, causal=True, dropout=0.2, use_bias=False)),
            ((3, 4), layers.MultiHeadAttention(1, rotary=True)),
        ],
        layers.PReLU: [((2, 4), layers.PReLU(weight_initializer=0.4)), ((4,), layers.PReLU(shared=True))],
        layers.Permute: [((2, 3), layers.Permute((1, 0)))],
        layers.PositionalEmbedding: [((3, 4), layers.PositionalEmbedding(5))],
        layers.RMSNorm: [((3, 4), layers.RMSNorm(epsilon=1e-3))],
        layers.ReLU: [((4,), layers.ReLU())],
        layers.ReLU6: [((4,), layers.ReLU6())],
        layers.Rescale: [((4,), layers.Rescale(2.0, offset=1.0))],
        layers.Reshape: [((2, 3), layers.Reshape((3, -1)))],
        layers.Residual: [
            ((4,), layers.Residual(layers.Dense(2), layers.Tanh(), projection=layers.Dense(2))),
            ((3, 4), layers.Residual(layers.Dense(4), layers.ReLU())),
        ],
        layers.Sequential: [((4,), layers.Sequential([layers.Dense(2), layers.Tanh()]))],
        layers.Sigmoid: [((4,), layers.Sigmoid())],
        layers.SiLU: [((4,), layers.SiLU())],
        layers.Slice: [((2, 5), layers.Slice(-4, 4, axis=-1)), ((3, 4), layers.Slice(1))],
        layers.SimpleRNN: [((3, 2), layers.SimpleRNN(2, bias_initializer=0.3))],
        layers.Softmax: [((2, 3), layers.Softmax())],
        layers.Softplus: [((4,), layers.Softplus())],
        layers.Step: [((4,), layers.Step(0.3))],
        layers.Tanh: [((4,), layers.Tanh())],
        layers.TransformerBlock: [
            ((3, 4), layers.TransformerBlock(1, 2, dropout=0.1, weight_initializer="he_normal")),
            ((3, 4), layers.TransformerBlock(1, 3, causal=False, norm="rms", activation="silu", use_bias=False)),
        ],
        layers.Upsample2D: [(IMAGE, layers.Upsample2D((1, 2), interpolation="bilinear"))],
        layers.ZeroPadding2D: [(IMAGE, layers.ZeroPadding2D(((1, 0), (2, 3))))],
    },
    without=MERGING,
)

#: (loss, the kind of targets that it takes)
LOSSES = examples_of(
    losses,
    losses.Loss,
    {
        losses.BinaryCrossEntropy: [(losses.BinaryCrossEntropy(label_smoothing=0.1), "yes or no")],
        losses.CosineSimilarity: [(losses.CosineSimilarity(), "real")],
        losses.HalfSquaredError: [
            (losses.HalfSquaredError(), "real"),
            (losses.HalfSquaredError(reduction="sum"), "real"),
        ],
        losses.Huber: [(losses.Huber(0.4), "real")],
        losses.KLDivergence: [(losses.KLDivergence(), "probabilities")],
        losses.MeanAbsoluteError: [(losses.MeanAbsoluteError(), "real")],
        losses.MeanSquaredError: [(losses.MeanSquaredError(), "real")],
        losses.SoftmaxCrossEntropy: [(losses.SoftmaxCrossEntropy(label_smoothing=0.1), "probabilities")],
        losses.TripletMargin: [(losses.TripletMargin(1.5), "real")],
    },
)

OPTIMIZERS = examples_of(
    optimizers,
    optimizers.Optimizer,
    {
        optimizers.Adagrad: [optimizers.Adagrad(weight_decay=0.1)],
        optimizers.Adam: [
            optimizers.Adam(weight_decay=0.1, clip_norm=0.01),
            optimizers.Adam(weight_decay=0.1, parameter_rates={"*.weight": 0.5, "*.bias": 2.0}),
        ],
        optimizers.AdamW: [optimizers.AdamW(schedules.InverseTimeDecay(0.1, every=1))],
        optimizers.Muon: [
            optimizers.Muon(0.05, weight_decay=0.1, clip_norm=1.0),
            optimizers.Muon(matrices=["*.weight"], nesterov=False, parameter_rates={"*.bias": 2.0}),
        ],
        optimizers.RMSprop: [optimizers.RMSprop()],
        optimizers.SGD: [
            optimizers.SGD(0.1, weight_decay=0.1, clip_norm=0.01),
            optimizers.SGD(0.1, momentum=0.9),
            optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        ],
    },
)
