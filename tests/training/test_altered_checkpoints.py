"""Checkpoints and model files that were altered and signed again are refused whole, and the model stays as it was."""

import copy
import tracemalloc
import warnings

import numpy as np
import pytest
from altered_files import DELETED, VALUES, File, places, value_at, with_value
from custom_layers import Counted
from small_models import StopAt, assert_same_state

import xpnet
from xpnet import augment, callbacks, layers, metrics, optimizers
from xpnet.errors import ArgumentError, ArgumentTypeError, DeviceMemoryError, DivergenceError, FileError

RNG = np.random.default_rng(0)
X = RNG.random((40, 4, 4, 1)).astype("float32")
Y = RNG.integers(3, size=40)


def net():
    stack = [layers.Conv2D(2, 3), layers.BatchNorm(), layers.ReLU(), layers.Flatten(), layers.Dropout(0.2),
             layers.Dense(3)]  # fmt: skip
    return xpnet.Sequential(stack, (4, 4, 1), "cpu")


def fit(model, folder, path=None, **changed):
    """A run with every kind of state."""
    own = [callbacks.EarlyStopping("loss", patience=9), callbacks.ReduceLROnPlateau("loss", patience=0),
           callbacks.CSVLogger(folder / "log.csv"),
           callbacks.Checkpoint(folder / "run", minutes=0, keep_best=2, monitor="loss")]  # fmt: skip
    arguments = {
        "optimizer": optimizers.SGD(0.1, momentum=0.9),
        "metrics": ["accuracy", metrics.F1()],
        "epochs": 4,
        "batch_size": 8,
        "accumulate": 2,
        "sample_weight": np.linspace(0.5, 1.5, 40),
        "verbose": 0,
    }
    extra = changed.pop("extra", [])
    return model.fit(X, Y, **{**arguments, "callbacks": [*own, *extra], "resume_from": path, **changed})


def everything(model):
    """All that a refused resume must leave alone."""
    state = model._state
    slots = {f"slot {name}": np.array(vector) for name, vector in state.optimizer_state.slots.items()}
    numbers = {"step": state.step, "epoch": state.epoch, "factor": state.rate_factor}
    frozen = {f"frozen {p.name}": np.array(p.trainable) for p in model.parameters}
    what = {"what": np.array([repr(state.optimizer), repr(state.loss), repr(state.metrics)])}
    return {**model.state_dict(), **slots, **frozen, **what, **{k: np.array(v) for k, v in numbers.items()}}


def array_changes(file):
    """(name, file) for altered arrays."""
    for name, array in file.arrays.items():
        forms = {
            "missing": None,
            "longer": np.zeros((*array.shape[:-1], (array.shape or (1,))[-1] + 1), array.dtype),
            "one axis more": array[None],
            "one element": array.reshape(-1)[:1].copy(),
            "empty": np.zeros((0, *array.shape[1:]), array.dtype),
            "half": array.astype("float16"),
            "integers": array.astype("int8"),
            "64 bits": array.astype("float64" if array.dtype != np.float64 else "float32"),
        }
        for form, changed in forms.items():
            if changed is not None and changed.dtype == array.dtype and changed.shape == array.shape:
                continue
            other = copy.copy(file)
            other.arrays = {**file.arrays, name: changed}
            if changed is None:
                del other.arrays[name]
            yield f"{name} {form}", other


def value_changes(file, values):
    for place in places(file.values):
        if len(place) > 1:
            for new in (DELETED, *values):
                if (
                    new is DELETED
                    or type(new) is not type(value_at(file.values, place))
                    or new != value_at(file.values, place)
                ):
                    yield f"{place} {'deleted' if new is DELETED else new}", with_value(file, place, new)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(the folder of a run that was stopped in its third epoch, the end of the run without a stop)."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(KeyboardInterrupt):
        fit(net(), folder, extra=[StopAt(8)])  # three steps per epoch
    whole = net()
    fit(whole, tmp_path_factory.mktemp("whole"))
    return folder / "run", whole


#: Where another valid value makes another run, which continues with that value.
OTHER_RUNS = tuple(f"('training', '{name}'" for name in ("callbacks", "constant_rate", "rate_factor", "stopped"))


