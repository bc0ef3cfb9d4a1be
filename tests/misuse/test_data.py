"""Data of any kind is used exactly or refused: memory layouts, tables, streams, batches, tokens and idx files."""

import inspect
import math

import numpy as np
import pytest
from misuse import Misuse, Subject, check

import xpnet
from xpnet import augment, datasets, layers
from xpnet.datasets import CharTokenizer, RandomWindows, Stream, read_idx, token_windows, write_idx
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, XpnetError

OPTIONS = {"loss": "softmax_cross_entropy", "optimizer": "sgd", "verbose": 0, "batch_size": 4}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 4)).astype("float32"), RNG.integers(0, 3, 12)
#: Small whole numbers, which every dtype holds.
WHOLE = RNG.integers(0, 100, (12, 4))


def model():
    return xpnet.Sequential([layers.Dense(5), layers.Tanh(), layers.Dense(3)], (4,), "cpu")


# Every layout and dtype gives the same result -----------------------------------------------------------------------


def on_disk(a, folder):
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, a)
    return np.load(path, mmap_mode="r")


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a):
    buffer = np.zeros(a.nbytes + 1, "uint8")
    b = buffer[1:].view(a.dtype).reshape(a.shape)
    b[...] = a
    assert not b.flags.aligned
    return b


LAYOUTS = {
    "list": lambda a, _: a.tolist(),
    "tuple": lambda a, _: tuple(a.tolist()),
    "list_of_arrays": lambda a, _: list(a),
    "fortran": lambda a, _: np.asfortranarray(a),
    "every_second": lambda a, _: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a, _: a[::-1].copy()[::-1],
    "a_column_of_more": lambda a, _: np.stack([a, a + 1], axis=-1)[..., 0],
    "big_endian": lambda a, _: a.astype(a.dtype.newbyteorder(">")),
    "read_only": lambda a, _: read_only(a),
    "unaligned": lambda a, _: unaligned(a),
    "memory_map": on_disk,
    "matrix_subclass": lambda a, _: a.view(type("Own", (np.ndarray,), {})),
    "memoryview": lambda a, _: memoryview(np.ascontiguousarray(a)),
    "float64": lambda a, _: a.astype("float64"),
}


def results(x, y, weight=None):
    one = model()
    history = one.fit(x, y, sample_weight=weight, validation_split=0.25, **OPTIONS)
    return one.state_dict(), history, one.evaluate(x, y, sample_weight=weight), one.predict(x)


def assert_same_results(got, expected):
    assert got[1] == expected[1] and got[2] == expected[2]
    np.testing.assert_array_equal(got[3], expected[3])
    for name, value in expected[0].items():
        np.testing.assert_array_equal(got[0][name], value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_layout_gives_the_same_result(layout, weighted, tmp_path):
    change = LAYOUTS[layout]
    weight = np.linspace(1, 2, 12).astype("float32") if weighted else None
    given = change(weight, tmp_path) if weighted else None
    assert_same_results(results(change(X, tmp_path), change(Y, tmp_path), given), results(X, Y, weight))


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int64", "uint64", "float16", "float64", ">f8", "<u2"]
)
def test_every_dtype_gives_the_same_result(dtype):
    labels = Y.astype(dtype)
    assert_same_results(results(WHOLE.astype(dtype), labels), results(WHOLE.astype("float32"), Y))


def test_booleans_count_as_0_and_1():
    assert_same_results(results(X > 0, Y > 1), results((X > 0).astype("float32"), (Y > 1).astype(int)))


def test_a_constant_with_strides_of_zero_is_used_as_any_array():
    x, y = np.broadcast_to(X[0], (12, 4)), np.broadcast_to(Y[0], 12)
    assert x.strides[0] == y.strides[0] == 0
    assert_same_results(results(x, y), results(x.copy(), y.copy()))


@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 3)])
def test_layouts_of_targets_that_are_numbers(shape):
    x, y = RNG.normal(size=(6, 4)), RNG.normal(size=shape)
    make = [layers.Dense(math.prod(shape[1:])), layers.Reshape(shape[1:])]
    expected = xpnet.Sequential(make, (4,), "cpu").fit(x, y, "mse", verbose=0)
    for given in (np.asfortranarray(y), y[::-1].copy()[::-1], y.astype(">f8"), np.repeat(y, 2, 0)[::2]):
        make = [layers.Dense(math.prod(shape[1:])), layers.Reshape(shape[1:])]
        assert xpnet.Sequential(make, (4,), "cpu").fit(x, given, "mse", verbose=0) == expected


