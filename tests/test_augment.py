"""Random distortions of images: interpolated values, gradients and random draws."""

import copy
import math

import numpy as np
import pytest
from names import stable_repr
from small_models import assert_reproducible
from strict import StrictBackend

import xpnet
from xpnet import augment, layers, losses, optimizers
from xpnet.augment import (
    ElasticDistortion,
    GaussianNoise,
    MixUp,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomFlip,
)
from xpnet.backends import get_backend
from xpnet.errors import ArgumentError, ShapeError


class Fixed(augment.Distortion):
    """A custom distortion with fixed positions (rows, H, W)."""

    def __init__(self, vertical, horizontal):
        self.vertical, self.horizontal = vertical, horizontal

    def positions(self, rows):
        host = (self.vertical[:rows], self.horizontal[:rows])
        return tuple(self.backend.asarray(a, dtype=self.context.dtype) for a in host)


def built(layer, backend, shape, dtype="float32", seed=0, training=True):
    layer.build(shape, backend=backend, dtype=dtype, seed=seed)
    layer.context.training = training
    return layer


def distorted(layer, backend, x, **kwargs):
    """The output of this layer in training, built for x outside a model, on the host."""
    return backend.to_numpy(built(layer, backend, x.shape[1:], **kwargs).forward(backend.asarray(x)))


def with_noise(layer, backend, draws):
    """The layer with these numbers instead of its noise."""
    layer.uniform = lambda rows, *shape: backend.asarray(np.resize(draws, (rows, *shape)).astype("float32"))
    return layer


def random_positions(rng, rows, height, width, spread=2.0):
    """Positions near each pixel, many of them outside the image."""
    v, h = np.mgrid[:height, :width]
    return [a + rng.normal(0, spread, (rows, height, width)) for a in (v, h)]


def interpolated(x, vertical, horizontal):
    """Bilinear interpolation of x (N, H, W, C) by its definition, pixel by pixel, in float64."""
    y = np.zeros(x.shape)
    for n, i, j in np.ndindex(x.shape[:3]):
        v, h = vertical[n, i, j], horizontal[n, i, j]
        for a, b in np.ndindex(x.shape[1:3]):
            y[n, i, j] += max(0.0, 1 - abs(v - a)) * max(0.0, 1 - abs(h - b)) * x[n, a, b]
    return y


DISTORTIONS = [RandomAffine(2.5, 30, 0.3, 20), RandomAffine((1, 2), 5, (0.1, 0.2)), ElasticDistortion(8.0, 1.5)]
OTHERS = [
    RandomFlip(), RandomFlip(vertical=True), RandomCrop(2), RandomCrop((1, 2), (4, 6)), RandomErasing(0.8, (0.1, 0.5)),
    GaussianNoise(0.5), MixUp(0.4),
]  # fmt: skip
ALL = [*DISTORTIONS, *OTHERS]


def unbuilt_copy(layer):
    return type(layer)(**layer.get_config())


# Interpolation


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (6, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "uint8"])
def test_interpolation_equals_a_loop(backend, rng, shape, dtype):
    x = (255 * rng.random((4, *shape))).astype(dtype)
    v, h = random_positions(rng, 4, *shape[:2])
    y = distorted(Fixed(v, h), backend, x, dtype="float64")
    assert y.shape == x.shape
    np.testing.assert_allclose(
        y, interpolated(x.reshape(4, *shape[:2], -1), v, h).reshape(x.shape), rtol=1e-12, atol=1e-10
    )


def test_pixels_outside_the_image_are_zero_and_do_not_reach_other_images(backend):
    x = np.ones((3, 2, 2), np.float32)
    x[0], x[2] = np.nan, np.nan
    v = np.tile(np.array([[-1e9, 1e9], [2.0, 0.0]]), (3, 1, 1))
    h = np.tile(np.array([[0.0, 1.0], [1.0, 2.0]]), (3, 1, 1))
    assert (distorted(Fixed(v, h), backend, x)[1] == 0).all()


