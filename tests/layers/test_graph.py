"""The executor of graphs: fan-out, several inputs and outputs, custom layers, and which gradients are computed."""

import numpy as np
import pytest

import xpnet
from xpnet import layers
from xpnet.errors import ShapeError
from xpnet.layers.structure import as_tuple

X = np.random.default_rng(0).normal(size=(5, 4))


class Gate(layers.Layer):
    """y = a · b · w, of two inputs a and b."""

    def build(self, input_shape):
        self.w = self.add_parameter("w", input_shape[0], "ones")
        return input_shape[0]

    def forward(self, x):
        self.work.x = x
        return x[0] * x[1] * self.w.value

    def backward(self, grad_y):
        a, b = self.work.x
        self.w.grad[...] = self.xp.sum(grad_y * a * b, axis=0)
        return [grad_y * b * self.w.value, grad_y * a * self.w.value]


class Spied(layers.Dense):
    """A Dense that counts its backward passes, and notes whether the gradient of its input was wanted."""

    wanted: tuple = ()

    def backward(self, grad_y):
        vars(self)["wanted"] = (*self.wanted, self.wants_input_grad)
        return super().backward(grad_y)


def passed(model, *x):
    """(outputs, gradients of the inputs for gradients of ones), as tuples of arrays on the host."""
    backend = model.backend
    with backend.device():
        given = [backend.asarray(a, dtype=model.dtype) for a in x]
        y = model.forward_pass(given[0] if len(given) == 1 else tuple(given), training=True)
        outputs = [np.array(backend.to_numpy(a)) for a in as_tuple(y)]
        grads = [backend.asarray(np.ones(a.shape), dtype=model.dtype) for a in outputs]
        result = model.backward_pass(grads[0] if len(grads) == 1 else tuple(grads))
        return outputs, [np.array(backend.to_numpy(a)) for a in as_tuple(result)]


def test_gradients_add_up_where_a_value_is_used_several_times(backend):
    x = xpnet.Input(4)
    twice = layers.Rescale(2.0)(x)
    outputs = [layers.Rescale(3.0)(twice), twice, layers.Add()([twice, x, twice])]
    model = xpnet.Model(x, outputs, backend=backend, dtype="float64")
    results, (grad,) = passed(model, X)
    for got, factor in zip(results, (6.0, 2.0, 5.0), strict=True):
        np.testing.assert_allclose(got, factor * X)
    np.testing.assert_array_equal(grad, np.full(X.shape, 13.0))


def test_layers_in_a_row_may_begin_with_a_merge(backend, rng):
    x = xpnet.Input(4)
    h = layers.Sequential([layers.Add(), layers.Dense(3)])([x, layers.Tanh()(x)])
    model = xpnet.Model(x, h, backend=backend)
    assert max(xpnet.check_gradients(model, X, rng.normal(size=(5, 3)), inputs=True).values()) < 1e-6
    again = model([xpnet.Input(4)])  # a list of one is that one
    assert again.shape == (3,)


def test_one_tensor_may_be_an_output_twice(backend):
    x = xpnet.Input(4)
    h = layers.Rescale(2.0)(x)
    model = xpnet.Model(x, [h, h], backend=backend, dtype="float64")
    assert model.output_names == ["0", "0_2"]
    (first, second), (grad,) = passed(model, X)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(grad, np.full(X.shape, 4.0))


def test_an_input_that_nothing_reads_has_a_gradient_of_zeros(backend):
    x, other = xpnet.Input(4), xpnet.Input((2, 3), name="other")
    model = xpnet.Model([x, other], layers.Rescale(2.0)(x), backend=backend, dtype="float64")
    _, (grad, zeros) = passed(model, X, np.ones((5, 2, 3)))
    np.testing.assert_array_equal(grad, np.full(X.shape, 2.0))
    np.testing.assert_array_equal(zeros, np.zeros((5, 2, 3)))


def test_a_graph_may_begin_at_an_inner_tensor(backend):
    x = xpnet.Input(4)
    h = layers.Dense(3)(x)
    y = layers.Dense(2)(h)
    whole = xpnet.Model(x, y, backend=backend, dtype="float64")
    front, back = xpnet.Model(x, h), xpnet.Model(h, y)
    np.testing.assert_array_equal(back.predict(front.predict(X)), whole.predict(X))
    assert [p.name for p in back.parameters] == ["0.weight", "0.bias"]


def test_a_nested_model_with_several_inputs_and_outputs(backend):
    a, b = xpnet.Input(4), xpnet.Input(4)
    inner = xpnet.Model([a, b], [layers.Add()([a, b]), layers.Multiply()([a, b]), layers.Tanh()(a)], backend=backend)
    x = xpnet.Input(4)
    total, product, _ = inner([x, layers.Rescale(3.0)(x)])  # nothing reads the third output
    model = xpnet.Model(x, layers.Add()([total, product]), dtype="float64", backend=backend)
    (y,), (grad,) = passed(model, X)
    np.testing.assert_allclose(y, 4.0 * X + 3.0 * X * X, rtol=1e-12)
    np.testing.assert_allclose(grad, 4.0 + 6.0 * X, rtol=1e-12)


def test_custom_layers_may_have_several_inputs(backend, rng):
    x, dense, gate = xpnet.Input(4), layers.Dense(4), Gate()
    y = gate([gate([dense(x), x]), dense(dense(x))])
    model = xpnet.Model(x, y, backend=backend)
    errors = xpnet.check_gradients(model, X, rng.normal(size=(5, 4)), inputs=True)
    assert errors.keys() == {"0.weight", "0.bias", "1.w", "inputs"}
    assert max(errors.values()) < 1e-6
    model.fit(X, X, loss="mse", epochs=2, verbose=0)