def tables():
    pandas = pytest.importorskip("pandas")
    order = RNG.permutation(12)
    return pandas, {
        "frame": (pandas.DataFrame(X), pandas.Series(Y)),
        "other_index": (pandas.DataFrame(X, index=order), pandas.Series(Y, index=order[::-1])),
        "column_of_labels": (pandas.DataFrame(X), pandas.DataFrame({"label": Y})),
        "nullable": (pandas.DataFrame(X).astype("Float32"), pandas.Series(Y, dtype="Int64")),
        "index": (pandas.DataFrame(X), pandas.Index(Y)),
        "mixed_dtypes": (pandas.DataFrame({i: X[:, i].astype("float64" if i % 2 else "float32") for i in range(4)}),
                         pandas.Series(Y, dtype="uint8")),
        "frame_and_list": (pandas.DataFrame(X), Y.tolist()),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["frame", "other_index", "column_of_labels", "nullable", "index", "mixed_dtypes", "frame_and_list"]
)
def test_tables_give_the_same_result(kind):
    pandas, made = tables()
    x, y = made[kind]
    weight = np.linspace(1, 2, 12).astype("float32")
    assert_same_results(results(x, y), results(X, Y))
    assert_same_results(results(x, y, pandas.Series(weight, index=range(12, 0, -1))), results(X, Y, weight))


@pytest.mark.parametrize("scalar", [np.int8, np.uint64, np.float32, np.float64, np.array], ids=lambda s: s.__name__)
def test_arguments_may_be_numpy_scalars(scalar):
    one, other = model(), model()
    options = {"loss": "softmax_cross_entropy", "optimizer": "sgd"}
    got = one.fit(X, Y, epochs=scalar(2), batch_size=scalar(5), accumulate=scalar(2), verbose=scalar(0), **options)
    assert got == other.fit(X, Y, epochs=2, batch_size=5, accumulate=2, verbose=0, **options)
    np.testing.assert_array_equal(one.predict(X, batch_size=scalar(5)), other.predict(X, batch_size=5))


def test_a_csv_file_of_numpy(tmp_path):
    np.savetxt(tmp_path / "a.csv", np.column_stack([X, Y]), delimiter=",")
    table = np.loadtxt(tmp_path / "a.csv", delimiter=",")
    assert_same_results(results(table[:, :4], table[:, 4]), results(X, Y))


def refused(name, error, *words, x=lambda: X, y=lambda: Y):
    def wrong(subject):
        return subject.model.fit(x(), y(), **OPTIONS)

    return Misuse(name, wrong, error, words)


def pandas_of(make):
    def value():
        return make(pytest.importorskip("pandas"))

    return value


def sparse(kind):
    return lambda: getattr(pytest.importorskip("scipy.sparse"), kind)(X)


def named_columns():
    return np.array([tuple(row) for row in X], dtype=[(name, "f4") for name in "abcd"])


