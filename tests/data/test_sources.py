"""Data of other libraries: frames, series, arrays on disk without a length; and NumPy's numbers as arguments."""

import decimal
import fractions
import json

import numpy as np
import pytest
from small_models import LABELS, QUIET, SAMPLES
from small_models import small_net as net
from threads_as_ranks import run_on_ranks

import xpnet
from xpnet import callbacks, datasets, layers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, XpnetError

N = 200
X = np.random.default_rng(0).normal(size=(N, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype(int)


def fitted(x, y=Y, model=None, **kwargs):
    model = model or net()
    history = model.fit(x, y, **{"verbose": 0, "batch_size": 32, "epochs": 2, **kwargs})
    return {**history, **{name: a.tolist() for name, a in model.state_dict().items()}}


# Frames ------------------------------------------------------------------------------------------------------------

FRAME = {"a": X[:, 0], "b": X[:, 1] > 0, "c": np.arange(N) % 7, "d": X[:, 3]}
EXPECTED = np.column_stack([np.asarray(column, "float32") for column in FRAME.values()])


def pandas():
    return pytest.importorskip("pandas", reason="pandas is not installed")


def with_types(**types):
    return lambda pd: pd.DataFrame(FRAME, index=range(50, 50 + N)).astype(types)


def pyarrow_types(pd):
    pytest.importorskip("pyarrow", reason="PyArrow is not installed")
    return with_types(a="float[pyarrow]", b="bool[pyarrow]", c="int64[pyarrow]", d="double[pyarrow]")(pd)


PANDAS = {
    "plain": with_types(),
    "nullable": with_types(a="Float32", b="boolean", c="Int64", d="Float64"),
    "mixed": with_types(a="Float64", c="UInt8"),
    "sparse": lambda pd: with_types(c=pd.SparseDtype("int64", 0), d=pd.SparseDtype("float32", 0.0))(pd),
    "repeated names": lambda pd: with_types(a="Float32")(pd).set_axis(["x", "x", "y", "y"], axis=1),
    "pyarrow": pyarrow_types,
}


@pytest.mark.parametrize("make", PANDAS.values(), ids=PANDAS)
def test_frames_of_pandas_of_any_numeric_type_are_data(make):
    pd = pandas()
    frame = make(pd)
    labels, weights = pd.Series(Y, index=range(7, 7 + N)), pd.Series(1.0 + Y, index=range(N)[::-1], dtype="Float64")
    one = fitted(frame, labels, sample_weight=weights, validation_split=0.25)
    assert one == fitted(EXPECTED, Y, sample_weight=1.0 + Y, validation_split=0.25)
    np.testing.assert_array_equal(net().predict(frame), net().predict(EXPECTED))
    unbuilt = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    assert unbuilt.predict(frame).shape == (N, 2)


def test_nullable_labels_and_series_are_targets():
    pd = pandas()
    for labels in (pd.Series(Y, dtype="Int64"), pd.Series(Y, dtype="boolean"), pd.array(Y, dtype="Int8"), pd.Index(Y),
                   pd.Series(Y, index=range(N)[::-1])):  # fmt: skip
        assert fitted(X, labels) == fitted(X, Y)
    assert net().evaluate(X, pd.Series(Y, dtype="Int64"), loss="softmax_cross_entropy") == net().evaluate(
        X, Y, loss="softmax_cross_entropy"
    )


def test_missing_values_are_refused_with_the_columns():
    pd = pandas()
    frame = with_types(a="Float64", c="Int64", d="Float64")(pd)
    frame.iloc[3, 0] = frame.iloc[5, 2] = pd.NA
    for action in (lambda: fitted(frame), lambda: net().predict(frame), lambda: net().evaluate(frame, Y, loss="mse")):
        with pytest.raises(DataError, match=r"x has missing values \(NA\) in the columns 'a', 'c'"):
            action()
    labels = pd.Series(Y, dtype="Int64")
    labels[2] = pd.NA
    with pytest.raises(DataError, match=r"y has missing values \(NA\)\. Fill"):
        fitted(X, labels)
    with pytest.raises(DataError, match=r"sample_weight has missing values"):
        fitted(X, Y, sample_weight=labels)
    frame = pd.DataFrame(FRAME)
    frame.iloc[3, 0] = np.nan
    with pytest.raises(DataError, match="x contains NaN or infinity"):
        fitted(frame)


UNSUITABLE = {
    "categories": (lambda pd: pd.Categorical(["u", "v"] * (N // 2)), r"has categories in the column 'a'.*\.cat\.codes"),
    "text": (lambda pd: ["u", "v"] * (N // 2), "contains text or objects in the column 'a'.*Encode it first"),
    "strings": (lambda pd: pd.array(["u"] * N, dtype="string"), "contains text or objects in the column 'a'"),
    "objects": (lambda pd: np.array([1.5, 2.5] * (N // 2), object), r"'a'.*\.astype\(float\)"),
    "dates": (lambda pd: pd.date_range("2026", periods=N), "contains dates or times in the column 'a'"),
    "zones": (lambda pd: pd.date_range("2026", periods=N, tz="UTC"), "contains dates or times in the column 'a'"),
    "periods": (lambda pd: pd.period_range("2026", periods=N), "contains dates or times in the column 'a'"),
    "differences": (lambda pd: pd.timedelta_range("1s", periods=N), "contains dates or times in the column 'a'"),
}


@pytest.mark.parametrize(("make", "match"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_columns_that_are_not_numbers_are_refused_by_name(make, match):
    pd = pandas()
    frame = pd.DataFrame({**FRAME, "a": make(pd)})
    with pytest.raises(ArgumentTypeError, match=match):
        fitted(frame)
    with pytest.raises(ArgumentTypeError, match="^y must be an array of real numbers, but it"):
        fitted(X, frame["a"])


def test_arrays_of_dates_and_objects_get_a_hint():
    with pytest.raises(ArgumentTypeError, match=r"text or objects. Encode it first; .*astype\(float\)"):
        fitted(X.astype(object))
    with pytest.raises(ArgumentTypeError, match=r"dtype datetime64\[s\]. Encode it first, as numbers"):
        fitted(X, Y.astype("datetime64[s]"))


def test_sparse_matrices_get_a_hint_and_can_be_streamed():
    sparse = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    for matrix in (sparse.csr_array(EXPECTED), sparse.csr_matrix(EXPECTED)):
        with pytest.raises(ArgumentTypeError, match=r"x is a sparse matrix: give x\.toarray\(\), or a datasets.Stream"):
            fitted(matrix)
        one, two = datasets.Stream(matrix, Y), datasets.Stream(EXPECTED, Y)
        assert fitted(one, None) == fitted(two, None)
        np.testing.assert_array_equal(net().predict(one), net().predict(EXPECTED))


def test_frames_of_polars_are_data():
    pl = pytest.importorskip("polars", reason="polars is not installed")
    frame = pl.DataFrame(FRAME)
    assert fitted(frame, pl.Series(Y), validation_split=0.25) == fitted(EXPECTED, Y, validation_split=0.25)
    with pytest.raises(ArgumentTypeError, match=r"x is a LazyFrame: call its collect\(\) first"):
        fitted(frame.lazy())
    missing = frame.with_columns(c=pl.when(pl.col("c") > 5).then(None).otherwise(pl.col("c")))
    with pytest.raises(DataError, match=r"x has missing values \(NA\) in the column 'c'"):
        net().predict(missing)
    for column, match in (
        (pl.Series(["u"] * N), "text or objects in the column 'a'"),
        (pl.Series(["u"] * N, dtype=pl.Categorical), "has categories in the column 'a'"),
        (pl.Series(np.arange(N).astype("datetime64[us]")), "dates or times in the column 'a'"),
        (pl.Series(np.arange(N)).cast(pl.Date), "dates or times in the column 'a'"),
    ):
        with pytest.raises(ArgumentTypeError, match=match):
            fitted(frame.with_columns(a=column))


def test_tables_of_pyarrow_are_data():
    pa = pytest.importorskip("pyarrow", reason="PyArrow is not installed")
    table = pa.table(FRAME)
    assert fitted(table, pa.array(Y), validation_split=0.25) == fitted(EXPECTED, Y, validation_split=0.25)
    np.testing.assert_array_equal(net().predict(table.to_batches()[0]), net().predict(EXPECTED))
    with pytest.raises(DataError, match=r"y has missing values"):
        fitted(X, pa.array([None, *Y[1:].tolist()]))
    with pytest.raises(ArgumentTypeError, match="has categories in the column 'a'"):
        fitted(table.set_column(0, "a", pa.array(["u"] * N).dictionary_encode()))
    with pytest.raises(ArgumentTypeError, match="text or objects in the column 'a'"):
        fitted(table.set_column(0, "a", pa.array(["u"] * N)))


def test_frames_may_be_batches_and_targets_of_a_stream():
    pd = pandas()
    frame, labels = with_types(a="Float32", c="Int64")(pd), pd.Series(Y, index=range(N)[::-1], dtype="Int64")
    settings = {"verbose": 0, "epochs": 1, "shuffle": False, "batch_size": 50}

    def batches(x, y):
        return [(x[i : i + 50], y[i : i + 50]) for i in range(0, N, 50)]

    parts = [(frame.iloc[i : i + 50], labels.iloc[i : i + 50]) for i in range(0, N, 50)]
    one, two = net().fit(parts, **settings), net().fit(batches(EXPECTED, Y), **settings)
    assert dict(one) == dict(two)
    three = net().fit(datasets.Stream(EXPECTED, labels, pd.Series(np.ones(N))), **settings)
    assert three["loss"] == pytest.approx(two["loss"])
    assert net().fit(datasets.Stream(EXPECTED, Y.tolist()), **settings)["loss"] == pytest.approx(two["loss"])
    frame.iloc[60, 0] = pd.NA
    with pytest.raises(
        DataError, match=r"batch 2 of the stream: x of a batch has missing values \(NA\) in the column 'a'"
    ):
        net().fit([(frame.iloc[i : i + 50], labels.iloc[i : i + 50]) for i in range(0, N, 50)], **settings)


def test_class_weights_may_be_a_series():
    pd = pandas()
    assert fitted(X, class_weight=pd.Series([3.0, 0.5], index=[1, 0])) == fitted(X, class_weight={0: 0.5, 1: 3.0})


# Arrays on disk ------------------------------------------------------------------------------------------------------


class OnDisk:
    """Shape, dtype and slices, and nothing else: no length, no conversion, no open slices, no lists of indices."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, part):
        if not isinstance(part, slice) or None in (part.start, part.stop):
            raise TypeError("slices only")
        if part.stop > len(self.array):
            raise IndexError("out of range")
        return self.array[part]


def zarr_array(array):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    made = zarr.create_array({}, shape=array.shape, dtype=array.dtype, chunks=(16, *array.shape[1:]))
    made[...] = array
    return made


def h5py_dataset(array):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    file = h5py.File.in_memory() if hasattr(h5py.File, "in_memory") else h5py.File("x", "w", driver="core")
    return file.create_dataset("x", data=array)


def dask_array(array):
    return pytest.importorskip("dask.array", reason="dask is not installed").from_array(array, chunks=16)


@pytest.mark.parametrize("make", [OnDisk, zarr_array, h5py_dataset, dask_array])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whatever_has_shape_dtype_and_slices_is_streamed(make):
    x, y, w = make(X), make(Y), make(1.0 + Y)
    stream, plain = (datasets.Stream(*arrays, block=16, window_bytes=1024) for arrays in ((x, y, w), (X, Y, 1.0 + Y)))
    assert len(stream) == N and stream.sample_shape == (4,)
    assert fitted(stream, None) == fitted(plain, None)
    np.testing.assert_array_equal(net().predict(stream), net().predict(X))
    assert net().evaluate(stream, loss="softmax_cross_entropy") == net().evaluate(plain, loss="softmax_cross_entropy")
    assert fitted(x, y, validation_split=0.25, sample_weight=w) == fitted(
        X, Y, validation_split=0.25, sample_weight=1.0 + Y
    )
    np.testing.assert_array_equal(net().predict(x), net().predict(X))
    unbuilt = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    assert unbuilt.predict(stream).shape == (N, 2)


def csr_matrix(array):
    return pytest.importorskip("scipy.sparse", reason="SciPy is not installed").csr_matrix(array)


@pytest.mark.parametrize("make", [OnDisk, csr_matrix])
def test_ranks_read_arrays_that_take_slices_only_and_sparse_matrices(make):
    def train(communicator):
        source = datasets.Stream(make(X), OnDisk(Y), block=16, window_bytes=1024)
        return net().fit(source, verbose=0, batch_size=32, distributed=communicator)["loss"]

    want = net().fit(datasets.Stream(X, Y, block=16, window_bytes=1024), verbose=0, batch_size=32)["loss"]
    for losses in run_on_ranks(2, train):
        assert losses == pytest.approx(want, rel=1e-5)


class Short(OnDisk):
    """Gives fewer samples than it says."""

    def __init__(self, array, real):
        super().__init__(array)
        self.real = real

    def __getitem__(self, part):
        return self.array[part.start : min(part.stop, self.real)]


class Changing(OnDisk):
    """Gives samples of another shape or dtype from some sample on."""

    def __init__(self, array, change):
        super().__init__(array)
        self.change = change

    def __getitem__(self, part):
        return self.array[part] if part.stop <= 64 else self.change(self.array[part])


@pytest.mark.parametrize("bad", [
    lambda a: Short(a, 143), lambda a: Short(a, 128), lambda a: Short(a, 0),
    lambda a: Changing(a, lambda part: part[:, :3] if part.ndim > 1 else part[:, None]),
    lambda a: Changing(a, lambda part: np.concatenate([part, part])),
    lambda a: Changing(a, lambda part: part.astype("U5")),
    lambda a: Changing(a, lambda part: part.astype("complex64")),
], ids=["143 samples", "128 samples", "none", "shape", "more", "text", "complex"])  # fmt: skip
def test_short_and_changing_reads_are_refused(bad):
    def streams(x, y):
        return datasets.Stream(x, y, block=16, window_bytes=512)

    with pytest.raises(DataError, match=r"^x: reading the samples \d+ to \d+ gave"):
        net().predict(streams(bad(X), Y), batch_size=16)
    for name, stream in (("x", streams(bad(X), Y)), ("y", streams(X, bad(Y)))):
        for action in (
            lambda stream=stream: net().fit(stream, verbose=0, batch_size=16, shuffle=False),
            lambda stream=stream: net().evaluate(stream, loss="softmax_cross_entropy", batch_size=16),
            lambda stream=stream: net().fit(X, Y, validation_data=(stream, None), verbose=0),
        ):
            with pytest.raises(DataError, match=rf"^{name}: reading the samples \d+ to \d+ gave"):
                action()


def test_an_array_that_changes_its_length_is_refused():
    x = OnDisk(X)
    stream = datasets.Stream(x, Y, block=16, window_bytes=512)

    class Shrink(callbacks.Callback):
        def on_epoch_end(self, model, epoch, logs):
            x.shape = (150, 4)

    with pytest.raises(DataError, match=r"had 200 samples when this run began, but now have \[150, 200\]"):
        net().fit(stream, epochs=2, callbacks=[Shrink()], verbose=0)
    with pytest.raises(DataError, match="now have"):
        net().evaluate(stream, loss="softmax_cross_entropy")
    x.shape, x.array = (200, 4), X[:150]
    with pytest.raises(DataError, match=r"x: the samples \d+ to \d+ cannot be read: out of range"):
        net().evaluate(stream, loss="softmax_cross_entropy")


def test_arrays_without_a_known_length_are_refused():
    x = OnDisk(X)
    for shape in ((), (float("nan"), 4)):
        x.shape = shape
        with pytest.raises(ArgumentTypeError, match="x must have a first axis of known length"):
            datasets.Stream(x, Y)


@pytest.mark.parametrize(("third", "match"), [
    ((X[:5, :3], Y[:5]), r"batch 3 of the stream: a sample of x has shape \(3,\), but in the batches before, \(4,\)"),
    ((X[:5], np.eye(2)[Y[:5]]), r"batch 3 of the stream: a sample of y has shape \(2,\)"),
    ((X[:5], Y[:4]), "batch 3 of the stream: x of a batch has 5 samples, but y of a batch has 4 targets"),
    ((X[:5].astype(str), Y[:5]), "batch 3 of the stream: x of a batch must be an array of real numbers"),
    ((X[:5] * np.nan, Y[:5]), "batch 3 of the stream: x of a batch contains NaN"),
    (([[1.0], [2.0, 3.0]], Y[:2]), "batch 3 of the stream: x of a batch cannot be converted to an array"),
    ((X[:0], Y[:0]), "batch 3 of the stream: Stream: a batch is empty"),
    (X[:5], "batch 3 of the stream: Stream: each batch must be"),
])  # fmt: skip
def test_an_incompatible_batch_is_named_in_the_error(third, match):
    batches = [(X[:32], Y[:32]), (X[32:64], Y[32:64]), third]
    for action in (
        lambda: net().fit(batches, verbose=0),
        lambda: net().fit(lambda: iter(batches), verbose=0),
        lambda: net().evaluate(batches, loss="softmax_cross_entropy"),
    ):
        with pytest.raises((DataError, ShapeError, ArgumentTypeError), match=match):
            action()


def test_incompatible_batches_of_a_step_are_named_in_the_error():
    with pytest.raises(DataError, match=r"batch 2 of the stream: a sample of x has shape \(3,\)"):
        net().fit([(X[:5], Y[:5]), (X[:5, :3], Y[:5])], accumulate=2, verbose=0)
    with pytest.raises(DataError, match="batch 1 to 2 of the stream: x of a batch contains NaN"):
        net().fit([(X[:5], Y[:5]), (X[:5] * np.nan, Y[:5])], accumulate=2, verbose=0)


# Numbers -------------------------------------------------------------------------------------------------------------

QUARTERS = [np.float32(0.25), np.float16(0.25), np.float64(0.25), np.longdouble(0.25), np.array(0.25),
            fractions.Fraction(1, 4), decimal.Decimal("0.25")]  # fmt: skip
THREES = [np.int64(3), np.uint8(3), np.array(3), 3.0, np.float32(3), fractions.Fraction(3), decimal.Decimal(3)]


@pytest.mark.parametrize("quarter", QUARTERS, ids=repr)
def test_numbers_of_any_type_are_fractions_and_rates(quarter, tmp_path):
    want = fitted(SAMPLES, LABELS, validation_split=0.25, optimizer=xpnet.optimizers.SGD(0.25))
    optimizer = xpnet.optimizers.SGD(quarter, momentum=quarter, clip_norm=quarter)
    assert repr(optimizer) == "SGD(learning_rate=0.25, momentum=0.25, clip_norm=0.25)"
    assert fitted(SAMPLES, LABELS, validation_split=quarter, optimizer=xpnet.optimizers.SGD(quarter)) == want
    stopping = callbacks.EarlyStopping("loss", min_delta=quarter)
    model = xpnet.Sequential([layers.Dense(3, l2=quarter), layers.Dropout(quarter), layers.Dense(2)], (4,), "cpu")
    checkpoint = callbacks.Checkpoint(tmp_path / "run")
    history = model.fit(SAMPLES, LABELS, optimizer=optimizer, callbacks=[stopping, checkpoint], **QUIET)
    assert all(type(value) is float for values in history.values() for value in values)
    assert type(stopping.min_delta) is type(stopping.best) is type(model.layers[1].rate) is float
    assert json.dumps(history)
    model.save(tmp_path / "m")
    assert xpnet.load(tmp_path / "m", "cpu").layers[1].rate == 0.25


@pytest.mark.parametrize("three", THREES, ids=repr)
def test_numbers_of_any_type_are_counts(three, tmp_path):
    model = xpnet.Sequential([layers.Dense(three), layers.ReLU(), layers.Dense(2)], three, "cpu", seed=three)
    assert model.layers[0].output_shape == (3,) and model.seed == 3 and model.input_shape == (3,)
    checkpoint = callbacks.Checkpoint(tmp_path / "run", every=three, keep_best=three, monitor="loss")
    history = model.fit(SAMPLES[:, :3], LABELS, epochs=three, batch_size=three, accumulate=three, verbose=0,
                        callbacks=[checkpoint, callbacks.EarlyStopping("loss", patience=three)])  # fmt: skip
    assert len(history["loss"]) == 3 and type(model._state.epoch) is int
    assert model.predict(SAMPLES[:, :3], batch_size=three).shape == (20, 2)
    assert json.loads(json.dumps(model.get_config()["seed"])) == 3


@pytest.mark.parametrize("value", [
    np.float32(1), np.float32("nan"), np.array([0.25]), np.bool_(True), "0.25", None, decimal.Decimal("NaN"), 1j,
    fractions.Fraction(10**400), np.array(True), np.array("0.25"), np.datetime64("2026"), decimal.Decimal("1e999"),
], ids=repr)  # fmt: skip
def test_invalid_fractions_are_refused(value):
    with pytest.raises(ArgumentError, match="validation_split must be a number of at least 0 and below 1"):
        fitted(SAMPLES, LABELS, validation_split=value)
    with pytest.raises(ArgumentError, match="rate must be a number"):
        layers.Dropout(value)


@pytest.mark.parametrize("value", [
    np.float32(2.5), np.array([3]), np.bool_(True), np.array(True), decimal.Decimal("2.5"), fractions.Fraction(5, 2),
    np.int64(0), "3",
], ids=repr)  # fmt: skip
def test_invalid_counts_are_refused(value):
    for name in ("epochs", "batch_size", "accumulate"):
        with pytest.raises(ArgumentError, match=f"{name} must be an integer"):
            net().fit(SAMPLES, LABELS, **{**QUIET, name: value})


def test_flags_may_be_numpy_booleans_and_nothing_else():
    for true in (True, np.True_, np.array(True)):
        layer = layers.Dense(2, use_bias=true)
        assert layer.use_bias is True
    for wrong in (1, "yes", None, np.int64(1), np.array([True])):
        with pytest.raises(XpnetError, match="use_bias must be True or False"):
            layers.Dense(2, use_bias=wrong)
