"""Constructor arguments that are assigned later: they take effect, or are refused."""

import copy

import every
import numpy as np
import pytest

import xpnet
from xpnet import augment, layers, losses, optimizers
from xpnet.errors import ArgumentError, StateError, XpnetError

AUGMENTATIONS = [
    ((5, 6, 2), augment.ElasticDistortion(2.0, 1.0)), ((4,), augment.GaussianNoise(0.1)), ((4,), augment.MixUp(0.3)),
    ((5, 6, 2), augment.RandomAffine(0.5)), ((5, 6, 2), augment.RandomCrop(1)), ((5, 6, 2), augment.RandomFlip()),
    ((5, 6, 2), augment.RandomErasing(0.9)),
]  # fmt: skip
LAYERS = [*every.LAYERS, *AUGMENTATIONS]
IDS = [f"{i}-{type(layer).__name__}" for i, (_, layer) in enumerate(LAYERS)]

#: Another valid value of each argument that may be assigned to a built layer.
OTHER = {
    "alpha": 0.7, "approximate": "none", "area": (0.2, 0.5), "deviation": 0.6, "dropout": 0.4, "epsilon": 0.3,
    "high": 0.4, "horizontal": False, "low": 0.01, "momentum": 0.6, "negative_slope": 0.4, "offset": 2.0, "rate": 0.6,
    "rotation": 20.0, "scale": 0.5, "shear": 10.0, "shift": 2.0, "sigma": 3.0, "threshold": 0.5, "value": 0.5,
    "vertical": True,
}  # fmt: skip


def results(layer, shape):
    """Outputs and gradients in inference and in training, and what the layer keeps."""
    rng, found = np.random.default_rng(0), []
    x = rng.integers(0, 2, (3, *shape)) if layer.accepts_integers is True else rng.normal(size=(3, *shape))
    x = x.astype("float32") if layer.accepts_integers is not True or isinstance(layer, augment.Distortion) else x
    if isinstance(layer, layers.Masking):
        x[0, 0] = 0.25
    for training in (False, True):
        layer.context.training = training
        y = layer.forward(x)
        found += [y, layer.backward(np.linspace(-1, 1, y.size).reshape(y.shape).astype("float32"))]
        found += [layer.mask] if layer.starts_mask is False else [layer.start_mask(x)]
    return [*found, *(array.value for array in layer.context.store.arrays())]


def same(one, other):
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("shape", "layer"), LAYERS, ids=IDS)
def test_an_argument_of_a_built_layer_takes_effect_or_is_refused(shape, layer):
    for name, value in layer.get_config().items():
        if isinstance(value, list | tuple | layers.Layer) and name not in OTHER:
            continue  # inner layers
        changed = copy.deepcopy(layer)
        changed.build(shape, backend="cpu", seed=0)
        if name not in layer._changeable:
            with pytest.raises(StateError, match=name):
                setattr(changed, name, "other")
            continue
        before = results(changed, shape)
        other = OTHER[name] if value != OTHER[name] else {"approximate": "tanh", "value": 0.25}[name]
        new = type(layer).from_config({**layer.get_config(), name: other})
        new.build(shape, backend="cpu", seed=0)
        changed = copy.deepcopy(layer)
        changed.build(shape, backend="cpu", seed=0)
        setattr(changed, name, other)
        assert same(results(changed, shape), results(new, shape)), name
        assert not same(before, results(new, shape)), f"the test does not see {name}"


def test_every_argument_that_may_be_assigned_is_tried():
    tried = {type(layer) for _, layer in LAYERS}
    public = [getattr(module, name) for module in (layers, augment) for name in module.__all__]
    assert not [cls for cls in public if getattr(cls, "_changeable", None) and cls not in tried]


