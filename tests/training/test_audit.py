"""The first step with layers, losses, metrics and optimizers of the user: mistakes are named, and nothing changes."""

import copy
import pickle

import numpy as np
import pytest
from custom_layers import Counted
from small_models import LABELS, QUIET, SAMPLES, assert_same_state, gradients_of, small_net

import xpnet
from xpnet import layers, losses, metrics, optimizers
from xpnet.errors import ShapeError, StateError, XpnetError

ONE_HOT = np.eye(2, dtype="float32")[LABELS]
TWICE = 2 * np.ones(1)  # float64


class Gain(layers.Layer):
    """x · gain, with mistakes: `forward` and `backward` are replaced by these functions of the layer and an array."""

    def __init__(self, forward=None, backward=None):
        self.wrong_forward, self.wrong_backward = forward, backward

    def build(self, input_shape):
        self.gain = self.add_parameter("gain", input_shape, "ones")
        return input_shape

    def forward(self, x):
        if self.wrong_forward is not None and (self.context.training or self.wrong_forward in ONLY_AT_INFERENCE):
            return self.wrong_forward(self, x)
        return self.right_forward(x)

    def right_forward(self, x):
        self.work.x = x
        return x * self.gain.value

    def backward(self, grad_y):
        return self.right_backward(grad_y) if self.wrong_backward is None else self.wrong_backward(self, grad_y)

    def right_backward(self, grad_y):
        self.gain.grad[...] = self.xp.sum(grad_y * self.work.x, axis=0)
        return grad_y * self.gain.value


ONLY_AT_INFERENCE = set()


# Mistakes of forward -----------------------------------------------------------------------------------------------


def write_into_x(layer, x):
    x *= 2.0
    return layer.right_forward(x)


def write_into_x_and_put_it_back(layer, x):
    y = layer.right_forward(x)
    x += 1.0
    return y


def too_few_rows(layer, x):
    return layer.right_forward(x)[:-1]


def too_few_columns(layer, x):
    return layer.right_forward(x)[:, :-1]


def wrong_axes(layer, x):
    return layer.right_forward(x)[None]


def return_nothing(layer, x):
    layer.right_forward(x)


def return_a_list(layer, x):
    return layer.backend.to_numpy(layer.right_forward(x)).tolist()


def float64(layer, x):
    return layer.right_forward(x).astype("float64")


def integers(layer, x):
    return layer.right_forward(x).astype("int64")


def declare_a_parameter(layer, x):
    layer.late = layer.add_parameter("late", (3,), "ones")
    return layer.right_forward(x)


def declare_a_buffer(layer, x):
    layer.late = layer.add_buffer("late", [1.0])
    return layer.right_forward(x)


WRONG_FORWARDS = {
    write_into_x: "forward has written into its input x",
    write_into_x_and_put_it_back: "forward has written into its input x",
    too_few_rows: r"forward must return .* with N = ",
    too_few_columns: r"forward must return",
    wrong_axes: r"forward must return",
    return_nothing: r"forward must return .*None",
    return_a_list: r"forward must return",
    float64: r"forward must return .*float32.*float64.*astype",
    integers: r"forward must return .*int64",
    declare_a_parameter: "call add_parameter in build",
    declare_a_buffer: "call add_buffer in build",
}


# Mistakes of backward ----------------------------------------------------------------------------------------------


def add_to_the_gradient(layer, grad_y):
    layer.gain.grad += layer.xp.sum(grad_y * layer.work.x, axis=0)
    return grad_y * layer.gain.value


def forget_the_gradient(layer, grad_y):
    return grad_y * layer.gain.value


def write_a_part_of_the_gradient(layer, grad_y):
    layer.gain.grad[0] = 1.0
    return grad_y * layer.gain.value


def write_into_grad_y(layer, grad_y):
    layer.right_backward(grad_y)
    grad_y *= 2.0
    return layer.right_backward(grad_y)


def write_into_x_in_backward(layer, grad_y):
    layer.work.x *= grad_y
    return layer.right_backward(grad_y)


def return_no_gradient(layer, grad_y):
    layer.right_backward(grad_y)


def return_a_float64_gradient(layer, grad_y):
    return layer.right_backward(grad_y).astype("float64")