def trained():
    """A model that was trained with another optimizer, which a resumed run replaces."""
    model = net()
    model.fit(X, Y, optimizer="adam", batch_size=8, verbose=0)
    return model


def check(stopped, folder, changes):
    """Each altered file is refused, and nothing has changed; or it continues like the original."""
    path, whole = stopped
    log = path.with_name("log.csv").read_bytes()
    model, refused = trained(), 0
    before = everything(model)
    for what, changed in changes:
        changed.write(folder / "altered")
        (folder / "log.csv").write_bytes(log)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of another environment, or of callbacks that are missing
                fit(model, folder, folder / "altered")
        except DivergenceError:
            assert "rate" in what
        except (FileError, ArgumentError) as error:
            assert str(error).startswith(f"{folder / 'altered'}: "), what
            assert_same_state(everything(model), before)
            assert (folder / "log.csv").read_bytes() == log
            refused += 1
            continue
        else:
            if not what.startswith(OTHER_RUNS):
                assert_same_state(model.state_dict(), whole.state_dict())
        model = trained()
    return refused


def test_an_unaltered_file_continues(stopped, tmp_path):
    assert check(stopped, tmp_path, [("nothing", File(stopped[0].read_bytes()))]) == 0


@pytest.mark.sweep
def test_altered_arrays_of_a_checkpoint_are_refused_or_harmless(stopped, tmp_path):
    assert check(stopped, tmp_path, array_changes(File(stopped[0].read_bytes()))) > 120


@pytest.mark.sweep
def test_altered_values_of_a_checkpoint_are_refused_or_harmless(stopped, tmp_path):
    changes = list(value_changes(File(stopped[0].read_bytes()), VALUES))[::6]
    assert check(stopped, tmp_path, changes) > 250


@pytest.mark.sweep
def test_all_altered_values_of_a_checkpoint_are_refused_or_harmless(stopped, tmp_path):
    assert check(stopped, tmp_path, value_changes(File(stopped[0].read_bytes()), VALUES)) > 1500


@pytest.mark.parametrize(("place", "new", "reason"), [
    (("step",), DELETED, "has no 'step'"),
    (("step",), 8, "16 samples and 2 steps of this epoch do not fit together"),
    (("seen",), 24, "24 samples and 1 steps of this epoch do not fit together"),
    (("seen",), -8, "'seen' must be a count, not -8"),
    (("epoch",), 3, "must have a finite loss and a time for each of its 3 epochs"),
    (("epoch",), 2.0, "'epoch' must be a count, not 2.0"),
    (("history", "loss"), [1.0], "must have a finite loss"),
    (("history", "f1"), [1.0], "must have 2 numbers of f1"),
    (("history", "accuracy"), DELETED, "must have 2 numbers of accuracy"),
    (("batches", "shuffle"), DELETED, "'batches' has no shuffle"),
    (("what", "loss"), 3, "'what' must be texts by name"),
    (("callbacks", "EarlyStopping 0", "waited"), "x", "the state of EarlyStopping in it was refused.*waited"),
    (("callbacks", "EarlyStopping 0", "best"), DELETED, "the state of EarlyStopping in it was refused"),
    (("callbacks", "EarlyStopping 0", "best"), 10**400, "the state of EarlyStopping in it was refused.*best"),
    (("callbacks", "CSVLogger 0", "size"), 7, "has no row that ends after 7 bytes"),
    (("callbacks", "Checkpoint 0", "kept"), [[0.5, 9]], "a kept epoch must be an integer from 0 to 1"),
])  # fmt: skip
def test_the_reason_is_named(stopped, tmp_path, place, new, reason):
    path = tmp_path / "altered"
    with_value(File(stopped[0].read_bytes()), ("training", *place), new).write(path)
    (tmp_path / "log.csv").write_bytes(stopped[0].with_name("log.csv").read_bytes())
    with pytest.raises(FileError, match=reason) as caught:
        fit(trained(), tmp_path, path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), StopAt])
