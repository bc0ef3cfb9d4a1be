"""Model files: what is saved comes back on any device, and nothing else is taken for one."""

import json
import os
import stat
import struct

import numpy as np
import pytest
import safetensors.numpy
from own_layers import Counted
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


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("target", ["the same", "cpu", "strict"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_model_comes_back_here_and_elsewhere(backend, tmp_path, target, dtype):
    model = net(backend, dtype=dtype, seed=5)
    model.save(str(tmp_path / "m"))
    other = backend if target == "the same" else StrictBackend() if target == "strict" else target
    loaded = xpnet.load(tmp_path / "m", backend=other)
    assert loaded.backend is xpnet.get_backend(other)
    assert_same(loaded.state_dict(), model.state_dict())
    assert (loaded.dtype, loaded.seed, loaded.input_shape) == (dtype, 5, (4,))
    np.testing.assert_allclose(loaded.predict(X), model.predict(X), rtol=1e-5, atol=1e-6)
    assert loaded.summary().count("\n") == model.summary().count("\n")


def test_a_file_of_the_cpu_loads_on_every_device(backend, tmp_path):
    model = net()
    model.save(tmp_path / "m")
    assert_same(xpnet.load(tmp_path / "m", backend).state_dict(), model.state_dict())


def test_a_loaded_model_trains_as_the_saved_one_does_with_a_fresh_optimizer(backend, tmp_path):
    model = net(backend)
    model.save(tmp_path / "m")
    loaded = xpnet.load(tmp_path / "m", backend)
    one, two = (m.fit(X, Y, optimizer="sgd", epochs=2, batch_size=8, verbose=0) for m in (model, loaded))
    assert dict(one) == dict(two)
    assert_same(loaded.state_dict(), model.state_dict())


def test_architecture_comes_back_with_every_argument(saved):
    original, loaded = net(), xpnet.load(saved, "cpu")
    assert type(loaded.layers[1]) is layers.Sequential
    assert repr(loaded.layers[0]) == repr(original.layers[0])
    assert repr(loaded.layers[1].layers[0]) == repr(original.layers[1].layers[0])
    assert loaded.layers[2].rate == 0.25 and loaded.layers[3].target_shape == (5,)
    assert loaded.layers[0].layers[0].l2 == 0.01


def test_a_layer_of_ones_own_comes_back_where_its_class_is_given(backend, tmp_path):
    model = xpnet.Sequential([Counted(2.0), layers.Sequential([Counted(3.0)]), layers.Dense(2)], (4,), backend)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "m")
    with pytest.raises(FileError, match=r"it holds a layer 'Counted'.*custom_layers=\[Counted\]"):
        xpnet.load(tmp_path / "m", backend)
    loaded = xpnet.load(tmp_path / "m", backend, custom_layers=[Counted])
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.layers[0].start == 2.0 and (loaded.state_dict()["0.count"] == 20).all()


def test_plain_safetensors_opens_the_file_by_plain_names(saved):
    state = safetensors.numpy.load_file(saved)
    assert_same(state, net().state_dict())
    assert sorted(state) == ["0.0.bias", "0.0.weight", "1.0.weight", "4.bias", "4.weight"]


def test_plain_weights_go_in_by_load_state_dict(saved):
    model = net(seed=1)
    model.load_state_dict(safetensors.numpy.load_file(saved))
    assert_same(model.state_dict(), net().state_dict())


def test_what_json_cannot_hold_is_refused_and_nothing_written(tmp_path):
    model = xpnet.Sequential([Counted(1.0, inner=object()), layers.Dense(2)], (4,), "cpu")
    with pytest.raises(ArgumentTypeError, match="cannot be written to a model file"):
        model.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# Whole or not at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch, call):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="No space left"):
        net(seed=1).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_replaces_an_old_file(saved):
    net(seed=1).save(saved)
    assert_same(xpnet.load(saved, "cpu").state_dict(), net(seed=1).state_dict())
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileError, match=r"none/m: cannot be written"):
        net().save(tmp_path / "none" / "m")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_model_file_has_the_permissions_of_any_other_file(tmp_path):
    net().save(tmp_path / "m")
    (tmp_path / "plain").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("m", "plain")]
    assert modes[0] == modes[1]