@pytest.mark.parametrize("layer", [layer for layer in ALL if getattr(layer, "size", None) is None], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_images_do_not_change_outside_training(backend, rng, layer, dtype):
    x = (255 * rng.random((3, 6, 5, 1))).astype(dtype)
    layer = built(unbuilt_copy(layer), backend, x.shape[1:], training=False)
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, x)
    grad = backend.asarray(y)
    np.testing.assert_array_equal(backend.to_numpy(layer.backward(grad)), y)


@pytest.mark.parametrize("layer", [RandomAffine(), ElasticDistortion(0.0, 2.0)], ids=repr)
def test_ranges_of_zero_do_not_change_images(backend, rng, layer):
    x = rng.normal(size=(3, 6, 5)).astype("float32")
    np.testing.assert_array_equal(distorted(unbuilt_copy(layer), backend, x), x)


def test_a_shift_by_whole_pixels_moves_pixels_exactly(backend, rng):
    x = rng.normal(size=(2, 6, 7, 2)).astype("float32")
    y = distorted(with_noise(RandomAffine((2, 3)), backend, [1, -1, 0, 0, 0, 0]), backend, x)
    np.testing.assert_array_equal(y[:, 2:, :-3], x[:, :-2, 3:])
    assert not y[:, :2].any()
    assert not y[:, :, -3:].any()


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_rotation_by_90_degrees_equals_numpy_rot90(backend, rng, size, sign):
    x = rng.normal(size=(2, size, size)).astype("float32")
    y = distorted(with_noise(RandomAffine(rotation=90), backend, [0, 0, sign, 0, 0, 0]), backend, x)
    np.testing.assert_allclose(y, np.rot90(x, sign, axes=(1, 2)), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "draws", "positions"),
    [
        (RandomAffine(scale=1.0), [0, 0, 0, 1, 0, 0], lambda v, h: (v / 2, h / 2)),
        (RandomAffine(scale=1.0), [0, 0, 0, -1, 1, 0], lambda v, h: (2 * v, 2 * h)),
        (RandomAffine(scale=(1.0, 3.0)), [0, 0, 0, -1, 1, 0], lambda v, h: (2 * v, h / 4)),
        (RandomAffine(shear=45), [0, 0, 0, 0, 0, 1], lambda v, h: (v, h + v)),
        (RandomAffine(shift=0.5), [-0.5, 1, 0, 0, 0, 0], lambda v, h: (v + 0.25, h - 0.5)),
        (RandomAffine(2, 90, 1.0, 45), [0, 1, 1, 1, 0, 1], lambda v, h: ((h - 2) / 2, (h - 2) / 2 - v / 2)),
    ],
    ids=stable_repr,
)
def test_random_affine_is_an_affine_map_about_the_center(backend, layer, draws, positions):
    layer = with_noise(built(unbuilt_copy(layer), backend, (5, 9)), backend, draws)
    v, h = np.mgrid[-2:3, -4:5]
    for got, expected, center in zip(layer.positions(2), positions(v, h), (2, 4), strict=True):
        np.testing.assert_allclose(backend.to_numpy(got), np.tile(expected + center, (2, 1, 1)), atol=1e-5)


def test_elastic_displacements_are_noise_smoothed_by_a_gaussian(backend, rng):
    noise, sigma = rng.uniform(-1, 1, (3, 2, 12, 9)), 1.5
    layer = with_noise(built(ElasticDistortion(10.0, sigma), backend, (12, 9)), backend, noise)
    # The integral of a Gaussian over each pixel, by the midpoint rule with a thousand strips per pixel.
    strips = (np.arange(-500, 500) + 0.5) / 1000
    share = [np.exp(-(((d + strips) / sigma) ** 2) / 2).mean() / (sigma * math.sqrt(2 * math.pi)) for d in range(12)]
    by_height, by_width = ([[share[abs(i - j)] for j in range(n)] for i in range(n)] for n in (12, 9))
    field = 10.0 * np.einsum("ip,ncpq,qj->cnij", by_height, noise, by_width)
    for got, displacement, grid in zip(layer.positions(3), field, np.mgrid[:12, :9], strict=True):
        np.testing.assert_allclose(backend.to_numpy(got), grid + displacement, rtol=1e-4, atol=1e-4)


