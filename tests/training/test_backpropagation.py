"""xpnet.explain: its numbers are those of passes by hand and of finite differences, and the model stays as it was."""

import copy
import html.parser
import pickle

import numpy as np
import pytest
from every import LAYERS
from small_models import Do, assert_same_state, gradients_of

import xpnet
from xpnet import augment, layers, losses, optimizers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, PositionError, ShapeError, StateError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(3, 2)), RNG.normal(size=(3, 1))


def net(*stack, shape=(2,), backend="cpu", **options):
    return xpnet.Sequential(stack, shape, backend, **{"dtype": "float64", **options})


def two_two_one(backend="cpu"):
    return net(layers.Dense(2), layers.Sigmoid(), layers.Dense(1), layers.Sigmoid(), backend=backend)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


# The numbers


def test_every_number_of_a_small_net_is_that_of_the_formulas(backend):
    model = two_two_one(backend)
    w1, b1, w2, b2 = model.state_dict().values()
    explained = xpnet.explain(model, X, Y, "half_squared_error", 0.5)
    z1 = X @ w1 + b1
    h = 1 / (1 + np.exp(-z1))
    z2 = h @ w2 + b2
    y = 1 / (1 + np.exp(-z2))
    grad_y = (y - Y) / 3  # the loss is a mean over 3 samples
    grad_z2 = grad_y * y * (1 - y)
    grad_h = grad_z2 @ w2.T
    grad_z1 = grad_h * h * (1 - h)
    close(explained.loss, (0.5 * (y - Y) ** 2).mean())
    expected = {
        "0": (X, z1, w1, grad_z1, grad_z1 @ w1.T),
        "1": (z1, h, h * (1 - h), grad_h, grad_z1),
        "2": (h, z2, w2, grad_z2, grad_h),
        "3": (z2, y, y * (1 - y), grad_y, grad_z2),
    }
    assert list(explained.layers) == list(expected)
    for name, values in expected.items():
        one = explained[name]
        for ours, theirs in zip((one.input, one.output, one.local, one.upstream, one.downstream), values, strict=True):
            assert type(ours) is np.ndarray and ours.shape == theirs.shape
            close(ours, theirs)
    gradients = {"0.weight": X.T @ grad_z1, "0.bias": grad_z1.sum(axis=0), "2.weight": h.T @ grad_z2,
                 "2.bias": grad_z2.sum(axis=0)}  # fmt: skip
    assert list(explained.parameters) == list(gradients)
    for (name, gradient), value in zip(gradients.items(), (w1, b1, w2, b2), strict=True):
        p = explained.parameters[name]
        close(p.value, value)
        close(p.gradient, gradient)
        close(p.update, -0.5 * gradient)
    assert explained["2"].parameters["bias"] is explained.parameters["2.bias"]


def test_gradients_are_those_of_finite_differences(backend):
    model = net(layers.Dense(3, l2=0.1), layers.Tanh(), layers.LayerNorm(), layers.Dense(2), backend=backend)
    y = np.array([0, 1, 1])
    explained = xpnet.explain(model, X, y, "softmax_cross_entropy")

    def loss():
        return losses.SoftmaxCrossEntropy()(model.predict(x), y)

    def slopes(array):
        found = np.zeros(array.shape)
        for i in np.ndindex(array.shape):
            before = float(array[i])
            sides = []
            for h in (1e-5, -1e-5):
                array[i] = before + h
                sides.append(loss())
            array[i] = before
            found[i] = (sides[0] - sides[1]) / 2e-5
        return found

    x = X.copy()
    np.testing.assert_allclose(explained["0"].downstream, slopes(x), atol=1e-8)
    for p in model.parameters:
        np.testing.assert_allclose(explained.parameters[p.name].gradient, slopes(p.value), atol=1e-8, err_msg=p.name)