TABLES = [
    refused("missing_values", DataError, "NaN",
            x=pandas_of(lambda pd: pd.DataFrame(X).mask(pd.DataFrame(X) > 1))),
    refused("missing_nullable", DataError, "missing values",
            x=pandas_of(lambda pd: pd.DataFrame(X).astype("Float32").mask(pd.DataFrame(X) > 1))),
    refused("categories", ArgumentTypeError, "categories",
            y=pandas_of(lambda pd: pd.Series(pd.Categorical(np.array(["a", "b", "c"])[Y])))),
    refused("text_column", ArgumentTypeError, "text", "'name'",
            x=pandas_of(lambda pd: pd.DataFrame({"a": X[:, 0], "name": "x"}))),
    refused("dates", ArgumentTypeError, "times",
            x=pandas_of(lambda pd: pd.DataFrame({"a": pd.date_range("2020", periods=12)}))),
    refused("text_labels", ArgumentTypeError, "y", y=pandas_of(lambda pd: pd.Series(np.array(["a", "b", "c"])[Y]))),
    refused("a_frame_of_two_labels", ShapeError, "(12, 2)", y=pandas_of(lambda pd: pd.DataFrame({"a": Y, "b": Y}))),
    refused("empty_frame", XpnetError, "x", x=pandas_of(lambda pd: pd.DataFrame())),
    refused("grouped", XpnetError, "x", x=pandas_of(lambda pd: pd.DataFrame(X).groupby(0))),
    refused("csr", ArgumentTypeError, "sparse", "toarray()", x=sparse("csr_matrix")),
    refused("coo", ArgumentTypeError, "sparse", x=sparse("coo_array")),
    refused("masked", ArgumentTypeError, "mask", x=lambda: np.ma.masked_greater(X, 1)),
    refused("masked_without_a_mask", ArgumentTypeError, "mask", x=lambda: np.ma.array(X)),
    refused("list_with_a_masked_row", XpnetError, "x", x=lambda: [np.ma.masked_greater(row, -9) for row in X]),
    refused("records", ArgumentTypeError, "x", x=named_columns),
    refused("decimals", ArgumentTypeError, "x", x=lambda: np.vectorize(__import__("decimal").Decimal)(X.astype(float))),
    refused("list_with_none", ArgumentTypeError, "x", x=lambda: [[None] * 4] * 12),
    refused("ragged", ArgumentTypeError, "x", x=lambda: [[1.0]] * 11 + [[1.0, 2.0]]),
    refused("a_set", ArgumentTypeError, "x", x=lambda: {1.0, 2.0}),
    refused("time_differences", ArgumentTypeError, "x", x=lambda: X.astype("timedelta64[s]")),
    refused("bytes", ArgumentTypeError, "x", x=lambda: X.tobytes()),
    refused("wide_floats", DataError, "x", "float32", x=lambda: X.astype(np.longdouble) * np.longdouble(1e300)),
    refused("zero_dimensions", ShapeError, "(N, 4)", x=lambda: np.float32(3)),
]  # fmt: skip


# Streams and batches -------------------------------------------------------------------------------------------------


class OnDisk:
    """An array on disk that has the shape and the dtype that it says, or not."""

    def __init__(self, array, missing=0, shape=None, dtype=None):
        self.array, self.missing = array, missing
        self.shape, self.dtype = array.shape if shape is None else shape, array.dtype if dtype is None else dtype

    def __getitem__(self, rows):
        part = self.array[rows]
        return part[: len(part) - self.missing]


BATCHES = {
    "none": None,
    "number": 3,
    "text": "ab",
    "two_texts": ("a", "b"),
    "one_array": (X,),
    "four_arrays": (X, Y, None, None),
    "array": X,
    "dict": {"x": X, "y": Y},
    "numbers": (3, 4),
    "other_width": (np.ones((4, 5)), Y[:4]),
    "other_axes": (X[None], Y),
    "other_length": (X[:4], Y[:3]),
    "no_samples": (X[:0], Y[:0]),
    "nan": (X * np.nan, Y),
    "label_out_of_range": (X, Y + 9),
    "text_labels": (X, np.array(["a"] * 12)),
    "objects": (X.astype(object), Y),
    "masked": (np.ma.masked_greater(X, 0), Y),
    "without_targets": (X, None),
    "without_inputs": (None, Y),
    "short_weights": (X, Y, np.ones(3)),
    "nan_weights": (X, Y, np.full(12, np.nan)),
    "negative_weights": (X, Y, -np.ones(12)),
    "text_weights": (X, Y, ["a"] * 12),
}


def stream_row(name, first, *, trains):
    good = [] if first else [(X[:4], Y[:4])]
    calls = {
        "fit_list": lambda s: s.model.fit([*good, BATCHES[name]], **OPTIONS),
        "fit_function": lambda s: s.model.fit(lambda: iter([*good, BATCHES[name]]), **OPTIONS),
        "fit_iterator": lambda s: s.model.fit(iter([*good, BATCHES[name]]), **OPTIONS),
        "accumulate": lambda s: s.model.fit([*good, BATCHES[name]], accumulate=2, **OPTIONS),
        "evaluate": lambda s: s.model.evaluate([*good, BATCHES[name]]),
        "validation": lambda s: s.model.fit(X, Y, validation_data=([*good, BATCHES[name]], None), **OPTIONS),
    }
    place = "first" if first else "second"
    return [
        Misuse(f"batch_{name}_{place}_{how}", wrong, XpnetError, ("of the stream",) if how != "validation" else (),
               trains=how == "validation" or (trains and how.startswith("fit")))
        for how, wrong in calls.items()
    ]  # fmt: skip