def test_a_callback_that_fails_to_resume_leaves_the_model_unchanged(stopped, tmp_path, error):
    class Failing(callbacks.Callback):
        def state(self):
            return {}

        def on_resume(self, model, state):
            assert model._state.step == 7
            model.layers[0].trainable = False
            raise KeyboardInterrupt if error is StopAt else error

    file = File(stopped[0].read_bytes())
    file.values["training"]["callbacks"]["Failing 0"] = {}
    file.write(tmp_path / "run")
    (tmp_path / "log.csv").write_bytes(stopped[0].with_name("log.csv").read_bytes())
    model = trained()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt if error is StopAt else FileError) as caught:
        fit(model, tmp_path, tmp_path / "run", extra=[Failing()])
    assert error is StopAt or f"{tmp_path / 'run'}: the state of Failing" in str(caught.value)
    assert_same_state(everything(model), before)
    one, two = trained(), model
    for m in (one, two):
        m.fit(X, Y, optimizer="adam", batch_size=8, verbose=0)
    assert_same_state(everything(one), everything(two))


@pytest.mark.parametrize("size", [10**6, 2**62])
def test_a_log_that_is_shorter_than_the_checkpoint_says_goes_on(stopped, tmp_path, size):
    file = with_value(File(stopped[0].read_bytes()), ("training", "callbacks", "CSVLogger 0", "size"), size)
    assert check(stopped, tmp_path, [("('training', 'callbacks'", file)]) == 0


def test_an_unbuilt_model_stays_unbuilt_if_its_checkpoint_is_refused(tmp_path):
    model = xpnet.Sequential([layers.Flatten(), layers.Dense(3)], backend="cpu")
    with pytest.raises(FileError, match="no such file"):
        fit(model, tmp_path, tmp_path / "none")
    assert not model.is_built


def test_callbacks_may_keep_numpy_numbers_and_history_of_their_own(tmp_path):
    class Own(callbacks.Callback):
        def on_epoch_end(self, model, epoch, logs):
            if epoch == 1:
                self.run.history["own"] = [{"any": "thing"}]

        def state(self):
            return {"list": [np.float32(1.5), np.int64(2)]}

        def on_resume(self, model, state):
            self.seen = state["list"]

    with pytest.raises(KeyboardInterrupt):
        fit(net(), tmp_path, extra=[Own(), StopAt(8)])
    own = Own()
    history = fit(net(), tmp_path, tmp_path / "run", extra=[own])
    assert own.seen == [1.5, 2] and history["own"] == [{"any": "thing"}]


# Model files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    stack = [augment.RandomAffine(shift=1.0), layers.Conv2D(2, 3, padding="same"), layers.BatchNorm(), layers.Flatten(),
             layers.Residual(layers.Dense(32), layers.Tanh()), layers.Dense(3, weight_initializer="he_normal", l2=0.1),
             layers.LeakyReLU(0.1)]  # fmt: skip
    model = xpnet.Sequential(stack, (4, 4, 1), "cpu")
    model.layers[5].trainable = False
    model.save(path)
    return path


def check_loading(path, changes, custom=()):
    refused = 0
    for what, changed in changes:
        changed.write(path)
        try:
            model = xpnet.load(path, "cpu", custom)
        except FileError as error:
            assert str(error).startswith(f"{path}: "), what
            refused += 1
        except DeviceMemoryError:  # of a size that no device can hold
            refused += 1
        else:
            assert_same_state(model.state_dict(), dict(changed.arrays))
    return refused


def test_altered_arrays_of_a_model_file_are_refused(model_file, tmp_path):
    changes = list(array_changes(File(model_file.read_bytes())))
    assert check_loading(tmp_path / "altered", changes) == len(changes)


def test_altered_values_of_a_model_file_are_refused_or_valid(model_file, tmp_path):
    assert check_loading(tmp_path / "altered", list(value_changes(File(model_file.read_bytes()), VALUES))[::2]) > 300


@pytest.mark.sweep
def test_all_altered_values_of_a_model_file_are_refused_or_valid(model_file, tmp_path):
    assert check_loading(tmp_path / "altered", value_changes(File(model_file.read_bytes()), VALUES)) > 600


def test_sizes_are_compared_before_memory_is_used(tmp_path):
    path = tmp_path / "m"
    xpnet.Sequential([layers.Dense(3)], (4,), "cpu").save(path)
    file = File(path.read_bytes())
    for units in (10**8, 10**12, 10**17):
        with_value(file, ("architecture", "layers", 0, "config", "units"), units).write(path)
        tracemalloc.start()
        with pytest.raises((FileError, DeviceMemoryError), match=r"0.weight has shape \(4, 3\) there|takes .* GiB"):
            xpnet.load(path, "cpu")
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()