class Halves(layers.Layer):
    """The two halves of the features, as a list."""

    def build(self, input_shape):
        return [(input_shape[0] // 2,), (input_shape[0] // 2,)]

    def forward(self, x):
        return [x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]]

    def backward(self, grad_y):
        return self.xp.concatenate(grad_y, axis=1)


def test_custom_layers_may_have_several_outputs(backend, rng):
    x = xpnet.Input(4)
    a, b = Halves()(layers.Dense(6)(x))
    c, _ = Halves()(layers.Dense(4)(a))
    model = xpnet.Model(x, layers.Concatenate()([a, b, c]), backend=backend)
    errors = xpnet.check_gradients(model, X, rng.normal(size=(5, 8)), inputs=True)
    assert max(errors.values()) < 1e-6
    model.fit(X, np.ones((5, 8)), loss="mse", epochs=2, verbose=0)

    class Third(Halves):
        def forward(self, x):
            return [*super().forward(x), x]

    model = xpnet.Model(x, Third()(x), backend=backend)
    with pytest.raises(ShapeError, match=r"layer 0 \(Third\): forward must return a list of 2 arrays, not 3"):
        model.predict(X)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda grads: grads[0], r"layer 0 \(Broken\): backward must return a list of 2 gradients, .* an array"),
        (lambda grads: grads[:1], "a list of 2 gradients, one for each input, but returned 1 of them"),
        (lambda grads: [grads[0], None], r"must return ∂L/∂x of input 1, \(N, 4\), .* returned None"),
    ],
    ids=["an array", "too few", "None"],
)
def test_wrong_gradients_of_several_inputs_are_explained(result, text):
    class Broken(Gate):
        def backward(self, grad_y):
            return result(super().backward(grad_y))

    x, other = xpnet.Input(4), xpnet.Input(4)
    dense = layers.Dense(4, name="dense")(other)
    model = xpnet.Model([x, other], Broken()([x, dense]), backend="cpu", dtype="float64")
    with pytest.raises(ShapeError, match=text.replace("layer 0", "layer 1")):
        passed(model, X, X)


def test_backward_leaves_out_what_nothing_trained_needs():
    x = xpnet.Input(4)
    base, body, head, other = (Spied(4, name=name) for name in ("base", "body", "head", "other"))
    h = base(x)
    model = xpnet.Model(x, layers.Add()([head(body(h)), other(h)]), backend="cpu")
    base.trainable = other.trainable = False
    y = model.forward_pass(np.ones((2, 4), "float32"), training=True)
    model.backward_pass(y, input_grad=False)
    assert [layer.wanted for layer in (base, body, head, other)] == [(), (False,), (True,), ()]
    model.backward_pass(y, input_grad=True)
    assert [layer.wanted for layer in (base, body, head, other)] == [(True,), (False, True), (True, True), (True,)]
    base.trainable = True
    model.backward_pass(y, input_grad=False)
    assert [layer.wanted[-1] for layer in (base, body, head, other)] == [False, True, True, True]


def test_max_pooling_runs_before_a_relu_only_if_nothing_else_reads_it(backend, rng):
    x = xpnet.Input((4, 4, 2))
    h = layers.ReLU()(x)
    pooled = layers.MaxPool2D(2)(h)
    alone, shared = xpnet.Model(x, pooled, backend=backend, dtype="float64"), xpnet.Model(x, [pooled, h])
    assert [type(site.layer).__name__ for site in alone._executor.sites] == ["MaxPool2D", "ReLU"]
    assert [type(site.layer).__name__ for site in shared._executor.sites] == ["ReLU", "MaxPool2D"]
    images = rng.normal(size=(3, 4, 4, 2))
    (first,), _ = passed(alone, images)
    (second, relu), _ = passed(shared, images)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(relu, np.maximum(images, 0))


def test_integers_stay_integers_for_embeddings_only(backend):
    words, weights = xpnet.Input(3, name="words"), xpnet.Input(3, name="weights")
    h = layers.Flatten()(layers.Embedding(9, 2)(words))
    model = xpnet.Model([words, weights], layers.Concatenate()([h, weights]), backend=backend)
    assert model.accepts_integers == (True, False)
    numbers = np.arange(6).reshape(2, 3)
    y = model.predict([numbers, numbers])
    np.testing.assert_array_equal(y[:, 6:], numbers)


def test_integers_become_floats_for_the_layers_that_take_floats(backend, rng):
    words = xpnet.Input(3)
    wide = layers.Reshape((3, 1))(words)
    outputs = [layers.Embedding(9, 2)(words), layers.Concatenate()([wide, layers.Rescale(0.5)(wide)])]
    model = xpnet.Model(words, layers.Concatenate()(outputs), backend=backend)
    assert model.accepts_integers is True
    y = model.predict(np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(y[..., 2], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(y[..., 3], 0.5 * np.arange(6).reshape(2, 3))
    model.fit(np.arange(6).reshape(2, 3), y, loss="mse", epochs=3, verbose=0)


def test_the_probabilities_of_each_output_are_known():
    x = xpnet.Input(4)
    p, logits = layers.Reshape((2, 2))(layers.Softmax()(layers.Dense(4)(x))), layers.Dense(3)(x)
    inner = xpnet.Model(x, [p, logits], backend="cpu")
    assert inner.gives_probabilities == (True, False)
    outer_p, outer_logits = inner(x)
    assert xpnet.Model(x, [outer_logits, outer_p]).gives_probabilities == (False, True)