# backward


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 3)], ids=str)
def test_backward_is_the_adjoint_of_forward(backend, rng, shape):
    layer = built(Fixed(*random_positions(rng, 4, *shape[:2])), backend, shape, dtype="float64")
    for rows in (4, 2):  # a smaller batch must not use values of the larger one before it
        x, grad = rng.normal(size=(2, rows, *shape))
        y = backend.to_numpy(layer.forward(backend.asarray(x)))
        grad_x = backend.to_numpy(layer.backward(backend.asarray(grad)))
        assert grad_x.shape == x.shape
        assert np.vdot(y, grad) == pytest.approx(np.vdot(x, grad_x), rel=1e-12)


@pytest.mark.parametrize("layer", ALL, ids=repr)
def test_gradients_equal_finite_differences(backend, rng, layer):
    model = xpnet.Sequential(
        [layers.Dense(2), unbuilt_copy(layer), layers.Flatten(), layers.Dense(3)],
        input_shape=(5, 6, 1),
        backend=backend,
    )
    x, y = rng.normal(size=(4, 5, 6, 1)), rng.normal(size=(4, 3))
    assert max(xpnet.check_gradients(model, x, y, inputs=True).values()) < 1e-6


def test_the_input_gradient_is_computed_only_if_wanted(backend):
    layer, x = built(RandomAffine(1), backend, (3, 3)), backend.asarray(np.ones((1, 3, 3), np.float32))
    layer.forward(x)
    layer.wants_input_grad = False
    assert layer.backward(x) is None


# Random draws


def images(layer, backend, x, seed=0, step=0, first_row=0, index=0):
    """The output of a model in which the layer has this index."""
    model = xpnet.Sequential(
        [*(layers.Identity() for _ in range(index)), unbuilt_copy(layer)], x.shape[1:], backend=backend, seed=seed
    )
    model.context.step, model.context.first_row = step, first_row
    return backend.to_numpy(model.forward(x, training=True))


@pytest.mark.parametrize("layer", ALL, ids=repr)
def test_images_depend_only_on_seed_layer_step_and_row(backend, rng, layer):
    x = rng.normal(size=(16, 9, 9)).astype("float32")
    first = images(layer, backend, x)
    np.testing.assert_array_equal(images(layer, backend, x), first)
    np.testing.assert_allclose(images(layer, get_backend("cpu"), x), first, atol=1e-4)
    for change in ({"seed": 1}, {"step": 1}, {"index": 1}, {"first_row": 16}):
        differ = np.abs(images(layer, backend, x, **change) - first).max(axis=(1, 2)) > 0.1
        assert differ.all() if layer in DISTORTIONS else differ.any(), change


@pytest.mark.parametrize("layer", [layer for layer in ALL if not isinstance(layer, MixUp)], ids=repr)
def test_a_part_of_a_batch_gets_the_distortions_of_the_whole_batch(backend, rng, layer):
    x = rng.normal(size=(8, 9, 9)).astype("float32")
    whole, part = images(layer, backend, x), images(layer, backend, x[3:6], first_row=3)
    np.testing.assert_allclose(part, whole[3:6], atol=1e-4)


def test_each_image_of_a_batch_gets_its_own_distortion(backend, rng):
    x = np.tile(rng.normal(size=(9, 9)), (6, 1, 1))
    for layer in DISTORTIONS:
        y = images(layer, backend, x)
        assert min(np.abs(y[i] - y[j]).max() for i in range(6) for j in range(i)) > 0.1


def test_noise_is_uniform_from_minus_one_to_one(backend):
    noise = backend.to_numpy(built(RandomAffine(), backend, (2, 2)).uniform(500, 40))
    assert -1 <= noise.min() < -0.999 < 0.999 < noise.max() <= 1
    assert abs(noise.mean()) < 5 / math.sqrt(3 * noise.size)
    assert noise.var() == pytest.approx(1 / 3, rel=0.03)
    assert np.abs(np.corrcoef(noise.T) - np.eye(40)).max() < 0.25