@pytest.mark.parametrize("name", ["rate", "negative_slope"])
def test_a_captured_model_follows_an_assignment(backend, name, monkeypatch):
    """Twice 12 steps and a prediction, captured and eager."""
    trained = {}
    x = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
    for captured in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", captured)
        stack = [layers.Dense(6), layers.LeakyReLU(0.1), layers.Dropout(0.2), layers.Dense(3)]
        model = xpnet.Sequential(stack, (4,), backend)
        for value in (0.2, 0.6):
            setattr(model[2 if name == "rate" else 1], name, value)
            model.fit(x, np.arange(24) % 3, epochs=6, batch_size=4, verbose=0)
            for _ in range(3):
                prediction = model.predict(x)
        trained[captured] = [*model.state_dict().values(), prediction]
    for one, other in zip(trained["1"], trained["0"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_settings_of_built_models_are_refused():
    model = xpnet.Sequential([layers.Dense(3)], backend="cpu")
    model.seed, model.dtype = 7, "float64"
    with pytest.raises(ArgumentError, match="seed must be an integer"):
        model.seed = -1
    model.fit(np.ones((4, 2)), np.zeros(4, int), verbose=0)
    assert model.parameters[0].value.dtype == "float64" and model.context.seed == 7
    for name, value, hint in (
        ("seed", 3, "new model"),
        ("dtype", "float32", "model.to"),
        ("precision", "tf32", "new model"),
        ("input_shape", (3,), "new model"),
    ):
        with pytest.raises(StateError, match=f"{name} cannot change after the model is built.*{hint}"):
            setattr(model, name, value)
    assert model.to("cpu", "float32").dtype == "float32"
    graph = xpnet.Model(model.inputs, model.outputs)
    for name in ("inputs", "outputs"):
        with pytest.raises(StateError, match=f"Model: {name} cannot change after the model is built"):
            setattr(graph, name, list(getattr(graph, name)))


def test_assignments_of_subclasses_are_checked_like_those_of_the_class_of_xpnet():
    class Heavy(optimizers.SGD):
        def __init__(self):
            super().__init__(0.1)
            self.momentum = 0.9

    class Own(optimizers.Optimizer):
        def __init__(self, momentum):
            super().__init__(0.1, 0.0, None)
            self.momentum = momentum

    heavy, own = Heavy(), Own(0.5)
    with pytest.raises(ArgumentError, match="SGD: momentum must be a number of at least 0 and below 1, not 1.5"):
        heavy.momentum = 1.5
    assert heavy.momentum == 0.9
    own.momentum = 1.5  # not an argument of a class of xpnet
    with pytest.raises(ArgumentError, match="weight_decay must be"):
        own.weight_decay = -1
    huber = losses.Huber(2.0)
    with pytest.raises(ArgumentError, match="Huber: delta must be"):
        huber.delta = 0
    huber.delta = np.float32(3)
    assert huber.delta == 3.0 and type(huber.delta) is float


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        (layers.Conv1D(2, 3), "padding", "same"),
        (layers.Conv1D(2, 3, padding="causal"), "strides", 2),
        (layers.LSTM(2), "return_sequences", False),
        (layers.GRU(2), "reverse", True),
    ],
    ids=["padding", "strides", "return_sequences", "reverse"],
)
def test_masks_and_causality_follow_an_assignment_before_the_layer_is_built(layer, name, value):
    new = type(layer).from_config({**layer.get_config(), name: value})
    before = copy.deepcopy(layer)
    setattr(layer, name, value)
    seen = []
    for one in (before, layer, new):
        one.build((6, 2), backend="cpu", seed=0)
        seen.append((one.causal, one.spread_masks([True])))
    assert seen[1] == seen[2] != seen[0]


@pytest.mark.parametrize("kind", [xpnet.Sequential, layers.Sequential])
def test_layers_that_are_assigned_before_a_container_is_built_are_checked(kind):
    container, twice = kind([layers.Dense(3)]), layers.Dense(2)
    for wrong in (5, "text", [], [1], None, layers.Dense(3), [layers.Dense], [twice, twice]):
        with pytest.raises(XpnetError, match="^Sequential: "):
            container.layers = wrong
    container.layers = [layers.Dense(4), twice]
    assert [layer.units for layer in container.layers] == [4, 2]
    model = xpnet.Sequential([container] if kind is layers.Sequential else container.layers, (5,), "cpu")
    assert model.predict(np.ones((1, 5))).shape == (1, 2)


def test_a_projection_that_is_assigned_before_a_residual_is_built_is_its_skip():
    block = layers.Residual(layers.Dense(2), projection=layers.Dense(2, name="skip"))
    with pytest.raises(StateError, match="Residual: layers cannot be assigned"):
        block.layers = [layers.Dense(2)]
    with pytest.raises(XpnetError, match="Residual: projection must be a layer"):
        block.projection = 5
    block.projection = layers.Dense(2, use_bias=False, name="skip")
    model = xpnet.Sequential([block], (3,), "cpu")
    assert [*model.state_dict()] == ["0.0.weight", "0.0.bias", "0.skip.weight"]
