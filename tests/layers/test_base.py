"""Layers in general: use inside and outside models, names, configuration, copies, dtypes and errors."""

import contextlib
import copy
import pickle

import every
import numpy as np
import pytest
from names import stable_repr
from small_models import LABELS, QUIET, SAMPLES, assert_reproducible, standalone_output
from strict import StrictBackend

import xpnet
from xpnet import layers, losses, optimizers, schedules
from xpnet.errors import ArgumentError, ArgumentTypeError, DeviceMemoryError, ShapeError, StateError

F64 = np.dtype("float64")


class Scale(layers.Layer):
    """A custom layer: a trained factor per feature, and a buffer that counts forward passes."""

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


# Standalone layers, nested layers, and layers that are used twice


def test_a_layer_outside_a_model_builds_and_runs_forward_and_backward(backend):
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


def test_nesting_changes_names_but_not_values(backend, rng):
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


def test_backward_without_input_grad_computes_the_same_parameter_gradients(backend, rng):
    model, x, grad = nested(backend), rng.normal(size=(5, 2, 2)), rng.normal(size=(5, 1))
    model.forward(x)
    assert model.backward(grad).shape == x.shape
    expected = [backend.to_numpy(p.grad).copy() for p in model.parameters]
    model.context.store.grads[...] = 0
    assert model.backward(grad, input_grad=False) is None
    for want, p in zip(expected, model.parameters, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(p.grad), want)


def test_trainable_of_a_container_applies_to_its_layers():
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
def test_a_layer_object_cannot_be_used_twice(shared):
    with pytest.raises(StateError, match=r"items 0 and 2 are the same \w+ object.*Make a second layer"):
        layers.Sequential(twice(shared))
    deep = layers.Sequential([shared, layers.Sequential([shared])])
    with pytest.raises(StateError, match="a layer object can be used only once"):
        deep.build((2,), backend="cpu")


def test_a_layer_of_one_model_is_refused_in_another():
    shared = layers.Dense(2)
    xpnet.Sequential([shared], input_shape=2, backend="cpu")
    for stack in ([layers.ReLU(), shared], [layers.ReLU(), layers.Sequential([shared])]):
        with pytest.raises(StateError, match=r"a Dense, is built already.*only once. Make a new layer"):
            xpnet.Sequential(stack, input_shape=2, backend="cpu")


def test_a_layer_can_be_built_after_a_refused_shape():
    layer = layers.Dense(3)
    with pytest.raises(ShapeError):
        layer.build((), backend="cpu")
    layer.build((4,), backend="cpu")
    assert layer.forward(np.ones((1, 4), np.float32)).shape == (1, 3)


def test_a_model_can_be_built_after_refused_data():
    model = xpnet.Sequential([layers.Reshape((2, 2)), layers.Flatten(), layers.Dense(1)], backend="cpu")
    with pytest.raises(ShapeError):
        model.predict(np.ones((3, 5)))
    assert model.predict(np.ones((3, 4))).shape == (3, 1)


# Custom layers


def test_a_custom_layer_works_inside_and_outside_a_model(backend, rng):
    x = rng.normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(standalone_output(Scale(2.0), backend, x), 2 * x)
    model = xpnet.Sequential([layers.Dense(3), Scale(), layers.Dense(1)], input_shape=4, backend=backend)
    assert [p.name for p in model.parameters] == ["0.weight", "0.bias", "1.factor", "2.weight", "2.bias"]
    assert max(xpnet.check_gradients(model, x, x[:, :1], inputs=True).values()) < 1e-6
    first = model.evaluate(x, x[:, :1], loss="mse")["loss"]
    model.fit(x, x[:, :1], loss="mse", optimizer="adam", epochs=20, verbose=0)
    assert model.evaluate(x, x[:, :1], loss="mse")["loss"] < first
    assert (model.state_dict()["1.passes"] > 20).all()


def test_a_wrong_gradient_of_a_custom_layer_is_found(backend, rng):
    model = xpnet.Sequential([layers.Dense(3), Scale(wrong=1.01)], input_shape=4, backend=backend)
    errors = xpnet.check_gradients(model, rng.normal(size=(5, 4)), rng.normal(size=(5, 3)))
    assert errors.pop("1.factor") > 1e-3
    assert max(errors.values()) < 1e-6


def test_a_missing_forward_or_backward_is_named():
    class Empty(layers.Layer):
        pass

    layer = Empty()
    assert layer.build((2,), backend="cpu") == (2,)
    for method in ("forward", "backward"):
        with pytest.raises(NotImplementedError, match=rf"Empty must define {method}\("):
            getattr(layer, method)(np.ones((1, 2), "float32"))