STREAMS = [row for name in BATCHES for first in (True, False) for row in stream_row(name, first, trains=not first)]


def stream(name, error, *words, x=lambda: X, y=lambda: Y, weight=lambda: None, trains=False, **options):
    def wrong(subject):
        return subject.model.fit(Stream(x(), y(), weight(), **options), **OPTIONS)

    return Misuse(f"stream_{name}", wrong, error, words, trains=trains)


STREAMS += [
    stream("of_nothing", ArgumentTypeError, "Stream", x=lambda: None),
    stream("of_no_inputs", ArgumentTypeError, "Stream", x=list),
    stream("of_no_names", ArgumentTypeError, "Stream", x=dict),
    stream("of_a_list", ArgumentTypeError, "Stream", "shape", x=X.tolist),
    stream("of_text", ArgumentTypeError, "Stream", x=lambda: "abc"),
    stream("of_text_targets", XpnetError, "y", y=lambda: "abc"),
    stream("other_lengths", DataError, "same length", y=lambda: Y[:-1]),
    stream("weights_of_another_length", DataError, "same length", weight=lambda: np.ones(5)),
    stream("masked", ArgumentTypeError, "mask", x=lambda: np.ma.masked_greater(X, 0)),
    stream("masked_targets", ArgumentTypeError, "mask", y=lambda: np.ma.masked_greater(Y, 1)),
    stream("nan_weights", DataError, "sample_weight", weight=lambda: np.full(12, np.nan)),
    stream("zero_weights", DataError, "weights", weight=lambda: np.zeros(12)),
    stream("width", ShapeError, "(N, 4)", x=lambda: X[:, :3]),
    stream("labels", DataError, "labels range", y=lambda: Y + 9),
    stream("nan", DataError, "NaN", x=lambda: X * np.nan),
    stream("short_reads", DataError, "became shorter", x=lambda: OnDisk(X, missing=1)),
    stream("short_reads_of_targets", DataError, "became shorter", y=lambda: OnDisk(Y, missing=1)),
    stream("longer_than_it_is", DataError, "same length", x=lambda: OnDisk(X, shape=(20, 4))),
    stream("wider_than_it_is", DataError, "(12, 5)", x=lambda: OnDisk(X, shape=(12, 5))),
    stream("of_another_dtype", DataError, "float32", "int32", x=lambda: OnDisk(X, dtype=np.dtype("int32"))),
    stream("without_axes", ArgumentTypeError, "first axis", x=lambda: OnDisk(X, shape=())),
    stream("of_unknown_length", ArgumentTypeError, "first axis", x=lambda: OnDisk(X, shape=(None, 4))),
    stream("without_samples", DataError, "above 0", x=lambda: X[:0], y=lambda: Y[:0]),
    *(stream(f"block_{i}", ArgumentError, "block", block=value)
      for i, value in enumerate([0, -1, 0.5, "a", None, math.nan])),
    *(stream(f"window_bytes_{i}", ArgumentError, "window_bytes", window_bytes=value)
      for i, value in enumerate([0, -1, 0.5, "a", None, math.inf])),
    *(Misuse(f"function_{name}", lambda s, f=function: s.model.fit(f, **OPTIONS), error, words)
      for name, function, error, words in [
          ("of_an_argument", lambda epoch: iter([]), ArgumentTypeError, ("no arguments",)),
          ("returns_none", lambda: None, ArgumentTypeError, ("iterable of batches",)),
          ("returns_a_number", lambda: 3, ArgumentTypeError, ("iterable of batches",)),
          ("returns_nothing", list, DataError, ("no batches",)),
          ("returns_text", lambda: "abc", ArgumentTypeError, ("each batch must be (x, y)",)),
          ("returns_a_dict", lambda: {"a": 1}, ArgumentTypeError, ("each batch must be (x, y)",)),
      ]),
    Misuse("an_iterator_twice", lambda s: s.model.fit(iter([(X, Y)]), epochs=2, **OPTIONS), ArgumentError,
           ("2 times",)),
    Misuse("predict_batches", lambda s: s.model.predict([(X, Y)]), XpnetError, ()),
    Misuse("predict_a_stream_of_batches", lambda s: s.model.predict(Stream([(X, Y)])), ArgumentError, ("batches",)),
    Misuse("predict_short_reads", lambda s: s.model.predict(Stream(OnDisk(X, missing=1), Y)), DataError, ("shorter",)),
    Misuse("predict_unknown_length", lambda s: s.model.predict(OnDisk(X, shape=(None, 4))), XpnetError,
           ("first axis",)),
    Misuse("train_on_batch_of_a_stream",
           lambda s: s.model.train_on_batch(Stream(X, Y), None, "softmax_cross_entropy", "sgd"), ArgumentTypeError,
           ("not a stream",)),
    Misuse("stream_and_y", lambda s: s.model.fit(Stream(X, Y), Y, **OPTIONS), ArgumentError, ("includes its targets",)),
    Misuse("weights_beside_batches", lambda s: s.model.fit([(X, Y)], sample_weight=np.ones(12), **OPTIONS),
           ArgumentError, ("in the batches",)),
    Misuse("balanced_stream", lambda s: s.model.fit(Stream(X, Y), class_weight="balanced", **OPTIONS), ArgumentError,
           ("balanced",)),
    Misuse("split_of_a_stream", lambda s: s.model.fit(Stream(X, Y), validation_split=0.5, **OPTIONS), ArgumentError,
           ("validation_split",)),
    Misuse("whole_stream_as_one_batch", lambda s: s.model.fit(Stream(X, Y), **{**OPTIONS, "batch_size": None}),
           ArgumentError, ("batch_size=None",)),
]  # fmt: skip