def test_the_step_is_the_next_one_of_training_in_its_mode_and_with_its_noise(backend):
    model = net(
        layers.Dense(6, l1=0.01), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.5), layers.Dense(2),
        backend=backend, dtype="float32",
    )  # fmt: skip
    y = np.array([0, 1, 1])
    adam = optimizers.Adam(0.01, weight_decay=0.1, clip_norm=0.5)
    for _ in range(2):
        model.train_on_batch(X, y, "softmax_cross_entropy", adam)
    explained, before = xpnet.explain(model, X, y), model.state_dict()
    logs = model.train_on_batch(X, y)
    assert explained.loss == logs["loss"]
    for name, p in explained.parameters.items():
        np.testing.assert_array_equal(p.value, before[name])
        np.testing.assert_array_equal(p.update, model.state_dict()[name] - before[name])
    local = explained["3"].local
    assert set(np.unique(local)) == {0.0, 2.0}
    np.testing.assert_array_equal(explained["3"].output, explained["3"].input * local)


def test_the_gradients_are_those_of_backward_by_hand(backend):
    model = net(
        layers.Conv2D(3, 3), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten(),
        layers.Residual(layers.Dense(4), layers.Tanh()), layers.Dense(2), shape=(6, 6, 1), backend=backend,
    )  # fmt: skip
    x, y = RNG.normal(size=(2, 6, 6, 1)), RNG.normal(size=(2, 2))
    explained = xpnet.explain(model, x, y, "half_squared_error")
    outputs = backend.to_numpy(model.forward(x))
    grad_x = model.backward((outputs - y) / 2)
    close(explained["5"].output, outputs)
    close(explained["0"].downstream, backend.to_numpy(grad_x))
    for name, gradient in gradients_of(model).items():
        close(explained.parameters[name].gradient, gradient)
    for name, output in model.activations(x).items():  # the order of ReLU and pooling is that of the layers
        close(explained[name].output, output)
    names = ["0", "1", "2", "3", "4", "4.0", "4.1", "4.skip", "5"]
    assert list(explained.layers) == names
    for before, after in (("0", "1"), ("1", "2"), ("2", "3"), ("3", "4"), ("4", "5"), ("4.0", "4.1")):
        np.testing.assert_array_equal(explained[before].output, explained[after].input)
        np.testing.assert_array_equal(explained[before].upstream, explained[after].downstream)
    assert explained["1"].local.shape == (2, 4, 4, 3)
    assert explained["0"].local is None and explained["2"].local is None and explained["4"].parameters == {}


#: In predictions their outputs depend on no other input, but in training they do; and a container shows its layers.
NOT_ELEMENTWISE = (layers.BatchNorm, layers.Masking, layers.Sequential)


@pytest.mark.parametrize(
    ("shape", "layer"),
    [(shape, layer) for shape, layer in LAYERS if not layer.accepts_integers],
    ids=lambda value: repr(value)[:40],
)
def test_local_derivatives_are_right_and_complete(shape, layer, backend):
    layer = copy.deepcopy(layer)
    x = np.random.default_rng(1).normal(size=(3, *shape))
    model = net(layer, shape=shape, backend=backend)
    explained = xpnet.explain(model, x, np.zeros((3, *model.output_shape)), "mse")
    one = explained["0"]
    assert one.output.shape == one.upstream.shape and one.downstream.shape == x.shape

    def output(x):
        return xpnet.explain(model, x, np.zeros((3, *model.output_shape)), "mse")["0"].output

    if type(layer) is layers.Dense:
        close(one.downstream, one.upstream @ one.local.T)
    elif one.local is not None:
        close(one.downstream, one.upstream * one.local)
        if type(layer) is not layers.Step:
            h = 1e-6
            np.testing.assert_allclose(one.local, (output(x + h) - output(x - h)) / (2 * h), atol=1e-6)
    elif model.output_shape == shape and backend.name == "cpu" and type(layer) not in NOT_ELEMENTWISE:
        assert not all(changes_only(model, x, i) for i in range(x[0].size)), "it is elementwise"