def test_the_error_of_an_unbuilt_layer_says_how_to_build_it():
    with pytest.raises(StateError, match="Dense is not built yet: put it in a model, or call its build"):
        layers.Dense(2).forward(np.ones((1, 2)))


@pytest.mark.parametrize("method", ["add_parameter", "add_buffer"])
def test_arrays_that_are_declared_in_the_constructor_are_refused(method):
    class Early(layers.Layer):
        def __init__(self):
            getattr(self, method)("scale", *((3,) if method == "add_parameter" else ()), 1.0)

    with pytest.raises(StateError, match=rf"^Early: call {method} in build, which knows the shapes, not before\.$"):
        Early()


def test_a_value_that_forward_does_not_keep_is_named():
    class Forgets(layers.Layer):
        def forward(self, x):
            return x * x

        def backward(self, grad_y):
            return 2.0 * self.work.x * grad_y

    model = xpnet.Sequential([layers.Dense(2), Forgets()], input_shape=(3,), backend="cpu")
    with pytest.raises(StateError, match=r"^backward uses work\.x, but forward did not keep it"):
        xpnet.check_gradients(model, np.ones((2, 3)), np.ones((2, 2)), loss="mse")


# Configuration and copies

SHAPES = {id(layer): shape for shape, layer in every.LAYERS}
EVERY = [*(layer for _, layer in every.LAYERS), Scale(3.0)]


@pytest.mark.parametrize("layer", EVERY, ids=lambda layer: type(layer).__name__)
def test_config_and_repr_reproduce_the_layer(layer):
    assert_reproducible(layer, Scale=Scale)


def model_around(layer, backend, **kwargs):
    """(a model with a copy of this layer in the middle, inputs for it)."""
    shape, rng = SHAPES.get(id(layer), (4,)), np.random.default_rng(1)
    if isinstance(layer, layers.Embedding):
        stack, x = [], rng.integers(0, layer.vocabulary_size, (5, *shape))
    else:
        stack, x = [layers.Dense(shape[-1])], rng.normal(size=(5, *shape)).astype("float32")
    stack += [copy.deepcopy(layer), layers.Flatten(), layers.Dense(3, l1=0.1, l2=0.1)]
    return xpnet.Sequential(stack, input_shape=shape, backend=backend, **kwargs), x


@pytest.mark.parametrize("copied", ["file", "deepcopy", "pickle", "to"])
@pytest.mark.parametrize("layer", EVERY, ids=lambda layer: type(layer).__name__)
def test_copies_of_a_trained_model_predict_the_same(backend, tmp_path, layer, copied):
    model, x = model_around(layer, backend)
    model.fit(x, np.zeros((5, 3)), loss="mse", optimizer="adam", epochs=2, verbose=0)
    if copied == "file":
        model.save(tmp_path / "m.safetensors")
        other = xpnet.load(tmp_path / "m.safetensors", backend, custom_layers=[Scale])
    elif copied == "to":
        other = copy.deepcopy(model).to(StrictBackend()).to(backend)
    else:
        other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(other.predict(x), model.predict(x))
    assert repr(other.layers) == repr(model.layers)


def test_repr_of_a_layer_with_an_array_argument():
    assert "weight_initializer=" in repr(layers.Dense(1, weight_initializer=np.zeros((2, 1))))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Dense(0), ArgumentError, "Dense: units must be an integer of at least 1, not 0"),
        (lambda: layers.Dropout(1.0), ArgumentError, "at least 0 and below 1, not 1.0"),
        (lambda: layers.Dropout(-0.1), ArgumentError, "not -0.1"),
        (lambda: layers.Reshape((-1, -1)), ArgumentError, r"one of which may be -1, not \(-1, -1\)"),
        (lambda: layers.Reshape((0, 3)), ArgumentError, r"must be positive integers.*not \(0, 3\)"),
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
            r"Dense expects \(N, ..., features\), but the input is \(N,\)",
        ),
        (lambda: layers.Dense(1).build((0,)), ArgumentError, r"positive integers, without the batch.*, not \(0,\)"),
        (lambda: layers.Dense(1).build("x"), ArgumentError, "not 'x'"),
        (lambda: layers.Reshape((4,)).build((5,)), ShapeError, r"as \(4,\) has, but the input is \(N, 5\)"),
        (lambda: layers.Reshape((-1, 2)).build((5,)), ShapeError, r"as \(-1, 2\) has"),
        (lambda: layers.Permute((1, 0)).build((5,)), ShapeError, r"2 axes after the batch, but the input is \(N, 5\)"),
        (
            lambda: layers.Dense(1, l1=-1).build((5,)),
            ArgumentError,
            "weight: l1 must be a finite number of at least 0, not -1",
        ),
        (lambda: layers.Dense(1, weight_initializer="hee").build((5,)), ArgumentError, "unknown initializer 'hee'"),
        (
            lambda: layers.Dense(1, weight_initializer=np.ones((2, 2))).build((5,)),
            ShapeError,
            r"array has shape \(2, 2\), but the parameter's is \(5, 1\)",
        ),
    ],
)
def test_invalid_arguments_and_shapes_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_errors_in_a_model_name_the_path_of_the_layer():
    with pytest.raises(ShapeError, match=r"layer 1\.0 \(Permute\) expects 3 axes"):
        xpnet.Sequential(
            [layers.Dense(4), layers.Sequential([layers.Permute((0, 1, 2))])], input_shape=(4,), backend="cpu"
        )


