"""Layers: what they compute, alone and in a model, their names and noise, and what they refuse."""

import contextlib
import copy
import math

import numpy as np
import pytest
from names import shown
from strict import StrictBackend

import xpnet
from xpnet import layers, losses, optimizers
from xpnet.backends import get_backend
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, StateError

F64 = np.dtype("float64")


def alone(layer, backend, x, training=False, **kwargs):
    """This layer, built alone for x, and what it makes of x, on the host."""
    layer.build(x.shape[1:], backend=backend, **kwargs)
    layer.context.training = training
    return backend.to_numpy(layer.forward(backend.asarray(x)))


class Scale(layers.Layer):
    """A layer as a user writes it: a learnt factor a feature, and a buffer that counts forward passes."""

    def __init__(self, start=1.0, wrong=1.0):
        self.start, self.wrong = start, wrong

    def build(self, input_shape):
        self.factor = self.add_parameter("factor", input_shape[-1:], self.start)
        self.passes = self.add_buffer("passes", np.zeros(2))
        return input_shape

    def forward(self, x):
        self.passes.value += 1.0
        self.work.x = x
        return self.xp.multiply(x, self.factor.value, out=self.work.buffer("y", x.shape))

    def backward(self, grad_y):
        products = (grad_y * self.work.x).reshape(-1, grad_y.shape[-1])
        self.backend.sum_rows(products, out=self.factor.grad)
        self.factor.grad *= self.wrong
        return grad_y * self.factor.value


# Dense, and layers that rearrange.


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_multiplies_the_last_axis(backend, rng, shape, use_bias):
    w, b, x = rng.normal(size=(4, 5)), rng.normal(size=5), rng.normal(size=(6, *shape))
    layer = layers.Dense(5, use_bias, weight_initializer=w, bias_initializer=b)
    y = alone(layer, backend, x, dtype="float64")
    assert layer.output_shape == (*shape[:-1], 5)
    assert [p.name for p in layer.parameters] == ["weight", "bias"][: 1 + use_bias]
    np.testing.assert_allclose(y, np.einsum("...i,ij->...j", x, w) + use_bias * b, rtol=1e-12, atol=1e-12)


def test_a_smaller_batch_after_a_larger_one_sees_no_leftovers(backend, rng):
    model = xpnet.Sequential([layers.Dense(4), layers.Tanh(), layers.Dense(2)], input_shape=3, backend=backend)
    x = rng.normal(size=(9, 3)).astype("float32")
    whole = model.predict(x)
    for rows in (2, 9, 1):
        np.testing.assert_allclose(model.predict(x[:rows]), whole[:rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "numpys"),
    [
        (layers.Flatten(), lambda x: x.reshape(len(x), -1)),
        (layers.Reshape((4, 6)), lambda x: x.reshape(-1, 4, 6)),
        (layers.Reshape((-1, 3)), lambda x: x.reshape(len(x), -1, 3)),
        (layers.Permute((2, 0, 1)), lambda x: x.transpose(0, 3, 1, 2)),
        (layers.Permute((1, 0, 2)), lambda x: x.transpose(0, 2, 1, 3)),
    ],
    ids=shown,
)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_shape_layers_move_numbers_as_numpy_does_and_keep_their_dtype(backend, layer, numpys, dtype):
    layer = type(layer)(**layer.get_config())
    x = np.arange(5 * 24).reshape(5, 2, 3, 4).astype(dtype)
    y = alone(layer, backend, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, numpys(x))
    assert layer.output_shape == y.shape[1:]
    back = layer.backward(backend.asarray(y.astype("float32")))
    np.testing.assert_array_equal(backend.to_numpy(back), x)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_rescale_turns_integers_into_the_models_floats(backend, dtype):
    x = np.array([[0, 51, 255]], dtype)
    y = alone(layers.Rescale(1 / 255, offset=-0.5), backend, x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [[-0.5, -0.3, 0.5]], rtol=1e-6)


def test_rescale_makes_no_gradient_that_nobody_reads(backend):
    layer, x = layers.Rescale(0.5), np.ones((1, 2), np.float32)
    alone(layer, backend, x)
    assert backend.to_numpy(layer.backward(backend.asarray(x))).tolist() == [[0.5, 0.5]]
    layer.wants_input_grad = False
    assert layer.backward(backend.asarray(x)) is None