# Foreign and broken files ------------------------------------------------------------------------------------------


def refused(path, match=None):
    with pytest.raises(FileError, match=match) as caught:
        xpnet.load(path, "cpu")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refused(tmp_path / "none", "there is no such file")
    refused(tmp_path, "there is no such file")


def test_a_file_truncated_anywhere_is_refused(saved):
    content = saved.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1, *range(0, len(content), 97)}
    for length in sorted(lengths):
        saved.write_bytes(content[:length])
        refused(saved, "truncated, altered or foreign")


def test_a_file_with_more_at_its_end_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved)


def rewritten(path, change_config=None, change_metadata=None, change_state=None):
    """The file again, with something in it changed."""
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
    "no JSON": {"change_metadata": lambda m: m.update(architecture="{")},
    "JSON that is no object": {"change_config": lambda c: [1]},
    "no layers": {"change_config": lambda c: c.pop("layers") and None},
    "layers that are no list": {"change_config": lambda c: c.update(layers=3)},
    "a layer that is no layer": {"change_config": lambda c: c["layers"].append(3)},
    "an unknown class": {"change_config": lambda c: c["layers"][2].update({"class": "os.system"})},
    "a class that is no layer": {"change_config": lambda c: c["layers"][2].update({"class": "Zeros", "config": {}})},
    "an unknown argument": {"change_config": lambda c: c["layers"][2]["config"].update(more=1)},
    "a missing argument": {"change_config": lambda c: c["layers"][2]["config"].clear()},
    "an argument that cannot be": {"change_config": lambda c: c["layers"][2]["config"].update(rate=7)},
    "an argument of a wrong type": {"change_config": lambda c: c["layers"][2]["config"].update(rate="much")},
    "another size": {"change_config": lambda c: c["layers"][4]["config"].update(units=3)},
    "another input": {"change_config": lambda c: c.update(input_shape=[5])},
    "no input": {"change_config": lambda c: c.update(input_shape=None)},
    "a bad dtype": {"change_config": lambda c: c.update(dtype="float16")},
    "a dtype that is none": {"change_config": lambda c: c.update(dtype="flaot")},
    "a bad seed": {"change_config": lambda c: c.update(seed=-1)},
    "a seed that is no number": {"change_config": lambda c: c.update(seed="x")},
    "more in the architecture": {"change_config": lambda c: c.update(more=1)},
    "a missing array": {"change_state": lambda s: s.pop("4.bias")},
    "one array more": {"change_state": lambda s: s.update(more=np.ones(2))},
    "an array of another shape": {"change_state": lambda s: s.update({"4.bias": np.ones(3, "float32")})},
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED.keys())
def test_an_altered_file_is_refused(saved, change):
    rewritten(saved, **change)
    refused(saved)


def test_rewriting_alone_is_not_what_is_refused(saved):
    rewritten(saved)
    assert_same(xpnet.load(saved, "cpu").state_dict(), net().state_dict())


def test_an_altered_size_that_no_memory_holds_is_refused(saved):
    rewritten(saved, change_config=lambda c: c["layers"][4]["config"].update(units=2**62))
    refused(saved)


def test_a_foreign_safetensors_file_is_refused_with_the_way_to_use_it(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "m")
    refused(tmp_path / "m", r"not a model of this version.*load_state_dict\(safetensors.numpy.load_file\(path\)\)")


def test_a_file_of_another_kind_is_refused(tmp_path):
    for content in (b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\0" * 100, b"\xff" * 100, b"{}"):
        (tmp_path / "m").write_bytes(content)
        refused(tmp_path / "m")


def test_a_flipped_bit_in_any_byte_of_the_header_raises_nothing_but_file_errors(saved):
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


def test_a_device_that_cannot_be_used_is_no_fault_of_the_file(saved):
    with pytest.raises(xpnet.errors.ArgumentError, match="unknown backend") as caught:
        xpnet.load(saved, backend="tpu")
    assert not isinstance(caught.value, FileError)
