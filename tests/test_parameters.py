"""Parameters: live views of one flat vector, through copies, moves and pickles."""

import copy
import io
import operator
import pickle

import numpy as np
import pytest
from small_models import dense_net

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, StateError, UnknownNameError
from xpnet.initializers import Zeros
from xpnet.parameters import Parameter, ParameterStore, Snapshot


class Counter(layers.Layer):
    """A custom layer with a buffer that counts, per feature, the rows that it has seen."""

    def build(self, input_shape):
        self.seen = self.add_buffer("seen", np.zeros(input_shape))
        return input_shape

    def forward(self, x):
        self.seen.value += float(len(x))
        return x

    def backward(self, grad_y):
        return grad_y


def model_of(backend, dtype="float32"):
    stack = [layers.Dense(3), Counter(), layers.Dense(5), layers.Dense(1, use_bias=False)]
    return xpnet.Sequential(stack, input_shape=7, backend=backend, dtype=dtype)


def address(array):
    return array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_parameter_starts_on_its_own_cache_line(dtype):
    model = model_of("cpu", dtype)
    for p in model.parameters:
        assert address(p.value) % 64 == address(p.grad) % 64 == 0
        assert p.value.dtype == p.grad.dtype == dtype
    lines = [address(p.value) // 64 for p in model.parameters]
    assert lines == sorted(set(lines))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slots_are_aligned_and_disjoint_with_zeros_between_them(backend, dtype):
    store = model_of(backend, dtype).context.store
    uses = np.zeros(len(store.values), int)
    for p in store.parameters:
        assert p.slot.start * np.dtype(dtype).itemsize % 64 == 0
        assert p.slot.stop - p.slot.start == p.size == np.prod(p.shape)
        uses[p.slot] += 1
    assert uses.max() == 1
    assert not backend.to_numpy(store.values)[uses == 0].any()
    assert store.values.shape == store.grads.shape


def test_values_and_gradients_are_live_views_of_the_flat_vectors(backend):
    model = model_of(backend)
    store, p = model.context.store, model.parameters[2]
    store.values[...] = 0
    p.value[1, 2] = 5.0
    assert backend.to_numpy(store.values)[p.slot.start + 5 + 2] == 5
    store.grads[...] = 7
    assert (backend.to_numpy(p.grad) == 7).all()
    x = np.ones((1, 7))
    assert not model.predict(x).any()
    model.parameters[0].value[...] = 1.0  # the next pass uses it
    store.values[model.parameters[2].slot] = 1.0
    model.parameters[4].value[...] = 1.0
    assert model.predict(x).item() == 7 * 3 * 5


@pytest.mark.parametrize(
    "new", [np.full((7, 3), 2), [[2.0] * 3] * 7, 2, np.float64(2)], ids=["array", "list", "number", "scalar"]
)
def test_assigning_to_value_or_grad_copies_into_the_array(backend, new):
    p, new = model_of(backend).parameters[0], copy.copy(new)
    value, grad = p.value, p.grad
    p.value = new
    p.grad = new
    assert p.value is value
    assert p.grad is grad
    assert (backend.to_numpy(value) == 2).all()
    assert (backend.to_numpy(grad) == 2).all()
    assert value.dtype == np.float32
    if isinstance(new, np.ndarray):
        new[...] = 9
        assert (backend.to_numpy(value) == 2).all()


def test_in_place_operators_change_a_parameter(backend):
    p = model_of(backend).parameters[0]
    before = backend.to_numpy(p.value).copy()
    p.value += 1
    p.value *= 2
    np.testing.assert_allclose(backend.to_numpy(p.value), (before + 1) * 2, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 7), (21,), (1, 3), (7, 1), (1,)], ids=str)
def test_a_value_of_another_shape_is_refused(backend, shape):
    p = model_of(backend).parameters[0]
    before = backend.to_numpy(p.value).copy()
    with pytest.raises(ShapeError, match=r"0\.weight has shape \(7, 3\), but the new value has shape"):
        p.value = np.ones(shape)
    np.testing.assert_array_equal(backend.to_numpy(p.value), before)


def test_a_parameter_has_no_values_before_its_model_is_built():
    p = Parameter("w", (2,), Zeros(), True, 0.0, 0.0)
    with pytest.raises(StateError, match="w has no values yet: build the model first"):
        p.value = 1.0
    with pytest.raises(ArgumentError, match="w: l2 must be a finite number of at least 0, not -1"):
        Parameter("w", (2,), Zeros(), True, 0.0, -1)