def test_integers_become_floats_unless_the_first_layer_takes_integers(backend):
    plain = xpnet.Sequential([layers.Flatten(), layers.Identity()], input_shape=2, backend=backend)
    assert plain.predict(np.array([[3, 4]], np.uint8)).dtype == np.float32
    scaled = xpnet.Sequential([layers.Flatten(), layers.Rescale(0.5)], input_shape=2, backend=backend)
    assert scaled.predict(np.array([[3, 255]], np.uint8)).tolist() == [[1.5, 127.5]]


def test_permute_of_floats_after_integers_keeps_their_fractions(backend):
    model = xpnet.Sequential([layers.Permute((1, 0)), layers.Rescale(1.0)], input_shape=(1, 2), backend=backend)
    model.predict(np.zeros((1, 1, 2), np.uint8))
    assert model.predict([[[0.25, 0.5]]]).ravel().tolist() == [0.25, 0.5]


# Noise.


def test_dropout_silences_its_rate_and_scales_the_rest(backend):
    y = alone(layers.Dropout(0.3), backend, np.ones((400, 250), np.float32), training=True)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs((y == 0).mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / y.size)


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True)])
def test_dropout_is_the_identity_outside_training_or_at_rate_zero(backend, rng, rate, training):
    x = rng.normal(size=(3, 4)).astype("float32")
    layer = layers.Dropout(rate)
    np.testing.assert_array_equal(alone(layer, backend, x, training=training), x)
    np.testing.assert_array_equal(backend.to_numpy(layer.backward(backend.asarray(x))), x)


def test_dropout_gives_the_gradient_the_mask_of_its_forward_pass(backend):
    layer, ones = layers.Dropout(0.5), np.ones((20, 30), np.float32)
    y = alone(layer, backend, ones, training=True)
    np.testing.assert_array_equal(backend.to_numpy(layer.backward(backend.asarray(ones))), y)


def masks(backend, seed=0, step=0, first_row=0, rows=40):
    """The zeros of two dropout layers in one model."""
    first, second = layers.Dropout(0.5), layers.Dropout(0.5)
    model = xpnet.Sequential([first, second], input_shape=(5, 4), backend=backend, seed=seed)
    model.context.step, model.context.first_row = step, first_row
    model.forward(np.ones((rows, 5, 4)), training=True)
    return [backend.to_numpy(layer.work.mask) > 0 for layer in (first, second)]


def test_dropout_masks_are_the_same_on_every_device(backend):
    np.testing.assert_array_equal(masks(backend), masks(get_backend("cpu")))


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"first_row": 40}], ids=str)
def test_dropout_masks_differ_by_seed_step_and_row(change):
    before, after = masks(get_backend("cpu"))[0], masks(get_backend("cpu"), **change)[0]
    assert 0.4 < (before == after).mean() < 0.6


def test_dropout_masks_differ_by_layer_and_a_shard_has_those_of_the_whole():
    first, second = masks(get_backend("cpu"))
    assert 0.4 < (first == second).mean() < 0.6
    shard = masks(get_backend("cpu"), first_row=15, rows=10)
    np.testing.assert_array_equal(shard, [first[15:25], second[15:25]])


# Alone, nested, and in their one place.


def test_a_layer_alone_builds_runs_forward_and_back(backend):
    layer = layers.Dense(3)
    assert layer.build((4,), backend=backend, seed=0) == (3,)
    y = layer.forward(backend.asarray(np.ones((2, 4), np.float32)))
    grad_x = layer.backward(y)
    assert (y.shape, grad_x.shape, layer.weight.grad.shape) == ((2, 3), (2, 4), (4, 3))
    host_y, w = backend.to_numpy(y), backend.to_numpy(layer.weight.value)
    np.testing.assert_allclose(backend.to_numpy(grad_x), host_y @ w.T, rtol=1e-5)
    np.testing.assert_allclose(backend.to_numpy(layer.bias.grad), host_y.sum(axis=0), rtol=1e-5)
    with pytest.raises(StateError, match="built already"):
        layer.build((4,))


def nested(backend, **kwargs):
    inner = layers.Sequential([layers.Dense(3), layers.Tanh(), layers.Sequential([layers.Dense(2)])])
    return xpnet.Sequential([layers.Flatten(), inner, layers.Dense(1)], input_shape=(2, 2), backend=backend, **kwargs)


