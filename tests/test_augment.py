"""Random distortions of images: what they fetch from where, their gradient, and the draws behind them."""

import math

import numpy as np
import pytest
from names import shown
from strict import StrictBackend

import xpnet
from xpnet import augment, layers
from xpnet.augment import ElasticDistortion, RandomAffine
from xpnet.backends import get_backend
from xpnet.errors import ArgumentError, ShapeError


class Fixed(augment.Distortion):
    """Fetches from given positions (rows, H, W): a distortion of the user's own."""

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
    """What this layer, built alone for x, makes of x in training, on the host."""
    return backend.to_numpy(built(layer, backend, x.shape[1:], **kwargs).forward(backend.asarray(x)))


def drawn(layer, backend, draws):
    """The layer with these numbers for its noise."""
    layer.uniform = lambda rows, *shape: backend.asarray(np.resize(draws, (rows, *shape)).astype("float32"))
    return layer


def places(rng, rows, height, width, spread=2.0):
    """Positions around every pixel, many of them outside."""
    v, h = np.mgrid[:height, :width]
    return [a + rng.normal(0, spread, (rows, height, width)) for a in (v, h)]


def fetched(x, vertical, horizontal):
    """The definition, pixel by pixel, in float64: x (N, H, W, C)."""
    y = np.zeros(x.shape)
    for n, i, j in np.ndindex(x.shape[:3]):
        v, h = vertical[n, i, j], horizontal[n, i, j]
        for a, b in np.ndindex(x.shape[1:3]):
            y[n, i, j] += max(0.0, 1 - abs(v - a)) * max(0.0, 1 - abs(h - b)) * x[n, a, b]
    return y


MOVING = [RandomAffine(2.5, 30, 0.3, 20), RandomAffine((1, 2), 5, (0.1, 0.2)), ElasticDistortion(8.0, 1.5)]


def again(layer):
    return type(layer)(**layer.get_config())


# What is fetched from where.


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (6, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "uint8"])
def test_pixels_come_from_their_positions_as_a_slow_loop_fetches_them(backend, rng, shape, dtype):
    x = (255 * rng.random((4, *shape))).astype(dtype)
    v, h = places(rng, 4, *shape[:2])
    y = distorted(Fixed(v, h), backend, x, dtype="float64")
    assert y.shape == x.shape
    np.testing.assert_allclose(y, fetched(x.reshape(4, *shape[:2], -1), v, h).reshape(x.shape), rtol=1e-12, atol=1e-10)


def test_far_outside_is_nothing_and_reaches_no_other_image(backend):
    x = np.ones((3, 2, 2), np.float32)
    x[0], x[2] = np.nan, np.nan
    v = np.tile(np.array([[-1e9, 1e9], [2.0, 0.0]]), (3, 1, 1))
    h = np.tile(np.array([[0.0, 1.0], [1.0, 2.0]]), (3, 1, 1))
    assert (distorted(Fixed(v, h), backend, x)[1] == 0).all()


@pytest.mark.parametrize("layer", MOVING, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_outside_training_images_stay_as_they_are(backend, rng, layer, dtype):
    x = (255 * rng.random((3, 6, 5, 1))).astype(dtype)
    layer = built(again(layer), backend, x.shape[1:], training=False)
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, x)
    grad = backend.asarray(y)
    np.testing.assert_array_equal(backend.to_numpy(layer.backward(grad)), y)


@pytest.mark.parametrize("layer", [RandomAffine(), ElasticDistortion(0.0, 2.0)], ids=repr)
def test_ranges_of_zero_leave_images_as_they_are(backend, rng, layer):
    x = rng.normal(size=(3, 6, 5)).astype("float32")
    np.testing.assert_array_equal(distorted(again(layer), backend, x), x)


