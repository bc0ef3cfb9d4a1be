"""Residual: the sum of its layers and its skip connection, and automatic projections."""

import copy
import pickle

import numpy as np
import pytest
from small_models import assert_same_state
from strict import StrictBackend

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError, ShapeError, StateError

F32 = np.dtype("float32")
IMAGE = (7, 5, 4)

# name: (function that makes the block, input shape, type of the skip, names of the skip's parameters)
BLOCKS = {
    "identity": (lambda: layers.Residual(layers.Dense(4), layers.Tanh()), (4,), layers.Identity, []),
    "of sequences": (lambda: layers.Residual(layers.Dense(4), layers.Tanh()), (3, 4), layers.Identity, []),
    "dense": (lambda: layers.Residual(layers.Dense(3), layers.Tanh()), (4,), layers.Dense, ["skip.weight"]),
    "dense of sequences": (lambda: layers.Residual(layers.Dense(3)), (2, 4), layers.Dense, ["skip.weight"]),
    "of images": (lambda: layers.Residual(layers.Conv2D(4, 3, padding="same")), IMAGE, layers.Identity, []),
    "wider": (lambda: layers.Residual(layers.Conv2D(3, 3, padding="same")), IMAGE, layers.Conv2D, ["skip.weight"]),
    "strided": (
        lambda: layers.Residual(layers.Conv2D(6, 3, strides=2, padding="same"), layers.BatchNorm(), layers.Tanh()),
        IMAGE,
        layers.Conv2D,
        ["skip.weight"],
    ),
    "narrower by a stride": (
        lambda: layers.Residual(layers.Conv2D(4, 3, strides=3, padding="same")),
        IMAGE,
        layers.Conv2D,
        ["skip.weight"],
    ),
    "explicit projection": (
        lambda: layers.Residual(layers.Dense(3), projection=layers.Dense(3)),
        (4,),
        layers.Dense,
        ["skip.weight", "skip.bias"],
    ),
    "projection of several layers": (
        lambda: layers.Residual(
            layers.Conv2D(2, 3, strides=2, padding="same"),
            projection=layers.Sequential([layers.Conv2D(2, 1, strides=2, use_bias=False), layers.BatchNorm()]),
        ),
        IMAGE,
        layers.Sequential,
        ["skip.0.weight", "skip.1.gamma", "skip.1.beta"],
    ),
    "nested": (
        lambda: layers.Residual(layers.Dense(4), layers.Residual(layers.Dense(4), layers.Tanh()), layers.Dense(2)),
        (4,),
        layers.Dense,
        ["skip.weight"],
    ),
    "without parameters": (lambda: layers.Residual(layers.Tanh()), (4,), layers.Identity, []),
}
each_block = pytest.mark.parametrize(("make", "shape", "kind", "names"), BLOCKS.values(), ids=BLOCKS.keys())


def built(make, backend, shape, dtype="float64"):
    block = make()
    block.build(shape, backend=backend, dtype=dtype)
    block.context.training = True
    return block


@each_block
def test_forward_and_backward_are_sums_of_the_layers_and_the_skip(backend, rng, make, shape, kind, names):
    """The expected arrays come from the same layers, called one after the other."""
    block = built(make, backend, shape)
    *stack, skip = block.layers
    assert type(skip) is kind
    assert [p.name for p in block.parameters if p.name.startswith("skip")] == names
    x, g = rng.normal(size=(6, *shape)), rng.normal(size=(6, *block.output_shape))
    device_x, device_g = backend.asarray(x.copy()), backend.asarray(g.copy())
    got = [backend.to_numpy(a).copy() for a in (block.forward(device_x), block.backward(device_g))]
    grads = [backend.to_numpy(p.grad).copy() for p in block.parameters]

    y, grad = device_x, device_g
    for layer in stack:
        y = layer.forward(y)
    y = backend.to_numpy(y) + backend.to_numpy(skip.forward(device_x))
    for layer in reversed(stack):
        grad = layer.backward(grad)
    grad = backend.to_numpy(grad) + backend.to_numpy(skip.backward(device_g))
    np.testing.assert_array_equal(got[0], y)
    np.testing.assert_array_equal(got[1], grad)
    for p, before in zip(block.parameters, grads, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(p.grad), before)
    np.testing.assert_array_equal(backend.to_numpy(device_x), x)
    np.testing.assert_array_equal(backend.to_numpy(device_g), g)