def test_names_of_nested_layers_join_with_dots():
    names = [p.name for p in nested("cpu").parameters]
    assert names == ["1.0.weight", "1.0.bias", "1.2.0.weight", "1.2.0.bias", "2.weight", "2.bias"]


def test_nesting_changes_names_but_no_numbers(backend, rng):
    deep, x = nested(backend), rng.normal(size=(5, 2, 2)).astype("float32")
    flat = xpnet.Sequential(
        [layers.Flatten(), layers.Dense(3), layers.Tanh(), layers.Dense(2), layers.Dense(1)], (2, 2), backend=backend
    )
    for ours, theirs in zip(flat.parameters, deep.parameters, strict=True):
        ours.value = theirs.value
    np.testing.assert_array_equal(flat.predict(x), deep.predict(x))
    flat.forward(x), deep.forward(x)
    grad = rng.normal(size=(5, 1))
    np.testing.assert_array_equal(backend.to_numpy(flat.backward(grad)), backend.to_numpy(deep.backward(grad)))
    for ours, theirs in zip(flat.parameters, deep.parameters, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(ours.grad), backend.to_numpy(theirs.grad))


def test_without_input_grad_the_parameters_gradients_are_the_same(backend, rng):
    model, x, grad = nested(backend), rng.normal(size=(5, 2, 2)), rng.normal(size=(5, 1))
    model.forward(x)
    assert model.backward(grad).shape == x.shape
    wanted = [backend.to_numpy(p.grad).copy() for p in model.parameters]
    model.context.store.grads[...] = 0
    assert model.backward(grad, input_grad=False) is None
    for want, p in zip(wanted, model.parameters, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(p.grad), want)


def test_trainable_of_a_container_reaches_its_layers():
    model = nested("cpu")
    model.layers[1].trainable = False
    assert [p.trainable for p in model.parameters] == [False] * 4 + [True] * 2
    assert not model.layers[1].trainable
    assert model.trainable
    frozen = layers.Dense(1)
    frozen.trainable = False
    frozen.build((1,), backend="cpu")
    assert not any(p.trainable for p in frozen.parameters)


def twice(first):
    return [first, layers.ReLU(), first]


@pytest.mark.parametrize("shared", [layers.Dense(2), layers.Identity()], ids=repr)
def test_one_layer_object_has_one_place(shared):
    with pytest.raises(StateError, match=r"same \w+ object stands at 0 and 2.*Make a second layer"):
        layers.Sequential(twice(shared))
    deep = layers.Sequential([shared, layers.Sequential([shared])])
    with pytest.raises(StateError, match="one layer object has one place"):
        deep.build((2,), backend="cpu")


def test_a_layer_of_one_model_is_refused_in_another():
    shared = layers.Dense(2)
    xpnet.Sequential([shared], input_shape=2, backend="cpu")
    for stack in ([layers.ReLU(), shared], [layers.ReLU(), layers.Sequential([shared])]):
        with pytest.raises(StateError, match=r"a Dense, is built already and has a place.*Make a new layer"):
            xpnet.Sequential(stack, input_shape=2, backend="cpu")


def test_a_layer_refused_once_can_be_built_rightly():
    layer = layers.Dense(3)
    with pytest.raises(ShapeError):
        layer.build((), backend="cpu")
    layer.build((4,), backend="cpu")
    assert layer.forward(np.ones((1, 4), np.float32)).shape == (1, 3)


def test_a_model_refused_at_its_first_data_takes_better_data():
    model = xpnet.Sequential([layers.Reshape((2, 2)), layers.Flatten(), layers.Dense(1)], backend="cpu")
    with pytest.raises(ShapeError):
        model.predict(np.ones((3, 5)))
    assert model.predict(np.ones((3, 4))).shape == (3, 1)


# A layer of the user's own.