def return_a_sum(layer, grad_y):
    return layer.right_backward(grad_y).sum(axis=0)


def return_a_flat_gradient(layer, grad_y):
    return layer.right_backward(grad_y).reshape(-1)


def assign_a_wrong_shape(layer, grad_y):
    layer.gain.grad = grad_y
    return grad_y


def update_the_value(layer, grad_y):
    grad_x = layer.right_backward(grad_y)
    layer.gain.value -= 0.1 * layer.gain.grad
    return grad_x


def declare_a_parameter_in_backward(layer, grad_y):
    layer.add_parameter("late", (3,), "ones")
    return layer.right_backward(grad_y)


WRONG_BACKWARDS = {
    add_to_the_gradient: r"backward leaves NaN in the gradient of \d.gain",
    forget_the_gradient: r"backward leaves NaN in the gradient of \d.gain",
    write_a_part_of_the_gradient: r"backward leaves NaN in the gradient of \d.gain",
    write_into_grad_y: "backward has written into grad_y",
    write_into_x_in_backward: "backward has written into its input x",
    return_no_gradient: "backward must return .*None",
    return_a_float64_gradient: r"backward must return .*float32.*float64",
    return_a_sum: "backward must return",
    return_a_flat_gradient: "backward must return",
    assign_a_wrong_shape: r"gain has shape",
    update_the_value: r"backward changes the value of \d.gain. Write its gradient, self.gain.grad\[...\] = ...;",
    declare_a_parameter_in_backward: "call add_parameter in build",
}

MISTAKES = [
    *[pytest.param({"forward": f}, match, id=f.__name__) for f, match in WRONG_FORWARDS.items()],
    *[pytest.param({"backward": f}, match, id=f.__name__) for f, match in WRONG_BACKWARDS.items()],
]


def net_with(layer, where, backend="cpu", norm=True):
    inner = [layers.Dense(5, l2=0.1), layers.BatchNorm() if norm else layers.Identity(), layers.Tanh(), layers.Dense(2)]
    inner.insert(where, layer)
    return xpnet.Sequential(inner, (4,), backend)


def by_fit(model, x, y):
    model.fit(x, y, "softmax_cross_entropy", optimizers.Adam(0.1, weight_decay=0.1), shuffle=False, batch_size=None,
              verbose=0)  # fmt: skip


def by_batches(model, x, y):
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    model.fit(batches, None, "softmax_cross_entropy", optimizers.Adam(0.1, weight_decay=0.1), verbose=0)


def by_one_batch(model, x, y):
    model.train_on_batch(x, y, "softmax_cross_entropy", optimizers.Adam(0.1, weight_decay=0.1))


def by_hand(model, x, y):
    outputs = model.forward(x, training=True)
    model.backward(losses.SoftmaxCrossEntropy().gradient(model.backend, outputs, model.backend.asarray(y)))
    model.apply_gradients()


WAYS = [by_fit, by_batches, by_one_batch, by_hand]


