"""Arrays of other libraries: every public method accepts them, without a copy if possible."""

import numpy as np
import pytest

import xpnet
from xpnet import datasets, layers, losses, metrics
from xpnet.errors import ArgumentTypeError

X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.arange(12) % 3
CPU = xpnet.get_backend("cpu")


def torch_tensor(a):
    return pytest.importorskip("torch", reason="PyTorch is not installed").from_numpy(a.copy())


def torch_tensor_with_gradient(a):
    return torch_tensor(a).requires_grad_() if a.dtype.kind == "f" else torch_tensor(a)


def torch_parameter(a):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    return torch.nn.Parameter(torch_tensor(a)) if a.dtype.kind == "f" else torch_tensor(a)


def torch_transposed(a):
    return torch_tensor(np.ascontiguousarray(a.T)).T if a.ndim > 1 else torch_tensor(a)


def jax_array(a):
    return pytest.importorskip("jax", reason="JAX is not installed").numpy.asarray(a)


def pandas_frame(a):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    return (
        pandas.DataFrame(a, index=range(100, 100 + len(a)))
        if a.ndim > 1
        else pandas.Series(a, index=range(7, 7 + len(a)))
    )


FORMS = [
    torch_tensor,
    torch_tensor_with_gradient,
    torch_parameter,
    torch_transposed,
    jax_array,
    pandas_frame,
]


def net(backend="cpu"):
    return xpnet.Sequential([layers.Dense(5), layers.Tanh(), layers.Dense(3)], (4,), backend)


@pytest.mark.parametrize("form", FORMS)
def test_every_public_method_accepts_arrays_of_other_libraries(backend, form):
    model, other = net(backend), net(backend)
    x, y, weights = form(X), form(Y), form((1.0 + Y).astype("float32"))
    settings = {"batch_size": 5, "validation_split": 0.25, "verbose": 0}
    one = model.fit(x, y, sample_weight=weights, **settings)
    two = other.fit(X, Y, sample_weight=1.0 + Y, **settings)
    assert dict(one) == dict(two)
    np.testing.assert_array_equal(model.predict(x), other.predict(X))
    assert model.evaluate(x, y) == other.evaluate(X, Y)
    assert model.train_on_batch(x, y) == other.train_on_batch(X, Y)
    np.testing.assert_array_equal(backend.to_numpy(model.forward(x)), backend.to_numpy(other.forward(X)))
    grad = np.ones((12, 3), "float32")
    np.testing.assert_array_equal(backend.to_numpy(model.backward(form(grad))), backend.to_numpy(other.backward(grad)))
    model.load_state_dict({name: form(value) for name, value in other.state_dict().items() if value.ndim > 1} | {
        name: value for name, value in other.state_dict().items() if value.ndim == 1
    })  # fmt: skip
    np.testing.assert_array_equal(model.predict(X), other.predict(X))
    assert xpnet.metrics.Accuracy()(form(np.eye(3, dtype="float32")[Y]), y) == 1.0


@pytest.mark.parametrize("form", FORMS[:3])
def test_a_tensor_on_the_cpu_is_not_copied(form):
    tensor = form(X)
    array = CPU.asarray(tensor)
    assert array.__array_interface__["data"][0] == tensor.data_ptr()


def test_a_read_only_array_is_not_copied():
    array = jax_array(X)
    assert not np.asarray(array).flags.writeable
    assert np.shares_memory(CPU.asarray(array), np.asarray(array))


def test_a_dtype_that_numpy_lacks_is_refused():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(ArgumentTypeError, match="x cannot be converted to an array"):
        net().predict(torch_tensor(X).to(torch.bfloat16))


class GPUTensor:
    """Like a PyTorch tensor on a GPU that requires a gradient: other libraries can read it only after `detach`."""

    def __init__(self, a, detached=False):
        self.a, self.detached = a, detached

    @property
    def __cuda_array_interface__(self):
        if not self.detached:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")
        return {}

    def detach(self):
        return GPUTensor(self.a, detached=True)

    def cpu(self):
        assert self.detached
        return self.a


def test_a_tensor_on_a_gpu_is_copied_to_the_host():
    np.testing.assert_array_equal(net().predict(GPUTensor(X)), net().predict(X))


class GPUArray:
    """Like a JAX array on a GPU, which has neither `get` nor `cpu`."""

    __cuda_array_interface__ = {}  # noqa: RUF012

    def __array__(self, dtype=None, copy=None):
        return X


def test_an_array_that_only_numpy_can_convert_is_copied_to_the_host():
    np.testing.assert_array_equal(net().predict(GPUArray()), net().predict(X))


# Masked arrays


