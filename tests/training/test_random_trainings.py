"""Random training runs, captured and eager, must be equal bit for bit, whatever their callbacks do.

A seed chooses layers, loss, optimizer, weights, accumulation, streaming, schedule and dtype, and the actions of a
callback: it calls forward, evaluate and predict with other batch sizes, freezes layers, frees memory, changes the rate,
and trains a second model.
"""

import random

import numpy as np
import pytest

import xpnet
from xpnet import callbacks, datasets, layers, losses, optimizers, schedules
from xpnet.training import captured_step

IMAGES, LABELS = datasets.digits()
IMAGES = IMAGES.reshape(-1, 8, 8, 1).astype("float32") / 16
LABELS = LABELS.astype("int64")
ALWAYS = 16  # this many seeds run in every test session, the others in `nox -s tests-slow`
SEEDS = [*range(ALWAYS), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(ALWAYS, 200))]

ACTIVATIONS = [layers.ReLU, layers.Tanh, layers.Sigmoid, layers.GELU, layers.SiLU, layers.ELU, layers.LeakyReLU]


def hidden(choose):
    """A few layers on images or on vectors; some have buffers or noise."""
    activation = choose.choice(ACTIVATIONS)
    if choose.random() < 0.5:
        stack = [layers.Flatten()]
        for _ in range(choose.randint(1, 3)):
            stack += [layers.Dense(choose.choice([5, 16, 33]), l2=choose.choice([0.0, 1e-3])), activation()]
            stack += choose.choice([[], [layers.BatchNorm()], [layers.LayerNorm()], [layers.Dropout(0.3)]])
        return stack
    filters = choose.choice([2, 5])
    stack = [
        layers.Conv2D(filters, choose.choice([2, 3]), padding=choose.choice(["same", "valid"])),
        *choose.choice([[], [layers.BatchNorm()], [layers.LayerNorm()]]),
        activation(),
        choose.choice([layers.MaxPool2D(2), layers.AvgPool2D(2), layers.DepthwiseConv2D(3, padding="same")]),
        *choose.choice([[], [layers.Residual(layers.Conv2D(filters, 3, padding="same"), activation())]]),
    ]
    if isinstance(stack[-1], layers.DepthwiseConv2D):
        stack.append(layers.Dropout(0.2))
    return [*stack, choose.choice([layers.Flatten(), layers.GlobalAveragePool2D()])]


def optimizer(choose):
    rate = choose.choice([0.01, schedules.OneCycle(0.02, steps=20), schedules.CosineDecay(0.01, steps=15)])
    common = {"weight_decay": choose.choice([0.0, 0.01]), "clip_norm": choose.choice([None, 0.5])}
    return choose.choice([
        lambda: optimizers.SGD(rate, **common),
        lambda: optimizers.SGD(rate, momentum=0.9, nesterov=choose.random() < 0.5, **common),
        lambda: optimizers.Adam(rate, **common),
        lambda: optimizers.AdamW(rate, **common),
        lambda: optimizers.RMSprop(rate, **common),
        lambda: optimizers.Adagrad(rate, **common),
    ])()  # fmt: skip


class Meddler(callbacks.Callback):
    """Does what callbacks may do to the model and its device, at moments that the seed chooses."""

    def __init__(self, seed, other):
        self.choose, self.other = random.Random(seed), other

    def on_epoch_begin(self, model, epoch):
        if self.choose.random() < 0.4:
            layer = self.choose.choice(model.layers[:-1])
            layer.trainable = not layer.trainable
        if self.choose.random() < 0.3:
            model.context.backend.free_memory()

    def on_step_end(self, model, step):
        if self.choose.random() < 0.25:
            count = self.choose.choice([1, 7, 40, 90])
            x, y = IMAGES[200 : 200 + count], LABELS[200 : 200 + count]
            self.choose.choice([
                lambda: model.forward(model.backend.asarray(x), training=True),
                lambda: model.evaluate(x, y, loss="softmax_cross_entropy", metrics=["accuracy"]),
                lambda: model.predict(x, batch_size=self.choose.choice([16, 1024])),
                lambda: model.activations(x),
                lambda: self.run.logs(),
                lambda: model.load_state_dict(model.state_dict()),
            ])()  # fmt: skip
        if self.choose.random() < 0.05:
            self.run.state.rate_factor *= 0.8

    def on_epoch_end(self, model, epoch, logs):
        if self.other is not None and self.choose.random() < 0.5:
            self.other.fit(IMAGES[:48], LABELS[:48], epochs=4, batch_size=16, optimizer="adam", verbose=0)


def trained(backend, seed):
    """(states of both models, histories) of the training that this seed describes."""
    choose = random.Random(seed)
    dtype = choose.choice(["float32", "float32", "float64"])
    model = xpnet.Sequential([*hidden(choose), layers.Dense(10)], (8, 8, 1), backend=backend, seed=seed, dtype=dtype)
    other = None
    if choose.random() < 0.5:
        other = xpnet.Sequential([*hidden(choose), layers.Dense(10)], (8, 8, 1), backend=backend, seed=seed)
    count, size = choose.choice([48, 61]), choose.choice([8, 13])
    x, y, options = IMAGES[:count], LABELS[:count], {}
    weights = choose.choice([None, np.linspace(0.2, 2.0, count)])
    loss = choose.choice(["softmax_cross_entropy", losses.SoftmaxCrossEntropy(label_smoothing=0.1), "mse"])
    if loss == "mse":
        y = np.eye(10, dtype=dtype)[y]
        options["metrics"] = choose.choice([None, ["mae"]])
    elif choose.random() < 0.3:
        options["class_weight"] = {3: 4.0}
    if choose.random() < 0.25:
        x, y, weights = datasets.Stream(x, y, weights, block=16, window_bytes=32 * 64 * 4), None, None
    elif weights is not None:
        options["sample_weight"] = weights
    histories = [
        model.fit(
            x, y, loss=loss, optimizer=optimizer(choose), epochs=choose.randint(3, 5), batch_size=size,
            accumulate=choose.choice([1, 1, 2, 3]), shuffle=choose.random() < 0.8, verbose=0,
            callbacks=[Meddler(seed, other)], **options
        )
        for _ in range(choose.choice([1, 1, 2]))
    ]  # fmt: skip
    states = [net.state_dict() for net in (model, other) if net is not None and net.is_built]
    return states, [dict(history) for history in histories]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", ["cpu", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_a_captured_training_equals_the_eager_one(backend, monkeypatch, seed):
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)  # such short runs would be eager
    captured = trained(backend, seed)
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    eager = trained(backend, seed)
    for got, want in zip(captured[0], eager[0], strict=True):
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert captured[1] == eager[1]