@each_block
def test_gradients_equal_finite_differences(backend, rng, make, shape, kind, names):
    model = xpnet.Sequential([layers.Dense(shape[-1]), make(), layers.Tanh()], shape, backend)
    x, y = rng.normal(size=(5, *shape)), rng.normal(size=(5, *model.output_shape))
    errors = xpnet.check_gradients(model, x, y, inputs=True)
    assert {f"1.{name}" for name in names} <= errors.keys()
    assert max(errors.values()) < 1e-6


@each_block
def test_backward_without_input_grad_computes_the_same_parameter_gradients(backend, rng, make, shape, kind, names):
    block = built(make, backend, shape)
    x, g = (backend.asarray(rng.normal(size=(5, *s))) for s in (shape, block.output_shape))
    block.forward(x)
    assert block.backward(g).shape == x.shape
    expected = [backend.to_numpy(p.grad).copy() for p in block.parameters]
    block.context.store.grads[...] = 0
    block.wants_input_grad = False
    assert block.backward(g) is None
    for want, p in zip(expected, block.parameters, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(p.grad), want)


class Counting(layers.Identity):
    """Counts its backward passes, and records whether the last one wanted the gradient of the input."""

    passes, wanted = 0, None

    def backward(self, grad_y):
        self.passes += 1
        self.wanted = self.wants_input_grad
        return grad_y


@pytest.mark.parametrize("wanted", [True, False])
def test_an_unwanted_input_gradient_is_not_computed(backend, wanted):
    before, after, skip = Counting(), Counting(), Counting()
    block = built(lambda: layers.Residual(before, layers.Dense(4), after, projection=skip), backend, (4,))
    x = backend.asarray(np.ones((3, 4)))
    block.wants_input_grad = wanted
    block.forward(x)
    block.backward(x)
    assert (before.passes, after.passes, skip.passes) == ((1, 1, 1) if wanted else (0, 1, 0))
    assert after.wanted
    assert block.layers[1].wants_input_grad == wanted


def test_arrays_that_pass_through_uncopied_are_not_modified(backend):
    block = built(lambda: layers.Residual(layers.Identity()), backend, (2,))
    x, g = (backend.asarray(np.array([[1.0, 2.0]]) * k) for k in (1, 10))
    assert backend.to_numpy(block.forward(x)).tolist() == [[2.0, 4.0]]
    assert backend.to_numpy(block.backward(g)).tolist() == [[20.0, 40.0]]
    assert (backend.to_numpy(x).tolist(), backend.to_numpy(g).tolist()) == ([[1.0, 2.0]], [[10.0, 20.0]])


# Automatic projections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "stride"),
    [
        ((8, 8, 4), (8, 8, 6), 1),
        ((8, 8, 4), (4, 4, 4), 2),
        ((7, 5, 4), (4, 3, 4), 2),
        ((7, 5, 4), (3, 2, 9), 3),
        ((1, 8, 2), (1, 3, 2), 3),
        ((4, 4, 2), (1, 1, 2), 4),
    ],
)
def test_the_projection_of_images_is_a_convolution_with_a_matching_stride(before, after, stride):
    block = layers.Residual(layers.Flatten(), layers.Dense(int(np.prod(after))), layers.Reshape(after))
    assert block.build(before, backend="cpu") == after
    assert repr(block.layers[-1]) == repr(layers.Conv2D(after[2], 1, strides=stride, use_bias=False))
    assert block.layers[-1].output_shape == after


