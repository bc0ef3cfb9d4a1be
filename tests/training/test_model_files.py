"""Model files: round trips on all devices, atomic writing, and damaged or foreign files."""

import json
import os
import stat
import struct

import numpy as np
import pytest
import safetensors.numpy
from custom_layers import Counted
from small_models import LABELS, QUIET, SAMPLES, assert_same_state, small_net
from strict import StrictBackend

import xpnet
from xpnet import initializers, layers
from xpnet.errors import ArgumentTypeError, FileError

X = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype(int)


def net(backend="cpu", **kwargs):
    model = xpnet.Sequential(
        [
            layers.Sequential([layers.Dense(6, l2=0.01), layers.LeakyReLU(0.2)]),
            xpnet.Sequential([layers.Dense(5, use_bias=False, weight_initializer=initializers.Normal(0.0, 0.3))]),
            layers.Dropout(0.25),
            layers.Reshape((5,)),
            layers.Dense(2, bias_initializer=np.array([1.0, 2.0])),
        ],
        (4,), backend, **kwargs)  # fmt: skip
    model.fit(X, Y, batch_size=8, verbose=0)
    return model


@pytest.fixture
def saved(tmp_path):
    net().save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


# Round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["the same", "cpu", "strict"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_model_loads_on_the_same_and_on_other_devices(backend, tmp_path, target, dtype):
    model = net(backend, dtype=dtype, seed=5)
    model.save(str(tmp_path / "m"))
    other = backend if target == "the same" else StrictBackend() if target == "strict" else target
    loaded = xpnet.load(tmp_path / "m", backend=other)
    assert loaded.backend is xpnet.get_backend(other)
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert (loaded.dtype, loaded.seed, loaded.input_shape) == (dtype, 5, (4,))
    np.testing.assert_allclose(loaded.predict(X), model.predict(X), rtol=1e-5, atol=1e-6)
    assert loaded.summary().count("\n") == model.summary().count("\n")


def test_a_model_saved_on_the_cpu_loads_on_every_device(backend, tmp_path):
    model = net()
    model.save(tmp_path / "m")
    assert_same_state(xpnet.load(tmp_path / "m", backend).state_dict(), model.state_dict())


def test_a_loaded_model_trains_like_the_saved_one_with_a_fresh_optimizer(backend, tmp_path):
    model = net(backend)
    model.save(tmp_path / "m")
    loaded = xpnet.load(tmp_path / "m", backend)
    one, two = (m.fit(X, Y, optimizer="sgd", epochs=2, batch_size=8, verbose=0) for m in (model, loaded))
    assert dict(one) == dict(two)
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_a_loaded_model_has_the_architecture_and_all_arguments(saved):
    original, loaded = net(), xpnet.load(saved, "cpu")
    assert type(loaded.layers[1]) is layers.Sequential
    assert repr(loaded.layers[0]) == repr(original.layers[0])
    assert repr(loaded.layers[1].layers[0]) == repr(original.layers[1].layers[0])
    assert loaded.layers[2].rate == 0.25 and loaded.layers[3].target_shape == (5,)
    assert loaded.layers[0].layers[0].l2 == 0.01


def test_a_custom_layer_loads_if_its_class_is_passed(backend, tmp_path):
    model = xpnet.Sequential([Counted(2.0), layers.Sequential([Counted(3.0)]), layers.Dense(2)], (4,), backend)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "m")
    with pytest.raises(FileError, match=r"it contains a layer 'Counted'.*custom_layers=\[Counted\]"):
        xpnet.load(tmp_path / "m", backend)
    loaded = xpnet.load(tmp_path / "m", backend, custom_layers=[Counted])
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.layers[0].start == 2.0 and (loaded.state_dict()["0.count"] == 20).all()


def test_safetensors_reads_the_file_with_names_of_parameters(saved):
    state = safetensors.numpy.load_file(saved)
    assert_same_state(state, net().state_dict())
    assert sorted(state) == ["0.0.bias", "0.0.weight", "1.0.weight", "4.bias", "4.weight"]


def test_load_state_dict_accepts_arrays_read_by_safetensors(saved):
    model = net(seed=1)
    model.load_state_dict(safetensors.numpy.load_file(saved))
    assert_same_state(model.state_dict(), net().state_dict())


