"""xpnet.attribution: its numbers are those of formulas and finite differences, and the model stays as it was."""

import copy
import threading

import numpy as np
import pytest
from every import LAYERS
from precisions import require_precision
from small_models import Do, assert_same_state, gradients_of

import xpnet
from xpnet import attribution, augment, callbacks, layers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, PositionError, ShapeError, StateError
from xpnet.training.probe import ROWS

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 8, 6, 2))


def net(*stack, shape=(2,), backend="cpu", **options):
    return xpnet.Sequential(stack, shape, backend, **{"dtype": "float64", **options})


def cnn(backend="cpu", last=(), **options):
    model = net(
        layers.Conv2D(4, 3, name="first"), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Dropout(0.5),
        layers.Conv2D(3, 2), layers.Tanh(), layers.Flatten(), layers.Dense(4), *last,
        shape=(8, 6, 2), backend=backend, **options,
    )  # fmt: skip
    model.train_on_batch(IMAGES, np.arange(3), "softmax_cross_entropy", "adam") if not last else None
    return model


def close(ours, theirs, tolerance=1e-11):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=tolerance)


def slopes(score, x, h=1e-6):
    """∂score/∂x by central differences, for a function score(x) (N,) of which each value depends on one sample."""
    found = np.zeros(x.shape)
    for i in np.ndindex(x.shape[1:]):
        sides = []
        for step in (h, -h):
            other = x.copy()
            other[(slice(None), *i)] += step
            sides.append(score(other))
        found[(slice(None), *i)] = (sides[0] - sides[1]) / (2 * h)
    return found


# Saliency


def test_the_saliency_of_a_linear_net_is_its_weight(backend):
    model = net(layers.Dense(3), shape=(5,), backend=backend)
    x, weight = RNG.normal(size=(4, 5)), model.state_dict()["0.weight"]
    predicted = model.predict(x).argmax(axis=1)
    assert len({*predicted.tolist()}) > 1
    for target, classes in ((None, predicted), (2, [2] * 4), ([0, 2, 1, 1], [0, 2, 1, 1])):
        found = attribution.saliency(model, x, target)
        assert type(found) is np.ndarray and found.dtype == np.float64
        np.testing.assert_array_equal(found, weight.T[classes])
    on_device = attribution.saliency(model, backend.asarray(x), np.array([0, 2, 1, 1]), as_device=True)
    assert isinstance(on_device, backend.xp.ndarray)
    np.testing.assert_array_equal(backend.to_numpy(on_device), found)


def test_the_saliency_of_a_convolutional_net_is_that_of_finite_differences(backend):
    model = cnn(backend)
    for target in (None, 1, [3, 0, 2]):
        chosen = model.predict(IMAGES).argmax(axis=1) if target is None else np.broadcast_to(target, 3)
        found = attribution.saliency(model, IMAGES, target)
        expected = slopes(lambda x, chosen=chosen: model.predict(x)[np.arange(3), chosen], IMAGES)
        np.testing.assert_allclose(found, expected, atol=1e-8)
        assert abs(found).max() > 1e-3


@pytest.mark.parametrize("last", [layers.Softmax, layers.LogSoftmax, layers.Sigmoid])
def test_scores_are_those_before_a_last_layer_that_gives_probabilities(last):
    logits = cnn()
    expected = attribution.saliency(logits, IMAGES, 1)
    state = logits.state_dict()
    for end in ([last()], [last(), layers.Reshape((2, 2)), layers.Flatten()], [layers.Sequential([last()])]):
        model = cnn(last=end)
        model.load_state_dict(state)
        np.testing.assert_array_equal(attribution.saliency(model, IMAGES, 1), expected)
        close(
            attribution.occlusion(model, IMAGES, 1, size=4),
            attribution.occlusion(logits, IMAGES, 1, size=4),
        )
        assert model.predict(IMAGES).max() <= 1.0  # the model itself still ends with that layer
    image = xpnet.Input((8, 6, 2))
    graph = xpnet.Model(image, last()(logits(image)))
    np.testing.assert_array_equal(attribution.saliency(graph, IMAGES, 1), expected)


def test_a_softmax_inside_a_model_and_one_whose_outputs_are_used_further_stay():
    model = net(layers.Dense(3), layers.Softmax(), layers.Dense(2), shape=(4,))
    x = RNG.normal(size=(3, 4))
    close(attribution.saliency(model, x, 1), slopes(lambda x: model.predict(x)[:, 1], x), 1e-8)

    class Doubled(xpnet.Sequential):
        def forward(self, x, training=False):
            return 2.0 * super().forward(x, training)

        def backward(self, grad_output, input_grad=True):
            return super().backward(2.0 * grad_output, input_grad)

    own = Doubled([layers.Dense(3), layers.Softmax()], (4,), "cpu", dtype="float64")
    close(attribution.saliency(own, x, 1), slopes(lambda x: own.predict(x)[:, 1], x), 1e-8)

    class Gate(layers.Sequential):
        def forward(self, x):
            return 2.0 * super().forward(x)

        def backward(self, grad_y):
            return super().backward(2.0 * grad_y)

    gated = net(Gate([layers.Dense(3), layers.Softmax()]), shape=(4,))
    close(attribution.saliency(gated, x, 1), slopes(lambda x: gated.predict(x)[:, 1], x), 1e-8)
    with_residual = net(layers.Residual(layers.Dense(4), layers.Softmax()), shape=(4,))
    close(attribution.saliency(with_residual, x, 1), slopes(lambda x: with_residual.predict(x)[:, 1], x), 1e-8)