def test_repr_shows_name_shape_and_whether_the_parameter_is_frozen():
    p = model_of("cpu").parameters[0]
    assert repr(p) == "<Parameter 0.weight (7, 3)>"
    p.trainable = False
    assert repr(p) == "<Parameter 0.weight (7, 3), frozen>"


ONES = np.ones((7, 3), "float32")
USES = {
    "asarray": np.asarray,
    "array of two": lambda p: np.array([p, p]),
    "array_equal": lambda p: np.array_equal(p, ONES),
    "save": lambda p: np.save(io.BytesIO(), p),
    "exp": np.exp,
    "concatenate": lambda p: np.concatenate([ONES, p]),
    "assert_array_equal": lambda p: np.testing.assert_array_equal(p, ONES),
    "product": lambda p: p * 2,
    "reflected difference": lambda p: 1.0 - p,
    "array on the left": lambda p: ONES - p,
    "matrix product": lambda p: ONES.T @ p,
    "in-place sum": lambda p: operator.iadd(p, 1),
    "comparison": lambda p: p == ONES,
    "less": lambda p: p < 1,
    "item": lambda p: p[0],
    "assigned item": lambda p: operator.setitem(p, 0, 1.0),
    "length": len,
    "iteration": list,
    "float": float,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_parameter_or_buffer_used_as_an_array_is_refused(use):
    model = model_of("cpu")
    with pytest.raises(ArgumentTypeError, match=r"^0\.weight is a Parameter, not an array\. .* layer\.weight\.value"):
        use(model[0].weight)
    with pytest.raises(ArgumentTypeError, match=r"^1\.seen is a Buffer, not an array\. .* layer\.seen\.value"):
        use(model[1].seen)
    assert model[0].weight and model[1].seen  # is there one?


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mean", r"layer\.weight\.value"),
        ("numpy", r"layer\.weight\.value"),
        ("data", "its value"),
        ("requires_grad", "trainable = False"),
    ],
)
def test_an_unknown_attribute_of_a_parameter_gets_a_hint(name, hint):
    p = model_of("cpu")[0].weight
    with pytest.raises(UnknownNameError, match=f"^0\\.weight is a Parameter, which has no attribute '{name}'.*{hint}"):
        getattr(p, name)
    assert not hasattr(p, name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("requires_grad", "trainable = False"), ("data", "its value"), ("trainabel", "Set trainable"),
     ("traineable", "Set trainable"), ("Trainable", "Set trainable")],
)  # fmt: skip
def test_assigning_what_was_surely_meant_to_be_another_attribute_is_refused(name, hint):
    p = model_of("cpu")[0].weight
    with pytest.raises(UnknownNameError, match=hint):
        setattr(p, name, False)
    assert name not in vars(p)
    p.note = "of the user"
    assert p.note == "of the user"


@pytest.mark.parametrize("bits", range(32))
def test_slices_are_the_fewest_that_cover_exactly_the_chosen_parameters(bits):
    store = model_of("cpu").context.store
    chosen = [bool(bits >> i & 1) for i in range(5)]
    slices = store.slices(lambda p: chosen[store.parameters.index(p)])
    assert len(slices) == sum(now and not before for before, now in zip([False, *chosen], chosen, strict=False))
    covered = {i for part in slices for i in range(part.start, part.stop)}
    for p, is_chosen in zip(store.parameters, chosen, strict=True):
        slot = set(range(p.slot.start, p.slot.stop))
        assert slot <= covered if is_chosen else not slot & covered


# Copies


def pickle_copy(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle_copy])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_copy_is_complete_equal_and_independent(backend, duplicate, dtype):
    model = model_of(backend, dtype)
    model.forward(np.ones((4, 7)))
    model.backward(np.ones((4, 1)))
    twin = duplicate(model)
    store = twin.context.store
    assert [p.name for p in twin.parameters] == [p.name for p in model.parameters]
    assert twin.layers[0].weight is twin.parameters[0] is store.parameters[0]
    assert twin.layers[1].seen is store.buffers[0]
    assert twin.layers[0].context is twin.layers[3].context is twin.context
    for ours, theirs in zip(model.parameters, twin.parameters, strict=True):
        assert ours is not theirs
        np.testing.assert_array_equal(backend.to_numpy(ours.value), backend.to_numpy(theirs.value))
        np.testing.assert_array_equal(backend.to_numpy(ours.grad), backend.to_numpy(theirs.grad))
    before = model.state_dict()
    store.values[...] = 2  # the views of the twin must be views of its own vectors
    twin.layers[1].seen.value += 1.0
    assert (backend.to_numpy(twin.layers[3].weight.value) == 2).all()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert twin.state_dict()["1.seen"].tolist() == [5] * 3
    np.testing.assert_allclose(twin.predict(np.ones((1, 7))), [[(7 * 2 + 2) * 3 * 2 * 5 * 2 + 2 * 5 * 2]])