def changes_only(model, x, i):
    """Whether element i of the first input changes no other element of its output."""
    other = x.copy()
    other[0].flat[i] += 1.0
    return {*np.flatnonzero(model.predict(other) != model.predict(x)).tolist()} <= {i}


# Models


def test_a_graph_with_shared_layers_and_several_inputs_and_outputs(backend):
    a, b = xpnet.Input((2,), name="a"), xpnet.Input((2,), name="b")
    shared = layers.Dense(2, name="shared")
    h = layers.Add(name="sum")([shared(a), shared(b)])
    model = xpnet.Model([a, b], [layers.Dense(2, name="kind")(h), layers.Dense(1, name="size")(h)], backend=backend,
                        dtype="float64")  # fmt: skip
    options = {"loss": ["softmax_cross_entropy", "half_squared_error"], "loss_weights": [1.0, 0.25]}
    kinds, sizes = np.array([0, 1, 1]), Y
    explained = xpnet.explain(model, [X, X + 1], [kinds, sizes], optimizer=1.0, **options)
    assert list(explained.layers) == ["shared", "shared#2", "sum", "kind", "size"]
    logits, size = explained["kind"].output, explained["size"].output
    close(explained["size"].upstream, 0.25 * (size - Y) / 3)
    close(explained["sum"].upstream, explained["kind"].downstream + explained["size"].downstream)
    assert [g.shape for g in explained["sum"].downstream] == [(3, 2), (3, 2)]
    assert explained["shared"].parameters.keys() == {"weight", "bias"} and not explained["shared#2"].parameters
    by_call = [explained[name].input.T @ explained[name].upstream for name in ("shared", "shared#2")]
    close(explained.parameters["shared.weight"].gradient, sum(by_call))
    cross_entropy = losses.SoftmaxCrossEntropy()(logits, kinds)
    close(explained.loss, cross_entropy + 0.25 * (0.5 * (size - Y) ** 2).mean())
    assert "SoftmaxCrossEntropy + HalfSquaredError of 3 samples" in str(explained)
    assert "downstream ∂L/∂x, 2" in str(explained)


def test_nested_models_and_blocks_have_dotted_names(backend):
    encoder = net(layers.Dense(3), layers.Tanh(), backend=backend)
    model = net(encoder, layers.Reshape((3, 1)), layers.Bidirectional(layers.GRU(2)), layers.TransformerBlock(2),
                layers.Flatten(), layers.Dense(1), backend=backend)  # fmt: skip
    explained = xpnet.explain(model, X, Y, "mse")
    assert list(explained.parameters) == [p.name for p in model.parameters]
    inner = ["0", "0.0", "0.1", "1", "2", "2.forward", "2.backward", "2.join", "3", "3.norm1"]
    assert list(explained.layers)[: len(inner)] == inner
    assert explained["3"].layer == "TransformerBlock of 10 layers"
    assert explained["2.forward"].parameters.keys() == {"weight", "recurrent_weight", "bias", "recurrent_bias"}
    close(explained["3.add2"].output, explained["3"].output)
    model.forward(X, training=True)
    model.backward((model.forward(X, training=True) - backend.asarray(Y)) * (2 / 3))
    for name, gradient in gradients_of(model).items():
        close(explained.parameters[name].gradient, gradient)


def test_masks_ignored_labels_and_integer_inputs(backend):
    tokens = np.array([[1, 2, 3], [2, 0, 0]])
    labels = np.array([[1, 0, -1], [1, 1, 1]])
    model = net(layers.Embedding(4, 3, padding_index=0), layers.GRU(2), layers.Dense(2), shape=(None,), backend=backend)
    loss = losses.SoftmaxCrossEntropy(ignore=-1)
    explained = xpnet.explain(model, tokens, labels, loss)
    counted = np.array([[1, 1, 0], [1, 0, 0]], bool)
    close(explained.loss, losses.SoftmaxCrossEntropy()(explained["2"].output[counted], labels[counted]))
    assert not explained["2"].upstream[~counted].any() and explained["2"].upstream[counted].all()
    assert explained["0"].downstream is None and explained["0"].input.dtype.kind == "i"
    assert explained["0"].output.shape == (2, 3, 3)