def test_dropout_is_off_in_a_forward_written_by_hand():
    x = RNG.normal(size=(3, 4))

    class ByHand(xpnet.Sequential):
        def forward(self, x, training=False):
            for layer in self.layers:
                x = layer.forward(x)
            return x

        def backward(self, grad_output, input_grad=True):
            for layer in reversed(self.layers):
                grad_output = layer.backward(grad_output)
            return grad_output

    by_hand = ByHand([layers.Dense(9), layers.Dropout(0.5), layers.Dense(2)], (4,), "cpu", dtype="float64")
    by_hand.train_on_batch(x, [0, 1, 1], "softmax_cross_entropy", "sgd")
    first, _, last, _ = by_hand.state_dict().values()
    close(attribution.saliency(by_hand, x, 1), np.tile((first @ last)[:, 1], (3, 1)))


def test_a_model_with_one_output_has_one_score(backend):
    x = RNG.normal(size=(3, 4))
    model = net(layers.Dense(3), layers.Tanh(), layers.Dense(1), layers.Sigmoid(), shape=(4,), backend=backend)
    w1, b1, w2, _ = model.state_dict().values()
    expected = (1 - np.tanh(x @ w1 + b1) ** 2) * w2[:, 0] @ w1.T
    for target in (None, 0, [0, 0, 0]):
        close(attribution.saliency(model, x, target), expected)
    flat = xpnet.Model(model.inputs, layers.Flatten()(model.outputs[0]), backend=backend)
    close(attribution.saliency(flat, x), expected)


def test_tokens_that_an_embedding_inside_another_model_reads_have_the_same_norms():
    tokens, encoder = np.array([[1, 2, 3], [4, 0, 2]]), [layers.Embedding(6, 3), layers.GlobalAveragePool1D()]
    model = net(*copy.deepcopy(encoder), layers.Dense(2), shape=(3,))
    expected = attribution.saliency(model, tokens, 1)
    inner = xpnet.Sequential(copy.deepcopy(encoder), (3,), "cpu", dtype="float64")
    words = xpnet.Input((3,))
    for nested in (
        net(layers.Sequential(copy.deepcopy(encoder)), layers.Dense(2), shape=(3,)),
        xpnet.Model(words, layers.Dense(2)(inner(words)), dtype="float64"),
    ):
        for parameter, value in zip(nested.parameters, model.state_dict().values(), strict=True):
            parameter.value[...] = value
        close(attribution.saliency(nested, tokens, 1), expected)
    assert (expected > 0).all()


def test_several_inputs_have_a_gradient_each_and_integers_none(backend):
    image, words = xpnet.Input((4,), name="image"), xpnet.Input((3,), name="words")
    vectors = layers.Flatten()(layers.Embedding(5, 2)(words))
    h = layers.Tanh()(layers.Dense(4)(layers.Concatenate()([image, vectors])))
    model = xpnet.Model([image, words], layers.Dense(3)(h), backend=backend, dtype="float64")
    x, tokens = RNG.normal(size=(2, 4)), np.array([[0, 1, 2], [3, 4, 0]])
    grads = attribution.saliency(model, {"image": x, "words": tokens}, 2)
    assert len(grads) == 2 and grads[1] is None
    close(grads[0], slopes(lambda x: model.predict([x, tokens])[:, 2], x), 1e-8)
    both = xpnet.Model([image, image2 := xpnet.Input((4,))], layers.Dense(2)(layers.Multiply()([image, image2])),
                       backend=backend, dtype="float64")  # fmt: skip
    weight = both.state_dict()["1.weight"][:, 1]
    for ours, theirs in zip(attribution.saliency(both, [x, x + 1], 1), (weight * (x + 1), weight * x), strict=True):
        close(ours, theirs)


def test_tokens_have_the_norm_of_the_gradient_of_their_vector(backend):
    tokens = np.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    model = net(layers.Embedding(7, 3, padding_index=0), layers.GRU(4, return_sequences=False), layers.Dense(2),
                shape=(None,), backend=backend)  # fmt: skip
    found = attribution.saliency(model, tokens, [1, 0])
    assert found.shape == (2, 4) and not found[1, 2:].any()
    table = next(p for p in model.parameters if p.name == "0.weight")
    host = backend.to_numpy(table.value).copy()
    for row, target in enumerate((1, 0)):
        for step, word in enumerate(tokens[row]):  # each word is there once
            grad = []
            for i in range(3):
                sides = []
                for h in (1e-6, -1e-6):
                    varied = host.copy()
                    varied[word, i] += h
                    table.value = varied
                    sides.append(model.predict(tokens)[row, target])
                grad.append((sides[0] - sides[1]) / 2e-6)
            table.value = host
            np.testing.assert_allclose(found[row, step], np.linalg.norm(grad) * (word > 0), atol=1e-8)