def test_random_maps_fill_their_ranges_and_stay_within_them(backend):
    rows, center = 2000, 2
    layer = built(RandomAffine((1.0, 3.0), 0.0, (0.5, 0.25)), backend, (5, 5))
    v, h = (backend.to_numpy(a).astype("float64") for a in layer.positions(rows))
    taller, wider = 1 / (v[:, 1, 0] - v[:, 0, 0]), 1 / (h[:, 0, 1] - h[:, 0, 0])
    down, right = -(v[:, center, 0] - center) * taller, -(h[:, 0, center] - center) * wider
    for values, low, high in ((taller, 1 / 1.5, 1.5), (wider, 0.8, 1.25), (down, -1, 1), (right, -3, 3)):
        assert low - 1e-5 <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-5
    assert np.abs(np.corrcoef([taller, wider, down, right]) - np.eye(4)).max() < 0.12

    turned = built(RandomAffine(rotation=30.0), backend, (5, 5)).positions(rows)
    angle = np.degrees(np.arcsin(backend.to_numpy(turned[0])[:, 0, 1] - backend.to_numpy(turned[0])[:, 0, 0]))
    assert 29.5 < np.abs(angle).max() < 30.001
    assert abs(angle.mean()) < 2


def test_elastic_displacements_have_the_documented_standard_deviation(backend):
    layer = built(ElasticDistortion(34, 4), backend, (28, 28))
    for got, grid in zip(layer.positions(400), np.mgrid[:28, :28], strict=True):
        displaced = backend.to_numpy(got) - grid
        assert displaced[:, 10:18, 10:18].std() == pytest.approx(34 / 4 / (2 * math.sqrt(3 * math.pi)), rel=0.1)
        assert displaced[:, 0, 0].std() < displaced[:, 14, 14].std()
        assert np.corrcoef(displaced[:, 14, 14], displaced[:, 14, 15])[0, 1] > 0.95
        assert abs(np.corrcoef(displaced[:, 2, 2], displaced[:, 25, 25])[0, 1]) < 0.2


# Work on the device