def test_unknown_custom_layers_are_named_all(tmp_path):
    class Other(Counted):
        pass

    path = tmp_path / "m"
    xpnet.Sequential([Counted(), layers.Sequential([Other(), Counted()])], (4,), "cpu").save(path)
    with pytest.raises(
        FileError, match=r"contains layers 'Counted', 'Other' .*custom_layers=\[Counted, Other\]"
    ) as caught:
        xpnet.load(path, "cpu")
    assert "damaged" not in str(caught.value)
    assert len(xpnet.load(path, "cpu", custom_layers=[Counted, Other]).layers) == 2
    for wrong in (Counted, [Counted()], "Counted", 3, [int]):
        with pytest.raises(ArgumentTypeError, match="custom_layers must be a list of layer classes"):
            xpnet.load(path, "cpu", custom_layers=wrong)


def test_a_custom_layer_whose_arguments_have_changed_is_named(tmp_path):
    class Changing(Counted):
        pass

    path = tmp_path / "m"
    xpnet.Sequential([Changing()], (4,), "cpu").save(path)

    class Changing(layers.Layer):
        pass

    with pytest.raises(FileError, match="its layer Changing cannot be made from its arguments, .*'start'"):
        xpnet.load(path, "cpu", custom_layers=[Changing])


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "m"
    x, shared = xpnet.Input((4,)), layers.Dense(4)
    y = layers.Add()([shared(x), layers.Tanh()(shared(shared(x)))])
    xpnet.Model(x, layers.Sequential([layers.Residual(layers.Dense(4))])(y), "cpu").save(path)
    return path


@pytest.mark.parametrize(("place", "new", "reason"), [
    (("calls", 0, 0), -1, "no layer number -1"),
    (("calls", 0, 0), False, "no layer number False"),
    (("calls", 0, 1), [0, 0], r"cannot be called on \[0, 0\] with takes_list=False"),
    (("calls", 0, 1), [-1], "no tensor number -1"),
    (("calls", 0, 2), "yes", "takes_list='yes'"),
    (("outputs",), [-1], "no tensor number -1"),
    (("units",), 3, "its graph has 'units', which xpnet does not know"),
    (("outputs",), [1], "its outputs need only 1 of its 6 calls of layers"),
    (("dtype",), "", "dtype must be"),
    (("layers", 0, "name"), "x", "an object in its architecture has 'class', 'config', 'name'"),
    (("layers", 0), {"same": -1}, "no layer number -1"),
    (("layers", 0), {"same": 0, "class": "Dense", "config": {"units": 4}}, "an object in its architecture has"),
    (("layers", 0, "config", "l2"), 10**400, "l2 must be a finite number of at least 0"),
])  # fmt: skip
def test_a_graph_that_says_too_little_or_too_much_is_refused(graph_file, tmp_path, place, new, reason):
    path, file = tmp_path / "m", File(graph_file.read_bytes())
    if place == ("units",):
        file.values["architecture"]["units"] = new
    else:
        file = with_value(file, ("architecture", *place), new)
    file.write(path)
    with pytest.raises(FileError, match=reason):
        xpnet.load(path, "cpu")


def test_layers_that_a_graph_does_not_use_are_refused(graph_file, tmp_path):
    file = File(graph_file.read_bytes())
    file.values["architecture"]["layers"].append({"class": "Dense", "config": {"units": 4}})
    file.write(tmp_path / "m")
    with pytest.raises(FileError, match=r"no call uses layers \[\d\]"):
        xpnet.load(tmp_path / "m", "cpu")


def test_a_file_of_a_model_for_samples_beyond_any_memory_is_named(model_file, tmp_path):
    with_value(File(model_file.read_bytes()), ("architecture", "input_shape"), [4, 4, 10**15]).write(tmp_path / "m")
    with pytest.raises(DeviceMemoryError, match=f"^{tmp_path / 'm'}: Sequential: one sample of its inputs"):
        xpnet.load(tmp_path / "m", "cpu")
