"""Random training runs, captured and eager, must be equal bit for bit, whatever their callbacks do.

A seed chooses layers, loss, optimizer, weights, accumulation, streaming, schedule and dtype, and the actions of a
callback: it calls forward, evaluate and predict with other batch sizes, freezes layers, frees memory, changes the rate,
and trains a second model. On the CPU it also chooses layers of a user, distorted images and MixUp, attributes that the
callback changes, and a step at which the run stops and resumes from a checkpoint.
"""

import random

import numpy as np
import pytest
from seeds import seeds
from small_models import StopAt

import xpnet
from xpnet import augment, callbacks, datasets, layers, losses, optimizers, schedules
from xpnet.training import captured_step

IMAGES, LABELS = datasets.digits()
IMAGES = IMAGES.reshape(-1, 8, 8, 1).astype("float32") / 16
LABELS = LABELS.astype("int64")

ACTIVATIONS = [layers.ReLU, layers.Tanh, layers.Sigmoid, layers.GELU, layers.SiLU, layers.ELU, layers.LeakyReLU,
               layers.PReLU, layers.HardSwish, layers.Mish, layers.ReLU6]  # fmt: skip


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
        *choose.choice(
            [[], [layers.BatchNorm()], [layers.LayerNorm()], [layers.GroupNorm(1)], [layers.InstanceNorm()]]
        ),
        activation(),
        choose.choice(
            [
                layers.MaxPool2D(2),
                layers.AvgPool2D(2),
                layers.DepthwiseConv2D(3, padding="same"),
                layers.ZeroPadding2D(),
            ]
        ),
        *choose.choice([[], [layers.Residual(layers.Conv2D(filters, 3, padding="same"), activation())]]),
    ]
    if isinstance(stack[-1], layers.DepthwiseConv2D):
        stack.append(layers.Dropout(0.2))
    return [*stack, choose.choice([layers.Flatten(), layers.GlobalAveragePool2D(), layers.GlobalMaxPool2D()])]


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


class Scale(layers.Layer):
    """y = weight · x · factor, with an array of its own as a factor."""

    def build(self, input_shape):
        self.weight, self.factor = self.add_parameter("weight", input_shape, "ones"), np.float32(1.25)
        return input_shape

    def forward(self, x):
        self.x = x
        return x * self.weight.value * self.factor

    def backward(self, grad_y):
        self.weight.grad[...] = self.xp.sum(self.x * grad_y, axis=0) * self.factor
        return grad_y * self.weight.value * self.factor


class InPlace(layers.Layer):
    """Leaky ReLU by views and operations in place."""

    slope = 0.1

    def forward(self, x):
        y = self.work.buffer("y", x.shape)
        y[...] = x
        negative = self.xp.less(x, 0)
        self.work.slope = self.xp.where(negative, self.xp.asarray(self.slope, x.dtype), self.xp.ones((), x.dtype))
        flat = y.reshape(len(y), -1)
        flat *= self.work.slope.reshape(len(x), -1)
        return y

    def backward(self, grad_y):
        grad = grad_y.copy()
        grad *= self.work.slope
        return grad


class Centered(layers.Layer):
    """x - mean of the sample, with its result kept in a list on the layer."""

    def __init__(self):
        self.kept = [None]

    def forward(self, x):
        axes = tuple(range(1, x.ndim))
        self.kept[0] = x - x.mean(axis=axes, keepdims=True)
        return self.kept[0].copy()

    def backward(self, grad_y):
        axes = tuple(range(1, grad_y.ndim))
        return grad_y - np.mean(grad_y, axis=axes, keepdims=True)


class Counting(layers.Layer):
    """x; after some passes 2 x, which a capture cannot know."""

    def __init__(self, kind, limit):
        self.kind, self.limit, self.counts, self.rng = kind, limit, {"passes": 0}, np.random.default_rng(limit)

    def forward(self, x):
        self.counts["passes"] += self.kind == "count"
        drawn = self.kind == "draw" and self.rng.random() < 0.1
        self.work.factor = 2.0 if drawn or self.counts["passes"] > self.limit else 1.0
        return x * self.work.factor

    def backward(self, grad_y):
        return grad_y * self.work.factor


def own_layers(choose):
    found = [make() for make in (Scale, InPlace, Centered) if choose.random() < 0.4]
    if choose.random() < 0.12:
        found.append(Counting(choose.choice(["count", "draw", "nothing"]), choose.randint(5, 30)))
    return found


def distortions(choose):
    return choose.choice([
        list, list, lambda: [augment.MixUp(0.4)], lambda: [augment.RandomAffine(shift=1, rotation=9)],
        lambda: [augment.RandomCrop(1), augment.GaussianNoise(0.1)],
        lambda: [augment.RandomErasing(), augment.MixUp(0.2)],
    ])()  # fmt: skip