def test_a_shift_by_whole_pixels_moves_pixels_exactly(backend, rng):
    x = rng.normal(size=(2, 6, 7, 2)).astype("float32")
    y = distorted(drawn(RandomAffine((2, 3)), backend, [1, -1, 0, 0, 0, 0]), backend, x)
    np.testing.assert_array_equal(y[:, 2:, :-3], x[:, :-2, 3:])
    assert not y[:, :2].any()
    assert not y[:, :, -3:].any()


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_quarter_turn_is_numpys(backend, rng, size, sign):
    x = rng.normal(size=(2, size, size)).astype("float32")
    y = distorted(drawn(RandomAffine(rotation=90), backend, [0, 0, sign, 0, 0, 0]), backend, x)
    np.testing.assert_allclose(y, np.rot90(x, sign, axes=(1, 2)), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "draws", "place"),
    [
        (RandomAffine(scale=1.0), [0, 0, 0, 1, 0, 0], lambda v, h: (v / 2, h / 2)),
        (RandomAffine(scale=1.0), [0, 0, 0, -1, 1, 0], lambda v, h: (2 * v, 2 * h)),
        (RandomAffine(scale=(1.0, 3.0)), [0, 0, 0, -1, 1, 0], lambda v, h: (2 * v, h / 4)),
        (RandomAffine(shear=45), [0, 0, 0, 0, 0, 1], lambda v, h: (v, h + v)),
        (RandomAffine(shift=0.5), [-0.5, 1, 0, 0, 0, 0], lambda v, h: (v + 0.25, h - 0.5)),
        (RandomAffine(2, 90, 1.0, 45), [0, 1, 1, 1, 0, 1], lambda v, h: ((h - 2) / 2, (h - 2) / 2 - v / 2)),
    ],
    ids=shown,
)
def test_an_affine_map_about_the_centre(backend, layer, draws, place):
    layer = drawn(built(again(layer), backend, (5, 9)), backend, draws)
    v, h = np.mgrid[-2:3, -4:5]
    for got, wanted, centre in zip(layer.positions(2), place(v, h), (2, 4), strict=True):
        np.testing.assert_allclose(backend.to_numpy(got), np.tile(wanted + centre, (2, 1, 1)), atol=1e-5)


def test_elastic_displacements_are_the_noise_under_a_gaussian(backend, rng):
    noise, sigma = rng.uniform(-1, 1, (3, 2, 12, 9)), 1.5
    layer = drawn(built(ElasticDistortion(10.0, sigma), backend, (12, 9)), backend, noise)
    # A share of a Gaussian, by the midpoints of a thousand strips a pixel.
    strips = (np.arange(-500, 500) + 0.5) / 1000
    share = [np.exp(-(((d + strips) / sigma) ** 2) / 2).mean() / (sigma * math.sqrt(2 * math.pi)) for d in range(12)]
    by_height, by_width = ([[share[abs(i - j)] for j in range(n)] for i in range(n)] for n in (12, 9))
    field = 10.0 * np.einsum("ip,ncpq,qj->cnij", by_height, noise, by_width)
    for got, moved, grid in zip(layer.positions(3), field, np.mgrid[:12, :9], strict=True):
        np.testing.assert_allclose(backend.to_numpy(got), grid + moved, rtol=1e-4, atol=1e-4)


# The way back.


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 3)], ids=str)
def test_backward_is_the_adjoint(backend, rng, shape):
    layer = built(Fixed(*places(rng, 4, *shape[:2])), backend, shape, dtype="float64")
    for rows in (4, 2):  # a smaller batch after a larger one sees no leftovers
        x, grad = rng.normal(size=(2, rows, *shape))
        y = backend.to_numpy(layer.forward(backend.asarray(x)))
        grad_x = backend.to_numpy(layer.backward(backend.asarray(grad)))
        assert grad_x.shape == x.shape
        assert np.vdot(y, grad) == pytest.approx(np.vdot(x, grad_x), rel=1e-12)


@pytest.mark.parametrize("layer", MOVING, ids=repr)
def test_gradients(backend, rng, layer):
    model = xpnet.Sequential(
        [layers.Dense(2), again(layer), layers.Flatten(), layers.Dense(3)], input_shape=(5, 6, 1), backend=backend
    )
    x, y = rng.normal(size=(4, 5, 6, 1)), rng.normal(size=(4, 3))
    assert max(xpnet.check_gradients(model, x, y, inputs=True).values()) < 1e-6


def test_no_gradient_is_made_that_nobody_reads(backend):
    layer, x = built(RandomAffine(1), backend, (3, 3)), backend.asarray(np.ones((1, 3, 3), np.float32))
    layer.forward(x)
    layer.wants_input_grad = False
    assert layer.backward(x) is None


# The draws.


def images(layer, backend, x, seed=0, step=0, first_row=0, place=0):
    """What stands behind `place` identities makes of x, in a model."""
    model = xpnet.Sequential(
        [*(layers.Identity() for _ in range(place)), again(layer)], x.shape[1:], backend=backend, seed=seed
    )
    model.context.step, model.context.first_row = step, first_row
    return backend.to_numpy(model.forward(x, training=True))