# dtypes


def arrays_in(thing, kind, seen):
    """Every array of this type that can be reached from `thing`."""
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
    """A training step without epoch metrics. Returns (shapes of the float64 arrays that remain, dtypes seen)."""
    backend, store = model.backend, model.context.store
    state = optimizers.OptimizerState(optimizer, store)
    x, y = backend.asarray(x), backend.asarray(y)
    with getattr(backend, "watch_dtypes", contextlib.nullcontext)() as seen:
        outputs = model.forward_pass(x, training=True)
        _, grad = loss.samples_and_gradient(backend, outputs, y)
        loss.samples(backend, outputs, y), loss.gradient(backend, outputs, y)
        grad *= 1.0 / len(x)
        model.backward_pass(grad, input_grad=True)
        store.penalty()
        store.add_penalty_gradients()
        optimizer.apply(store, state)
    reached = list(arrays_in([model, state, optimizer, outputs, grad], backend.xp.ndarray, {}))
    assert len(reached) > 8
    return [a.shape for a in reached if a.dtype == F64 and a.size > 1], seen


LOSSES = [loss for loss, _ in every.LOSSES]
PARTS = [*EVERY, *LOSSES, *every.OPTIMIZERS, optimizers.AdamW(lambda step: 0.1 / (1 + step))]


@pytest.mark.parametrize("part", [*LOSSES, *every.OPTIMIZERS], ids=repr)
def test_losses_and_optimizers_are_equal_to_their_copies(part):
    copies = copy.deepcopy(part), pickle.loads(pickle.dumps(part)), type(part).from_config(part.get_config())
    assert all(
        other == part for other in (*copies, eval(repr(part), {**vars(losses), **vars(optimizers), **vars(schedules)}))
    )


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{type(part).__module__}.{type(part).__name__}"[6:])
def test_no_float64_array_appears_in_a_float32_model(backend, rng, part):
    model, x = model_around(part if isinstance(part, layers.Layer) else layers.Tanh(), backend)
    loss = part if isinstance(part, losses.Loss) else losses.MeanSquaredError()
    optimizer = part if isinstance(part, optimizers.Optimizer) else optimizers.SGD(0.1)
    y = rng.random((5, 3)).astype("float32")
    for targets in (y / y.sum(axis=1, keepdims=True), np.array([0, 2, 1, 1, 0])):
        if targets.ndim == 2 or isinstance(loss, losses.SoftmaxCrossEntropy):
            kept, seen = one_step(model, loss, optimizer, x, targets)
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
def test_numpy_scalars_as_settings_do_not_cause_float64(rng, layer, loss, optimizer):
    stack = [type(layer)(**layer.get_config()), layers.Dense(3)]
    model = xpnet.Sequential(stack, input_shape=3, backend=StrictBackend())
    x, y = rng.normal(size=(5, 3)).astype("float32"), rng.dirichlet(np.ones(3), 5).astype("float32")
    kept, seen = one_step(model, loss, optimizer, x, y)
    assert not kept
    assert F64 not in seen


def test_the_search_for_float64_arrays_finds_one(backend, rng):
    class Keeping(layers.Layer):
        def forward(self, x):
            self.kept = x.astype("float64")
            return x

        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([layers.Dense(2), Keeping()], input_shape=3, backend=backend)
    x, y = rng.normal(size=(5, 3)).astype("float32"), np.zeros((5, 2), "float32")
    kept, seen = one_step(model, losses.MeanSquaredError(), optimizers.SGD(), x, y)
    assert kept == [(5, 2)]
    assert seen is None or F64 in seen


class WrongOutput(layers.Layer):
    def __init__(self, error):
        self.error = error

    def forward(self, x):
        return {"none": None, "shape": x[:, :1], "flat": x.sum(axis=1), "dtype": x.astype("float64")}[self.error]

    def backward(self, grad_y):
        return grad_y