@pytest.mark.parametrize("before", [(8, 8, 4), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("after", [(5, 3, 4), (16, 16, 4), (3, 6), (1, 2, 3, 4)], ids=str)
def test_shapes_without_a_possible_projection_are_refused(before, after):
    stack = [layers.Flatten(), layers.Dense(int(np.prod(after))), layers.Reshape(after)]
    with pytest.raises(ShapeError) as caught:
        xpnet.Sequential([layers.Identity(), layers.Residual(*stack)], before, "cpu")
    text = str(caught.value)
    for words in ("layer 1 (Residual)", *(f"(N, {', '.join(map(str, s))})" for s in (before, after)), "projection="):
        assert words in text


def test_a_projection_of_another_shape_is_refused_and_both_shapes_are_named():
    block = layers.Residual(layers.Dense(3), projection=layers.Dense(5))
    with pytest.raises(ShapeError, match=r"its layers give \(N, 3\), but its projection gives \(N, 5\)"):
        block.build((4,), backend="cpu")


def test_a_block_can_be_built_after_a_refused_shape():
    block = layers.Residual(layers.Conv2D(3, 3))
    with pytest.raises(ShapeError, match="Keep the leading axes"):
        block.build((8, 8, 3), backend="cpu")
    assert not any(layer.is_built for layer in block.layers)
    assert block.build((3, 3, 2), backend="cpu") == (1, 1, 3)
    block = layers.Residual(layers.Dense(3), projection=layers.Permute((1, 0)))
    with pytest.raises(ShapeError):
        block.build((3, 4), backend="cpu")
    assert not any(layer.is_built for layer in block.layers)
    assert block.build((3, 3), backend="cpu") == (3, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Residual(), ArgumentError, "one or more layers, as in Residual"),
        (lambda: layers.Residual([layers.Dense(3), layers.ReLU()]), ArgumentError, "as in Residual"),
        (lambda: layers.Residual(layers.Dense(3), "relu"), ArgumentTypeError, "item 1 is 'relu', not a layer"),
        (lambda: layers.Residual(layers.Dense(3), projection=3), ArgumentTypeError, "projection must be .* not 3"),
    ],
)
def test_invalid_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_layer_object_cannot_be_used_twice():
    dense = layers.Dense(3)
    with pytest.raises(StateError, match="a layer object can be used only once"):
        layers.Residual(dense, projection=dense)
    dense.build((4,), backend="cpu")
    with pytest.raises(StateError, match="is built already"):
        xpnet.Sequential([layers.Residual(layers.Dense(3), projection=dense)], (4,), "cpu")


# Training, copies and devices --------------------------------------------------------------------------------------


def net(backend, **kwargs):
    """A small ResNet."""
    stack = [
        layers.Conv2D(3, 3, padding="same", use_bias=False),
        layers.Residual(layers.BatchNorm(), layers.ReLU(), layers.Conv2D(3, 3, padding="same", use_bias=False)),
        layers.Residual(layers.BatchNorm(), layers.ReLU(), layers.Conv2D(5, 3, 2, "same", use_bias=False)),
        layers.Residual(layers.Dense(2), projection=layers.Sequential([layers.Dense(2), layers.LayerNorm()])),
        layers.Flatten(),
        layers.Dense(2),
    ]
    return xpnet.Sequential(stack, (6, 6, 1), backend, **kwargs)


def task(rng, rows=24):
    return rng.normal(size=(rows, 6, 6, 1)).astype(F32), rng.integers(0, 2, rows)


def test_state_dict_has_the_expected_names(backend):
    assert list(net(backend).state_dict()) == [
        "0.weight", "1.0.gamma", "1.0.beta", "1.2.weight", "2.0.gamma", "2.0.beta", "2.2.weight", "2.skip.weight",
        "3.0.weight", "3.0.bias", "3.skip.0.weight", "3.skip.0.bias", "3.skip.1.gamma", "3.skip.1.beta",
        "5.weight", "5.bias",
        "1.0.running_mean", "1.0.running_var", "2.0.running_mean", "2.0.running_var",
    ]  # fmt: skip


@pytest.mark.parametrize("copied", ["file", "deepcopy", "pickle", "to"])
def test_copies_predict_and_train_like_the_model(backend, rng, tmp_path, copied):
    model, (x, y) = net(backend, seed=3), task(rng)
    model.layers[2].trainable = False
    model.fit(x, y, batch_size=8, verbose=0)
    if copied == "file":
        model.save(tmp_path / "m")
        other = xpnet.load(tmp_path / "m", backend)
        assert type(other.layers[2]) is layers.Residual
    elif copied == "to":
        other = copy.deepcopy(model).to(StrictBackend()).to(backend)
    else:
        other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.summary() == model.summary()
    np.testing.assert_array_equal(other.predict(x), model.predict(x))
    for m in (model, other):
        m.forward(x, training=True)
        m.backward(np.ones((len(x), 2)))
    for one, two in zip(model.parameters, other.parameters, strict=True):
        assert (one.name, one.trainable) == (two.name, two.trainable)
        np.testing.assert_array_equal(backend.to_numpy(one.grad), backend.to_numpy(two.grad))
    assert_same_state(other.state_dict(), model.state_dict())