@pytest.mark.parametrize("train", WAYS)
@pytest.mark.parametrize("where", [1, pytest.param(4, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("wrong", "match"), MISTAKES)
def test_a_layer_that_misbehaves_is_named_and_nothing_changes(backend, wrong, match, where, train):
    faulty = Gain(**wrong)
    model = net_with(faulty, where, backend)
    right = net_with(Gain(), where, backend)
    x, y, state = SAMPLES.copy(), LABELS.copy(), model.state_dict()
    for _ in range(2):  # the second call finds it too
        with pytest.raises(XpnetError, match=match) as error:
            train(model, x, y)
        if "has shape" not in match:
            assert f"layer {where} (Gain)" in str(error.value)
        np.testing.assert_array_equal(x, SAMPLES)
        np.testing.assert_array_equal(y, LABELS)
        after = model.state_dict()
        if train is by_hand:  # forward moves the statistics of BatchNorm
            state, after = ({n: a for n, a in s.items() if "running" not in n} for s in (state, after))
        assert_same_state(after, state)
        assert all(np.isfinite(grad).all() for grad in gradients_of(model).values())
    if train is by_hand:
        return
    faulty.wrong_forward = faulty.wrong_backward = None
    train(model, x, y)
    train(right, x, y)
    assert_same_state(model.state_dict(), right.state_dict())


@pytest.mark.parametrize("wrong", [write_into_x, write_into_x_and_put_it_back])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_users_data_is_never_written(backend, wrong, dtype):
    ONLY_AT_INFERENCE.add(wrong)
    try:
        model = xpnet.Sequential([Gain(forward=wrong), layers.Dense(2)], (4,), backend, dtype=dtype)
        x = backend.asarray(SAMPLES, dtype=dtype).copy()
        before = backend.to_numpy(x).copy()
        chosen = {"loss": "softmax_cross_entropy"}
        for call in (
            lambda: model.fit(x, LABELS, epochs=3, batch_size=None, verbose=0),
            lambda: model.fit(x, LABELS, epochs=3, batch_size=5, shuffle=False, verbose=0),
            lambda: model.train_on_batch(x, LABELS, optimizer="sgd", **chosen),
            lambda: model.forward(x, training=True),
            lambda: model.predict(x),
            lambda: model.predict_proba(x),
            lambda: model.evaluate(x, LABELS, **chosen),
            lambda: model.evaluate(x, LABELS, batch_size=None, **chosen),
            lambda: model.activations(x),
            lambda: xpnet.check_gradients(model, x, LABELS, **chosen),
        ):
            try:
                call()
            except XpnetError as error:
                assert "written into" in str(error)
            np.testing.assert_array_equal(backend.to_numpy(x), before)
    finally:
        ONLY_AT_INFERENCE.clear()


@pytest.mark.parametrize("wrong", [too_few_rows, too_few_columns, return_nothing, float64, integers, return_a_list])
def test_a_layer_that_misbehaves_only_at_inference_is_named(backend, wrong):
    faulty = Gain(forward=wrong)
    model = net_with(faulty, 1, backend)
    faulty.wrong_forward = lambda layer, x: layer.right_forward(x) if layer.context.training else wrong(layer, x)
    ONLY_AT_INFERENCE.add(faulty.wrong_forward)
    try:
        model.fit(SAMPLES, LABELS, **QUIET)
        for call in (lambda: model.predict(SAMPLES), lambda: model.evaluate(SAMPLES, LABELS)):
            with pytest.raises(ShapeError, match=r"layer 1 \(Gain\): forward must return"):
                call()
        with pytest.raises(ShapeError, match=r"layer 1 \(Gain\): forward must return"):
            model.fit(SAMPLES, LABELS, validation_data=(SAMPLES, LABELS), **QUIET)
    finally:
        ONLY_AT_INFERENCE.clear()


def test_right_layers_train_as_without_the_checks(backend, monkeypatch):
    audited = net_with(Counted(), 1, backend)
    plain = net_with(Counted(), 1, backend)
    by_fit(audited, SAMPLES, LABELS)
    monkeypatch.setattr(Counted, "is_custom", False)
    monkeypatch.setattr("xpnet.training.audit.is_custom", lambda kind: False)
    by_fit(plain, SAMPLES, LABELS)
    assert_same_state(audited.state_dict(), plain.state_dict())


@pytest.mark.parametrize("where", [0, 1])
def test_only_the_first_step_is_checked(backend, eager_steps, where, monkeypatch):
    seen = []
    monkeypatch.setattr("xpnet.training.audit._Unwritten.check", lambda self, method: seen.append(method))
    model = net_with(Gain(), where, backend)
    model.fit(SAMPLES, LABELS, epochs=3, **QUIET)
    assert sorted(seen) == [f"layer {where} (Gain): backward", f"layer {where} (Gain): forward"]
    model.fit(SAMPLES, LABELS, **QUIET)
    model.train_on_batch(SAMPLES, LABELS)
    assert len(seen) == 2
    model.train_on_batch(SAMPLES, ONE_HOT, loss=MyLoss())  # another loss of the user
    assert len(seen) == 7
    assert not any(callable(value) for layer in model.layers for value in vars(layer).values())
    assert "backward_in_context" not in vars(model)


def test_an_exception_of_the_user_passes_through(backend):
    def fail(layer, array):
        raise KeyError("my own")

    for wrong in ({"forward": fail}, {"backward": fail}):
        model = net_with(Gain(**wrong), 1, backend)
        before = model.state_dict()
        for train in (by_fit, by_one_batch, by_hand):
            with pytest.raises(KeyError, match="my own"):
                train(model, SAMPLES, LABELS)
            assert {n: a.tolist() for n, a in model.state_dict().items() if "running" not in n} == {
                n: a.tolist() for n, a in before.items() if "running" not in n
            }


def test_numbers_that_overflow_are_no_mistake_of_the_layer():
    model = net_with(Gain(), 1, norm=False)
    model.parameters[0].value = 1e38
    with pytest.raises(xpnet.errors.DivergenceError):
        by_fit(model, SAMPLES * 1e3, LABELS)


def test_frozen_layers_need_no_gradient(backend):
    model = net_with(Gain(backward=forget_the_gradient), 1, backend)
    model.layers[1].trainable = False
    by_fit(model, SAMPLES, LABELS)
    assert all(np.isfinite(grad).all() for grad in gradients_of(model).values())


def test_a_layer_may_pass_on_integers(backend):
    class Same(layers.Layer):
        accepts_integers = None

        def forward(self, x):
            return x

        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([Same(), layers.Embedding(9, 3), layers.Flatten(), layers.Dense(2)], (4,), backend)
    x = np.arange(20).reshape(5, 4) % 9
    model.fit(x, [0, 1, 0, 1, 1], epochs=3, batch_size=2, verbose=0)
    assert model.predict(x).shape == (5, 2)


def test_a_model_in_the_middle_of_its_checks_can_be_copied():
    model = net_with(Counted(), 1)
    model.forward(SAMPLES, training=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        by_hand(copied, SAMPLES, LABELS)


# Losses ------------------------------------------------------------------------------------------------------------


class MyLoss(losses.Loss):
    """½ (y - t)², with mistakes: `wrong(outputs, targets)` replaces the gradient, or the losses."""

    def __init__(self, wrong=None, method="gradient"):
        self.wrong, self.method = wrong, method

    def samples(self, backend, outputs, targets):
        if self.wrong is not None and self.method == "samples":
            return self.wrong(outputs, targets)
        return 0.5 * backend.xp.sum(backend.xp.square(outputs - targets), axis=1)

    def gradient(self, backend, outputs, targets):
        if self.wrong is not None and self.method == "gradient":
            return self.wrong(outputs, targets)
        return outputs - targets


class MyFusedLoss(MyLoss):
    def samples_and_gradient(self, backend, outputs, targets, out=None):
        return self.samples(backend, outputs, targets), self.gradient(backend, outputs, targets)


def into_outputs(outputs, targets):
    outputs -= targets
    return outputs


def into_targets(outputs, targets):
    targets *= -1.0
    targets += outputs
    return targets


WRONG_GRADIENTS = {
    "written into the outputs": into_outputs,
    "written into the targets": into_targets,
    "new array, because it has written into the targets": lambda outputs, targets: targets,
    "new array, because it has written into the outputs": lambda outputs, targets: outputs[:],
    r"must return .*None": lambda outputs, targets: None,
    r"must return .*float64": lambda outputs, targets: (outputs - targets).astype("float64"),
    r"must return the": lambda outputs, targets: (outputs - targets).sum(axis=1),
    r"must return the gradient": lambda outputs, targets: 0.5,
}


@pytest.mark.parametrize("cls", [MyLoss, MyFusedLoss])
@pytest.mark.parametrize(("match", "wrong"), WRONG_GRADIENTS.items())
def test_a_loss_with_a_wrong_gradient_is_named_and_nothing_changes(backend, cls, match, wrong):
    model, y = xpnet.Sequential([layers.Dense(5), layers.Dense(2)], (4,), backend), ONE_HOT.copy()
    before = model.state_dict()
    method = "gradient" if cls is MyLoss else "samples_and_gradient"
    for train in (lambda: model.fit(SAMPLES, y, loss=cls(wrong), batch_size=None, verbose=0),
                  lambda: model.train_on_batch(SAMPLES, y, cls(wrong), "sgd")):  # fmt: skip
        with pytest.raises(XpnetError, match=rf"{cls.__name__}: {method}.*{match}"):
            train()
        np.testing.assert_array_equal(y, ONE_HOT)
        assert_same_state(model.state_dict(), before)
    model.fit(SAMPLES, y, loss=cls(), epochs=2, verbose=0)
    assert model.history["loss"][1] < model.history["loss"][0]


@pytest.mark.parametrize(
    ("match", "wrong"),
    [
        (r"samples must return one number per sample.*\(N,\).*\(20, 2\)", lambda outputs, targets: outputs - targets),
        (r"samples must return one number per sample.*None", lambda outputs, targets: None),
        (r"samples must return one number per sample", lambda outputs, targets: (outputs - targets).sum()),
        (r"samples has written into the outputs", lambda outputs, targets: into_outputs(outputs, targets)[:, 0]),
    ],
)
def test_a_loss_with_wrong_samples_is_named(backend, match, wrong):
    model = xpnet.Sequential([layers.Dense(2)], (4,), backend)
    with pytest.raises(XpnetError, match=f"MyLoss: {match}"):
        model.fit(SAMPLES, ONE_HOT, loss=MyLoss(wrong, "samples"), verbose=0)


def test_a_loss_that_writes_into_targets_is_refused_in_evaluate_and_does_not_reach_the_users_data(backend):
    model, y = xpnet.Sequential([layers.Dense(2)], (4,), backend), ONE_HOT.copy()

    def wrong(outputs, targets):
        return into_targets(outputs, targets)[:, 0]

    with pytest.raises(StateError, match="samples has written into the targets"):
        model.evaluate(SAMPLES, y, loss=MyLoss(wrong, "samples"))
    np.testing.assert_array_equal(y, ONE_HOT)


def test_methods_that_are_missing_are_named():
    class NoGradient(losses.Loss):
        samples = MyLoss.samples
        wrong = None

    class NoSamples(losses.Loss):
        gradient = MyLoss.gradient
        wrong = None

    class NoUpdate(optimizers.Optimizer):
        def __init__(self):
            super().__init__(0.1, 0.0, None)

    class NoSums(metrics.Metric):
        name = "mine"

    class NoBackward(layers.Layer):
        def forward(self, x):
            return x

    def check(match, model=None, **chosen):
        model = model or small_net()
        before = model.state_dict()
        chosen = {"loss": "mse", "optimizer": "sgd", **chosen}
        for train in (lambda: model.fit(SAMPLES, ONE_HOT, verbose=0, **chosen),
                      lambda: model.train_on_batch(SAMPLES, ONE_HOT, **chosen)):  # fmt: skip
            with pytest.raises(XpnetError, match=match):
                train()
            assert_same_state(model.state_dict(), before)
        return model

    model = check(r"NoGradient must define gradient\(backend, outputs, targets\)", loss=NoGradient())
    assert model.evaluate(SAMPLES, ONE_HOT, loss=NoGradient())["loss"] > 0
    check(r"NoSamples must define samples", loss=NoSamples())
    model = check(r"NoUpdate must define update", optimizer=NoUpdate())
    model.forward(SAMPLES)
    model.backward(ONE_HOT)
    with pytest.raises(XpnetError, match="NoUpdate must define update"):
        model.apply_gradients(NoUpdate())
    assert model._state.step == 0
    check(r"NoSums must define sums", metrics=NoSums())
    check(r"NoBackward must define backward", xpnet.Sequential([layers.Dense(2), NoBackward()], (4,), "cpu"))
    with pytest.raises(XpnetError, match="NoGradient must define gradient"):
        xpnet.check_gradients(small_net(), SAMPLES, ONE_HOT, loss=NoGradient())


# Optimizers and metrics --------------------------------------------------------------------------------------------


class MyOptimizer(optimizers.Optimizer):
    def __init__(self, update, learning_rate=0.1):
        super().__init__(learning_rate, 0.0, None)
        self.how = update

    def update(self, xp, w, g, slots, t, rate, k):
        self.how(w, g, rate)


def rebind(w, g, rate):
    w = w - rate * g


def step(w, g, rate):
    w -= rate * g


@pytest.mark.parametrize("wrong", [rebind, lambda w, g, rate: None])
def test_an_optimizer_that_updates_nothing_is_named(backend, wrong):
    model = xpnet.Sequential([layers.Dense(2)], (4,), backend)
    with pytest.raises(XpnetError, match="MyOptimizer: update has changed neither"):
        model.fit(SAMPLES, ONE_HOT, loss="mse", optimizer=MyOptimizer(wrong), verbose=0)
    assert model._state.step == 0
    with pytest.raises(XpnetError, match="MyOptimizer: update has changed neither"):
        model.train_on_batch(SAMPLES, ONE_HOT, loss="mse", optimizer=MyOptimizer(wrong))
    model.backward(model.forward(SAMPLES))
    with pytest.raises(XpnetError, match="MyOptimizer: update has changed neither"):
        model.apply_gradients(MyOptimizer(wrong))
    assert model._state.step == 0
    model.fit(SAMPLES, ONE_HOT, loss="mse", optimizer=MyOptimizer(step), epochs=2, verbose=0)
    assert model.history["loss"][1] < model.history["loss"][0]


def test_an_optimizer_may_leave_the_weights_where_there_is_nothing_to_do():
    model = small_net()
    model.fit(SAMPLES, ONE_HOT, loss="mse", optimizer=MyOptimizer(step, learning_rate=0.0), verbose=0)
    model.fit(SAMPLES, ONE_HOT, loss="mse", optimizer=MyOptimizer(step, learning_rate=1e-30), verbose=0)
    model.trainable = False
    with pytest.warns(UserWarning, match="nothing in this model is trainable"):
        model.fit(SAMPLES, ONE_HOT, loss="mse", optimizer=MyOptimizer(rebind), verbose=0)


class MyMetric(metrics.Metric):
    name = "mine"

    def __init__(self, sums=None, result=None):
        self.wrong_sums, self.wrong_result = sums, result

    def sums(self, backend, outputs, targets, weights):
        if self.wrong_sums is not None:
            return self.wrong_sums(outputs, targets)
        return backend.xp.stack([backend.xp.sum(outputs), backend.xp.sum(outputs * outputs)])

    def result(self, sums):
        return super().result(sums) if self.wrong_result is None else self.wrong_result(sums)


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (MyMetric(sums=lambda outputs, targets: into_outputs(outputs, targets).sum(axis=0)), "sums has written into"),
        (MyMetric(sums=lambda outputs, targets: into_targets(outputs, targets).sum(axis=0)), "sums has written into"),
        (MyMetric(sums=lambda outputs, targets: [1.0, 2.0]), "sums must return an array"),
        (MyMetric(sums=lambda outputs, targets: None), "sums must return an array"),
        (MyMetric(result=lambda sums: sums), "result must return one number"),
        (MyMetric(result=lambda sums: None), "result must return one number"),
        (MyMetric(result=lambda sums: {"a": 1}), "result must return one number"),
    ],
)
def test_a_metric_that_misbehaves_is_named(backend, metric, match):
    model, y = xpnet.Sequential([layers.Dense(2)], (4,), backend), ONE_HOT.copy()
    before = model.state_dict()
    with pytest.raises(XpnetError, match=f"MyMetric: {match}"):
        model.fit(SAMPLES, y, loss="mse", metrics=metric, shuffle=False, verbose=0)
    np.testing.assert_array_equal(y, ONE_HOT)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("convert", [np.float32, np.float64, np.asarray, float])
def test_the_history_has_python_floats_of_a_metric_too(convert):
    history = small_net().fit(
        SAMPLES, ONE_HOT, loss="mse", metrics=MyMetric(result=lambda sums: convert(sums[0])), verbose=0
    )
    assert type(history["mine"][0]) is float


# Containers --------------------------------------------------------------------------------------------------------


class Scaled(layers.Sequential):
    """gain · f(gain · x): a container with a parameter of its own, which it needs before and after its layers."""

    def build(self, input_shape):
        self.gain = self.add_parameter("gain", (1,), 1.5)
        return super().build(input_shape)

    def forward(self, x):
        self.work.x = x
        self.work.inner = super().forward(x * self.gain.value)
        return self.work.inner * self.gain.value

    def backward(self, grad_y):
        grad = super().backward(grad_y * self.gain.value)
        self.gain.grad[...] = self.xp.sum(grad_y * self.work.inner) + self.xp.sum(grad * self.work.x)
        return grad * self.gain.value


@pytest.mark.parametrize("where", [0, 1])
def test_a_container_may_have_parameters_of_its_own(backend, tmp_path, where):
    inner = [layers.Tanh(), layers.Dense(2)]
    inner.insert(where, Scaled([layers.Dense(5), layers.Tanh()]))
    model = xpnet.Sequential(inner, (4,), backend)
    names = [p.name for p in model.parameters]
    assert f"{where}.gain" in names and names == list(model.state_dict())
    errors = xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy", inputs=True)
    assert list(errors) == [*names, "inputs"] and max(errors.values()) < 1e-6
    before = model.state_dict()
    model.fit(SAMPLES, LABELS, epochs=2, **QUIET)
    assert model.state_dict()[f"{where}.gain"] != before[f"{where}.gain"]
    model.save(tmp_path / "m.safetensors")
    loaded = xpnet.load(tmp_path / "m.safetensors", "cpu", custom_layers=[Scaled])
    np.testing.assert_allclose(loaded.predict(SAMPLES), model.predict(SAMPLES), rtol=1e-5, atol=1e-6)
    assert f"{sum(p.size for p in model.parameters):,} parameters" in str(model.summary())
    model.layers[where].trainable = False
    assert not any(p.trainable for p in model.layers[where].parameters) and model.trainable
    model.layers[where].gain.trainable = True
    assert model.layers[where].trainable


def test_a_container_that_forgets_its_layers_is_named(backend):
    class Forgetful(layers.Sequential):
        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([layers.Dense(4), Forgetful([layers.Dense(4)]), layers.Dense(2)], (4,), backend)
    with pytest.raises(StateError, match=r"layer 1 \(Forgetful\): its backward does not call .*layer 1.0 \(Dense\)"):
        by_fit(model, SAMPLES, LABELS)


class ScaledModel(xpnet.Sequential):
    """A model that multiplies its outputs by a parameter of its own."""

    def build(self, input_shape):
        shape = super().build(input_shape)
        self.gain = self.add_parameter("gain", (1,), 1.5)
        return shape

    def forward(self, x, training=False):
        y = super().forward(x, training)
        self.work.y = y
        return y * self.gain.value

    def backward(self, grad_y, input_grad=True):
        self.gain.grad[...] = self.xp.sum(grad_y * self.work.y)
        return super().backward(grad_y * self.gain.value, input_grad)


def test_a_subclass_of_the_model_may_have_parameters_of_its_own(backend):
    model = ScaledModel([layers.Dense(3), layers.Tanh(), layers.Dense(2)], (4,), backend)
    plain = xpnet.Sequential([layers.Dense(3), layers.Tanh(), layers.Dense(2)], (4,), backend)
    assert [p.name for p in model.parameters] == [*[p.name for p in plain.parameters], "gain"]
    np.testing.assert_allclose(model.predict(SAMPLES), 1.5 * plain.predict(SAMPLES), rtol=1e-5)
    np.testing.assert_allclose(backend.to_numpy(model.forward(SAMPLES)), model.predict(SAMPLES), rtol=1e-6)
    errors = xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy", inputs=True)
    assert list(errors)[-2:] == ["gain", "inputs"] and max(errors.values()) < 1e-6
    before = model.state_dict()["gain"]
    model.fit(SAMPLES, LABELS, epochs=2, **QUIET)
    assert model.state_dict()["gain"] != before
    np.testing.assert_allclose(model.evaluate(SAMPLES, LABELS)["loss"], losses.get("softmax_cross_entropy")(
        model.predict(SAMPLES), LABELS), rtol=1e-5)  # fmt: skip
    other = ScaledModel([layers.Dense(3), layers.Tanh(), layers.Dense(2)], (4,), backend)
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(other.predict(SAMPLES), model.predict(SAMPLES))
    with pytest.raises(XpnetError, match=r"ScaledModel.*state_dict"):
        model.save("never.safetensors")


def test_a_model_whose_own_parameter_gets_no_gradient_is_named():
    class Unused(xpnet.Sequential):
        def build(self, input_shape):
            self.gain = self.add_parameter("gain", (1,), 1.5)
            return super().build(input_shape)

    with pytest.raises(StateError, match="Unused: backward leaves NaN in the gradient of gain"):
        by_fit(Unused([layers.Dense(2)], (4,), "cpu"), SAMPLES, LABELS)