@pytest.mark.parametrize("error", ["none", "shape", "flat", "dtype"])
def test_a_last_layer_with_a_wrong_output_is_named(error):
    model = xpnet.Sequential([layers.Dense(2), WrongOutput(error)], (4,), "cpu")
    for call in (
        lambda: model.forward(SAMPLES),
        lambda: model.predict(SAMPLES),
        lambda: model.evaluate(SAMPLES, LABELS, "softmax_cross_entropy"),
        lambda: model.fit(SAMPLES, LABELS, **QUIET),
        lambda: model.train_on_batch(SAMPLES, LABELS, "softmax_cross_entropy", "sgd"),
    ):
        with pytest.raises(ShapeError, match="WrongOutput"):
            call()


class SameName(layers.Layer):
    def __init__(self, second):
        self.second = second

    def build(self, input_shape):
        self.add_parameter("w", (2,), "zeros")
        self.add_parameter("w", (2,), "ones") if self.second == "parameter" else self.add_buffer("w", np.zeros(2))
        return input_shape


@pytest.mark.parametrize("second", ["parameter", "buffer"])
def test_two_arrays_of_the_same_name_are_refused(second):
    with pytest.raises(ArgumentError, match="w'"):
        xpnet.Sequential([SameName(second)], (4,), "cpu")


class Widening(layers.Layer):
    """A layer whose output is wider than its build says."""

    def forward(self, x):
        return self.xp.concatenate([x, x], axis=-1)


def test_a_layer_with_an_output_of_another_shape_is_named(backend):
    model = xpnet.Sequential([layers.Conv2D(8, 1), Widening(), layers.Conv2D(4, 3)], (8, 8, 2), backend)
    for work in (model.predict, model.forward):
        with pytest.raises(
            ShapeError, match=r"layer 1 \(Widening\): forward must return \(N, 8, 8, 8\).*\(3, 8, 8, 16\)"
        ):
            work(np.ones((3, 8, 8, 2)))


@pytest.mark.parametrize(
    "layer", [layers.Conv2D(4, 3), layers.Conv2DTranspose(4, 3), layers.MaxPool2D(2), layers.AvgPool2D(2)], ids=repr
)
def test_a_standalone_layer_refuses_images_of_another_shape(backend, layer):
    layer = type(layer)(**layer.get_config())
    layer.build((8, 8, 2), backend=backend)
    for shape in ((2, 8, 8, 64), (2, 8, 8, 1), (2, 9, 8, 2)):
        with pytest.raises(ShapeError, match=r"expects \(N, 8, 8, 2\)"):
            layer.forward(backend.xp.ones(shape, dtype="float32"))


def test_a_container_is_trainable_if_any_of_its_layers_is():
    inner = layers.Sequential([layers.Dense(3), layers.ReLU()])
    xpnet.Sequential([inner], (4,), "cpu")
    inner.layers[0].trainable = False
    assert not inner.trainable


@pytest.mark.parametrize(
    ("stack", "shape"),
    [
        ([layers.Dense(10**12)], (4,)),
        ([layers.Dense(2**62)], (4,)),
        ([layers.Embedding(10**9, 10**5)], (4,)),
        ([layers.Conv2D(10**6, 400, padding="same")], (200, 200, 300)),
        ([layers.Conv2D(1, 3, padding=10**8)], (4, 4, 1)),
        ([layers.Upsample2D(10**9)], (4, 4, 1)),
        ([layers.BatchNorm()], (10**12,)),
        ([layers.ReLU()], (2**62,)),
        ([layers.Flatten(), layers.Dense(2)], (10**9, 10**9)),
    ],
    ids=lambda value: str(value)[:50],
)
def test_sizes_beyond_all_memory_are_refused_before_anything_is_allocated(stack, shape):
    with pytest.raises(DeviceMemoryError, match=r"GiB, more than the memory of cpu"):
        xpnet.Sequential(stack, shape, "cpu")
    assert not stack[0].is_built


@pytest.mark.parametrize(
    "shape",
    [(0,), (-1,), "4", b"ab", {4, 5}, {4: 5}, ((4,),), True, 4.5, (np.nan,), [[2, 4]], np.ones((2, 2)), (1,) * 70],
)
def test_an_input_shape_is_a_sequence_of_positive_integers(shape):
    with pytest.raises(ArgumentError, match="a shape must be one or more positive integers, without the batch"):
        xpnet.Sequential([layers.Dense(2)], shape, "cpu")