def test_a_users_layer_works_alone_and_in_a_model(backend, rng):
    x = rng.normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(alone(Scale(2.0), backend, x), 2 * x)
    model = xpnet.Sequential([layers.Dense(3), Scale(), layers.Dense(1)], input_shape=4, backend=backend)
    assert [p.name for p in model.parameters] == ["0.weight", "0.bias", "1.factor", "2.weight", "2.bias"]
    assert max(xpnet.check_gradients(model, x, x[:, :1], inputs=True).values()) < 1e-6
    first = model.evaluate(x, x[:, :1], loss="mse")["loss"]
    model.fit(x, x[:, :1], loss="mse", optimizer="adam", epochs=20, verbose=0)
    assert model.evaluate(x, x[:, :1], loss="mse")["loss"] < first
    assert (model.state_dict()["1.passes"] > 20).all()


def test_a_wrong_gradient_of_a_users_layer_is_seen(backend, rng):
    model = xpnet.Sequential([layers.Dense(3), Scale(wrong=1.01)], input_shape=4, backend=backend)
    errors = xpnet.check_gradients(model, rng.normal(size=(5, 4)), rng.normal(size=(5, 3)))
    assert errors.pop("1.factor") > 1e-3
    assert max(errors.values()) < 1e-6


def test_a_layer_without_forward_or_backward_says_what_is_missing():
    class Empty(layers.Layer):
        pass

    layer = Empty()
    assert layer.build((2,), backend="cpu") == (2,)
    for method in ("forward", "backward"):
        with pytest.raises(NotImplementedError, match=rf"Empty must define {method}\("):
            getattr(layer, method)(None)


def test_a_layer_not_built_says_how_to_build_it():
    with pytest.raises(StateError, match="Dense is not built yet: put it in a model, or call its build"):
        layers.Dense(2).forward(np.ones((1, 2)))


# Configuration.

OF_IMAGES = [
    layers.Conv2D(4, (2, 1), strides=(1, 2), padding="same", dilation=2, groups=2, use_bias=False, l1=0.1, l2=0.2),
    layers.DepthwiseConv2D(2, padding=1, depth_multiplier=2, weight_initializer="he_normal"),
    layers.Conv2DTranspose(4, 2, strides=2, groups=2, output_padding=1, bias_initializer=0.5),
    layers.MaxPool2D((2, 1), strides=1, padding="same"),
    layers.AvgPool2D(2, padding=1, count_include_pad=False),
    layers.GlobalAveragePool2D(),
    layers.Upsample2D((1, 2), interpolation="bilinear"),
]
EVERY = [
    *OF_IMAGES,
    layers.Dense(3, use_bias=False, weight_initializer="he_normal", bias_initializer=0.5, l1=0.1, l2=0.2),
    layers.Identity(),
    layers.Step(2.0),
    layers.Sigmoid(),
    layers.Tanh(),
    layers.ReLU(),
    layers.LeakyReLU(0.2),
    layers.ELU(0.5),
    layers.GELU(approximate="tanh"),
    layers.SiLU(),
    layers.Softplus(),
    layers.Softmax(),
    layers.LogSoftmax(),
    layers.Dropout(0.25),
    layers.Flatten(),
    layers.Reshape((2, -1)),
    layers.Permute((1, 0)),
    layers.Rescale(2.0, offset=1.0),
    layers.BatchNorm(momentum=0.2, epsilon=1e-3, center=False),
    layers.LayerNorm(epsilon=1e-3, scale=False),
    layers.Embedding(9, 2, weight_initializer="uniform", l1=0.1),
    layers.Residual(layers.Dense(2), layers.ReLU(), projection=layers.Dense(2)),
    layers.Sequential([layers.Dense(2), layers.ReLU()]),
    Scale(3.0),
]


@pytest.mark.parametrize("layer", EVERY, ids=lambda layer: type(layer).__name__)
def test_config_and_repr_make_the_layer_again(layer):
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    assert again is not layer
    assert again != layer  # a layer is a thing, not a value
    assert eval(repr(layer), {**vars(layers), "Scale": Scale}).get_config().keys() == config.keys()
    assert repr(eval(repr(layer), {**vars(layers), "Scale": Scale})) == repr(layer)


def test_every_layer_of_the_package_is_tested_here():
    everything = {getattr(layers, name) for name in layers.__all__} - {layers.Layer}
    assert everything <= {type(layer) for layer in EVERY}