def test_a_model_that_mixes_samples_is_explained_with_its_mixed_loss():
    model = net(augment.MixUp(0.4), layers.Dense(2))
    y = np.array([0, 1, 1])
    explained = xpnet.explain(model, X, y, "softmax_cross_entropy")
    assert explained.loss == model.train_on_batch(X, y, "softmax_cross_entropy", "sgd")["loss"]


def test_frozen_parameters_are_not_updated():
    model = two_two_one()
    model[0].trainable = False
    explained = xpnet.explain(model, X, Y, "mse", 1.0)
    assert not explained.parameters["0.weight"].update.any() and explained.parameters["2.weight"].update.all()
    assert explained["0"].downstream.all()


def test_layers_of_users_are_explained(backend):
    class Square(layers.Layer):
        def forward(self, x):
            self.work.x = x
            return x * x

        def backward(self, grad_y):
            return 2.0 * self.work.x * grad_y

    explained = xpnet.explain(net(Square(), layers.Dense(1), backend=backend), X, Y, "mse")
    close(explained["0"].downstream, 2 * X * explained["0"].upstream)
    assert explained["0"].local is None and explained["0"].layer == "Square"


def test_a_model_with_a_forward_and_a_backward_of_its_own_is_explained_with_them(backend):
    class Twice(xpnet.Sequential):
        def forward(self, x, training=False):
            return 2.0 * super().forward(x, training)

        def backward(self, grad_output, input_grad=True):
            return super().backward(2.0 * grad_output, input_grad)

    model = Twice([layers.Dense(3), layers.Tanh(), layers.Dense(1)], (2,), backend, dtype="float64")
    explained, outputs = xpnet.explain(model, X, Y, "half_squared_error"), model.predict(X)
    close(explained.loss, (0.5 * (outputs - Y) ** 2).mean())
    close(explained["2"].upstream, 2.0 * (outputs - Y) / 3)


def test_numbers_that_are_not_finite_are_shown():
    model = net(layers.Dense(1, weight_initializer=[[1e200], [1.0]]))
    explained = xpnet.explain(model, [[1e200, 1.0]], [[0.0]], "mse")
    assert explained.loss == np.inf and "inf" in str(explained)


# The model stays as it was


def test_nothing_of_the_model_changes(backend):
    def trained(explains):
        model = net(
            layers.Dense(4), layers.BatchNorm(), layers.Dropout(0.5), layers.Dense(2), backend=backend, dtype="float32"
        )
        y = np.array([0, 1, 1])
        for step in range(3):
            model.train_on_batch(X, y, "softmax_cross_entropy", "adam")
            if explains:
                model.forward(X, training=True)
                before = model.state_dict(), gradients_of(model), model.history
                xpnet.explain(model, X, y, optimizer=["sgd", 0.5, None][step])
                assert_same_state(model.state_dict(), before[0])
                assert_same_state(gradients_of(model), before[1])
                assert model.history is before[2]
            else:
                model.forward(X, training=True)
            model.backward(np.ones((3, 2)))
        state, outputs = model.state_dict(), backend.to_numpy(model.forward(X, training=True))
        return {**state, "outputs": outputs, **model.train_on_batch(X, y)}

    assert_same_state(trained(explains=True), trained(explains=False))


def test_a_callback_may_explain_a_running_fit():
    def explains(callback, model):
        seen.append(xpnet.explain(model, X, Y).loss)

    results = []
    for given in ([], [Do(explains, "on_epoch_end")]):
        seen, model = [], two_two_one()
        model.fit(X, Y, loss="mse", epochs=3, callbacks=given, verbose=0)
        results.append(model.state_dict())
    assert len(seen) == 3 and seen[2] < seen[0]
    assert_same_state(*results)