def test_arguments_without_a_json_form_are_refused_and_nothing_is_written(tmp_path):
    model = xpnet.Sequential([Counted(1.0, inner=object()), layers.Dense(2)], (4,), "cpu")
    with pytest.raises(ArgumentTypeError, match="cannot be written to a model file"):
        model.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# Writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(saved, monkeypatch, call):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="No space left"):
        net(seed=1).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_replaces_an_existing_file(saved):
    net(seed=1).save(saved)
    assert_same_state(xpnet.load(saved, "cpu").state_dict(), net(seed=1).state_dict())
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_into_a_missing_folder_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match=r"none/m: cannot be written"):
        net().save(tmp_path / "none" / "m")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_model_file_has_the_default_permissions(tmp_path):
    net().save(tmp_path / "m")
    (tmp_path / "plain").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("m", "plain")]
    assert modes[0] == modes[1]


# Foreign and damaged files -----------------------------------------------------------------------------------------


def refused(path, match=None):
    with pytest.raises(FileError, match=match) as caught:
        xpnet.load(path, "cpu")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_and_a_folder_are_refused_with_the_reason(tmp_path):
    refused(tmp_path / "none", "there is no such file")
    refused(tmp_path, "it is a folder")


def test_a_truncated_file_is_refused(saved):
    content = saved.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1, *range(0, len(content), 97)}
    for length in sorted(lengths):
        saved.write_bytes(content[:length])
        refused(saved, "damaged or not a model file")


def test_a_file_with_additional_bytes_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved)


def rewrite(path, change_config=None, change_metadata=None, change_state=None):
    """Write the file again, with changes."""
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["architecture"])
    if change_config:
        config = change_config(config) or config
    metadata["architecture"] = json.dumps(config)
    for change, value in ((change_metadata, metadata), (change_state, state)):
        if change:
            change(value)
    safetensors.numpy.save_file(state, path, metadata=metadata)


ALTERED = {
    "another format": {"change_metadata": lambda m: m.update(format="xpnet-model-99")},
    "no architecture": {"change_metadata": lambda m: m.pop("architecture")},
    "invalid JSON": {"change_metadata": lambda m: m.update(architecture="{")},
    "JSON that is not an object": {"change_config": lambda c: [1]},
    "no layers": {"change_config": lambda c: c.pop("layers") and None},
    "layers that are not a list": {"change_config": lambda c: c.update(layers=3)},
    "an item that is not a layer": {"change_config": lambda c: c["layers"].append(3)},
    "an unknown class": {"change_config": lambda c: c["layers"][2].update({"class": "os.system"})},
    "a class that is not a layer": {"change_config": lambda c: c["layers"][2].update({"class": "Zeros", "config": {}})},
    "an unknown argument": {"change_config": lambda c: c["layers"][2]["config"].update(more=1)},
    "a missing argument": {"change_config": lambda c: c["layers"][2]["config"].clear()},
    "an invalid argument": {"change_config": lambda c: c["layers"][2]["config"].update(rate=7)},
    "an argument of a wrong type": {"change_config": lambda c: c["layers"][2]["config"].update(rate="much")},
    "another size": {"change_config": lambda c: c["layers"][4]["config"].update(units=3)},
    "another input": {"change_config": lambda c: c.update(input_shape=[5])},
    "no input": {"change_config": lambda c: c.update(input_shape=None)},
    "an unsupported dtype": {"change_config": lambda c: c.update(dtype="float16")},
    "an unknown dtype": {"change_config": lambda c: c.update(dtype="flaot")},
    "a negative seed": {"change_config": lambda c: c.update(seed=-1)},
    "a seed that is not a number": {"change_config": lambda c: c.update(seed="x")},
    "an additional key in the architecture": {"change_config": lambda c: c.update(more=1)},
    "a missing array": {"change_state": lambda s: s.pop("4.bias")},
    "an additional array": {"change_state": lambda s: s.update(more=np.ones(2))},
    "an array of another shape": {"change_state": lambda s: s.update({"4.bias": np.ones(3, "float32")})},
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED.keys())
def test_an_altered_file_is_refused(saved, change):
    rewrite(saved, **change)
    refused(saved)


def test_a_rewritten_file_without_changes_is_accepted(saved):
    rewrite(saved)
    assert_same_state(xpnet.load(saved, "cpu").state_dict(), net().state_dict())