def test_many_samples_are_computed_in_parts():
    model, x = cnn(), RNG.normal(size=(2 * ROWS + 3, 8, 6, 2))
    target = RNG.integers(0, 4, len(x))
    found = attribution.saliency(model, x, target), attribution.grad_cam(model, x, target)
    occluded = attribution.occlusion(model, x, target, size=(8, 6))
    for rows in (slice(ROWS - 1, ROWS + 1), slice(len(x) - 2, None)):
        close(found[0][rows], attribution.saliency(model, x[rows], target[rows]))
        close(found[1][rows], attribution.grad_cam(model, x[rows], target[rows]))
        close(occluded[rows], attribution.occlusion(model, x[rows], target[rows], size=(8, 6)))
    close(attribution.saliency(model, x, as_device=True), attribution.saliency(model, x))


def test_integers_that_are_numbers_are_read_as_such(backend):
    images = RNG.integers(0, 256, (2, 6, 6, 1), np.uint8)
    model = net(augment.RandomFlip(), layers.Rescale(1 / 255), layers.Conv2D(2, 3), layers.Tanh(), layers.Flatten(),
                layers.Dense(3), shape=(6, 6, 1), backend=backend)  # fmt: skip
    floats = images.astype("float64")
    close(attribution.saliency(model, images, 1), slopes(lambda x: model.predict(x)[:, 1], floats, 1e-3), 1e-8)
    close(attribution.occlusion(model, images, 1, size=2, value=0.5),
          attribution.occlusion(model, floats, 1, size=2, value=0.5))  # fmt: skip
    close(attribution.grad_cam(model, images, 1), attribution.grad_cam(model, floats, 1))
    assert attribution.maximize_activation(model, 1, steps=2, rate=10.0).shape == (1, 6, 6, 1)

    class OneHot(layers.Layer):
        accepts_integers = True

        def build(self, input_shape):
            return (*input_shape, 5)

        def forward(self, x):
            return self.xp.eye(5, dtype=self.context.dtype)[x.astype("int64")]

        def backward(self, grad_y):
            return None

    model = net(OneHot(), layers.Flatten(), layers.Dense(2), shape=(3,), backend=backend)
    tokens = np.array([[0, 1, 4]])
    with pytest.raises(ArgumentError, match="saliency: the inputs are integers, which have no gradient"):
        attribution.saliency(model, tokens)
    with pytest.raises(ShapeError, match="OneHot.*: backward must return"):
        attribution.maximize_activation(model, 1)
    weight = model.state_dict()["2.weight"].reshape(3, 5, 2)[..., 1]
    close(attribution.occlusion(model, tokens, 1, size=1, value=2),
          [weight[[0, 1, 2], [0, 1, 4]] - weight[:, 2]])  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "layer"),
    [(shape, layer) for shape, layer in LAYERS if not layer.accepts_integers],
    ids=lambda value: repr(value)[:40],
)
def test_the_saliency_through_every_layer_is_that_of_finite_differences(shape, layer):
    model = net(copy.deepcopy(layer), layers.Flatten(), layers.Dense(2), shape=shape)
    x = np.random.default_rng(3).normal(size=(2, *shape))
    found = attribution.saliency(model, x, 1)
    if type(layer) is not layers.Step:  # whose backward uses another function
        close(found, slopes(lambda x: model.predict(x)[:, 1], x), 1e-7)
    assert attribution.maximize_activation(model, 0, 0, steps=1).shape == (1, *shape)


# Occlusion


def occluded_by_loops(model, x, target, windows, value):
    """The mean fall of the score at each place, over the windows that cover it; a window is a tuple of slices."""
    shape = x.shape[: 1 + len(windows[0])]
    total, covered = np.zeros(shape), np.zeros(shape)
    for n in range(len(x)):
        before = model.predict(x[n : n + 1])[0]
        k = before.argmax() if target is None else target
        for window in windows:
            other = x[n : n + 1].copy()
            other[(0, *window)] = value
            total[(n, *window)] += before[k] - model.predict(other)[0, k]
            covered[(n, *window)] += 1
    return total / covered


def starts(length, size, stride):
    found = [0]
    while found[-1] + size < length:
        found.append(found[-1] + stride)
    return found


@pytest.mark.parametrize(
    ("size", "stride", "target"), [(2, None, None), (3, 2, 1), ((8, 1), None, 2), ([1, 4], (1, 3), None)]
)
def test_the_occlusion_of_images_is_that_of_a_loop(backend, size, stride, target):
    model = cnn(backend)
    (height, width), (down, right) = np.broadcast_to(size, 2), np.broadcast_to(stride or size, 2)
    corners = [(i, j) for i in starts(8, height, down) for j in starts(6, width, right)]
    windows = [(slice(i, i + height), slice(j, j + width)) for i, j in corners]
    found = attribution.occlusion(model, IMAGES, target, size=size, stride=stride, value=0.25)
    assert type(found) is np.ndarray and found.shape == (3, 8, 6)
    close(found, occluded_by_loops(model, IMAGES, target, windows, 0.25))