# Arguments and errors


def test_loss_and_optimizer_default_to_those_of_the_latest_training():
    model = two_two_one()
    untrained = xpnet.explain(model, X, Y)
    assert "MeanSquaredError" in str(untrained)
    close(untrained.parameters["0.bias"].update, -0.01 * untrained.parameters["0.bias"].gradient)
    model.fit(X, Y, loss="huber", optimizer=optimizers.SGD(0.5), verbose=0)
    explained = xpnet.explain(model, X, Y)
    assert "Huber" in str(explained)
    close(explained.parameters["0.bias"].update, -0.5 * explained.parameters["0.bias"].gradient)


def test_a_sum_is_explained_as_a_sum():
    mean, total = (xpnet.explain(two_two_one(), X, Y, losses.HalfSquaredError(r)) for r in ("mean", "sum"))
    close(total.loss, 3 * mean.loss)
    close(total["0"].upstream, 3 * mean["0"].upstream)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: xpnet.explain(m, X[:, :1], Y), ShapeError, "x"),
        (lambda m: xpnet.explain(m, X, Y[:2]), DataError, "2"),
        (lambda m: xpnet.explain(m, X * np.nan, Y), DataError, "NaN"),
        (lambda m: xpnet.explain(m, X, Y, "msee"), ArgumentError, "Did you mean 'mse'"),
        (lambda m: xpnet.explain(m, X, Y, optimizer=-1.0), ArgumentError, "explain: optimizer must be .*-1.0"),
        (lambda m: xpnet.explain(m, X, Y, optimizer="adamm"), ArgumentError, "'adam'"),
        (lambda m: xpnet.explain(m, X, Y, lr=0.1), ArgumentTypeError, "explain: unknown argument 'lr'"),
        (lambda m: xpnet.explain(m[0], X, Y), ArgumentTypeError, "explain: model must be .*Dense"),
        (lambda m: xpnet.explain(m, lambda: [(X, Y)], None), ArgumentTypeError, "stream"),
        (lambda m: xpnet.explain(m, X, Y)["4"], ArgumentError, "unknown layer '4'.*Known: 0, 1, 2, 3"),
        (lambda m: xpnet.explain(m, X, Y)[4], PositionError, "no layer 4: the model has 4 layers, 0 to 3"),
        (lambda m: xpnet.explain(m, X, Y)[10**5000], PositionError, "no layer this int: the model has 4 layers"),
        (lambda m: xpnet.explain(m, X, Y)["0"].parameters["wieght"], ArgumentError, "Did you mean 'weight'"),
        (
            lambda m: xpnet.explain(m, X, Y).parameters["weight"],
            ArgumentError,
            r"unknown parameter 'weight'.*0\.weight",
        ),
        (lambda m: xpnet.explain(m, X, Y)[["0"]], ArgumentError, "unknown layer"),
    ],
)
def test_errors_name_what_is_wrong_and_the_model_works(call, error, words):
    model = two_two_one()
    with pytest.raises(error, match=words):
        call(model)
    assert model.predict(X).shape == (3, 1)


def test_a_model_without_an_input_shape_is_built_by_its_first_data_and_only_by_valid_ones():
    model = xpnet.Sequential([layers.Dense(1)], backend="cpu")
    with pytest.raises(DataError):
        xpnet.explain(model, X, Y[:2], "mse")
    assert not model.is_built
    assert xpnet.explain(model, X, Y, "mse").samples == 3 and model.is_built
    outer = net(layers.Dense(2), inner := xpnet.Sequential([layers.Dense(1)]))
    with pytest.raises(StateError, match="call the whole model"):
        xpnet.explain(inner, X, Y)
    explained = xpnet.explain(outer, X, Y)
    assert explained["1.0"].layer == "Dense"
    assert explained[1] is explained[-1] is explained["1"]


