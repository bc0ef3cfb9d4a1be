"""What may enter a model, what is refused before anything is trained, and what the refusals say."""

import copy

import numpy as np
import pytest
from strict import StrictBackend

import xpnet
from xpnet import callbacks, layers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, XpnetError

X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.arange(12) % 3
ONE_HOT = np.eye(3)[Y]


class OnlyArray:
    """What offers __array__ and nothing else."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


class OnlyDLPack:
    """What offers DLPack and nothing else but a shape."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __dlpack__(self, **kwargs):
        return self.values.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class OnlyShapeless(OnlyDLPack):
    def __init__(self, values):
        self.values = values


class Torchlike(OnlyDLPack):
    """As a PyTorch tensor: NumPy may have it once it is detached from its gradient."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")

    def detach(self):
        return OnlyArray(self.values)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def spread_out(a):
    wide = np.full((2 * len(a), *(2 * n for n in a.shape[1:])), 99, dtype=a.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def backwards(a):
    return a[::-1].copy()[::-1]


FORMS = {
    "lists": lambda a: a.tolist(),
    "tuples": lambda a: tuple(map(tuple, a.tolist())) if a.ndim > 1 else tuple(a.tolist()),
    "a list of arrays": list,
    "float64": lambda a: a.astype("float64"),
    "float16 and back": lambda a: a.astype("float16").astype("float32") if a.dtype.kind == "f" else a.astype("int8"),
    "not contiguous": spread_out,
    "negative strides": backwards,
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "__array__": OnlyArray,
    "DLPack": OnlyDLPack,
    "DLPack without a shape": OnlyShapeless,
    "a tensor with a gradient": Torchlike,
    "a memory map": lambda a: a.view(np.memmap),
    "a strict device array": lambda a: StrictBackend().asarray(a),
}


def net(backend="cpu"):
    return xpnet.Sequential([layers.Dense(5), layers.Tanh(), layers.Dense(3)], (4,), backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [Y, ONE_HOT], ids=["labels", "probabilities"])
def test_data_in_any_form_train_alike(backend, form, labels):
    if form == "a strict device array" and backend.name == "gpu":
        pytest.skip("a pretended device array on a real GPU")
    x = X.astype("float16").astype("float32") if form.startswith("float16") else X
    model, other = net(backend), net(backend)
    make = FORMS[form]
    given, targets, weight = make(x), make(labels), make(1.0 + Y)
    one = model.fit(given, targets, sample_weight=weight, batch_size=5, validation_data=(given, targets), verbose=0)
    two = other.fit(x, labels, sample_weight=1.0 + Y, batch_size=5, validation_data=(x, labels), verbose=0)
    tolerance = 1e-5 if backend.name == "gpu" else 0  # there, another layout is another product's kernel
    for name in two:
        np.testing.assert_allclose(one[name], two[name], rtol=tolerance)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(model.predict(given), other.predict(x), rtol=tolerance, atol=tolerance)
    assert model.forward(given).shape == (12, 3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint64", ">i2", "bool"])
def test_integers_of_any_type_are_numbers(backend, dtype):
    x = np.random.default_rng(0).integers(0, 2, (12, 4))
    model, other = net(backend), net(backend)
    one = model.fit(x.astype(dtype), Y, batch_size=5, validation_split=0.5, verbose=0)
    two = other.fit(x.astype("float32"), Y, batch_size=5, validation_split=0.5, verbose=0)
    assert dict(one) == dict(two)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_lazy_model_is_built_by_dlpack_without_a_shape():
    xpnet.Sequential([layers.Dense(3)], backend="cpu").fit(OnlyShapeless(X), Y, verbose=0)


def test_validation_split_takes_what_only_has_array():
    net().fit(OnlyArray(X), OnlyArray(Y), validation_split=0.5, verbose=0)


def test_training_leaves_the_callers_arrays_alone(backend):
    x, y, w = X.copy(), ONE_HOT.astype("float32"), np.linspace(0, 1, 12, dtype="float32")
    net(backend).fit(x, y, sample_weight=w, class_weight={1: 2.0}, epochs=3, batch_size=5, verbose=0)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, ONE_HOT)
    np.testing.assert_array_equal(w, np.linspace(0, 1, 12, dtype="float32"))


# Refusals ----------------------------------------------------------------------------------------------------------


def changed(a, at, value):
    a = a.astype("float64")
    a[at] = value
    return a


REFUSED = {
    "x as text": (np.array([["a"] * 4] * 12), Y, ArgumentTypeError, "^x "),
    "x as a list of text": ([["a"] * 4] * 12, Y, ArgumentTypeError, "^x must be an array of real numbers"),
    "x as objects": (X.astype(object), Y, ArgumentTypeError, "^x "),
    "x as complex": (X.astype(complex), Y, ArgumentTypeError, "^x must be an array of real.*complex"),
    "x as dates": (X.astype("int64").astype("datetime64[s]"), Y, ArgumentTypeError, "^x "),
    "x ragged": ([[1, 2, 3, 4], [1, 2]], Y, ArgumentTypeError, "^x cannot be made an array"),
    "x None": (None, Y, ArgumentTypeError, "^x "),
    "y None": (X, None, ArgumentTypeError, "^y "),
    "y as text": (X, np.array(["cat"] * 12), ArgumentTypeError, "^y "),
    "y as a list of text": (X, ["cat"] * 12, ArgumentTypeError, "^y .*text or objects. Encode it first"),
    "y ragged": (X, [[1], [1, 2]] * 6, ArgumentTypeError, "^y cannot be made an array"),
    "x with NaN": (changed(X, (7, 1), np.nan), Y, DataError, "^x holds NaN.* 1 of 12 samples, first in sample 7"),
    "x with infinity": (changed(X, slice(3, 5), -np.inf), Y, DataError, "^x .* in 2 of 12 samples, first in sample 3"),
    "y with NaN": (X, changed(ONE_HOT, 2, np.nan), DataError, "^y holds NaN.* 1 of 12 samples, first in sample 2"),
    "y of labels with NaN": (X, changed(Y, 2, np.nan), DataError, "^y holds NaN"),
    "x empty": (X[:0], Y[:0], DataError, r"^x is empty: it has shape \(0, 4\)"),
    "x and y of other lengths": (X, Y[:5], DataError, "^x holds 12 samples, but y holds 5 targets"),
    "y a number": (X, 3, DataError, "^x holds 12 samples, but y holds a single number"),
    "x of too many features": (np.ones((12, 5)), Y, ShapeError, r"^x must have shape \(N, 4\).*has \(12, 5\)"),
    "x of too few axes": (np.ones(12), Y, ShapeError, r"^x must have shape \(N, 4\).*has \(12,\)"),
    "x a single sample": (np.ones(4), Y, ShapeError, r"add the batch axis: x\[None\]"),
    "x a number": (3.0, Y, ShapeError, r"^x must have shape \(N, 4\).*has \(\)"),
    "x of another form": (np.ones((12, 2, 2)), Y, ShapeError, r"The sizes agree: reshape it"),
    "labels too large": (X, Y + 1, DataError, "^y: .*from 1 to 3, but the model's 3 outputs allow 0 to 2.*4 outputs"),
    "labels negative": (X, Y - 1, DataError, "^y: .*labels run from -1 to 1.*Renumber"),
    "labels with fractions": (X, Y + 0.5, DataError, "^y: .*class numbers, but some are fractions"),
    "probabilities of other classes": (X, np.eye(4)[Y], ShapeError, r"^y: .*\(N, 3\) probabilities, but are \(12, 4\)"),
    "probabilities that sum to 2": (X, 2 * ONE_HOT, DataError, "^y: .*sum 1, but the sums run from 2 to 2"),
    "negative probabilities": (X, 2 * ONE_HOT - np.roll(ONE_HOT, 1, axis=1), DataError, "^y: .*at least 0"),
}  # fmt: skip


class NoStep(callbacks.Callback):
    def on_train_begin(self, model):
        raise AssertionError("training has begun")


@pytest.mark.parametrize(("x", "y", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_data_that_cannot_be_trained_on_are_refused_with_the_reason(backend, x, y, error, match):
    model = net(backend)
    model.fit(X, Y, verbose=0)
    before, step = model.state_dict(), model._state.memory.step
    for use in (
        lambda: model.fit(x, y, callbacks=[NoStep()], verbose=0),
        lambda: model.train_on_batch(x, y),
        lambda: model.evaluate(x, y),
    ):
        with pytest.raises(error, match=match):
            use()
    assert model._state.memory.step == step
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("case", ["x with NaN", "y as a list of text", "x and y of other lengths"])
def test_bad_validation_data_are_named_and_refused_before_training(backend, case):
    x, y, error, match = REFUSED[case]
    match = match.replace("^x", "^validation x").replace("^y", "^validation y").replace("but y", "but validation y")
    with pytest.raises(error, match=match):
        net(backend).fit(X, Y, validation_data=(x, y), callbacks=[NoStep()], verbose=0)


def test_labels_of_validation_data_out_of_range_are_named():
    with pytest.raises(DataError, match="validation y"):
        net().fit(X, Y, validation_data=(X, Y + 1), verbose=0)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_yes_or_no_targets_outside_0_to_1_are_refused(backend, value):
    with pytest.raises(DataError, match=r"targets must lie in \[0, 1\], but they run from"):
        net(backend).fit(X, changed(ONE_HOT, (2, 0), value), loss="binary_cross_entropy", verbose=0)


@pytest.mark.parametrize("outputs", [1, (2, 3)])
def test_class_losses_need_logits_of_classes(outputs):
    end = [layers.Dense(6), layers.Reshape(outputs)] if outputs != 1 else [layers.Dense(1)]
    with pytest.raises(ShapeError, match=r"logits of K ≥ 2 classes"):
        xpnet.Sequential(end, (4,), "cpu").fit(X, Y, verbose=0)


def test_a_refused_first_fit_leaves_a_model_as_if_it_had_not_been(backend):
    model, other = net(backend), net(backend)
    untouched = copy.deepcopy(model.state_dict())
    for y in (Y + 1, Y[:5]):
        with pytest.raises(XpnetError):
            model.fit(X, y, optimizer="sgd", loss="softmax_cross_entropy", verbose=0)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, untouched[name])
    with pytest.raises(ArgumentError, match="never trained"):
        model.evaluate(X, Y)
    assert dict(model.fit(X, Y, verbose=0)) == dict(other.fit(X, Y, verbose=0))


def test_predict_takes_nan_and_shows_it(backend):
    y = net(backend).predict(changed(X, (7, 1), np.nan))
    assert np.isnan(y[7]).all() and np.isfinite(np.delete(y, 7, axis=0)).all()