def test_steps_features_images_without_channels_and_tokens_are_occluded(backend):
    recurrent = net(layers.GRU(4, return_sequences=False), layers.Dense(3), shape=(None, 2), backend=backend)
    x = RNG.normal(size=(2, 5, 2))
    windows = [(slice(i, i + 2),) for i in (0, 1, 2, 3)]
    close(
        attribution.occlusion(recurrent, x, 1, size=(2, None), stride=1),
        occluded_by_loops(recurrent, x, 1, windows, 0.0),
    )
    plain = net(layers.Flatten(), layers.Dense(3), shape=(5, 2), backend=backend)
    windows = [(slice(i, i + 2), slice(j, j + 1)) for i in (0, 2, 4) for j in (0, 1)]
    close(attribution.occlusion(recurrent, x, size=(5, None)), occluded_by_loops(recurrent, x, None, [(slice(5),)], 0))
    close(
        attribution.occlusion(recurrent, x, size=(3, None), stride=(2, None)),
        occluded_by_loops(recurrent, x, None, [(slice(0, 3),), (slice(2, 5),)], 0),
    )
    close(attribution.occlusion(plain, x, size=(2, 1)), occluded_by_loops(plain, x, None, windows, 0.0))
    dense = net(layers.Dense(3), shape=(4,), backend=backend)
    features = RNG.normal(size=(2, 4))
    close(attribution.occlusion(dense, features, 2, size=1), features * dense.state_dict()["0.weight"][:, 2])
    words = net(layers.Embedding(7, 3), layers.Flatten(), layers.Dense(2), shape=(4,), backend=backend)
    tokens = np.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    windows = [(slice(i, i + 1),) for i in range(4)]
    found = attribution.occlusion(words, tokens, 1, size=1, value=6)
    close(found, occluded_by_loops(words, tokens, 1, windows, 6))
    assert found[1, 1] == 0 and abs(found).max() > 1e-3


# Grad-CAM


def enlarged(small, height, width):
    """Bilinear interpolation between centers of pixels, one pixel at a time."""
    large = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        corners = []
        for place, before, after in ((i, small.shape[0], height), (j, small.shape[1], width)):
            at = min(max((place + 0.5) * before / after - 0.5, 0), before - 1)
            low = min(int(at), max(before - 2, 0))
            corners.append((low, min(low + 1, before - 1), at - low))
        (i0, i1, u), (j0, j1, v) = corners
        above, below = ((1 - v) * small[k, j0] + v * small[k, j1] for k in (i0, i1))
        large[i, j] = (1 - u) * above + u * below
    return large


def convolved(x, weight, bias):
    height, width = x.shape[1] - weight.shape[0] + 1, x.shape[2] - weight.shape[1] + 1
    y = np.zeros((len(x), height, width, weight.shape[3]))
    for i, j in np.ndindex(height, width):
        window = x[:, i : i + weight.shape[0], j : j + weight.shape[1]]
        y[:, i, j] = np.tensordot(window, weight, axes=3) + bias
    return y