@pytest.mark.parametrize("layer", ALL, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_distortions_read_nothing_back_stay_float32_and_equal_the_reference(reference, rng, layer, dtype):
    strict = StrictBackend()
    x = (255 * rng.random((5, 8, 7, 2))).astype(dtype)
    results = []
    for backend in (strict, reference):
        copied = built(unbuilt_copy(layer), backend, x.shape[1:])
        grad = np.random.default_rng(1).normal(size=(5, *copied.output_shape)).astype("float32")
        inputs, grad_y = backend.asarray(x), backend.asarray(grad)
        with strict.no_host_reads(), strict.watch_dtypes() as seen:
            outputs = copied.forward(inputs), copied.backward(grad_y)
        assert np.dtype("float64") not in seen
        np.testing.assert_array_equal(backend.to_numpy(inputs), x)
        np.testing.assert_array_equal(backend.to_numpy(grad_y), grad)
        results.append([backend.to_numpy(a) for a in outputs])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == np.float32
        assert ours.tobytes() == theirs.tobytes()


# Models and files


def net(backend):
    return xpnet.Sequential(
        [RandomAffine((1, 0.5), 10, (0.1, 0.2), 5), ElasticDistortion(2, 1.5), RandomCrop(1), RandomFlip(),
         RandomErasing(0.1), layers.Rescale(1 / 16), GaussianNoise(0.05), MixUp(0.2), layers.Flatten(),
         layers.Dense(10)], input_shape=(8, 8), backend=backend
    )  # fmt: skip


def test_a_model_trains_on_distorted_integers_and_predicts_undistorted_ones(backend):
    x, y = (a[:300] for a in xpnet.datasets.digits())
    model = net(backend)
    history = model.fit(x, y, loss="softmax_cross_entropy", epochs=6, batch_size=32, verbose=0)
    assert history["loss"][-1] < history["loss"][0]
    plain = xpnet.Sequential(
        [layers.Rescale(1 / 16), layers.Flatten(), layers.Dense(10)], input_shape=(8, 8), backend=backend
    )
    for ours, theirs in zip(plain.parameters, model.parameters, strict=True):
        ours.value = theirs.value
    np.testing.assert_array_equal(model.predict(x), plain.predict(x))


def test_a_loaded_model_has_the_distortions_of_the_saved_one(backend, rng, tmp_path):
    model, x = net(backend), rng.integers(0, 17, (4, 8, 8)).astype("uint8")
    model.save(tmp_path / "m.safetensors")
    loaded = xpnet.load(tmp_path / "m.safetensors", backend=backend)
    one, two = (backend.to_numpy(m.forward(x, training=True)) for m in (model, loaded))
    np.testing.assert_array_equal(one, two)


def test_a_model_with_distortions_can_change_its_dtype(backend, rng):
    model, x = net(backend), rng.integers(0, 17, (4, 8, 8)).astype("uint8")
    before = backend.to_numpy(model.forward(x, training=True))
    model.to(backend, dtype="float64").context.step = 0  # for the noise of the first pass
    after = backend.to_numpy(model.forward(x, training=True))
    assert (before.dtype, after.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("layer", ALL, ids=repr)
def test_config_and_repr_reproduce_the_layer(layer):
    assert_reproducible(layer)
    assert unbuilt_copy(layer).get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomAffine(-1), ArgumentError, r"shift must be .* or two, \(vertical, horizontal\), not -1"),
        (lambda: RandomAffine((1, 2, 3)), ArgumentError, r"shift must be .*not \(1, 2, 3\)"),
        (lambda: RandomAffine((1, -2)), ArgumentError, r"shift must be .*not \(1, -2\)"),
        (lambda: RandomAffine(math.inf), ArgumentError, "shift must be .*not inf"),
        (lambda: RandomAffine("ab"), ArgumentError, "shift must be .*not 'ab'"),
        (lambda: RandomAffine(scale=None), ArgumentError, "scale must be .*not None"),
        (lambda: RandomAffine(rotation=(1, 2)), ArgumentError, r"rotation must be a number .* 1000000, not \(1, 2\)"),
        (lambda: RandomAffine(shear=90), ArgumentError, "shear must be a number of at least 0 and below 90, not 90"),
        (lambda: ElasticDistortion(-1, 4), ArgumentError, "alpha must be a number from 0 to 1000000, not -1"),
        (lambda: ElasticDistortion(34, 0), ArgumentError, "sigma must be a number above 0 and at most 1000000, not 0"),
        (lambda: RandomFlip(horizontal=1), ArgumentError, "RandomFlip: horizontal must be True or False, not 1"),
        (lambda: RandomCrop(-1), ArgumentError, "RandomCrop: padding must be an integer .*not -1"),
        (lambda: RandomCrop(size=0), ArgumentError, "RandomCrop: size must be an integer .*not 0"),
        (lambda: RandomCrop(size=9).build((8, 9)), ShapeError, r"expects images of at least \(9, 9\) pixels"),
        (lambda: RandomErasing(2), ArgumentError, "RandomErasing: rate must be a number from 0 to 1, not 2"),
        (lambda: RandomErasing(area=(0.5, 0.1)), ArgumentError, r"area must be a share or \(smallest, largest\)"),
        (lambda: RandomErasing(area=(0.5, 0.1, 0.2)), ArgumentError, r"area must be a share or"),
        (lambda: RandomErasing(area="a"), ArgumentError, r"area must be .*, or \(smallest, largest\), not 'a'"),
        (lambda: GaussianNoise(-1), ArgumentError, "GaussianNoise: deviation must be a number"),
        (lambda: MixUp(0), ArgumentError, "MixUp: alpha must be a number above 0"),
        (lambda: RandomErasing().build((4,)), ShapeError, r"expects \(N, height, width\)"),
        (lambda: RandomAffine(1).build((4,)), ShapeError, r"expects \(N, height, width\) or .*input is \(N, 4\)"),
        (lambda: RandomAffine(1).build((1, 2, 3, 4)), ShapeError, r"input is \(N, 1, 2, 3, 4\)"),
        (lambda: augment.Distortion().positions(1), NotImplementedError, r"Distortion must define positions\(rows\)"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numpy_scalars_as_settings_do_not_cause_float64(rng):
    number, strict = np.float64(0.25), StrictBackend()
    x = rng.normal(size=(3, 5, 5)).astype("float32")
    pair = np.array([0.25, 0.5])
    for layer in (RandomAffine(pair, number, pair, number), RandomAffine(number, scale=number),
                  ElasticDistortion(number, number), GaussianNoise(number), MixUp(number), RandomErasing(number, pair),
                  RandomErasing(number, number), RandomCrop(np.int64(1), np.array([2, 3]))):  # fmt: skip
        layer, inputs = built(layer, strict, (5, 5)), strict.asarray(x)
        with strict.watch_dtypes() as seen:
            layer.forward(inputs)
        assert np.dtype("float64") not in seen


# Flips, crops, rectangles and noise against plain NumPy


def uniform(rows, columns, seed=0):
    """The uniform numbers that a layer outside a model draws, in float64."""
    return (REFERENCE.random_bits((seed, 0, 0), rows, columns).astype("float64") + 0.5) / 2**32


REFERENCE = get_backend("cpu")


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_random_flip_mirrors_half_of_the_images(backend, rng, shape, dtype):
    x = (255 * rng.random((40, *shape))).astype(dtype)
    draws = uniform(40, 2) < 0.5
    assert 10 < draws[:, 0].sum() < 30
    for horizontal, vertical in ((True, False), (False, True), (True, True), (False, False)):
        want = x.copy()
        for n in range(40):
            if horizontal and draws[n, 0]:
                want[n] = want[n][:, ::-1]
            if vertical and draws[n, 1]:
                want[n] = want[n][::-1]
        layer = RandomFlip(horizontal=horizontal, vertical=vertical)
        np.testing.assert_array_equal(distorted(layer, backend, x), want)


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 2)], ids=str)
@pytest.mark.parametrize(("padding", "size"), [(2, None), (None, None), ((1, 3), None), (None, (4, 5)), (1, 8), (0, 6)])
def test_random_crop_cuts_a_window_out_of_the_padded_image(backend, rng, shape, padding, size):
    x, draws = rng.normal(size=(30, *shape)).astype("float32"), uniform(30, 2)
    pad = np.broadcast_to((4 if size is None else 0) if padding is None else padding, 2)
    window = shape[:2] if size is None else np.broadcast_to(size, 2)
    padded = np.pad(x, [(0, 0), *[(p, p) for p in pad], *[(0, 0)] * (len(shape) - 2)])

    def cut(image, top, left):
        return image[top : top + window[0], left : left + window[1]]

    last = [padded.shape[1] - window[0], padded.shape[2] - window[1]]
    want = [
        cut(image, int(u[0] * (last[0] + 1)), int(u[1] * (last[1] + 1))) for image, u in zip(padded, draws, strict=True)
    ]
    layer = RandomCrop(padding, size)
    np.testing.assert_array_equal(distorted(layer, backend, x), want)
    middle = distorted(unbuilt_copy(layer), backend, x, training=False)
    np.testing.assert_array_equal(middle, [cut(image, last[0] // 2, last[1] // 2) for image in padded])
    grad = rng.normal(size=middle.shape).astype("float32")
    for training in (True, False):  # ⟨y, g⟩ = ⟨x, ∂L/∂x⟩
        layer.context.training = training
        y = backend.to_numpy(layer.forward(backend.asarray(x)))
        grad_x = backend.to_numpy(layer.backward(backend.asarray(grad)))
        assert grad_x.shape == x.shape
        assert np.vdot(y, grad) == pytest.approx(np.vdot(x, grad_x), rel=1e-4)


def test_random_erasing_sets_a_rectangle_of_the_area_to_zero(backend):
    x = 1 + np.zeros((300, 20, 30, 2), "float32")
    y = distorted(RandomErasing(0.6, (0.1, 0.3)), backend, x)
    zeros = (y == 0).all(axis=3)
    np.testing.assert_array_equal(y, x * ~zeros[..., None])
    hit = zeros.any(axis=(1, 2))
    assert hit.mean() == pytest.approx(0.6, abs=0.1)
    for mask in zeros[hit]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        np.testing.assert_array_equal(mask, np.outer(rows, columns))
        for line in (rows, columns):  # one run of pixels
            assert np.abs(np.diff(line.astype(int))).sum() + line[0] + line[-1] == 2
    share = zeros[hit].mean(axis=(1, 2))
    assert 0.08 < share.min() < 0.12 and 0.25 < share.max() < 0.33
    ratios = [mask.any(axis=1).sum() / mask.any(axis=0).sum() for mask in zeros[hit]]
    assert min(ratios) < 0.5 and max(ratios) > 2
    assert (distorted(RandomErasing(1.0, 1.0), backend, x[:50]) == 0).all()
    assert not (distorted(RandomErasing(1.0, 0.0), backend, x[:50]) == 0).any()
    np.testing.assert_array_equal(distorted(RandomErasing(0.0), backend, x), x)


def test_gaussian_noise_is_normal_and_independent(backend):
    x = np.full((200, 7, 3), 5.0, "float32")
    z = (distorted(GaussianNoise(2.0), backend, x) - 5) / 2
    u = uniform(200, 22)
    radius, angle = np.sqrt(-2 * np.log(u[:, :11])), 2 * np.pi * u[:, 11:]
    want = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :21].reshape(200, 7, 3)
    np.testing.assert_allclose(z, want, atol=2e-5)
    assert abs(z.mean()) < 0.05 and z.std() == pytest.approx(1, abs=0.03)
    assert (np.abs(z) < 1.96).mean() == pytest.approx(0.95, abs=0.01)
    assert np.abs(np.corrcoef(z.reshape(200, -1).T) - np.eye(21)).max() < 0.3
    assert distorted(GaussianNoise(1.0), backend, np.zeros((3, 1), "float32")).shape == (3, 1)


# MixUp


def mixed_by_hand(layer, backend, a):
    """λ a_i + (1 - λ) a_j for an array of the host, with the shares and partners of the latest pass."""
    shares, partners = backend.to_numpy(layer.shares), backend.to_numpy(layer.partners)
    shares = shares.reshape(-1, *[1] * (a.ndim - 1)).astype("float64")
    return shares * a + (1 - shares) * a[partners]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_mixup_mixes_each_sample_with_a_partner(backend, rng, dtype):
    x = (255 * rng.random((9, 4, 3))).astype(dtype)
    layer = built(MixUp(0.7), backend, (4, 3))
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    np.testing.assert_allclose(y, mixed_by_hand(layer, backend, x), rtol=1e-5)
    partners = backend.to_numpy(layer.partners)
    np.testing.assert_array_equal(partners[partners], np.arange(9))
    steps = set()
    for step in range(40):
        layer.context.step = step
        layer.forward(backend.asarray(x))
        steps.add(int(backend.to_numpy(layer.partners)[0]))
    assert steps == set(range(9))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 8.0])
