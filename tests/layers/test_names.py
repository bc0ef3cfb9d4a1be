"""Names of layers, access to layers by name and position, and arrays assigned to attributes of layers."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from every import LAYERS

import xpnet
from xpnet import augment, layers
from xpnet.errors import ArgumentError, ArgumentTypeError, PositionError, ShapeError, StateError


class Own(layers.Layer):
    """A layer that does not know of names."""

    def __init__(self, factor=2.0):
        self.factor = factor

    def build(self, input_shape):
        self.scale = self.add_parameter("scale", input_shape, self.factor)
        return input_shape

    def forward(self, x):
        self.work.x = x
        return x * self.scale.value

    def backward(self, grad_y):
        self.scale.grad = (grad_y * self.work.x).sum(axis=0)
        return grad_y * self.scale.value


@pytest.mark.parametrize("kind", [*layers.__all__, *augment.__all__])
def test_the_signature_of_every_layer_has_a_name(kind):
    cls = getattr(layers, kind, None) or getattr(augment, kind)
    name = inspect.signature(cls).parameters["name"]
    assert name.kind is name.KEYWORD_ONLY and name.default is None


class OwnConfig(Own):
    def get_config(self):
        return {"factor": self.factor}


class Forgetful(Own):
    def __init__(self, factor=2.0, name=None):
        self.factor = factor


class PassesOn(Own):
    def __init__(self, factor=2.0, **options):
        super().__init__(**options)
        self.factor = factor


@pytest.mark.parametrize("cls", [Own, OwnConfig, Forgetful, PassesOn])
def test_a_layer_of_ones_own_takes_a_name_however_it_is_written(cls, tmp_path):
    layer = cls(3.0, name="own")
    assert layer.name == "own" and layer.factor == 3.0 and cls().name is None
    model = xpnet.Sequential([layer, cls()], (2,), "cpu")
    assert [p.name for p in model.parameters] == ["own.scale", "1.scale"]
    model.save(tmp_path / "model.safetensors")
    loaded = xpnet.load(tmp_path / "model.safetensors", "cpu", custom_layers=[cls])
    assert [p.name for p in loaded.parameters] == ["own.scale", "1.scale"] and loaded[0].factor == 3.0


def net(backend="cpu"):
    stack = [
        layers.Dense(3, name="first"),
        layers.Sequential([layers.ReLU(), layers.Dense(3, name="inner"), Own(name="own")], name="block"),
        layers.Residual(layers.Dense(2, name="f"), name="skip"),
        layers.BatchNorm(),
        OwnConfig(name="last"),
    ]
    return xpnet.Sequential(stack, (4,), backend, name="model")


NAMES = ["first.weight", "first.bias", "block.inner.weight", "block.inner.bias", "block.own.scale", "skip.f.weight",
         "skip.f.bias", "skip.skip.weight", "3.gamma", "3.beta", "last.scale"]  # fmt: skip


def test_a_name_replaces_the_number_in_the_names_of_parameters():
    model = net()
    assert [p.name for p in model.parameters] == NAMES
    assert [layer.path for layer in model] == ["first", "block", "skip", "3", "last"]
    assert list(model.activations(np.ones((1, 4)))) == ["first", "block", "skip", "3", "last"]
    assert "Dense(3, name='first')" in model.summary()


@pytest.mark.parametrize("example", range(len(LAYERS)))
def test_every_layer_takes_a_name_and_keeps_it(example, tmp_path):
    shape, layer = LAYERS[example]
    layer = copy.deepcopy(layer)
    assert layer.name is None and "name" not in layer.get_config() and "name=" not in repr(layer).split("(", 1)[1][:6]
    layer.name = "digit"
    again = type(layer).from_config(layer.get_config())
    assert again.name == "digit" and repr(layer).endswith("name='digit')") and repr(again) == repr(layer)
    model = xpnet.Sequential([layer], shape, "cpu")
    assert model.get_layer("digit") is layer and all(p.name.startswith("digit.") for p in model.parameters)
    model.save(tmp_path / "model.safetensors")
    assert repr(xpnet.load(tmp_path / "model.safetensors", "cpu")) == repr(model)


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_names_survive_copies_and_files(how, tmp_path):
    model = net()
    if how == "file":
        model.save(tmp_path / "model.safetensors")
        twin = xpnet.load(tmp_path / "model.safetensors", "cpu", custom_layers=[Own, OwnConfig])
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert [p.name for p in twin.parameters] == NAMES and twin.name == "model"
    assert [layer.name for layer in twin] == ["first", "block", "skip", None, "last"]
    x = np.ones((2, 4))
    np.testing.assert_array_equal(model.predict(x), twin.predict(x))


def test_a_nested_model_keeps_its_name_in_files(tmp_path):
    inner = xpnet.Sequential([layers.Dense(2)], name="encoder")
    model = xpnet.Sequential([inner, layers.Dense(1)], (3,), "cpu")
    model.save(tmp_path / "model.safetensors")
    loaded = xpnet.load(tmp_path / "model.safetensors", "cpu")
    assert next(p.name for p in loaded.parameters) == "encoder.0.weight" and loaded.get_layer("encoder.0")


def test_names_change_initial_weights_and_noise_only_of_the_layers_that_have_them():
    def weights(name):
        model = xpnet.Sequential([layers.Dense(3), layers.Dropout(0.5, name=name), layers.Dense(3)], (4,), "cpu")
        return model.state_dict(), model.forward(np.ones((4, 4)), training=True)

    (plain, noise), (named, other_noise) = weights(None), weights("drop")
    assert all((plain[key] == named[key]).all() for key in plain) and not np.array_equal(noise, other_noise)


@pytest.mark.parametrize("name", ["", " ", "a.b", ".", "3", "a/b", "a\n", "training/x"])
def test_names_that_could_be_mistaken_are_refused(name):
    with pytest.raises(ArgumentError, match="^Dense: name must be text without dots"):
        layers.Dense(1, name=name)


@pytest.mark.parametrize("name", [3, True, b"a", ["a"]])
def test_a_name_must_be_text(name):
    with pytest.raises(ArgumentTypeError, match="^Own: name must be text, not"):
        Own(name=name)


def test_names_are_unique_within_their_container():
    two = [layers.Dense(2, name="a"), layers.Dense(2, name="a")]
    with pytest.raises(ArgumentError, match="Sequential: two of the layers have the name 'a'"):
        layers.Sequential(two)
    with pytest.raises(ArgumentError, match="Residual: two of the layers"):
        layers.Residual(*two)
    with pytest.raises(ArgumentError, match="Residual: a layer has the name 'skip'"):
        layers.Residual(layers.Dense(2, name="skip"))
    model = xpnet.Sequential([layers.Dense(2, name="a"), layers.Dense(2, name="b")])
    model[1].name = "a"
    with pytest.raises(ArgumentError, match="two of the layers have the name 'a'"):
        model.predict(np.ones((1, 2)))
    nested = xpnet.Sequential([layers.Dense(2, name="a"), layers.Sequential([layers.Dense(2, name="a")])], (2,), "cpu")
    assert [p.name for p in nested.parameters][::2] == ["a.weight", "1.a.weight"]


def test_a_built_layer_is_not_renamed():
    with pytest.raises(StateError, match="set the name before"):
        net()[0].name = "other"


# Access


def test_layers_are_found_by_name_and_by_number():
    model = net()
    assert model.get_layer("first") is model.get_layer("0") is model[0]
    assert model.get_layer("block.inner") is model.get_layer("1.1") is model[1][1]
    assert model.get_layer("skip.f") is model[2][0] and model.get_layer("skip.skip") is model[2][-1]
    unbuilt = xpnet.Sequential([layers.Dense(3, name="digit")])
    assert unbuilt.get_layer("digit") is unbuilt.layers[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("frist", "unknown layer 'frist'. Did you mean 'first'"),
        ("block.iner", "Did you mean 'block.inner'"),
        ("5", "unknown layer '5'.*Known: 3, block"),
        ("0.0", "unknown layer '0.0'"),
        ("", "unknown layer ''"),
    ],
)
def test_an_unknown_layer_gets_the_nearest_name_suggested(name, message):
    with pytest.raises(ArgumentError, match=message):
        net().get_layer(name)


def test_a_model_is_a_sequence_of_layers():
    model = net()
    assert len(model) == 5 and list(model) == list(model.layers) and model[-1] is model[np.int64(4)]
    assert model[1:3] == model.layers[1:3] and model[0] in model
    for position in (5, -6):
        with pytest.raises(PositionError, match=f"no layer {position}: Sequential has 5 layers, 0 to 4"):
            model[position]
    with pytest.raises(IndexError):
        model[99]
    with pytest.raises(ArgumentTypeError, match=r"not 'first'. Use get_layer\('first'\)"):
        model["first"]
    with pytest.raises(ArgumentTypeError, match="get_layer takes a name"):
        model.get_layer(0)
    with pytest.raises(ArgumentTypeError, match="must be a list of layers"):
        xpnet.Sequential(layers.Sequential([layers.ReLU()]))


def test_dir_of_a_model_lists_no_internal_attributes():
    listed = {name for name in dir(net()) if not name.startswith("__")}
    hidden = {"place", "unplace", "forward_pass", "backward_pass", "execution_context", "drop_workspaces", "noise_key"}
    assert not listed & hidden and not any(name.startswith("_") for name in listed)
    assert listed >= {"fit", "predict", "evaluate", "layers", "get_layer", "parameters", "summary", "to", "save",
                      "build", "forward", "backward", "add_parameter", "add_buffer", "work", "xp", "backend",
                      "random_bits", "random_normal", "refuse", "check_inputs", "name", "trainable"}  # fmt: skip


# Assignment


def test_an_array_assigned_to_a_parameter_is_written_into_it(backend):
    model = net(backend)
    parameter, view, flat = model[0].weight, model[0].weight.value, model.context.store.values
    model[0].weight = np.arange(12.0).reshape(4, 3)
    assert model[0].weight is parameter and parameter.value is view and model.context.store.values is flat
    np.testing.assert_array_equal(model.state_dict()["first.weight"], np.arange(12.0).reshape(4, 3))
    model[0].bias, model.get_layer("block.own").scale = [1, 2, 3], backend.asarray([4.0, np.nan, 6.0])
    np.testing.assert_array_equal(model.state_dict()["first.bias"], [1, 2, 3])
    np.testing.assert_array_equal(model.state_dict()["block.own.scale"], [4, np.nan, 6])
    model[0].bias = 0.5
    np.testing.assert_array_equal(model.state_dict()["first.bias"], [0.5] * 3)


def test_arrays_assigned_to_values_gradients_and_buffers_are_written_into_them(backend):
    model = net(backend)
    for held, attribute in ((model[0].weight, "value"), (model[0].weight, "grad"), (model[3].running_var, "value")):
        view = getattr(held, attribute)
        setattr(held, attribute, np.full(view.shape, 7.0))
        assert getattr(held, attribute) is view
        np.testing.assert_array_equal(backend.to_numpy(view), np.full(view.shape, 7.0))
    held, view = model[3].running_mean, model[3].running_mean.value
    model[3].running_mean = [1.0, 2.0]
    assert model[3].running_mean is held and held.value is view
    np.testing.assert_array_equal(model.state_dict()["3.running_mean"], [1.0, 2.0])
    held.value *= 2
    held.value += 1
    assert held.value is view
    np.testing.assert_array_equal(model.state_dict()["3.running_mean"], [3.0, 5.0])


def test_an_assigned_weight_is_what_is_used_trained_and_saved(tmp_path):
    model = xpnet.Sequential([layers.Dense(1, name="d")], (2,), "cpu")
    model[0].weight = [[2.0], [3.0]]
    np.testing.assert_array_equal(model.predict([[1.0, 1.0]]), [[5.0]])
    model.save(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(xpnet.load(tmp_path / "m.safetensors", "cpu").predict([[1.0, 1.0]]), [[5.0]])
    model.train_on_batch([[1.0, 1.0]], [[0.0]], loss="mse", optimizer=xpnet.optimizers.SGD(0.01))
    np.testing.assert_allclose(model.state_dict()["d.weight"], [[1.9], [2.9]], rtol=1e-6)


def test_a_parameter_assigned_to_another_copies_its_values():
    model = xpnet.Sequential([layers.Dense(3), layers.Dense(3)], (3,), "cpu")
    first, second = model[0].weight, model[1].weight
    model[1].weight = model[0].weight
    assert model[1].weight is second is not first and model.parameters[2] is second
    np.testing.assert_array_equal(second.value, first.value)
    assert not np.shares_memory(second.value, first.value)


@pytest.mark.parametrize("value", [0, 1, None, "no"])
def test_trainable_is_a_flag(value):
    class Scaled(layers.Sequential):
        def build(self, input_shape):
            self.scale = self.add_parameter("scale", (1,), 1.0)
            return super().build(input_shape)

    scaled = Scaled([layers.Dense(3)])
    xpnet.Sequential([scaled], (2,), "cpu").trainable = False
    for layer, kind in ((scaled, "Scaled"), (layers.Dense(3), "Dense")):
        with pytest.raises(ArgumentError, match=f"{kind}: trainable must be True or False"):
            layer.trainable = value
    assert not any(parameter.trainable for parameter in scaled.parameters)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.ones((3, 4)), ShapeError, r"layer first \(Dense\): weight has shape \(4, 3\), but .* \(3, 4\)"),
        (np.ones(3), ShapeError, r"\(4, 3\), but .* \(3,\)"),
        (np.ones((4, 3), complex), ArgumentTypeError, "real numbers, not an array of complex128"),
        (np.full((4, 3), "a"), ArgumentTypeError, "real numbers"),
        ("relu", ArgumentTypeError, "real numbers, not 'relu'"),
        (None, ArgumentTypeError, "real numbers, not None"),
        ([[1.0], [2.0, 3.0]], ArgumentTypeError, "real numbers"),
        (np.ma.masked_array(np.ones((4, 3)), mask=np.eye(4, 3)), ArgumentTypeError, "masked"),
    ],
)
def test_what_a_parameter_cannot_hold_is_refused_and_changes_nothing(backend, value, error, message):
    model = net(backend)
    before = model.state_dict()["first.weight"]
    with pytest.raises(error, match=message):
        model[0].weight = value
    with pytest.raises(error):
        model[0].weight.grad = value
    np.testing.assert_array_equal(model.state_dict()["first.weight"], before)


def test_a_weight_assigned_before_the_layer_is_built_is_not_lost_silently():
    layer = layers.Dense(3)
    layer.weight = np.ones((4, 3))
    with pytest.raises(StateError, match="weight was assigned before the layer was built"):
        xpnet.Sequential([layer], (4,), "cpu")


def test_a_layer_is_built_again_after_an_error():
    layer = layers.Dense(3)
    with pytest.raises(ArgumentError):
        xpnet.Sequential([layer, layers.Conv2D(3, 3)], (4,), "cpu")
    assert xpnet.Sequential([layer], (4,), "cpu").parameters[0] is layer.weight