@pytest.mark.parametrize("layer", [None, "conv", 0, "1"])
def test_grad_cam_is_that_of_numpy(backend, layer):
    model = net(layers.Conv2D(5, 3, name="conv"), layers.ReLU(), layers.MaxPool2D(2), layers.GlobalAveragePool2D(),
                layers.Dense(3), layers.Softmax(), shape=(8, 6, 2), backend=backend)  # fmt: skip
    weight, bias, dense, _ = model.state_dict().values()
    conv = convolved(IMAGES, weight, bias)
    relu = np.maximum(conv, 0)
    windows = relu.reshape(3, 3, 2, 2, 2, 5).transpose(0, 1, 3, 5, 2, 4).reshape(3, 3, 2, 5, 4)
    first = np.eye(4)[windows.argmax(axis=-1)]  # 1 for the first maximum of each window
    largest = first.reshape(3, 3, 2, 5, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(relu.shape)
    classes = np.array([0, 2, 1])
    grad = largest * dense.T[classes][:, None, None, :] / 6  # with respect to ReLU, of the mean of 6 maxima
    seen, grad = (relu, grad) if layer == "1" else (conv, grad * (relu > 0))
    small = np.maximum((seen * grad.mean(axis=(1, 2), keepdims=True)).sum(axis=-1), 0)
    expected = [enlarged(one, 8, 6) for one in small]
    given = model.get_layer("conv") if layer == 0 else layer
    found = attribution.grad_cam(model, IMAGES, classes, given)
    assert type(found) is np.ndarray and found.shape == (3, 8, 6) and found.dtype == np.float64
    close(found, expected)
    assert found.max() > 1e-3
    close(attribution.grad_cam(model, IMAGES, layer=layer)[:1],
          attribution.grad_cam(model, IMAGES[:1], int(model.predict(IMAGES[:1]).argmax()), layer))  # fmt: skip


def test_layers_are_found_in_blocks_and_in_graphs(backend):
    image = xpnet.Input((8, 6, 2))
    block = layers.Residual(layers.Conv2D(2, 3, padding="same"), layers.ReLU())
    head = net(layers.GlobalAveragePool2D(), layers.Dense(3), shape=(8, 6, 2), backend=backend)
    model = xpnet.Model(image, head(layers.ReLU()(block(image))), backend=backend, dtype="float64")
    weight = head.state_dict()["1.weight"]
    blocks = model.activations(IMAGES)["0"]  # before the last ReLU
    assert blocks.shape == (3, 8, 6, 2) and isinstance(block[0], layers.Conv2D)
    gradient = (blocks > 0) * weight[:, 1] / 48
    expected = np.maximum((blocks * gradient.mean(axis=(1, 2), keepdims=True)).sum(axis=-1), 0)
    for layer in (None, block, "0", 0):
        close(attribution.grad_cam(model, IMAGES, 1, layer), expected)
    first = attribution.grad_cam(model, IMAGES, 1, "0.0")
    close(attribution.grad_cam(model, IMAGES, 1, block[0]), first)
    assert abs(first - expected).max() > 1e-4
    nested = net(cnn(backend), shape=(8, 6, 2), backend=backend)
    close(attribution.grad_cam(nested, IMAGES, 1), attribution.grad_cam(nested, IMAGES, 1, "0.5"))
    close(attribution.grad_cam(nested, IMAGES, 1), attribution.grad_cam(nested[0], IMAGES, 1))


def test_a_layer_that_is_called_twice_is_seen_where_it_is_called_first(backend):
    image, conv = xpnet.Input((8, 6, 2)), layers.Conv2D(2, 3, padding="same", name="twice")
    h = conv(layers.Tanh()(conv(image)))
    model = xpnet.Model(image, layers.Dense(3)(layers.GlobalAveragePool2D()(h)), backend=backend, dtype="float64")
    first = xpnet.Model(model.inputs, model.output_of("twice"), backend=backend)
    found = attribution.maximize_activation(model, 1, conv, steps=3)
    graph = xpnet.Model(image, layers.GlobalAveragePool2D()(first.outputs[0]), backend=backend)
    close(found, attribution.maximize_activation(graph, 1, steps=3))


def test_images_without_channels_have_maps_too(backend):
    model = net(layers.Reshape((8, 6, 1)), layers.Conv2D(2, 3), layers.GlobalAveragePool2D(), layers.Dense(2),
                shape=(8, 6), backend=backend)  # fmt: skip
    assert attribution.grad_cam(model, IMAGES[..., 0]).shape == (3, 8, 6)


# Activation maximization


def test_each_step_is_that_of_the_formula(backend):
    model = net(layers.Dense(3), layers.Softmax(), shape=(4,), backend=backend)
    weight = model.state_dict()["0.weight"]
    x = np.random.default_rng(7).normal(0.0, 0.1, (2, 4))
    for _ in range(5):
        grad = weight.T[[2, 0]]
        x = np.clip((x + 0.1 * grad / np.sqrt((grad**2).mean(axis=1, keepdims=True))) * 0.75, -0.2, 0.4)
    found = attribution.maximize_activation(model, [2, 0], steps=5, rate=0.1, decay=0.25, limits=(-0.2, 0.4), seed=7)
    assert type(found) is np.ndarray and found.dtype == np.float64
    close(found, x)
    one = attribution.maximize_activation(model, 2, steps=1, rate=0.1, decay=0.0, start=np.ones(4))
    close(one, 1 + 0.1 * weight.T[2:] / np.sqrt((weight[:, 2] ** 2).mean()))
    again = attribution.maximize_activation(model, [2, 0], steps=1, start=np.stack([np.ones(4), np.zeros(4)]))
    assert again.shape == (2, 4)


@pytest.mark.parametrize(
    ("layer", "units"), [("first", [3, 0]), (2, [1, 2]), ("5", [2, 0]), (7, [5, 3]), (None, [3, 1])]
)
def test_the_direction_is_the_gradient_of_the_mean_of_a_unit(backend, layer, units):
    model = cnn(backend)
    name = "8" if layer is None else str(layer)

    def activation(x):
        outputs = model.activations(x)[name]
        return outputs.reshape(2, -1, outputs.shape[-1]).mean(axis=1)[np.arange(2), units]

    start = IMAGES[:2]
    found = attribution.maximize_activation(model, units, layer, steps=1, rate=1.0, decay=0.0, start=start)
    grad = slopes(activation, start)
    close(found - start, grad / np.sqrt((grad**2).mean(axis=(1, 2, 3), keepdims=True)), 1e-6)
    many = attribution.maximize_activation(model, units, layer, steps=20, rate=0.1)
    assert (activation(many) > activation(np.zeros_like(many)) + 0.01).all()


def test_the_gradient_of_a_unit_has_no_part_of_the_scores_that_skip_its_layer(backend):
    skipped = layers.Residual(layers.Dense(4), layers.Tanh())
    model = net(skipped, layers.Dense(3), shape=(4,), backend=backend)
    grad, start = model.state_dict()["0.0.weight"][:, 1], RNG.normal(size=4)
    found = attribution.maximize_activation(model, 1, "0.0", steps=1, rate=1.0, decay=0.0, start=start)
    close(found - start, [grad / np.sqrt((grad**2).mean())])


def test_the_inputs_are_determined_by_the_seed_on_all_devices(backend):
    options = {"steps": 4, "limits": (0, 1)}
    found = attribution.maximize_activation(cnn(backend), 1, **options)
    close(found, attribution.maximize_activation(cnn(), 1, **options), 1e-7)
    np.testing.assert_array_equal(found, attribution.maximize_activation(cnn(backend), 1, **options))
    assert found.shape == (1, 8, 6, 2) and found.min() >= 0 and found.max() <= 1
    assert abs(found - attribution.maximize_activation(cnn(backend), 1, seed=1, **options)).max() > 1e-3
    any_seed = [attribution.maximize_activation(cnn(), 1, seed=None, **options) for _ in range(2)]
    assert (any_seed[0] != any_seed[1]).any()


def test_a_unit_without_a_gradient_leaves_the_input_as_it_is():
    model = net(layers.Dense(2, weight_initializer="zeros"), shape=(3,))
    start = np.ones(3)
    np.testing.assert_array_equal(attribution.maximize_activation(model, 1, start=start, decay=0.0), start[None])


# Principal components


def test_principal_components_are_those_of_the_singular_values(backend):
    model = cnn(backend)
    values = RNG.normal(size=(20, 3, 2)) @ np.array([[2.0, 0.5], [0.0, 1.0]])
    rows = values.reshape(20, 6)
    _, lengths, expected = np.linalg.svd(rows - rows.mean(axis=0))
    for given in (values, backend.asarray(values)):
        found = attribution.principal_components(given, 3)
        assert found.points.shape == (20, 3) and found.components.shape == (3, 6) and found.mean.shape == (6,)
        close(abs(found.components), abs(expected[:3]))
        close(found.points, (rows - rows.mean(axis=0)) @ found.components.T)
        close(found.explained, lengths[:3] ** 2 / (lengths**2).sum())
        assert (found.components[np.arange(3), abs(found.components).argmax(axis=1)] > 0).all()
    everything = attribution.principal_components(values, 6)
    close(everything.points @ everything.components + everything.mean, rows)
    close(everything.explained.sum(), 1.0)
    close(attribution.principal_components(-values).components, found.components[:2])
    seen = attribution.principal_components(model.activations(IMAGES)["first"])
    assert seen.points.shape == (3, 2)
    words = net(layers.Embedding(9, 4), layers.Flatten(), layers.Dense(2), shape=(3,), backend=backend)
    close(attribution.principal_components(words[0].weight).points,
          attribution.principal_components(words.state_dict()["0.weight"]).points)  # fmt: skip


def test_values_that_are_all_equal_have_no_variance_to_explain():
    found = attribution.principal_components(np.ones((3, 2)))
    assert not found.points.any() and not found.explained.any()


# The model stays as it was


def attribute(model):
    """Call all functions."""
    attribution.saliency(model, IMAGES)
    attribution.occlusion(model, IMAGES, size=4)
    attribution.grad_cam(model, IMAGES)
    attribution.maximize_activation(model, 1, "first", steps=2)


def test_nothing_of_the_model_changes(backend):
    def trained(attributes):
        model = cnn(backend, dtype="float32")
        for _ in range(3):
            model.fit(np.tile(IMAGES, (8, 1, 1, 1)), np.arange(24) % 4, batch_size=6, verbose=0)
            model.forward(IMAGES, training=True)
            outputs = [model.predict(IMAGES) for _ in range(3)]
            before = model.state_dict(), gradients_of(model), model.history, model._state.step
            if attributes:
                attribute(model)
                assert_same_state(model.state_dict(), before[0])
                assert_same_state(gradients_of(model), before[1])
                assert (model.history, model._state.step) == before[2:]
                np.testing.assert_array_equal(model.predict(IMAGES), outputs[-1])
            model.backward(np.ones((3, 4)))
        outputs = backend.to_numpy(model.forward(IMAGES, training=True))
        gradients = {f"gradient of {name}": grad for name, grad in gradients_of(model).items()}
        return {**model.state_dict(), **gradients, "outputs": outputs}

    assert_same_state(trained(attributes=True), trained(attributes=False))


def test_models_in_mixed_precision_are_differentiated_in_their_dtype(gpu):
    require_precision(gpu, "float16")
    model = net(layers.Dense(3), shape=(5,), backend=gpu, dtype="float32", precision="float16")
    found = attribution.saliency(model, RNG.normal(size=(1, 5)), 1)
    np.testing.assert_array_equal(found, model.state_dict()["0.weight"].T[[1]])
    assert model.precision == model.context.precision == "float16"


def test_frozen_models_and_layers_of_users_keep_their_state():
    class Square(layers.Layer):
        def forward(self, x):
            self.work.x = x
            return x * x

        def backward(self, grad_y):
            return 2.0 * self.work.x * grad_y

    model = net(Square(), layers.Dense(3), layers.Softmax(), shape=(4,))
    model.trainable = False
    x, weight = RNG.normal(size=(2, 4)), model.state_dict()["1.weight"]
    for _ in range(2):  # the first pass of such a layer is audited
        close(attribution.saliency(model, x, [2, 0]), 2 * x * weight.T[[2, 0]])
        close(attribution.maximize_activation(model, 1, 0, steps=1, rate=0.1, decay=0.0, start=[1.0, 2, 3, -4]),
              [[1, 2.2, 3, -4]])  # fmt: skip
    assert not model.trainable and not [p for p in model.parameters if p.trainable]


def test_a_callback_may_attribute_a_running_fit_and_so_may_another_thread(backend):
    def attributes(callback, model):
        attribute(model)
        seen.append(attribution.saliency(model, IMAGES))

    results = []
    for given in ([], [Do(attributes, "on_epoch_end")]):
        seen, model = [], cnn(backend, dtype="float32")
        model.fit(IMAGES, np.arange(3), epochs=4, callbacks=given, verbose=0)
        results.append(model.state_dict())
    assert len(seen) == 4 and (seen[0] != seen[3]).any()
    assert_same_state(*results)

    model, running, errors = cnn(backend, dtype="float32"), threading.Event(), []

    def beside():
        running.wait(20)
        try:
            for _ in range(3):
                attribute(model)
        except Exception as error:
            errors.append(error)

    class Signals(callbacks.Callback):
        def on_epoch_end(self, model, epoch, logs):
            running.set()
            while thread.is_alive() and epoch == 3:
                model.predict(IMAGES)

    thread = threading.Thread(target=beside)
    thread.start()
    model.fit(IMAGES, np.arange(3), epochs=4, callbacks=[Signals()], verbose=0)
    thread.join(20)
    assert not errors and not thread.is_alive()
    assert_same_state(model.state_dict(), results[0])


# Errors


def small(*stack, shape=(4,)):
    return net(*stack, layers.Dense(3), shape=shape)


def two_outputs():
    x = xpnet.Input(4)
    return xpnet.Model(x, [layers.Dense(2, name="kind")(x), layers.Dense(2)(x)], backend="cpu")


def with_an_inner_layer_of_two_outputs():
    x = xpnet.Input(4)
    return xpnet.Model(x, layers.Add()(two_outputs()(x)), "cpu")


class SkipsLast(xpnet.Sequential):
    def forward(self, x, training=False):
        return self.layers[0].forward(x)

    def backward(self, grad_output, input_grad=True):
        return self.layers[0].backward(grad_output)


def tokens_elsewhere():
    x = xpnet.Input((3,))
    return xpnet.Model(x, layers.Dense(2)(layers.Flatten()(layers.Embedding(5, 2)(layers.Reshape((3,))(x)))), "cpu")


X = np.ones((2, 4))
saliency, occlusion, grad_cam = attribution.saliency, attribution.occlusion, attribution.grad_cam
maximize, components = attribution.maximize_activation, attribution.principal_components


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: saliency(layers.Dense(2), X), ArgumentTypeError, "saliency: model must be an xpnet.Sequential"),
        (lambda: saliency(xpnet.Sequential([layers.Dense(2)]), X), StateError, "not built yet.*give it input_shape"),
        (lambda: saliency(two_outputs(), X), ArgumentError, "2 outputs.*output_of\\('kind'\\)"),
        (lambda: saliency(net(layers.Dense(2), shape=(3, 4)), X), ArgumentError, "one score per class.*N, 3, 2"),
        (lambda: saliency(small(), X[:, :3]), ShapeError, "x must have shape"),
        (lambda: saliency(small(), X, 3), ArgumentError, "saliency: target must be an integer from 0 to 2.*not 3"),
        (lambda: saliency(small(), X, -1), ArgumentError, "target must be"),
        (lambda: saliency(small(), X, [0, 1, 2]), ShapeError, "one for each of the 2 samples.*\\(3,\\)"),
        (lambda: saliency(small(), X, [0, 3]), DataError, "target must be from 0 to 2, but is from 0 to 3"),
        (lambda: saliency(small(), X, np.eye(3)[:2]), ArgumentTypeError, "target must be integers, not float64"),
        (lambda: saliency(small(), X, "seven"), ArgumentTypeError, "target"),
        (lambda: saliency(small(), X, targets=1), ArgumentTypeError, "Did you mean 'target'"),
        (lambda: saliency(small(), X, as_device=1), ArgumentError, "as_device must be True or False"),
        (lambda: saliency(tokens_elsewhere(), [[1, 2, 3]]), ArgumentError, "integers.*layer 0 \\(Reshape\\) reads"),
        (lambda: occlusion(small(), X), ArgumentTypeError, "occlusion: needs size"),
        (lambda: occlusion(small(), X, size=5), ArgumentError, "at most the lengths of the axes, \\(4,\\)"),
        (lambda: occlusion(small(), X, size=0), ArgumentError, "size must be an integer of at least 1"),
        (lambda: occlusion(small(), X, size=(1, 1)), ArgumentError, "size must be an integer"),
        (lambda: occlusion(small(layers.Flatten(), shape=(2, 2)), np.ones((1, 2, 2)), size=1), ArgumentError,
         "\\(height, width\\) if they are images, or \\(steps, None\\) if they are sequences, not 1"),
        (lambda: occlusion(small(layers.Flatten(), shape=(2, 2, 1, 1)), np.ones((1, 2, 2, 1, 1)), size=1), ShapeError,
         "cannot replace parts of inputs"),
        (lambda: occlusion(small(), X, size=2, stride=3), ArgumentError, "at most the size, \\(2,\\), not 3"),
        (lambda: occlusion(small(), X, size=2, value=np.nan), ArgumentError, "value must be a finite number"),
        (lambda: occlusion(cnn(), IMAGES, size=(2, 2, 2)), ArgumentError, "size must be.*two"),
        (lambda: occlusion(tokens_elsewhere(), [[1, 2, 3]], size=1, value=5), DataError, "value holds 5"),
        (lambda: occlusion(tokens_elsewhere(), [[1, 2, 3]], size=1, value=0.5), ArgumentError, "must be an integer"),
        (lambda: grad_cam(small(), X), ArgumentError, "no convolution.*Give layer="),
        (lambda: grad_cam(cnn(), IMAGES, layer="last"), ArgumentError, "unknown layer 'last'.*first"),
        (lambda: grad_cam(cnn(), IMAGES, layer=99), PositionError, "there is no layer 99"),
        (lambda: grad_cam(cnn(), IMAGES, layer=1.5), ArgumentTypeError, "layer must be a layer of the model, its name"),
        (lambda: grad_cam(cnn(), IMAGES, layer=layers.Conv2D(2, 3)), ArgumentError, "is not a layer of this model"),
        (lambda: grad_cam(cnn(), IMAGES, layer=cnn()[0]), ArgumentError, "is not a layer of this model"),
        (lambda: grad_cam(cnn(), IMAGES, layer=-1), ShapeError, "layer 8 \\(Dense\\) are \\(N, 4\\)"),
        (lambda: grad_cam(small(layers.Reshape((2, 2, 1)), layers.Conv2D(1, 1), layers.Flatten()), X), ShapeError,
         "images"),
        (lambda: maximize(small(), 3), DataError, "target must be from 0 to 2"),
        (lambda: maximize(small(), None), ArgumentTypeError, "target"),
        (lambda: maximize(small(), [[0]]), ShapeError, "one unit or several"),
        (lambda: maximize(small(), []), DataError, "target is empty"),
        (lambda: maximize(cnn(), 4, "first"), DataError, "target must be from 0 to 3"),
        (lambda: maximize(small(), 0, steps=0), ArgumentError, "steps must be"),
        (lambda: maximize(small(), 0, rate=0), ArgumentError, "rate must be"),
        (lambda: maximize(small(), 0, decay=1), ArgumentError, "decay must be"),
        (lambda: maximize(small(), 0, limits=1), ArgumentError, "limits must be \\(low, high\\)"),
        (lambda: maximize(small(), 0, limits=(1, 0)), ArgumentError, "limits: high must be"),
        (lambda: maximize(small(), 0, seed=-1), ArgumentError, "seed must be"),
        (lambda: maximize(small(), [0, 1], start=np.ones((3, 4))), ShapeError, "one for each of the 2 targets"),
        (lambda: maximize(small(), 0, start=np.ones(3)), ShapeError, "start must be one input.*N, 4.*\\(3,\\)"),
        (lambda: maximize(small(layers.GRU(2, return_sequences=False), shape=(None, 2)), 0), ArgumentError, "start="),
        (lambda: maximize(tokens_elsewhere(), 0), ArgumentError, "the inputs are integers"),
        (lambda: maximize(small(), 0, start=[np.nan] * 4), StateError, "NaN or infinite"),
        (lambda: maximize(SkipsLast([layers.Dense(4), layers.Dense(4)], (4,), "cpu"), 0, 1), StateError, "did not run"),
        (lambda: maximize(with_an_inner_layer_of_two_outputs(), 0, 0), ShapeError, "one output, but .* has 2"),
        (lambda: components(np.ones(4)), DataError, "two or more samples"),
        (lambda: components(np.ones((1, 4))), DataError, "two or more samples"),
        (lambda: components([[1.0, np.nan], [1.0, 2.0]]), DataError, "NaN or infinity"),
        (lambda: components(np.ones((3, 4)), 4), ArgumentError, "n must be an integer from 1 to 3, not 4"),
        (lambda: components([["a"], ["b"]]), ArgumentTypeError, "values must be an array of real numbers"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("call", [
    lambda model, x: occlusion(model, x, size=1), grad_cam, lambda model, x: maximize(model, 0)
])  # fmt: skip
def test_several_inputs_are_refused_where_one_is_needed(call):
    a, b = xpnet.Input(4), xpnet.Input(4)
    model = xpnet.Model([a, b], layers.Dense(2)(layers.Add()([a, b])), "cpu")
    with pytest.raises(ArgumentError, match="has 2 inputs, but must have one"):
        call(model, [X, X])