def test_a_file_with_other_argument_names_is_refused(tmp_path):
    model = xpnet.Sequential([layers.Residual(layers.Dense(4))], (4,), "cpu")
    model.save(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    for before, after in ((b'\\"projection\\"', b'\\"projectile\\"'), (b'\\"layers\\": [', b'\\"papers\\": [')):
        assert content.count(before) >= 1
        (tmp_path / "m").write_bytes(content.replace(before, after))
        with pytest.raises(FileError):
            xpnet.load(tmp_path / "m", "cpu")


def test_config_and_repr_have_the_arguments():
    block = layers.Residual(layers.Dense(3), layers.ReLU())
    assert repr(block) == "Residual(Dense(3), ReLU())"
    assert block.get_config() == {"layers": list(block.layers[:2]), "projection": None}
    block.build((4,), backend="cpu")
    assert repr(block) == "Residual(Dense(3), ReLU())"  # an automatic projection is not an argument
    block = layers.Residual(layers.Dense(3), projection=layers.Dense(3))
    assert repr(block) == "Residual(Dense(3), projection=Dense(3))"
    assert repr(layers.Residual.from_config(block.get_config())) == repr(block)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("make", [lambda: layers.Residual(layers.Dense(3)),
                                  lambda: layers.Residual(layers.Dense(3), projection=layers.Dense(3))])  # fmt: skip
def test_a_frozen_block_freezes_its_layers_and_its_skip(backend, rng, make, early):
    block = make()
    if early:
        block.trainable = False
    model = xpnet.Sequential([block, layers.Dense(2)], (4,), backend)
    block.trainable = False
    assert not block.trainable
    assert [p.name for p in model.parameters if p.trainable] == ["1.weight", "1.bias"]


def test_a_block_frozen_before_it_is_built_has_a_frozen_skip():
    block = layers.Residual(layers.Dense(3))
    block.trainable = False
    block.build((4,), backend="cpu")
    assert not any(p.trainable for p in block.parameters)


def test_dropout_and_batch_norm_inside_a_block_distinguish_training_and_inference(backend, rng):
    stack = [layers.Residual(layers.Dense(4), layers.BatchNorm(), layers.Dropout(0.5), projection=layers.BatchNorm())]
    model, x = xpnet.Sequential(stack, (4,), backend), rng.normal(size=(8, 4)).astype(F32)
    inference = model.predict(x)
    np.testing.assert_allclose(backend.to_numpy(model.forward(x)), inference, rtol=1e-6)
    assert not np.allclose(backend.to_numpy(model.forward(x, training=True)), inference)
    assert (model.state_dict()["0.skip.running_mean"] != 0).all()


def test_outputs_of_a_block_are_not_probabilities_and_inputs_become_floats(backend):
    model = xpnet.Sequential([layers.Residual(layers.Softmax())], (3,), backend)
    assert not model.gives_probabilities
    model = xpnet.Sequential([layers.Residual(layers.Rescale(0.5))], (3,), backend)
    assert model.predict(np.array([[2, 4, 255]], np.uint8)).tolist() == [[3.0, 6.0, 382.5]]


def test_strict_trains_like_the_reference_bit_for_bit(reference, rng):
    x, y = task(rng)
    one, other = net(StrictBackend()), net(reference)
    histories = [m.fit(x, y, batch_size=8, epochs=2, verbose=0) for m in (one, other)]
    assert_same_state(one.state_dict(), other.state_dict())
    assert dict(histories[0]) == dict(histories[1])


def test_passes_read_nothing_back_and_stay_float32(rng):
    backend = StrictBackend()
    model, x = net(backend), backend.asarray(task(rng)[0])
    with backend.no_host_reads(), backend.watch_dtypes() as seen:
        y = model.forward_pass(x, training=True)
        model.backward_pass(y)
        model.forward_pass(x, inference=True)
    assert seen <= {F32, np.dtype(bool)}