def test_the_shares_of_mixup_are_from_a_beta_distribution(backend, alpha):
    stats = pytest.importorskip("scipy.stats")
    layer = built(MixUp(alpha), backend, (1,), dtype="float64")
    layer.forward(backend.zeros((4000, 1), "float64"))
    shares = backend.to_numpy(layer.shares)
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).statistic < 0.03
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


LOSSES_OF_MIXUP = {
    "labels": (losses.SoftmaxCrossEntropy(), np.arange(12) % 3),
    "probabilities": (losses.SoftmaxCrossEntropy(0.1), np.eye(3)[np.arange(12) % 3]),
    "yes or no": (losses.BinaryCrossEntropy(), np.eye(3)[np.arange(12) % 3]),
    "a loss that is not linear in its targets": (losses.Huber(0.3), np.arange(36.0).reshape(12, 3) / 9),
    "a sum": (losses.HalfSquaredError("sum"), np.arange(36.0).reshape(12, 3) / 9),
}


@pytest.mark.parametrize("weights", [None, np.linspace(0, 2, 12)], ids=["", "weighted"])
@pytest.mark.parametrize("case", LOSSES_OF_MIXUP.values(), ids=LOSSES_OF_MIXUP.keys())
def test_mixup_mixes_the_loss_and_its_gradient(backend, rng, case, weights):
    (loss, y), x = case, rng.normal(size=(12, 4))
    model = xpnet.Sequential([MixUp(0.8), layers.Dense(3)], (4,), backend, seed=2, dtype="float64")
    plain = xpnet.Sequential([layers.Dense(3)], (4,), backend, seed=5, dtype="float64")
    plain.load_state_dict({name.replace("1.", "0."): a for name, a in model.state_dict().items()})
    logs = model.train_on_batch(x, y, loss, optimizers.SGD(0.0), metrics=[], sample_weight=weights)
    mixup = model.layers[0]
    shares, partners = backend.to_numpy(mixup.shares), backend.to_numpy(mixup.partners)
    outputs = plain.forward(mixed_by_hand(mixup, backend, x))
    w = np.ones(12) if weights is None else weights
    total, value, want_grad = w.sum(), 0.0, np.zeros((12, 3))
    for part, labels in ((shares * w, y), ((1 - shares) * w[partners], y[partners])):
        each = backend.to_numpy(loss.samples(backend, outputs, backend.asarray(labels)))
        grad = backend.to_numpy(loss.gradient(backend, outputs, backend.asarray(labels)))
        value += (part * each).sum()
        want_grad += part[:, None] * grad
    mixed_total = (shares * w + (1 - shares) * w[partners]).sum()
    summed = loss.reduction == "sum"
    plain.backward(want_grad / (1.0 if summed else total))
    assert logs["loss"] == pytest.approx(value if summed else value / mixed_total, rel=1e-12)
    for mine, theirs in zip(model.parameters, plain.parameters, strict=True):
        np.testing.assert_allclose(backend.to_numpy(mine.grad), backend.to_numpy(theirs.grad), rtol=1e-9, atol=1e-12)


