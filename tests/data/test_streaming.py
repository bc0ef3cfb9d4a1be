"""Streaming datasets, which may be larger than memory: order, checks of each window, resuming, and memory use."""

import os
import sys
import threading

import numpy as np
import pytest
from small_models import StopAt

import xpnet
from xpnet import callbacks, datasets, layers
from xpnet.data.streaming import StreamingDataset
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, DivergenceError
from xpnet.layers.context import Workspace

RNG = np.random.default_rng(0)
N = 1003
X = RNG.random((N, 5)).astype("float32")
Y = RNG.integers(3, size=N)
WEIGHTS = RNG.random(N) + 0.1


def net(backend="cpu", **kwargs):
    return xpnet.Sequential(
        [layers.Dense(8), layers.Tanh(), layers.Dropout(0.2), layers.Dense(3)], (5,), backend, **kwargs
    )


class OnDisk:
    """Like an HDF5 dataset, with shape, dtype, length and slices; records each read."""

    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.read = []

    def __len__(self):
        return len(self._array)

    def __getitem__(self, part):
        assert isinstance(part, slice)
        self.read.append(threading.current_thread().name)
        return self._array[part]


def stream(x=X, y=Y, weights=None, block=64, rows=256):
    """A Stream with windows of this number of rows."""
    return datasets.Stream(x, y, weights, block=block, window_bytes=rows * X.itemsize * X.shape[1])


def epoch_of(source, size=32, accumulate=1, key=(0, 1), first=0):
    """(first feature of each row, in order; number of rows of each step) of one epoch."""
    model = net()
    streamed = StreamingDataset(
        source,
        lambda x, y, w, names: xpnet.data.preparation.prepare(model, x, y, xpnet.losses.get(LOSS), w, None, names),
    )
    seen, rows = [], []
    for step in streamed.steps(Workspace(model.context), size, accumulate, key, first):
        batches = list(step.batches())
        assert len(batches) == step.batch_count and [len(b) for b in batches] == step.batch_sizes
        seen += [batch.x[:, 0].copy() for batch in batches][:1] if accumulate == 1 else []
        rows.append(step.rows)
    return np.concatenate(seen) if seen else None, rows


@pytest.fixture(params=["in place", "copied"])
def both_ways(request, monkeypatch):
    """Runs a test with windows that stay in the array of the stream, and with copies of them."""
    least = 0 if request.param == "in place" else 2**62
    monkeypatch.setattr(xpnet.data.streaming, "_MIN_BLOCK_IN_PLACE", least)


LOSS = "softmax_cross_entropy"


@pytest.mark.usefixtures("both_ways")
def test_an_epoch_has_every_sample_once_in_shuffled_order():
    got, rows = epoch_of(stream())
    np.testing.assert_array_equal(np.sort(got), np.sort(X[:, 0]))
    assert (got != X[:, 0]).any() and rows == [32] * 31 + [11]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_only_the_last_step_is_smaller(accumulate):
    _, rows = epoch_of(stream(), size=20, accumulate=accumulate)
    assert sum(rows) == N and set(rows[:-1]) == {20 * accumulate}