def test_repr_of_a_layer_that_was_given_an_array():
    assert "weight_initializer=" in repr(layers.Dense(1, weight_initializer=np.zeros((2, 1))))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Dense(0), ArgumentError, "units must be a whole number of at least 1, not 0"),
        (lambda: layers.Dropout(1.0), ArgumentError, "at least 0 and below 1, not 1.0"),
        (lambda: layers.Dropout(-0.1), ArgumentError, "not -0.1"),
        (lambda: layers.Reshape((-1, -1)), ArgumentError, "one of them may be -1"),
        (lambda: layers.Reshape((0, 3)), ArgumentError, "must be positive"),
        (lambda: layers.Permute((1, 2)), ArgumentError, r"0 to 1 in some order, not \(1, 2\)"),
        (lambda: layers.Sequential([]), ArgumentError, "at least one layer"),
        (
            lambda: layers.Sequential([layers.Dense]),
            ArgumentTypeError,
            r"item 0 is .*did you mean an object, with \(\)",
        ),
        (lambda: layers.Sequential([layers.ReLU(), "relu"]), ArgumentTypeError, "item 1 is 'relu', not a layer"),
        (
            lambda: layers.Dense(1).build(()),
            ShapeError,
            r"Dense\) expects \(N, ..., features\), but the input is \(N,\)",
        ),
        (lambda: layers.Dense(1).build((0,)), ArgumentError, r"positive integers, without the batch, not \(0,\)"),
        (lambda: layers.Dense(1).build("x"), ArgumentError, "not 'x'"),
        (lambda: layers.Reshape((4,)).build((5,)), ShapeError, r"as \(4,\) holds, but the input is \(N, 5,\)"),
        (lambda: layers.Reshape((-1, 2)).build((5,)), ShapeError, r"as \(-1, 2\) holds"),
        (lambda: layers.Permute((1, 0)).build((5,)), ShapeError, r"2 axes after the batch, but the input is \(N, 5,\)"),
        (
            lambda: layers.Dense(1, l1=-1).build((5,)),
            ArgumentError,
            "penalties must be finite numbers of at least 0, but l1=-1",
        ),
        (lambda: layers.Dense(1, weight_initializer="hee").build((5,)), ArgumentError, "unknown initializer 'hee'"),
        (
            lambda: layers.Dense(1, weight_initializer=np.ones((2, 2))).build((5,)),
            ShapeError,
            r"array has shape \(2, 2\), but the parameter's is \(5, 1\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_errors_in_a_model_name_the_layer_by_its_path():
    with pytest.raises(ShapeError, match=r"layer 1\.0 \(Permute\) expects 3 axes"):
        xpnet.Sequential(
            [layers.Dense(4), layers.Sequential([layers.Permute((0, 1, 2))])], input_shape=(4,), backend="cpu"
        )


# dtypes.


def arrays_in(thing, kind, seen):
    """Every array of this kind that can be reached from `thing` through the library's objects."""
    if id(thing) in seen or isinstance(thing, xpnet.Backend):
        return
    seen[id(thing)] = thing
    if isinstance(thing, kind):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for value in list(thing.values()) if isinstance(thing, dict) else thing:
            yield from arrays_in(value, kind, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from arrays_in(vars(thing), kind, seen)


def one_step(model, loss, optimizer, x, y):
    """A step as training makes it, without the epoch's sums: (shapes of float64 arrays that it leaves, dtypes seen)."""
    backend, store = model.backend, model.context.store
    state = optimizers.OptimizerState(optimizer, store)
    x, y = backend.asarray(x), backend.asarray(y)
    with getattr(backend, "watch_dtypes", contextlib.nullcontext)() as seen:
        outputs = model.run(x, training=True)
        _, grad = loss.samples_and_gradient(backend, outputs, y)
        loss.samples(backend, outputs, y), loss.gradient(backend, outputs, y)
        grad *= 1.0 / len(x)
        model.run_back(grad, input_grad=True)
        store.penalty()
        store.add_penalty_gradients()
        optimizer.apply(store, state)
    reached = list(arrays_in([model, state, optimizer, outputs, grad], backend.xp.ndarray, {}))
    assert len(reached) > 8
    return [a.shape for a in reached if a.dtype == F64 and a.size > 1], seen


LOSSES = [
    losses.MeanSquaredError(),
    losses.HalfSquaredError(),
    losses.HalfSquaredError("sum"),
    losses.MeanAbsoluteError(),
    losses.Huber(0.5),
    losses.BinaryCrossEntropy(label_smoothing=0.1),
    losses.SoftmaxCrossEntropy(label_smoothing=0.1),
]
OPTIMIZERS = [
    optimizers.SGD(0.1, weight_decay=0.1, clip_norm=0.01),
    optimizers.SGD(0.1, momentum=0.9),
    optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    optimizers.Adagrad(weight_decay=0.1),
    optimizers.RMSprop(),
    optimizers.Adam(weight_decay=0.1, clip_norm=0.01),
    optimizers.AdamW(lambda step: 0.1 / (1 + step)),
]
PARTS = [*EVERY, *LOSSES, *OPTIMIZERS]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{type(part).__module__}.{type(part).__name__}"[6:])
def test_no_float64_array_appears_in_a_float32_model(backend, rng, part):
    layer = copy.deepcopy(part) if isinstance(part, layers.Layer) else layers.Tanh()
    if isinstance(part, layers.Embedding):  # takes no floats: test_embedding.py looks at its
        layer = layers.Tanh()
    loss = part if isinstance(part, losses.Loss) else losses.MeanSquaredError()
    optimizer = part if isinstance(part, optimizers.Optimizer) else optimizers.SGD(0.1)
    shape = layers.Reshape((2, 2, 2) if part in OF_IMAGES else (4, 2))
    model = xpnet.Sequential(
        [layers.Reshape((4, 3)), layers.Dense(2), shape, layer, layers.Flatten(), layers.Dense(3, l1=0.1, l2=0.1)],
        input_shape=12,
        backend=backend,
    )
    y = rng.random((5, 3)).astype("float32")
    for targets in (y / y.sum(axis=1, keepdims=True), np.array([0, 2, 1, 1, 0])):
        if targets.ndim == 2 or isinstance(loss, losses.SoftmaxCrossEntropy):
            kept, seen = one_step(model, loss, optimizer, rng.normal(size=(5, 12)).astype("float32"), targets)
            assert not kept
            assert F64 not in (seen or ())


NUMPY = np.float64(0.25)
FROM_NUMPY = [
    (layers.LeakyReLU(NUMPY), losses.Huber(NUMPY), optimizers.SGD(NUMPY, NUMPY, weight_decay=NUMPY, clip_norm=NUMPY)),
    (layers.ELU(NUMPY), losses.BinaryCrossEntropy(NUMPY), optimizers.RMSprop(NUMPY, NUMPY, NUMPY, NUMPY)),
    (layers.Dropout(NUMPY), losses.SoftmaxCrossEntropy(NUMPY), optimizers.AdamW(NUMPY, NUMPY, NUMPY, NUMPY, NUMPY)),
    (layers.Rescale(NUMPY, NUMPY), losses.MeanSquaredError(), optimizers.Adagrad(lambda step: NUMPY, NUMPY, NUMPY)),
    (layers.Dense(3, l1=NUMPY, l2=NUMPY), losses.MeanSquaredError(), optimizers.Adam(NUMPY, NUMPY, NUMPY, NUMPY)),
]


@pytest.mark.parametrize(("layer", "loss", "optimizer"), FROM_NUMPY, ids=range(5))
def test_settings_given_as_numpy_floats_lift_nothing_to_float64(rng, layer, loss, optimizer):
    stack = [type(layer)(**layer.get_config()), layers.Dense(3)]
    model = xpnet.Sequential(stack, input_shape=3, backend=StrictBackend())
    x, y = rng.normal(size=(5, 3)).astype("float32"), rng.dirichlet(np.ones(3), 5).astype("float32")
    kept, seen = one_step(model, loss, optimizer, x, y)
    assert not kept
    assert F64 not in seen


def test_the_search_for_float64_finds_one(backend, rng):
    class Leaky(layers.Layer):
        def forward(self, x):
            self.kept = x.astype("float64")
            return x

        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([layers.Dense(2), Leaky()], input_shape=3, backend=backend)
    x, y = rng.normal(size=(5, 3)).astype("float32"), np.zeros((5, 2), "float32")
    kept, seen = one_step(model, losses.MeanSquaredError(), optimizers.SGD(), x, y)
    assert kept == [(5, 2)]
    assert seen is None or F64 in seen