def test_an_unbuilt_model_can_be_copied():
    twin = copy.deepcopy(xpnet.Sequential([layers.Dense(2)], backend="cpu"))
    assert twin.predict(np.ones((1, 3))).shape == (1, 2)


def test_a_move_keeps_parameters_buffers_and_values(backend):
    model = model_of("cpu")
    model.forward(np.ones((4, 7)))
    model.backward(np.ones((4, 1)))
    objects, before = list(model.parameters), model.state_dict()
    grads = [p.grad.copy() for p in objects]
    for target, dtype in ((backend, "float64"), (backend, "float32"), (xpnet.get_backend("cpu"), "float32")):
        model.to(target, dtype=dtype)
        assert all(a is b for a, b in zip(objects, model.parameters, strict=True))
        for p, grad in zip(objects, grads, strict=True):
            assert isinstance(p.value, target.xp.ndarray)
            assert p.value.dtype == p.grad.dtype == dtype
            assert p.slot.start * np.dtype(dtype).itemsize % 64 == 0
            np.testing.assert_array_equal(target.to_numpy(p.grad), grad)
        assert {name: value.dtype for name, value in model.state_dict().items()} == dict.fromkeys(
            before, np.dtype(dtype)
        )
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name])


def test_a_snapshot_restores_values_buffers_and_optimizer_state(backend):
    model = model_of(backend)
    store, moments = model.context.store, backend.asarray([1.0, 2.0])
    snapshot = Snapshot(store, lambda: {"moments": moments})
    for changed in (False, True):
        if changed:
            store.values[...] = 3
            model.layers[1].seen.value[...] = 4
            moments[...] = 5
            snapshot.take()
        before, kept = model.state_dict(), backend.to_numpy(moments).copy()
        value = model.parameters[0].value
        store.values[...] = 9
        model.layers[1].seen.value[...] = 9
        moments[...] = 9
        snapshot.restore()
        assert model.parameters[0].value is value
        np.testing.assert_array_equal(backend.to_numpy(moments), kept)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name])


def test_buffers_are_saved_and_moved_but_not_trained(backend):
    model = model_of(backend)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "1.seen"]
    assert "1.seen" not in [p.name for p in model.parameters]
    model.predict(np.ones((4, 7)))
    assert model.state_dict()["1.seen"].tolist() == [4] * 3
    model.load_state_dict({**model.state_dict(), "1.seen": np.full(3, 8)})
    assert backend.to_numpy(model.layers[1].seen.value).tolist() == [8] * 3
    assert model.layers[1].seen.value.dtype == np.float32


def test_a_store_without_parameters_is_allocated_and_empty(backend):
    store = ParameterStore(backend, "float32")
    assert not store.allocated
    store.allocate(0)
    assert store.allocated
    assert store.values.shape == (0,)
    assert store.slices(lambda p: True) == []
    assert store.penalty() is None


@pytest.mark.parametrize("bad", [None, 1j, np.full((4, 2), 1j), "text", np.full((4, 2), "1")])
@pytest.mark.parametrize("which", ["value", "grad"])
def test_a_parameter_accepts_only_real_numbers(bad, which):
    parameter = dense_net(weight_initializer="ones").parameters[0]
    parameter.grad = 1.0
    with pytest.raises(ArgumentTypeError, match="0.weight"):
        setattr(parameter, which, bad)
    np.testing.assert_array_equal(getattr(parameter, which), np.ones((4, 2)))


def test_parameters_are_a_list_that_explains_a_call():
    model = xpnet.Sequential([layers.Dense(2), layers.Dense(1)], (3,), "cpu")
    assert isinstance(model.parameters, list) and [p.name for p in model.parameters][::3] == ["0.weight", "1.bias"]
    for owner in (model, model[0], layers.ReLU()):
        with pytest.raises(ArgumentTypeError, match="parameters is a list.*Optimizers take no parameters"):
            owner.parameters()