@pytest.mark.usefixtures("both_ways")
def test_samples_are_shuffled_over_blocks_and_within_windows():
    got, _ = epoch_of(stream(block=32, rows=128), size=32)
    index = {value: i for i, value in enumerate(X[:, 0])}
    order = np.array([index[value] for value in got])
    first_window = order[:128]
    assert len(set(first_window // 32)) == 4  # four blocks
    assert (np.diff(first_window) != 1).mean() > 0.9
    repeated, _ = epoch_of(stream(block=32, rows=128), size=32)
    np.testing.assert_array_equal(got, repeated)
    other, _ = epoch_of(stream(block=32, rows=128), size=32, key=(0, 2))
    assert (got != other).any()


@pytest.mark.usefixtures("both_ways")
def test_without_shuffling_the_order_is_kept():
    got, _ = epoch_of(stream(), key=None)
    np.testing.assert_array_equal(got, X[:, 0])


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("first", [32, 256, 288, 992])
def test_an_epoch_can_start_in_the_middle(first):
    whole, _ = epoch_of(stream())
    rest, _ = epoch_of(stream(), first=first)
    np.testing.assert_array_equal(rest, whole[first:])


def test_windows_are_read_one_at_a_time_by_another_thread():
    x = OnDisk(X)
    epoch_of(stream(x=x))
    assert len(x.read) == 16 and all(name.startswith("xpnet-stream") for name in x.read)


# fit, evaluate, predict -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_stream_without_shuffling_trains_like_arrays(backend, weights):
    one, two = net(backend), net(backend)
    settings = {"epochs": 2, "batch_size": 32, "shuffle": False, "verbose": 0}
    want = one.fit(X, Y, sample_weight=weights, **settings)
    got = two.fit(stream(weights=weights), validation_data=None, **settings)
    assert dict(got) == dict(want)
    for name, value in one.state_dict().items():
        np.testing.assert_array_equal(two.state_dict()[name], value)


def test_training_on_a_shuffled_stream_works(backend):
    y = (X[:, 0] > 0.5).astype(int) + (X[:, 1] > 0.5)
    history = net(backend).fit(stream(y=y), epochs=15, batch_size=32, optimizer=xpnet.optimizers.Adam(0.01), verbose=0)
    assert history["accuracy"][-1] > 0.7 and len(history.seconds) == 15


def test_accumulated_steps_of_a_stream_equal_those_of_arrays():
    one, two = net(), net()
    settings = {"batch_size": 32, "accumulate": 3, "shuffle": False, "verbose": 0}
    want, got = one.fit(X, Y, sample_weight=WEIGHTS, **settings), two.fit(stream(weights=WEIGHTS), **settings)
    assert dict(got) == dict(want)


def batches(size=50, weights=None):
    for start in range(0, N, size):
        part = slice(start, start + size)
        yield (X[part], Y[part]) if weights is None else (X[part], Y[part], weights[part])


def approximately(logs):
    return {name: pytest.approx(values, rel=1e-12) for name, values in logs.items()}


@pytest.mark.usefixtures("exact_replays")
@pytest.mark.parametrize("source", ["list", "function"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_an_iterable_of_batches_trains_like_arrays(backend, source, weights):
    one, two = net(backend), net(backend)
    settings = {"epochs": 2, "shuffle": False, "verbose": 0}
    want = one.fit(X, Y, batch_size=50, sample_weight=weights, **settings)
    x = list(batches(weights=weights)) if source == "list" else lambda: batches(weights=weights)
    got = two.fit(x, **settings)
    assert dict(got) == approximately(want)
    for name, value in one.state_dict().items():
        np.testing.assert_array_equal(two.state_dict()[name], value)


def test_accumulated_batches_of_an_iterable_equal_those_of_arrays():
    one, two = net(), net()
    want = one.fit(X, Y, batch_size=50, accumulate=4, shuffle=False, verbose=0)
    assert dict(two.fit(batches, accumulate=4, verbose=0)) == approximately(want)


def test_evaluation_and_validation_of_streams_equal_those_of_arrays(backend):
    model = net(backend)
    history = model.fit(X, Y, validation_data=(stream(), None), batch_size=100, verbose=0)
    want = model.evaluate(X, Y, batch_size=100)
    assert model.evaluate(stream()) == pytest.approx(want)
    assert model.evaluate(list(batches())) == pytest.approx(want)
    assert {name: history[f"val_{name}"][0] for name in want} == pytest.approx(want)


def test_predictions_of_data_on_disk_equal_those_of_arrays(backend, tmp_path):
    model = net(backend)
    want = model.predict(X, batch_size=100)
    file = np.memmap(tmp_path / "x", dtype="float64", mode="w+", shape=X.shape)
    file[...] = X
    np.testing.assert_array_equal(model.predict(file, batch_size=100), want)
    np.testing.assert_array_equal(model.predict(stream(x=OnDisk(X)), batch_size=100), want)


def test_outputs_may_stay_on_the_device(backend):
    model = net(backend)
    out = model.predict(X, batch_size=100, as_device=True)
    assert type(out) is type(backend.zeros((1,), "float32"))
    np.testing.assert_array_equal(backend.to_numpy(out), model.predict(X, batch_size=100))


def test_a_model_without_input_shape_is_built_from_the_stream():
    model = xpnet.Sequential([layers.Dense(3)], backend="cpu")
    model.fit(stream(), batch_size=64, verbose=0)
    assert model.input_shape == (5,)
    with pytest.raises(ArgumentError, match="give the model an input_shape"):
        xpnet.Sequential([layers.Dense(3)], backend="cpu").fit(batches, verbose=0)


def test_progress_is_shown_for_a_stream_of_unknown_length(capsys):
    net().fit(batches, verbose=1)
    net().fit(batches, verbose=2)
    assert "samples/s" in capsys.readouterr().out


# Arrays that are trained on in place ----------------------------------------------------------------------------------


def trained(source, **settings):
    """(history, weights, whether windows were copied) of a training on this stream."""
    model, copied, copy = net(), [], StreamingDataset._read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamingDataset, "_read", lambda *args: copied.append(args) or copy(*args))
        history = model.fit(source, epochs=2, batch_size=32, verbose=0, **settings)
    return dict(history), model.state_dict(), bool(copied)


def equal_results(one, two):
    return one[0] == two[0] and all((value == two[1][name]).all() for name, value in one[1].items())


@pytest.mark.parametrize("settings", [{}, {"shuffle": False}, {"accumulate": 3}, {"class_weight": [2.0, 1.0, 0.5]}])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dtype", ["float32", "uint8", ">i4", "bool"])
def test_training_in_place_equals_training_on_copies(tmp_path, monkeypatch, dtype, weights, settings):
    file = np.memmap(tmp_path / "x", dtype=dtype, mode="w+", shape=X.shape)
    file[...] = X if dtype == "float32" else 5 * X
    want = trained(stream(x=file, weights=weights), **settings)
    monkeypatch.setattr(xpnet.data.streaming, "_MIN_BLOCK_IN_PLACE", 0)
    got = trained(
        stream(x=np.memmap(tmp_path / "x", dtype=dtype, mode="r", shape=X.shape), weights=weights), **settings
    )
    assert want[2] and not got[2] and equal_results(got, want)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_custom_layer_that_writes_into_its_input_does_not_change_the_array(monkeypatch, shuffle):
    class WritesLater(layers.Layer):
        """Writes into its input, but not in the first step, which is checked."""

        def build(self, input_shape):
            self.passes = 0
            return input_shape

        def forward(self, x):
            self.passes += 1
            if self.passes > 2:
                x *= 2
            return x

        def backward(self, grad_y):
            return grad_y

    monkeypatch.setattr(xpnet.data.streaming, "_MIN_BLOCK_IN_PLACE", 0)
    x = X.copy()
    model = xpnet.Sequential([WritesLater(), layers.Dense(3)], (5,), "cpu")
    model.fit(stream(x=x), batch_size=32, shuffle=shuffle, verbose=0)
    assert model[0].passes > 2
    np.testing.assert_array_equal(x, X)


def unaligned(a):
    raw = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


@pytest.mark.parametrize("change", [
    lambda x: x.astype("float64"),
    lambda x: x.astype(">f4"),
    np.asfortranarray,
    lambda x: np.repeat(x, 2, axis=0)[::2],
    unaligned,
    OnDisk,
])  # fmt: skip
def test_arrays_that_a_model_cannot_take_as_they_are_are_copied(monkeypatch, change):
    want = trained(stream(x=change(X)))
    monkeypatch.setattr(xpnet.data.streaming, "_MIN_BLOCK_IN_PLACE", 0)
    got = trained(stream(x=change(X)))
    assert got[2] and equal_results(got, want)


def test_small_blocks_and_large_targets_are_copied(monkeypatch):
    assert trained(stream())[2]  # blocks of 64 rows of 20 bytes
    monkeypatch.setattr(xpnet.data.streaming, "_MIN_BLOCK_IN_PLACE", 64 * 20)
    assert not trained(stream())[2]
    monkeypatch.setattr(xpnet.data.streaming, "_MAX_LOADED_BYTES", N * Y.itemsize - 1)
    assert trained(stream())[2]


def test_each_block_is_checked_in_place(monkeypatch):
    monkeypatch.setattr(xpnet.data.streaming, "_MIN_BLOCK_IN_PLACE", 0)
    x, y = X.copy(), Y.copy()
    x[700, 2] = np.nan
    where = "the block that begins with sample 640"
    with pytest.raises(DataError, match=f"x in {where} contains NaN .* first in sample 60"):
        net().fit(stream(x=x), batch_size=32, shuffle=False, verbose=0)
    y[700] = 3
    with pytest.raises(DataError, match=f"y in {where}: .* labels range from 0 to 3"):
        net().fit(stream(y=y), batch_size=32, verbose=0)


def test_in_place_a_block_is_checked_once_and_its_targets_are_read_once(monkeypatch):
    monkeypatch.setattr(xpnet.data.streaming, "_MIN_BLOCK_IN_PLACE", 0)
    y, checked, prepare = OnDisk(Y), [], StreamingDataset._prepare_block
    monkeypatch.setattr(StreamingDataset, "_prepare_block", lambda *args: checked.append(args[1]) or prepare(*args))
    net().fit(stream(y=y), epochs=3, batch_size=32, verbose=0)
    blocks = [(block.start, block.stop) for block in checked if block.stop - block.start > 1]  # without the trial
    assert sorted(blocks) == [(start, min(start + 64, N)) for start in range(0, N, 64)]
    assert len(y.read) == len(checked)


# Large memory maps ----------------------------------------------------------------------------------------------------


def test_only_a_large_memmap_is_streamed(tmp_path, monkeypatch):
    file = np.memmap(tmp_path / "x", dtype="float32", mode="w+", shape=X.shape)
    file[...] = X
    settings = {"batch_size": 32, "verbose": 0}
    want = dict(net().fit(X, Y, **settings))
    assert dict(net().fit(file, Y, **settings)) == want
    windows, ahead = [], xpnet.data.streaming._read_ahead
    monkeypatch.setattr(xpnet.data.streaming, "_read_ahead", lambda items: windows.append(items) or ahead(items))
    net().fit(file, Y, **settings)
    assert not windows
    monkeypatch.setattr(xpnet.data.streaming, "_MAX_LOADED_BYTES", 1000)
    assert dict(net().fit(file, Y, **settings)) == want  # a single window contains all samples, in the same order
    assert len(windows) == 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_on_a_large_file_needs_little_memory(tmp_path):
    """The environment variable XPNET_BIG_GB sets the size of the file, which is sparse and takes no space on disk."""
    rows = int(float(os.environ.get("XPNET_BIG_GB", "1")) * 2**30) // (784 * 4)
    x = np.memmap(tmp_path / "x", dtype="float32", mode="w+", shape=(rows, 784))
    y = np.memmap(tmp_path / "y", dtype="uint8", mode="w+", shape=(rows,))
    peak = 0

    class Watch(callbacks.Callback):
        def on_step_end(self, model, step):
            nonlocal peak
            if step % 10 == 0:
                peak = max(peak, anonymous_bytes())

    before = anonymous_bytes()
    model = xpnet.Sequential([layers.Dense(16), layers.ReLU(), layers.Dense(10)], (784,), backend="cpu")
    history = model.fit(x, y, batch_size=1024, callbacks=[Watch()], verbose=0)
    print(f"{x.nbytes / 2**30:.1f} GiB, {history.seconds[0]:.1f} s, anonymous memory {peak / 2**20:.0f} MiB")
    assert model._state.step == -(-rows // 1024)
    assert 0 < peak - before < 2**29


def anonymous_bytes():
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("source", [stream, lambda: batches])
@pytest.mark.parametrize("stop", [2, 9, 25, 40])
def test_a_run_on_a_stream_resumes_bit_for_bit(tmp_path, source, stop):
    settings = {"epochs": 3, "batch_size": 50, "verbose": 0}
    uninterrupted, model = net(), net()
    want = uninterrupted.fit(source(), **settings)
    with pytest.raises(KeyboardInterrupt):
        net().fit(source(), callbacks=[callbacks.Checkpoint(tmp_path / "run", minutes=0), StopAt(stop)], **settings)
    got = model.fit(source(), resume_from=tmp_path / "run", **settings)
    assert dict(got) == dict(want)
    for name, value in uninterrupted.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value)


def test_a_run_on_batches_resumes_after_the_last_step_of_an_epoch(tmp_path, monkeypatch):
    uninterrupted, model = net(), net()
    want = uninterrupted.fit(batches, epochs=2, verbose=0)
    checkpoint = callbacks.Checkpoint(tmp_path / "run", minutes=0)
    monkeypatch.setattr(checkpoint, "on_epoch_end", lambda *_: None)  # so that the file has the state of the last step
    net().fit(batches, callbacks=[checkpoint], epochs=1, verbose=0)
    assert dict(model.fit(batches, resume_from=tmp_path / "run", epochs=2, verbose=0)) == dict(want)
    with pytest.raises(DataError, match="ends after 500 samples, before the position of the checkpoint, 1003"):
        net().fit(lambda: (b for b in list(batches())[:10]), resume_from=tmp_path / "run", epochs=2, verbose=0)


def test_tensors_of_pytorch_can_be_streamed():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    one, two = net(), net()
    settings = {"batch_size": 32, "verbose": 0}
    want = one.fit(stream(), **settings)
    assert dict(two.fit(stream(x=torch.from_numpy(X), y=torch.from_numpy(Y)), **settings)) == dict(want)


# Invalid data and arguments -------------------------------------------------------------------------------------------


def test_each_window_and_batch_is_checked():
    x = X.copy()
    x[700, 2] = np.nan
    with pytest.raises(DataError, match="x in the window that begins with sample .* contains NaN or infinity"):
        net().fit(stream(x=x), batch_size=32, verbose=0)
    y = Y.copy()
    y[5] = 3
    with pytest.raises(DataError, match="labels range from 0 to 3"):
        net().fit(stream(y=y), batch_size=32, verbose=0)
    with pytest.raises(DataError, match="x of a batch contains NaN"):
        net().fit([(X, Y), (x, Y)], verbose=0)


def test_an_iterator_can_be_used_for_one_epoch():
    assert len(net().fit(batches(), verbose=0)["loss"]) == 1
    with pytest.raises(ArgumentError, match="iterated 2 times: give a list, or a function"):
        net().fit(batches(), epochs=2, verbose=0)


def test_an_iterator_of_validation_data_can_be_used_for_one_epoch():
    model, held_out = net(), [(X, Y)]
    model.fit(X, Y, validation_data=(iter(held_out), None), verbose=0)
    with pytest.raises(ArgumentError, match="iterated 2 times"):
        model.fit(X, Y, validation_data=(iter(held_out), None), epochs=2, verbose=0)


def test_a_window_may_have_zero_weight(backend):
    weights = np.where(np.arange(N) < 256, 0.0, WEIGHTS)
    one, two = net(backend), net(backend)
    settings = {"batch_size": 32, "shuffle": False, "verbose": 0}
    want = one.fit(X, Y, sample_weight=weights, **settings)
    assert dict(two.fit(stream(weights=weights), **settings)) == dict(want)


def test_an_iterator_cannot_be_resumed(tmp_path):
    net().fit(batches(), callbacks=[callbacks.Checkpoint(tmp_path / "run")], verbose=0)
    with pytest.raises(ArgumentError, match="which cannot be resumed"):
        net().fit(batches(), resume_from=tmp_path / "run", verbose=0)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: datasets.Stream(X, Y[:5]), DataError, "same length"),
        (lambda: datasets.Stream(X, Y, block=0), ArgumentError, "block"),
        (lambda: datasets.Stream(X[:0], Y[:0]), DataError, "above 0"),
        (lambda: datasets.Stream(X), ArgumentTypeError, "give arrays x"),
        (lambda: datasets.Stream([[1.0]], [1]), ArgumentTypeError, "give arrays x"),
        (lambda: datasets.Stream(X, Y, window_bytes=1.5), ArgumentError, "window_bytes"),
        (lambda: datasets.Stream(5), ArgumentTypeError, "without y, give batches"),
        (lambda: datasets.Stream([], None, WEIGHTS), ArgumentError, "give the weights of batches in the batches"),
        (lambda: net().fit(stream(), Y, verbose=0), ArgumentError, "give y and sample_weight to the Stream"),
        (lambda: net().fit(stream(), batch_size=None, verbose=0), ArgumentError, "batch_size=None"),
        (lambda: net().fit(stream(), validation_split=0.2, verbose=0), ArgumentError, "cannot split a stream"),
        (lambda: net().fit(X, verbose=0), ArgumentTypeError, "y is missing"),
        (lambda: net().evaluate(X, loss="mse"), ArgumentTypeError, "y is missing"),
        (lambda: net().fit([X, Y], verbose=0), ArgumentTypeError, "each batch must be"),
        (lambda: net().fit([], verbose=0), DataError, "gave no batches"),
        (lambda: net().fit(lambda: 5, verbose=0), ArgumentTypeError, "must return an iterable of batches"),
        (lambda: net().fit([(X[:0], Y[:0])], verbose=0), DataError, "a batch is empty"),
        (lambda: net().predict(datasets.Stream(batches)), ArgumentError, "give predict an array"),
        (
            lambda: net().train_on_batch(stream(), optimizer="adam", loss=LOSS, y=None),
            ArgumentTypeError,
            "not a stream",
        ),
    ],
)
def test_invalid_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_an_error_of_the_source_is_raised_and_the_thread_ends():
    def broken():
        yield X, Y
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        net().fit(broken, verbose=0)
    assert not [t for t in threading.enumerate() if t.name.startswith("xpnet-stream")]


def test_divergence_on_a_stream_names_epoch_and_step():
    with pytest.raises(DivergenceError, match=r"in epoch 1, at step \d+, "):
        net().fit(batches, loss=LOSS, optimizer=xpnet.optimizers.SGD(1e38), verbose=0)