# Texts


def test_the_text_has_four_digits_of_small_arrays_and_limits_of_large_ones():
    model = net(layers.Dense(1, weight_initializer=[[1.0], [-0.123456]]), layers.Sigmoid())
    explained = xpnet.explain(model, [[0.0, 2.0]], [[0.0]], "half_squared_error", 1.0)
    assert repr(explained) == str(explained)
    assert str(explained).splitlines() == [
        "L = 0.09618, HalfSquaredError of 1 sample; updates by SGD at a rate of 1",
        "layer      quantity             shape   values",
        "---------  -------------------  ------  -------------------",
        "0 Dense    input x              (1, 2)  [[0, 2]]",
        "           output y             (1, 1)  [[-0.2469]]",
        "           local ∂y/∂x          (2, 1)  [[1], [-0.1235]]",
        "           upstream ∂L/∂y       (1, 1)  [[0.108]]",
        "           downstream ∂L/∂x     (1, 2)  [[0.108, -0.01333]]",
        "           weight               (2, 1)  [[1], [-0.1235]]",
        "           gradient ∂L/∂weight  (2, 1)  [[0], [0.216]]",
        "           update of weight     (2, 1)  [[0], [-0.216]]",
        "           bias                 (1,)    [0]",
        "           gradient ∂L/∂bias    (1,)    [0.108]",
        "           update of bias       (1,)    [-0.108]",
        "1 Sigmoid  input x              (1, 1)  [[-0.2469]]",
        "           output y             (1, 1)  [[0.4386]]",
        "           local ∂y/∂x          (1, 1)  [[0.2462]]",
        "           upstream ∂L/∂y       (1, 1)  [[0.4386]]",
        "           downstream ∂L/∂x     (1, 1)  [[0.108]]",
    ]
    many = str(xpnet.explain(model, np.arange(14.0).reshape(7, 2), np.zeros(7), "mse"))
    assert "(7, 2)  min 0, mean 6.5, max 13\n" in many
    model = net(layers.Dense(4), layers.Softmax())
    assert "local ∂y/∂x          " + " " * 8 + "—" in str(xpnet.explain(model, X[:1], np.zeros((1, 4)), "mse"))


class Table(html.parser.HTMLParser):
    """The cells (tag, scope, rowspan, text) of each row; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.caption, self.open = [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            attrs = dict(attrs)
            self.rows[-1].append([tag, attrs.get("scope"), int(attrs.get("rowspan", 1)), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1][3] += data
        if self.open and self.open[-1] == "caption":
            self.caption += data


def test_a_notebook_shows_a_table_with_heads_of_columns_layers_and_rows():
    class B(layers.Identity):
        pass

    B.__name__ = "<b>&amp;"
    explained = xpnet.explain(net(layers.Dense(1), B()), X, Y, "mse")
    table = Table(explained._repr_html_())
    assert table.caption == f"L = {explained.loss:.4g}, MeanSquaredError of 3 samples; updates by SGD at a rate of 0.01"
    assert [cell[:2] for cell in table.rows[0]] == [["th", "col"]] * 4
    assert table.rows[1][0] == ["th", "rowgroup", 11, "0 Dense"]
    assert table.rows[12][0] == ["th", "rowgroup", 5, "1 <b>&amp;"]
    assert all(["th", "row"] in [cell[:2] for cell in row] for row in table.rows[1:])
    shown = [[cell[3] for cell in row][-3:] for row in table.rows[1:]]
    assert shown == [list(row) for one in explained.layers.values() for row in one.rows()]


def test_an_explanation_can_be_copied_and_pickled():
    explained = xpnet.explain(two_two_one(), X, Y, "mse")
    for twin in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        assert str(twin) == str(explained) and twin["0"].upstream.tolist() == explained["0"].upstream.tolist()