class Changer(callbacks.Callback):
    """Changes attributes and values after steps that the seed chooses; no arguments of layers if the run resumes."""

    def __init__(self, seed, resumes):
        self.seed, self.resumes = seed, resumes

    def on_step_end(self, model, step):
        choose = random.Random(f"{self.seed} {step}")  # so that a resumed run makes the same choices
        if choose.random() > 0.08:
            return
        for layer in model.layers:
            if isinstance(layer, layers.Dropout) and not self.resumes:
                layer.rate = choose.choice([0.1, 0.3, 0.5])
            elif isinstance(layer, Scale):
                layer.factor = np.float32(choose.choice([0.5, 1.0, 1.5]))
            elif isinstance(layer, InPlace):
                layer.slope = choose.choice([0.1, 0.2])
        if choose.random() < 0.3:
            model.parameters[0].l2 = choose.choice([0.0, 1e-3])
        if choose.random() < 0.3:
            model.parameters[-1].value[...] *= 0.9
        if choose.random() < 0.2:
            model.predict(IMAGES[:9])


def trained(backend, seed, more=()):
    """(states of both models, histories) of the training that this seed describes. more: callbacks."""
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
            callbacks=[Meddler(seed, other), *more], **options
        )
        for _ in range(choose.choice([1, 1, 2]))
    ]  # fmt: skip
    states = [net.state_dict() for net in (model, other) if net is not None and net.is_built]
    return states, [dict(history) for history in histories]


def trained_with_own_layers(seed, more=(), stop=None, path=None):
    """The same with layers of a user, distortions and changes of attributes, on the CPU.

    stop: a step at which the run stops and resumes, in a new model, from a checkpoint in the file `path`.
    """
    choose = random.Random(seed)
    dtype = choose.choice(["float32", "float32", "float64"])
    state = choose.getstate()
    size, weights = choose.choice([8, 13]), choose.choice([None, np.linspace(0.0, 2.0, 61)])
    accumulate, shuffle, epochs = choose.choice([1, 1, 2, 3]), choose.random() < 0.8, choose.randint(4, 6)
    frozen, early = choose.random() < 0.2, choose.random() < 0.3

    def run(extra, **options):
        choose.setstate(state)
        np.random.seed(seed)
        stack = [*distortions(choose), *hidden(choose), *own_layers(choose), layers.Dense(10)]
        model = xpnet.Sequential(stack, (8, 8, 1), backend="cpu", seed=seed, dtype=dtype)
        if frozen:
            model.layers[-1].trainable = False
        chosen, changer = optimizer(choose), [Changer(seed, stop is not None)] if choose.random() < 0.5 else []
        stopping = [callbacks.ReduceLROnPlateau("loss", patience=0)] if early else []
        history = model.fit(
            IMAGES[:61], LABELS[:61], sample_weight=weights, optimizer=chosen, epochs=epochs, batch_size=size,
            accumulate=accumulate, shuffle=shuffle, metrics=["accuracy", "log_loss"], verbose=0,
            callbacks=[*more, *changer, *stopping, *extra], **options
        )  # fmt: skip
        return [model.state_dict()], [dict(history)]

    if stop is None:
        return run([])
    with pytest.raises(KeyboardInterrupt):
        run([callbacks.Checkpoint(path, minutes=0), StopAt(stop)])
    return run([callbacks.Checkpoint(path)], resume_from=path)


def equal(captured, eager):
    for got, want in zip(captured[0], eager[0], strict=True):
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert captured[1] == eager[1]


def compare(monkeypatch, train):
    """Assert that a training is the same with captures, which begin at once, and without."""
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)  # such short runs would be eager
    captured = train()
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    equal(captured, train())


@pytest.mark.parametrize("seed", seeds(8, 100))
def test_a_captured_training_equals_the_eager_one_on_the_cpu(monkeypatch, seed):
    compare(monkeypatch, lambda: trained(xpnet.get_backend("cpu"), seed))


@pytest.mark.usefixtures("exact_replays")
@pytest.mark.parametrize("seed", seeds(8, 100))
def test_a_captured_training_equals_the_eager_one_on_a_gpu(gpu, monkeypatch, seed):
    compare(monkeypatch, lambda: trained(gpu, seed))


@pytest.mark.parametrize("seed", seeds(8, 150))
def test_a_captured_training_with_code_of_users_equals_the_eager_one(monkeypatch, tmp_path, seed):
    stop = random.Random(-seed - 1).choice([None, None, 2, 5, 7])
    compare(monkeypatch, lambda: trained_with_own_layers(seed, stop=stop, path=tmp_path / "run"))