def test_the_target_of_a_sample_of_weight_zero_does_not_count(backend, rng):
    x, y, weights = rng.normal(size=(8, 4)), np.arange(8) % 3, np.array([0, 1, 1, 0, 1, 1, 1, 1.0])
    results = []
    for labels in (y, np.where(weights, y, 2 - y)):
        model = xpnet.Sequential([MixUp(), layers.Dense(3)], (4,), backend, seed=2)
        model.fit(x, labels, epochs=3, batch_size=4, sample_weight=weights, verbose=0)
        results.append(model.state_dict())
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name])


def test_evaluation_does_not_mix(backend, rng):
    x, y = rng.normal(size=(8, 4)).astype("float32"), np.arange(8) % 3
    model = xpnet.Sequential([MixUp(), layers.Dense(3)], (4,), backend, seed=2)
    history = model.fit(x, y, epochs=2, batch_size=4, validation_data=(x, y), metrics=["auc"], verbose=0)
    assert history["val_loss"][-1] == pytest.approx(losses.SoftmaxCrossEntropy()(model.predict(x), y), rel=1e-5)
    assert model.evaluate(x, y)["loss"] == pytest.approx(history["val_loss"][-1], rel=1e-5)


def test_a_model_has_at_most_one_mixup():
    with pytest.raises(ArgumentError, match=r"layer 2 \(MixUp\): the model has a MixUp already"):
        xpnet.Sequential([MixUp(), layers.Dense(3), MixUp()], (4,))
    model = xpnet.Sequential([MixUp(), layers.Dense(3)], (4,))
    assert copy.deepcopy(model).context.mixup is not model.context.mixup
