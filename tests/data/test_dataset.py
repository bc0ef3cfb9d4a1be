"""Data for a model: accepted kinds of arrays, and invalid data, which are refused before training."""

import copy

import numpy as np
import pytest
from small_models import QUIET, SAMPLES, small_net, values_of
from strict import StrictBackend

import xpnet
from xpnet import callbacks, layers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, XpnetError

X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.arange(12) % 3
ONE_HOT = np.eye(3)[Y]


class OnlyArray:
    """Has only __array__."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


class OnlyDLPack:
    """Has only DLPack and a shape."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __dlpack__(self, **kwargs):
        return self.values.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class OnlyShapeless(OnlyDLPack):
    def __init__(self, values):
        self.values = values


class FakeTensor(OnlyDLPack):
    """Like a PyTorch tensor that requires a gradient: NumPy can convert it only after `detach`."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")

    def detach(self):
        return OnlyArray(self.values)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def not_contiguous(a):
    wide = np.full((2 * len(a), *(2 * n for n in a.shape[1:])), 99, dtype=a.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def negative_strides(a):
    return a[::-1].copy()[::-1]


FORMS = {
    "lists": lambda a: a.tolist(),
    "tuples": lambda a: tuple(map(tuple, a.tolist())) if a.ndim > 1 else tuple(a.tolist()),
    "a list of arrays": list,
    "float64": lambda a: a.astype("float64"),
    "float16 and back": lambda a: a.astype("float16").astype("float32") if a.dtype.kind == "f" else a.astype("int8"),
    "not contiguous": not_contiguous,
    "negative strides": negative_strides,
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "__array__": OnlyArray,
    "DLPack": OnlyDLPack,
    "DLPack without a shape": OnlyShapeless,
    "a tensor with a gradient": FakeTensor,
    "a memory map": lambda a: a.view(np.memmap),
    "a strict device array": lambda a: StrictBackend().asarray(a),
}


def net(backend="cpu"):
    return xpnet.Sequential([layers.Dense(5), layers.Tanh(), layers.Dense(3)], (4,), backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [Y, ONE_HOT], ids=["labels", "probabilities"])
def test_all_kinds_of_arrays_train_the_same_model(backend, form, labels):
    if form == "a strict device array" and backend.name == "gpu":
        pytest.skip("a fake device array on a real GPU")
    x = X.astype("float16").astype("float32") if form.startswith("float16") else X
    model, other = net(backend), net(backend)
    make = FORMS[form]
    inputs, targets, weight = make(x), make(labels), make(1.0 + Y)
    one = model.fit(inputs, targets, sample_weight=weight, batch_size=5, validation_data=(inputs, targets), verbose=0)
    two = other.fit(x, labels, sample_weight=1.0 + Y, batch_size=5, validation_data=(x, labels), verbose=0)
    tolerance = 1e-5 if backend.name == "gpu" else 0  # on a GPU, the kernel of a matrix product depends on the layout
    for name in two:
        np.testing.assert_allclose(one[name], two[name], rtol=tolerance)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(model.predict(inputs), other.predict(x), rtol=tolerance, atol=tolerance)
    assert model.forward(inputs).shape == (12, 3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint64", ">i2", "bool"])
def test_integers_of_any_dtype_train_like_floats(backend, dtype):
    x = np.random.default_rng(0).integers(0, 2, (12, 4))
    model, other = net(backend), net(backend)
    one = model.fit(x.astype(dtype), Y, batch_size=5, validation_split=0.5, verbose=0)
    two = other.fit(x.astype("float32"), Y, batch_size=5, validation_split=0.5, verbose=0)
    assert dict(one) == dict(two)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_can_be_built_from_dlpack_data_without_a_shape():
    model = xpnet.Sequential([layers.Dense(3)], backend="cpu")
    model.fit(OnlyShapeless(X), Y, verbose=0)
    assert model.input_shape == X.shape[1:]


def test_validation_split_accepts_objects_with_only_array():
    history = net().fit(OnlyArray(X), OnlyArray(Y), validation_split=0.5, verbose=0)
    assert history == net().fit(X, Y, validation_split=0.5, verbose=0)


def test_training_does_not_modify_its_arrays(backend):
    x, y, w = X.copy(), ONE_HOT.astype("float32"), np.linspace(0, 1, 12, dtype="float32")
    net(backend).fit(x, y, sample_weight=w, class_weight={1: 2.0}, epochs=3, batch_size=5, verbose=0)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, ONE_HOT)
    np.testing.assert_array_equal(w, np.linspace(0, 1, 12, dtype="float32"))


# Invalid data ------------------------------------------------------------------------------------------------------


def changed(a, index, value):
    a = a.astype("float64")
    a[index] = value
    return a


REFUSED = {
    "x as text": (np.array([["a"] * 4] * 12), Y, ArgumentTypeError, "^x "),
    "x as a list of text": ([["a"] * 4] * 12, Y, ArgumentTypeError, "^x must be an array of real numbers"),
    "x as objects": (X.astype(object), Y, ArgumentTypeError, "^x "),
    "x as complex": (X.astype(complex), Y, ArgumentTypeError, "^x must be an array of real.*complex"),
    "x as dates": (X.astype("int64").astype("datetime64[s]"), Y, ArgumentTypeError, "^x "),
    "x ragged": ([[1, 2, 3, 4], [1, 2]], Y, ArgumentTypeError, "^x cannot be converted to an array"),
    "x None": (None, Y, ArgumentTypeError, "^x "),
    "y None": (X, None, ArgumentTypeError, "^y "),
    "y as text": (X, np.array(["cat"] * 12), ArgumentTypeError, "^y "),
    "y as a list of text": (X, ["cat"] * 12, ArgumentTypeError, "^y .*text or objects. Encode it first"),
    "y ragged": (X, [[1], [1, 2]] * 6, ArgumentTypeError, "^y cannot be converted to an array"),
    "x with NaN": (changed(X, (7, 1), np.nan), Y, DataError, "^x contains NaN.* 1 of 12 samples, first in sample 7"),
    "x with infinity": (changed(X, slice(3, 5), -np.inf), Y, DataError, "^x .* in 2 of 12 samples, first in sample 3"),
    "y with NaN": (X, changed(ONE_HOT, 2, np.nan), DataError, "^y contains NaN.* 1 of 12 samples, first in sample 2"),
    "y of labels with NaN": (X, changed(Y, 2, np.nan), DataError, "^y contains NaN"),
    "x empty": (X[:0], Y[:0], DataError, r"^x is empty: it has shape \(0, 4\)"),
    "x and y of other lengths": (X, Y[:5], DataError, "^x has 12 samples, but y has 5 targets"),
    "y a number": (X, 3, DataError, "^x has 12 samples, but y has a single number"),
    "x of too many features": (np.ones((12, 5)), Y, ShapeError, r"^x must have shape \(N, 4\).*has \(12, 5\)"),
    "x of too few axes": (np.ones(12), Y, ShapeError, r"^x must have shape \(N, 4\).*has \(12,\)"),
    "x in a list": ([X], Y, ShapeError, "give the array itself, not a list of it"),
    "x as numeric text": (np.full((12, 4), "1.5"), Y, ArgumentTypeError, r"astype\(float\).*get_dummies.*numpy.unique"),
    "x a single sample": (np.ones(4), Y, ShapeError, r"add the batch axis: x\[None\]"),
    "x a number": (3.0, Y, ShapeError, r"^x must have shape \(N, 4\).*has \(\)"),
    "x of another form": (np.ones((12, 2, 2)), Y, ShapeError, r"The sizes agree: reshape it"),
    "labels too large": (X, Y + 1, DataError, "^y: .*from 1 to 3, but the model's 3 outputs allow 0 to 2.*4 outputs"),
    "labels negative": (X, Y - 1, DataError, "^y: .*labels range from -1 to 1.*Renumber"),
    "labels with fractions": (X, Y + 0.5, DataError, "^y: .*labels, integers from 0, but some are not whole numbers"),
    "probabilities of other classes": (X, np.eye(4)[Y], ShapeError, r"^y: .*\(N, 3\) probabilities, but are \(12, 4\)"),
    "probabilities that sum to 2": (X, 2 * ONE_HOT, DataError, "^y: .*sum 1, but .* the sums range from 2 to 2"),
    "negative probabilities": (X, 2 * ONE_HOT - np.roll(ONE_HOT, 1, axis=1), DataError, "^y: .*at least 0"),
}  # fmt: skip


def test_an_input_shape_that_is_that_of_all_samples_is_explained():
    model = xpnet.Sequential([layers.Flatten(), layers.Dense(3)], X.shape, "cpu")
    with pytest.raises(ShapeError, match=r"If it has 12 samples, input_shape must be that of one: \(4,\)"):
        model.fit(X, Y, verbose=0)


def test_a_wrong_shape_of_a_build_method_is_not_blamed_on_y_alone():
    class Wrong(layers.Layer):
        def build(self, input_shape):
            return (2 * input_shape[0],)

        def forward(self, x):
            return x + 0.0

        def backward(self, grad_y):
            return grad_y + 0.0

    model = xpnet.Sequential([layers.Dense(3), Wrong()], (4,), "cpu")
    with pytest.raises(ShapeError, match=r"^y: .* build method returns a wrong shape: model\.summary\(\)"):
        model.fit(X, ONE_HOT, "mse", verbose=0)


class NoStep(callbacks.Callback):
    def on_train_begin(self, model):
        raise AssertionError("training has started")


@pytest.mark.parametrize(("x", "y", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_data_are_refused_before_training(backend, x, y, error, match):
    model = net(backend)
    model.fit(X, Y, verbose=0)
    before, step = model.state_dict(), model._state.optimizer_state.step
    for use in (
        lambda: model.fit(x, y, callbacks=[NoStep()], verbose=0),
        lambda: model.train_on_batch(x, y),
        lambda: model.evaluate(x, y),
    ):
        with pytest.raises(error, match=match):
            use()
    assert model._state.optimizer_state.step == step
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("case", ["x with NaN", "y as a list of text", "x and y of other lengths"])
def test_invalid_validation_data_are_refused_before_training(backend, case):
    x, y, error, match = REFUSED[case]
    match = match.replace("^x", "^validation x").replace("^y", "^validation y").replace("but y", "but validation y")
    with pytest.raises(error, match=match):
        net(backend).fit(X, Y, validation_data=(x, y), callbacks=[NoStep()], verbose=0)


def test_validation_labels_out_of_range_are_refused():
    with pytest.raises(DataError, match="validation y"):
        net().fit(X, Y, validation_data=(X, Y + 1), verbose=0)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_binary_targets_outside_0_to_1_are_refused(backend, value):
    with pytest.raises(DataError, match=r"targets must be in \[0, 1\], but they range from"):
        net(backend).fit(X, changed(ONE_HOT, (2, 0), value), loss="binary_cross_entropy", verbose=0)


def test_softmax_cross_entropy_requires_at_least_two_outputs():
    with pytest.raises(ShapeError, match=r"logits of K ≥ 2 classes"):
        xpnet.Sequential([layers.Dense(1)], (4,), "cpu").fit(X, Y, verbose=0)


def test_a_refused_first_fit_does_not_change_the_model(backend):
    model, other = net(backend), net(backend)
    before = copy.deepcopy(model.state_dict())
    for y in (Y + 1, Y[:5]):
        with pytest.raises(XpnetError):
            model.fit(X, y, optimizer="sgd", loss="softmax_cross_entropy", verbose=0)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(ArgumentError, match="never trained"):
        model.evaluate(X, Y)
    assert dict(model.fit(X, Y, verbose=0)) == dict(other.fit(X, Y, verbose=0))


def test_predict_accepts_and_returns_nan(backend):
    y = net(backend).predict(changed(X, (7, 1), np.nan))
    assert np.isnan(y[7]).all() and np.isfinite(np.delete(y, 7, axis=0)).all()


@pytest.mark.parametrize("which", ["x", "y"])
def test_data_beyond_float32_is_refused_before_training(which):
    data = {"x": SAMPLES.astype("float64"), "y": SAMPLES[:, :2].astype("float64")}
    data[which][3, 1] = 1e300
    model = small_net()
    before = values_of(model)
    for call in (
        lambda: model.fit(**data, loss="mse", **QUIET),
        lambda: model.train_on_batch(**data, loss="mse", optimizer="sgd"),
        lambda: model.evaluate(**data, loss="mse"),
    ):
        with pytest.raises(DataError, match=f"^{which} .*float32.*sample 3"):
            call()
    np.testing.assert_array_equal(values_of(model), before)


@pytest.mark.parametrize(
    "names",
    [
        ["cat", "dog"] * 2,
        np.array(["cat", "dog"] * 2),
        np.array(["cat", "dog"] * 2, dtype=object),
        np.array(["cat", "dog"] * 2, dtype=np.dtypes.StringDType()),
        [["cat"], ["dog"]] * 2,
    ],
)
def test_class_names_are_refused_with_the_way_to_number_them(names):
    net = xpnet.Sequential([layers.Dense(2)], (3,), "cpu")
    with pytest.raises(ArgumentTypeError) as caught:
        net.fit(np.ones((4, 3)), names, verbose=0)
    assert str(caught.value).endswith(
        "If strings such as 'cat' are class names, number them: classes, y = numpy.unique(y, return_inverse=True)."
    )
    classes, y = np.unique(names, return_inverse=True)
    net.fit(np.ones((4, 3)), y, verbose=0)  # the advice works
    assert list(classes) == ["cat", "dog"]


def test_class_names_of_validation_data_and_of_pandas_are_refused_likewise():
    net = xpnet.Sequential([layers.Dense(2)], (3,), "cpu")
    x, y = np.ones((4, 3)), [0, 1, 0, 1]
    with pytest.raises(ArgumentTypeError, match="^validation y .*'a' are class names, number them: classes, y"):
        net.fit(x, y, validation_data=(x, ["a", "b"] * 2), verbose=0)
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    for dtype in (object, "string", "category"):
        with pytest.raises(ArgumentTypeError, match="number them: classes, y"):
            net.fit(x, pandas.Series(["a", "b"] * 2, dtype=dtype), verbose=0)


@pytest.mark.parametrize("y", [[None] * 4, [1j] * 4, [["a"], ["b", "c"]] * 2])
def test_targets_that_are_neither_numbers_nor_names_have_their_own_error(y):
    net = xpnet.Sequential([layers.Dense(2)], (3,), "cpu")
    with pytest.raises(ArgumentTypeError, match="real numbers|converted"):
        net.fit(np.ones((4, 3)), y, verbose=0)