@pytest.mark.parametrize("layer", MOVING, ids=repr)
def test_the_same_images_for_the_same_seed_layer_and_step_on_every_device(backend, rng, layer):
    x = rng.normal(size=(8, 9, 9)).astype("float32")
    first = images(layer, backend, x)
    np.testing.assert_array_equal(images(layer, backend, x), first)
    np.testing.assert_allclose(images(layer, get_backend("cpu"), x), first, atol=1e-4)
    for change in ({"seed": 1}, {"step": 1}, {"place": 1}, {"first_row": 8}):
        assert (np.abs(images(layer, backend, x, **change) - first).max(axis=(1, 2)) > 0.1).all(), change


@pytest.mark.parametrize("layer", MOVING, ids=repr)
def test_a_shard_sees_the_images_of_the_whole(backend, rng, layer):
    x = rng.normal(size=(8, 9, 9)).astype("float32")
    whole, shard = images(layer, backend, x), images(layer, backend, x[3:6], first_row=3)
    np.testing.assert_allclose(shard, whole[3:6], atol=1e-4)


def test_the_images_of_one_batch_are_distorted_each_in_its_way(backend, rng):
    x = np.tile(rng.normal(size=(9, 9)), (6, 1, 1))
    for layer in MOVING:
        y = images(layer, backend, x)
        assert min(np.abs(y[i] - y[j]).max() for i in range(6) for j in range(i)) > 0.1


def test_noise_is_uniform_from_minus_one_to_one(backend):
    noise = backend.to_numpy(built(RandomAffine(), backend, (2, 2)).uniform(500, 40))
    assert -1 <= noise.min() < -0.999 < 0.999 < noise.max() <= 1
    assert abs(noise.mean()) < 5 / math.sqrt(3 * noise.size)
    assert noise.var() == pytest.approx(1 / 3, rel=0.03)
    assert np.abs(np.corrcoef(noise.T) - np.eye(40)).max() < 0.25


def test_drawn_maps_fill_their_ranges_and_stay_within(backend):
    rows, centre = 2000, 2
    layer = built(RandomAffine((1.0, 3.0), 0.0, (0.5, 0.25)), backend, (5, 5))
    v, h = (backend.to_numpy(a).astype("float64") for a in layer.positions(rows))
    taller, wider = 1 / (v[:, 1, 0] - v[:, 0, 0]), 1 / (h[:, 0, 1] - h[:, 0, 0])
    down, right = -(v[:, centre, 0] - centre) * taller, -(h[:, 0, centre] - centre) * wider
    for values, low, high in ((taller, 1 / 1.5, 1.5), (wider, 0.8, 1.25), (down, -1, 1), (right, -3, 3)):
        assert low - 1e-5 <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-5
    assert np.abs(np.corrcoef([taller, wider, down, right]) - np.eye(4)).max() < 0.12

    turned = built(RandomAffine(rotation=30.0), backend, (5, 5)).positions(rows)
    angle = np.degrees(np.arcsin(backend.to_numpy(turned[0])[:, 0, 1] - backend.to_numpy(turned[0])[:, 0, 0]))
    assert 29.5 < np.abs(angle).max() < 30.001
    assert abs(angle.mean()) < 2


def test_elastic_displacements_have_the_spread_that_the_manual_says(backend):
    layer = built(ElasticDistortion(34, 4), backend, (28, 28))
    for got, grid in zip(layer.positions(400), np.mgrid[:28, :28], strict=True):
        moved = backend.to_numpy(got) - grid
        assert moved[:, 10:18, 10:18].std() == pytest.approx(34 / 4 / (2 * math.sqrt(3 * math.pi)), rel=0.1)
        assert moved[:, 0, 0].std() < moved[:, 14, 14].std()
        assert np.corrcoef(moved[:, 14, 14], moved[:, 14, 15])[0, 1] > 0.95
        assert abs(np.corrcoef(moved[:, 2, 2], moved[:, 25, 25])[0, 1]) < 0.2


# On the device.