def masked(a):
    """`a` with its first element masked."""
    a = np.asarray(a)
    return np.ma.masked_array(a, np.arange(a.size).reshape(a.shape) == 0)


MASKED_X = np.random.default_rng(0).random((20, 4)).astype("float32")
MASKED_Y = np.arange(20) % 2
ONES = np.ones(20)


def dense():
    return xpnet.Sequential([layers.Dense(2)], input_shape=4, backend="cpu")


def standalone():
    layer = layers.Dense(2)
    layer.build((4,), backend="cpu")
    return layer


BOUNDARIES = {
    "fit x": lambda: dense().fit(masked(MASKED_X), MASKED_Y, verbose=0),
    "fit y": lambda: dense().fit(MASKED_X, masked(MASKED_Y), verbose=0),
    "fit weights": lambda: dense().fit(MASKED_X, MASKED_Y, sample_weight=masked(ONES), verbose=0),
    "fit, not built": lambda: xpnet.Sequential([layers.Dense(2)]).fit(masked(MASKED_X), MASKED_Y, verbose=0),
    "validation x": lambda: dense().fit(MASKED_X, MASKED_Y, validation_data=(masked(MASKED_X), MASKED_Y), verbose=0),
    "validation y": lambda: dense().fit(MASKED_X, MASKED_Y, validation_data=(MASKED_X, masked(MASKED_Y)), verbose=0),
    "split": lambda: dense().fit(masked(MASKED_X), MASKED_Y, validation_split=0.5, verbose=0),
    "a list": lambda: dense().fit([masked(MASKED_X[0]), *MASKED_X[1:]], MASKED_Y, verbose=0),
    "a masked number": lambda: dense().fit(MASKED_X, [np.ma.masked, *MASKED_Y[1:]], verbose=0),
    "batches": lambda: dense().fit([(masked(MASKED_X), MASKED_Y)], verbose=0),
    "targets of batches": lambda: dense().fit([(MASKED_X, masked(MASKED_Y))], verbose=0),
    "Stream": lambda: datasets.Stream(masked(MASKED_X), MASKED_Y),
    "Stream y": lambda: datasets.Stream(MASKED_X, masked(MASKED_Y)),
    "predict": lambda: dense().predict(masked(MASKED_X)),
    "evaluate": lambda: dense().evaluate(MASKED_X, masked(MASKED_Y), "softmax_cross_entropy"),
    "train_on_batch": lambda: dense().train_on_batch(masked(MASKED_X), MASKED_Y, "softmax_cross_entropy", "sgd"),
    "forward": lambda: dense().forward(masked(MASKED_X)),
    "forward of a layer": lambda: standalone().forward(masked(MASKED_X)),
    "activations": lambda: dense().activations(masked(MASKED_X)),
    "load_state_dict": lambda: dense().load_state_dict({n: masked(a) for n, a in dense().state_dict().items()}),
    "check_gradients": lambda: xpnet.check_gradients(dense(), masked(MASKED_X), MASKED_Y, "softmax_cross_entropy"),
    "a loss": lambda: losses.MeanSquaredError()(masked(MASKED_X), MASKED_X),
    "a metric": lambda: metrics.Accuracy()(MASKED_X, masked(MASKED_Y)),
    "write_idx": lambda: datasets.write_idx("unwritten", masked(MASKED_Y.astype("uint8"))),
    "an initializer": lambda: xpnet.Sequential([layers.Dense(2, weight_initializer=masked(np.ones((4, 2))))], 4, "cpu"),
    "asarray": lambda: xpnet.get_backend("cpu").asarray(masked(MASKED_X)),
}


@pytest.mark.parametrize("use", BOUNDARIES.values(), ids=BOUNDARIES.keys())
def test_masked_arrays_are_refused(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentTypeError, match=r"masked arrays are not supported.*filled\(value\).*sample_weight"):
        use()
    assert not list(tmp_path.iterdir())


def test_devices_and_estimators_refuse_masked_arrays(backend):
    with pytest.raises(ArgumentTypeError, match="masked arrays"):
        backend.asarray(masked(MASKED_X))
    estimators = pytest.importorskip("xpnet.estimators")
    classifier = estimators.XPClassifier((3,), max_iter=1)
    for x, y, w in (
        (masked(MASKED_X), MASKED_Y, ONES),
        (MASKED_X, masked(MASKED_Y), ONES),
        (MASKED_X, MASKED_Y, masked(ONES)),
    ):
        with pytest.raises(ArgumentTypeError, match="masked arrays"):
            classifier.fit(x, y, sample_weight=w)
    classifier.partial_fit(MASKED_X, MASKED_Y)
    with pytest.raises(ArgumentTypeError, match="X: masked arrays"):
        classifier.predict(masked(MASKED_X))