@pytest.mark.parametrize("shape", [4, np.int64(4), [4], (4,), np.array([4]), iter([4])], ids=stable_repr)
def test_an_input_shape_may_be_any_sequence_of_integers(shape):
    assert xpnet.Sequential([layers.Dense(2)], shape, "cpu").input_shape == (4,)


@pytest.mark.parametrize("layer", [layers.Softmax, layers.LogSoftmax])
def test_softmax_needs_features_and_does_not_normalize_over_the_batch(layer):
    with pytest.raises(ShapeError, match=r"expects \(N, ..., features\), but the input is \(N,\)"):
        xpnet.Sequential([layer()], (), "cpu")


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 28, 3)])
def test_channels_first_images_get_a_hint(shape):
    model = xpnet.Sequential([layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)], shape, "cpu")
    x = np.zeros((5, shape[2], *shape[:2]))
    for use in (model.predict, model.forward, lambda x: model.fit(x, np.zeros(5, int))):
        with pytest.raises(ShapeError, match=r"channels last: numpy.moveaxis\(x, 1, -1\)"):
            use(x)
    assert model.predict(np.moveaxis(x, 1, -1)).shape == (5, 2)
    with pytest.raises(ShapeError, match="channels last"):
        xpnet.Sequential([layers.Conv2D(2, 4)], (3, 28, 28), "cpu")


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("value", [-1, np.inf, np.nan, "a", None, True])
def test_penalties_are_checked_by_the_constructor(penalty, value):
    for make in (lambda **kw: layers.Dense(2, **kw), lambda **kw: layers.Conv2D(2, 3, **kw),
                 lambda **kw: layers.Embedding(2, 3, **kw)):  # fmt: skip
        with pytest.raises(ArgumentError, match=f"{penalty} must be a"):
            make(**{penalty: value})


class AssigningParameter(layers.Layer):
    """y = x · gamma, with an assignment to gamma in the method `where`."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def build(self, input_shape):
        self.gamma = self.add_parameter("gamma", input_shape, "ones")
        return input_shape

    def forward(self, x):
        self.work.x = x
        if self.where == "forward":
            self.assign(x)
        return x * self.gamma.value

    def backward(self, grad_y):
        if self.where == "backward":
            self.assign(grad_y * self.work.x)
        return grad_y * self.gamma.value

    def assign(self, rows):
        self.gamma = self.xp.sum(rows, axis=0)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_that_assigns_a_parameter_is_refused(where):
    model = xpnet.Sequential([layers.Dense(3), AssigningParameter(where)], (2,), "cpu")
    text = (
        rf"^layer 1 \(AssigningParameter\): {where} assigns self\.gamma, the parameter\. .*self\.gamma\.grad\[\.\.\.\]"
    )
    with pytest.raises(StateError, match=text):
        model.fit(np.ones((4, 2)), [0, 1, 2, 0], verbose=0)
    np.testing.assert_array_equal(model[1].gamma.value, 1)
    model[1].gamma = [1.0, 2.0, 3.0]  # outside of a pass, it writes into the values
    np.testing.assert_array_equal(model[1].gamma.value, [1, 2, 3])


class Twice(layers.Layer):
    def build(self, input_shape):
        for _ in range(2):
            self.gamma = self.add_parameter("gamma", input_shape, "ones")
        return input_shape


def test_a_parameter_declared_twice_is_refused():
    with pytest.raises(ArgumentError, match="^Twice: there is a parameter or buffer called 'gamma' already"):
        Twice().build((3,), backend="cpu")


def test_layers_outside_a_list_and_inputs_inside_one_get_a_hint():
    with pytest.raises(ArgumentTypeError, match=r"Put them in \[ \]\.$"):
        xpnet.Sequential(layers.Dense(2), layers.ReLU())
    with pytest.raises(ArgumentTypeError, match="item 0 is .*Leave it out, and give its shape as input_shape="):
        xpnet.Sequential([xpnet.Input((4,)), layers.Dense(2)])


class Misnamed(layers.Layer):
    def build(self, input_shape):
        self.gamma = self.add_parameter("gamma", input_shape, "one")
        return input_shape


def test_an_unknown_initializer_is_named_with_its_layer_and_parameter():
    with pytest.raises(ArgumentError, match=r"^layer 1 \(Misnamed\): gamma: unknown initializer 'one'\. Did you mean"):
        xpnet.Sequential([layers.Dense(2), Misnamed()], (3,), "cpu")


def test_a_number_of_features_as_momentum_gets_a_hint():
    with pytest.raises(ArgumentError, match=r"momentum .*, not 8\. The number of features is known"):
        layers.BatchNorm(8)