@pytest.mark.parametrize("layer", MOVING, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_on_a_device_nothing_is_read_back_nor_float64_and_no_bit_differs(reference, rng, layer, dtype):
    strict = StrictBackend()
    x = (255 * rng.random((5, 8, 7, 2))).astype(dtype)
    grad = rng.normal(size=x.shape).astype("float32")
    results = []
    for backend in (strict, reference):
        here = built(again(layer), backend, x.shape[1:])
        given, grad_y = backend.asarray(x), backend.asarray(grad)
        with strict.no_host_reads(), strict.watch_dtypes() as seen:
            made = here.forward(given), here.backward(grad_y)
        assert np.dtype("float64") not in seen
        np.testing.assert_array_equal(backend.to_numpy(given), x)
        np.testing.assert_array_equal(backend.to_numpy(grad_y), grad)
        results.append([backend.to_numpy(a) for a in made])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == np.float32
        assert ours.tobytes() == theirs.tobytes()


# In a model, and in its file.


def net(backend):
    return xpnet.Sequential(
        [RandomAffine((1, 0.5), 10, (0.1, 0.2), 5), ElasticDistortion(2, 1.5), layers.Rescale(1 / 16),
         layers.Flatten(), layers.Dense(10)], input_shape=(8, 8), backend=backend
    )  # fmt: skip


def test_a_model_learns_from_distorted_integers_and_answers_to_the_plain_ones(backend):
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


def test_a_saved_model_comes_back_with_its_distortions(backend, rng, tmp_path):
    model, x = net(backend), rng.integers(0, 17, (4, 8, 8)).astype("uint8")
    model.save(tmp_path / "m.safetensors")
    loaded = xpnet.load(tmp_path / "m.safetensors", backend=backend)
    one, two = (backend.to_numpy(m.forward(x, training=True)) for m in (model, loaded))
    np.testing.assert_array_equal(one, two)


def test_a_model_that_has_run_goes_on_in_another_dtype(backend, rng):
    model, x = net(backend), rng.integers(0, 17, (4, 8, 8)).astype("uint8")
    before = backend.to_numpy(model.forward(x, training=True))
    after = backend.to_numpy(model.to(backend, dtype="float64").forward(x, training=True))
    assert (before.dtype, after.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("layer", MOVING, ids=repr)
def test_config_and_repr_make_the_layer_again(layer):
    assert repr(eval(repr(layer), vars(augment))) == repr(layer)
    assert again(layer).get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomAffine(-1), ArgumentError, r"shift must be .* or two, \(vertical, horizontal\), not -1"),
        (lambda: RandomAffine((1, 2, 3)), ArgumentError, r"shift must be .*not \(1, 2, 3\)"),
        (lambda: RandomAffine((1, -2)), ArgumentError, r"shift must be .*not \(1, -2\)"),
        (lambda: RandomAffine(math.inf), ArgumentError, "shift must be .*not inf"),
        (lambda: RandomAffine("ab"), ArgumentError, "shift must be .*not 'ab'"),
        (lambda: RandomAffine(scale=None), ArgumentError, "scale must be .*not None"),
        (lambda: RandomAffine(rotation=(1, 2)), ArgumentError, r"degrees from 0 to 1e.06, not \(1, 2\)"),
        (lambda: RandomAffine(shear=90), ArgumentError, "at least 0 and below 90, not 90"),
        (lambda: ElasticDistortion(-1, 4), ArgumentError, "alpha must be from 0 and sigma above 0.*not -1 and 4"),
        (lambda: ElasticDistortion(34, 0), ArgumentError, "not 34 and 0"),
        (lambda: RandomAffine(1).build((4,)), ShapeError, r"expects \(N, height, width\) or .*input is \(N, 4,\)"),
        (lambda: RandomAffine(1).build((1, 2, 3, 4)), ShapeError, r"input is \(N, 1, 2, 3, 4\)"),
        (lambda: augment.Distortion().positions(1), NotImplementedError, r"Distortion must define positions\(rows\)"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_settings_given_as_numpy_numbers_lift_nothing_to_float64(rng):
    number, strict = np.float64(0.25), StrictBackend()
    x = rng.normal(size=(3, 5, 5)).astype("float32")
    pair = np.array([0.25, 0.5])
    for layer in (RandomAffine(pair, number, pair, number), RandomAffine(number, scale=number),
                  ElasticDistortion(number, number)):  # fmt: skip
        here, given = built(layer, strict, (5, 5)), strict.asarray(x)
        with strict.watch_dtypes() as seen:
            here.forward(given)
        assert np.dtype("float64") not in seen