def test_an_altered_size_beyond_any_memory_is_refused(saved):
    rewrite(saved, change_config=lambda c: c["layers"][4]["config"].update(units=2**62))
    refused(saved)


def test_a_foreign_safetensors_file_is_refused_with_advice(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "m")
    refused(tmp_path / "m", r"not a model of this version.*load_state_dict\(safetensors.numpy.load_file\(path\)\)")


def test_a_file_of_another_kind_is_refused(tmp_path):
    for content in (b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\0" * 100, b"\xff" * 100, b"{}"):
        (tmp_path / "m").write_bytes(content)
        refused(tmp_path / "m")


def test_flipped_bits_in_the_header_raise_only_file_errors(saved):
    content = saved.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    rng = np.random.default_rng(0)
    refusals = 0
    for at in range(header):
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        saved.write_bytes(flipped)
        try:
            xpnet.load(saved, "cpu")
        except FileError:
            refusals += 1
    assert refusals > header / 2


def test_loading_on_an_unknown_backend_is_not_a_file_error(saved):
    with pytest.raises(xpnet.errors.ArgumentError, match="unknown backend") as caught:
        xpnet.load(saved, backend="tpu")
    assert not isinstance(caught.value, FileError)


class Doubled(layers.Sequential):
    """A subclass of a container that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2

    def backward(self, grad_y):
        return super().backward(grad_y * 2)


class ReLU(layers.Layer):
    """A custom layer with the name of a built-in one."""

    def forward(self, x):
        return -x

    def backward(self, grad_y):
        return -grad_y


@pytest.mark.parametrize("layer", [lambda: Doubled([layers.Dense(4), layers.Tanh()]), ReLU], ids=["Doubled", "ReLU"])
def test_custom_layers_never_load_as_built_in_layers_of_the_same_name(tmp_path, layer):
    custom, path = layer(), tmp_path / "model"
    model = xpnet.Sequential([layers.Sequential([custom]), layers.ReLU()], (4,), "cpu")
    model.save(path)
    with pytest.raises(FileError, match=type(custom).__name__):
        xpnet.load(path, "cpu")
    loaded = xpnet.load(path, "cpu", custom_layers=[type(custom)])
    np.testing.assert_array_equal(loaded.predict(SAMPLES), model.predict(SAMPLES))
    assert type(loaded.layers[0].layers[0]) is type(custom) and type(loaded.layers[1]) is layers.ReLU


@pytest.mark.parametrize("from_end", [1, 7, 40])
def test_a_flipped_bit_in_the_weights_is_found(tmp_path, from_end):
    path = tmp_path / "model"
    small_net().save(path)
    content = bytearray(path.read_bytes())
    content[-from_end] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="SHA-256"):
        xpnet.load(path, "cpu")


def test_a_frozen_layer_is_frozen_after_loading(tmp_path):
    model = small_net()
    model.layers[0].trainable = False
    model.save(tmp_path / "model")
    loaded = xpnet.load(tmp_path / "model", "cpu")
    assert [p.trainable for p in loaded.parameters] == [False, False, True, True]
    assert not loaded.layers[0].trainable and loaded.layers[2].trainable
    before = loaded.state_dict()
    loaded.fit(SAMPLES, LABELS, **QUIET)
    changed = [name for name, value in loaded.state_dict().items() if (value != before[name]).any()]
    assert changed == ["2.weight", "2.bias"]


def test_a_custom_sequential_never_loads_as_the_built_in_one(tmp_path):
    class Sequential(layers.Sequential):
        def forward(self, x):
            return super().forward(x) + 1.0

    model = xpnet.Sequential([Sequential([layers.Dense(2)])], (2,), "cpu")
    model.save(tmp_path / "m")
    with pytest.raises(FileError, match="custom_layers"):
        xpnet.load(tmp_path / "m", "cpu")
    loaded = xpnet.load(tmp_path / "m", "cpu", custom_layers=[Sequential])
    np.testing.assert_array_equal(loaded.predict(np.ones((3, 2))), model.predict(np.ones((3, 2))))


def test_a_model_with_scalar_inputs_can_be_loaded(tmp_path):
    model = xpnet.Sequential([layers.Embedding(5, 3), layers.Dense(2)], (), "cpu")
    model.save(tmp_path / "m")
    loaded = xpnet.load(tmp_path / "m", "cpu")
    np.testing.assert_array_equal(loaded.predict(np.arange(5)), model.predict(np.arange(5)))