@pytest.mark.parametrize("row", [*TABLES, *STREAMS], ids=lambda row: row.name)
def test_data_that_cannot_be_used(row, tmp_path):
    check(row, Subject(tmp_path))


class ReadError(Exception):
    pass


@pytest.mark.parametrize("how", ["fit", "evaluate", "predict"])
def test_an_error_of_the_users_generator_or_array_passes_unchanged(how, tmp_path):
    subject, error = Subject(tmp_path), ReadError("disk")
    subject.step()

    def batches():
        yield X, Y
        raise error

    class Broken(OnDisk):
        def __getitem__(self, rows):
            raise error

    for data in [batches, Stream(Broken(X), Y)] if how != "predict" else [Broken(X)]:
        with pytest.raises(ReadError) as raised:
            getattr(subject.model, how)(data, **(OPTIONS if how == "fit" else {}))
        assert raised.value is error
        subject.step()


# Datasets, tokens and idx files --------------------------------------------------------------------------------------

WRONG = {
    "none": None, "text": "zz", "bytes": b"x", "nan": math.nan, "infinity": math.inf, "negative": -1, "half": 0.5,
    "bool": True, "complex": 1j, "array": np.ones(3), "objects": np.array([None]), "list": ["a", 3], "dict": {"a": 1},
    "set": {1}, "function": len, "class": int, "huge": 2**64, "empty": "",
}  # fmt: skip
#: {function: {argument: wrong values that are right here}}
ARGUMENTS = {
    datasets.logic_gate: {"name": ""},
    datasets.blobs: {"n": "", "classes": "", "noise": "half huge", "seed": "huge"},
    datasets.moons: {"n": "", "noise": "half huge", "seed": "huge"},
    datasets.spirals: {"n": "", "classes": "", "noise": "half huge", "seed": "huge"},
    datasets.mnist: {"data_dir": "none"},
    datasets.fashion_mnist: {"data_dir": "none"},
    datasets.shakespeare: {"data_dir": "none"},
    datasets.read_idx: {"path": ""},
    datasets.token_windows: {"tokens": "", "length": ""},
    datasets.RandomWindows: {"tokens": "", "length": "", "batch_size": "", "batches": "huge"},
    datasets.CharTokenizer: {"text": "text"},
    augment.ElasticDistortion: {"alpha": "half huge", "sigma": "half"},
    augment.GaussianNoise: {"deviation": "half huge"},
    augment.MixUp: {"alpha": "half huge"},
    augment.RandomAffine: {"shift": "half", "rotation": "half negative huge", "scale": "half", "shear": "half"},
    augment.RandomCrop: {"padding": "none", "size": "none"},
    augment.RandomErasing: {"rate": "half", "area": "half"},
    augment.RandomFlip: {"horizontal": "bool", "vertical": "bool"},
}
RIGHT = {"name": "and", "tokens": np.arange(50), "length": 3, "batch_size": 2, "batches": 2, "alpha": 1.0, "sigma": 2.0,
         "deviation": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "argument"),
    [(f, a) for f, arguments in ARGUMENTS.items() for a in arguments],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_no_dataset_takes_an_argument_of_another_kind(function, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for name, value in WRONG.items():
        if name in ARGUMENTS[function][argument].split():
            continue
        arguments = {
            **{other: RIGHT[other] for other in needed if other != argument and other in RIGHT},
            argument: value,
        }
        try:
            result = function(**arguments)
        except XpnetError:
            continue
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        raise AssertionError(f"{name} was accepted, and gave {result!r:.100}")


AUGMENTATIONS = [augment.ElasticDistortion(1.0, 2.0), augment.RandomAffine(0.1), augment.RandomCrop(1),
                 augment.RandomErasing(), augment.RandomFlip()]  # fmt: skip


@pytest.mark.parametrize("layer", AUGMENTATIONS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("shape", [(4,), (None, 4), (2, 2, 2, 2)], ids=str)
def test_distortions_refuse_what_is_no_image(layer, shape):
    with pytest.raises(ShapeError, match=type(layer).__name__):
        xpnet.Sequential([type(layer).from_config(layer.get_config())], shape, "cpu")


TEXT = CharTokenizer("hello")
TOKENS = {
    "windows_too_short": lambda: token_windows(np.arange(3), 3),
    "windows_2d": lambda: token_windows(np.ones((5, 5), int), 2),
    "windows_of_floats": lambda: token_windows(np.arange(50.0), 2),
    "windows_of_text": lambda: token_windows("a" * 50, 2),
    "random_windows_too_short": lambda: RandomWindows(np.arange(3), 3, 1, 1),
    "random_windows_of_a_list_of_text": lambda: RandomWindows(["a"] * 50, 3, 1, 1),
    "encode_unknown": lambda: TEXT.encode("help"),
    "encode_tokens": lambda: TEXT.encode([1, 2]),
    "encode_none": lambda: TEXT.encode(None),
    "decode_too_large": lambda: TEXT.decode([9]),
    "decode_negative": lambda: TEXT.decode([-1]),
    "decode_floats": lambda: TEXT.decode([0.5]),
    "decode_text": lambda: TEXT.decode("he"),
    "decode_a_number": lambda: TEXT.decode(1),
    "decode_3d": lambda: TEXT.decode(np.zeros((1, 1, 1), int)),
    "load_nothing": lambda: CharTokenizer.load("none.json"),
    "load_none": lambda: CharTokenizer.load(None),
    "save_to_a_number": lambda: TEXT.save(3),
    "save_to_nowhere": lambda: TEXT.save("no/folder/a.json"),
    "idx_complex": lambda: write_idx("a", np.ones(2) + 1j),
    "idx_of_text": lambda: write_idx("a", ["a"]),
    "idx_of_large_integers": lambda: write_idx("a", np.array([2**40])),
    "idx_masked": lambda: write_idx("a", np.ma.masked_array(np.ones(3), True)),
    "idx_of_objects": lambda: write_idx("a", np.array([None])),
    "idx_of_dates": lambda: write_idx("a", np.array(["2020"], "M8[D]")),
    "idx_ragged": lambda: write_idx("a", [[1], [1, 2]]),
    "idx_path_none": lambda: write_idx(None, np.ones(3)),
    "idx_path_number": lambda: write_idx(3, np.ones(3)),
    "idx_path_empty": lambda: write_idx("", np.ones(3)),
    "idx_path_folder": lambda: write_idx(".", np.ones(3)),
    "idx_path_nowhere": lambda: write_idx("no/folder/a", np.ones(3)),
    "read_idx_folder": lambda: read_idx("."),
    "read_idx_nowhere": lambda: read_idx("none"),
    "read_idx_null": lambda: read_idx("a\0b"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_wrong_tokens_and_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(XpnetError):
        TOKENS[name]()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype="int32").reshape(2, 3).T, np.arange(6, dtype="int16")[::-2], np.arange(4, dtype=">i4"),
     np.ones((3, 0)), np.array(5.0),
     np.full((2, 2), np.nan, "float32"), np.array([-300], "int16"), np.array([255], "uint8")],
    ids=str,
)  # fmt: skip
def test_idx_files_give_back_any_layout(array, tmp_path):
    write_idx(tmp_path / "a", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)
