"""Custom training loops: apply_gradients equals train_on_batch; and learning rates that callbacks set."""

import copy

import numpy as np
import pytest
from small_models import LABELS, QUIET, SAMPLES, Do, assert_same_state, small_net

import xpnet
from xpnet import callbacks, layers, losses, metrics, optimizers, schedules
from xpnet.errors import ArgumentError, DivergenceError, StateError

ONE_HOT = np.eye(2, dtype="float32")[LABELS]


def net(backend, dropout=0.3):
    stack = [layers.Dense(5, l2=0.02), layers.BatchNorm(), layers.Tanh(), layers.Dropout(dropout)]
    return xpnet.Sequential([*stack, layers.Dense(2, l1=0.01)], (4,), backend)


def step_by_hand(model, loss, optimizer, x=SAMPLES, y=LABELS):
    targets = model.backend.asarray(y)
    outputs = model.forward(x, training=True)
    grad = loss.gradient(model.backend, outputs, targets)
    model.backward(grad if loss.reduction == "sum" else grad * (1.0 / len(x)), input_grad=False)
    model.apply_gradients(optimizer)


# apply_gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        optimizers.Adam(0.02, weight_decay=0.1, clip_norm=0.05),
        optimizers.AdamW(schedules.StepDecay(0.1, every=2)),
        optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        "rmsprop",
    ],
)
@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (losses.SoftmaxCrossEntropy(label_smoothing=0.1), LABELS),
        (losses.MeanSquaredError(), ONE_HOT),
        (losses.HalfSquaredError("sum"), ONE_HOT),
    ],
)
def test_a_loop_by_hand_equals_train_on_batch_bit_for_bit(backend, optimizer, loss, y):
    ours, by_hand = net(backend), net(backend)
    for _ in range(5):
        ours.train_on_batch(SAMPLES, y, loss=loss, optimizer=optimizer)
        step_by_hand(by_hand, loss, copy.deepcopy(optimizer), y=y)
    assert_same_state(by_hand.state_dict(), ours.state_dict())
    assert by_hand._state.step == 5


def test_steps_by_hand_and_of_train_on_batch_share_one_state():
    mixed, ours = small_net(), small_net()
    loss, optimizer = losses.SoftmaxCrossEntropy(), optimizers.Adam(0.05)
    for _ in range(4):
        ours.train_on_batch(SAMPLES, LABELS, loss=loss, optimizer=optimizer)
    mixed.train_on_batch(SAMPLES, LABELS, loss=loss, optimizer=optimizer)
    step_by_hand(mixed, loss, optimizers.Adam(0.05))
    mixed.train_on_batch(SAMPLES, LABELS)  # the loss and optimizer of the last training
    step_by_hand(mixed, loss, optimizer)
    assert_same_state(mixed.state_dict(), ours.state_dict())


def test_another_optimizer_starts_afresh():
    model = small_net()
    loss = losses.SoftmaxCrossEntropy()
    step_by_hand(model, loss, "adam")
    step_by_hand(model, loss, "adam")
    assert model._state.step == 2
    step_by_hand(model, loss, "sgd")
    assert model._state.step == 1


def test_gradients_keep_their_values_so_that_they_may_be_applied_again(backend):
    model = net(backend)
    model.backward(model.forward(SAMPLES, training=True))
    before = {p.name: backend.to_numpy(p.grad).copy() for p in model.parameters}
    model.apply_gradients(optimizers.SGD(0.1, weight_decay=0.5, clip_norm=0.01))
    for p in model.parameters:
        np.testing.assert_array_equal(backend.to_numpy(p.grad), before[p.name])


def test_frozen_parameters_stay():
    model = small_net()
    model.layers[0].trainable = False
    before = model.state_dict()
    step_by_hand(model, losses.SoftmaxCrossEntropy(), "sgd")
    after = model.state_dict()
    np.testing.assert_array_equal(after["0.weight"], before["0.weight"])
    assert not np.array_equal(after["2.weight"], before["2.weight"])


def test_apply_gradients_without_a_backward_is_refused():
    model = small_net()
    with pytest.raises(StateError, match="backward"):
        model.apply_gradients()
    model.forward(SAMPLES, training=True)
    with pytest.raises(StateError, match="backward"):
        model.apply_gradients()
    model.fit(SAMPLES, LABELS, **QUIET)  # its gradients are not those of a `backward` that the user called
    with pytest.raises(StateError, match="backward"):
        model.apply_gradients()
    with pytest.raises(StateError, match="not built"):
        xpnet.Sequential([layers.Dense(2)], backend="cpu").apply_gradients()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_gradients_change_nothing(backend, bad):
    model = net(backend)
    step_by_hand(model, losses.SoftmaxCrossEntropy(), "adam")
    before, slots = model.state_dict(), copy.deepcopy(model)._state.optimizer_state.slots
    model.backward(model.forward(SAMPLES))
    model.parameters[2].grad[0] = bad
    with pytest.raises(DivergenceError, match=model.parameters[2].name):
        model.apply_gradients("adam")
    assert_same_state(model.state_dict(), before)
    assert model._state.step == 1
    for name, slot in model._state.optimizer_state.slots.items():
        np.testing.assert_array_equal(backend.to_numpy(slot), backend.to_numpy(slots[name]))
    step_by_hand(model, losses.SoftmaxCrossEntropy(), "adam")
    assert model._state.step == 2


def test_apply_gradients_is_refused_while_fit_is_running_and_inside_another_model():
    model = small_net()

    def apply(self, model):
        model.apply_gradients()

    with pytest.raises(StateError, match="fit is running"):
        model.fit(SAMPLES, LABELS, callbacks=[Do(apply)], **QUIET)
    inner = xpnet.Sequential([layers.Dense(2)])
    xpnet.Sequential([inner, layers.Tanh()], (4,), "cpu")
    with pytest.raises(StateError, match="layer 0"):
        inner.apply_gradients()


def test_a_model_trained_by_hand_has_no_loss_to_evaluate_with():
    model = small_net()
    step_by_hand(model, losses.SoftmaxCrossEntropy(), "sgd")
    assert model.history is None
    with pytest.raises(ArgumentError, match="give a loss"):
        model.evaluate(SAMPLES, LABELS)
    assert set(model.evaluate(SAMPLES, LABELS, loss="softmax_cross_entropy")) == {"loss", "accuracy"}


# The learning rate -------------------------------------------------------------------------------------------------


class Rates(callbacks.Callback):
    """Sets the learning rate after these steps, and records the rate before each step."""

    def __init__(self, changes):
        self.changes, self.seen = changes, []

    def on_epoch_begin(self, model, epoch):
        self.seen.append(self.run.learning_rate)

    def on_step_end(self, model, step):
        if step in self.changes:
            self.run.learning_rate = self.changes[step]
        self.seen.append(self.run.learning_rate)


def test_the_history_has_the_rate_of_the_last_step_of_each_epoch(backend):
    schedule = schedules.ExponentialDecay(0.1, every=3, factor=0.5)
    history = net(backend).fit(SAMPLES, LABELS, optimizer=optimizers.SGD(schedule), epochs=3, **QUIET)
    assert history["learning_rate"] == [schedule(3), schedule(7), schedule(11)]
    assert all(type(rate) is float for rate in history["learning_rate"])
    assert net(backend).fit(SAMPLES, LABELS, optimizer=optimizers.SGD(1), epochs=2, **QUIET)["learning_rate"] == [1, 1]


def test_the_history_follows_reductions_and_later_fits():
    model, sgd = small_net(), optimizers.SGD(0.5)
    plateau = callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=1e9)
    history = model.fit(SAMPLES, LABELS, optimizer=sgd, epochs=3, callbacks=[plateau], **QUIET)
    assert history["learning_rate"] == [0.5, 0.5, 0.25]
    assert model.fit(SAMPLES, LABELS, optimizer=sgd, **QUIET)["learning_rate"] == [0.125]


@pytest.mark.usefixtures("exact_replays")
def test_a_callback_sets_a_constant_rate(backend):
    rates, sgd = Rates({2: 0.3, 5: 0.01, 8: 0.7}), optimizers.SGD(0.1)
    model, by_hand = net(backend, dropout=0.0), net(backend, dropout=0.0)
    history = model.fit(SAMPLES, LABELS, optimizer=sgd, epochs=2, shuffle=False, callbacks=[rates], **QUIET)
    used = [0.1, 0.1, 0.3, 0.3, 0.3, 0.01, 0.01, 0.01]
    assert rates.seen == [*used[:4], 0.3, *used[4:], 0.7]
    assert history["learning_rate"] == [0.3, 0.01]  # the last change came after the last step
    for step, rate in enumerate(used):
        rows = slice(step % 4 * 5, step % 4 * 5 + 5)
        by_hand.train_on_batch(SAMPLES[rows], LABELS[rows], "softmax_cross_entropy", optimizers.SGD(rate))
    np.testing.assert_allclose(
        backend.to_numpy(model.context.store.values), backend.to_numpy(by_hand.context.store.values), rtol=1e-5
    )
    assert sgd == optimizers.SGD(0.1)  # an optimizer is configuration only
    assert model.fit(SAMPLES, LABELS, optimizer=sgd, **QUIET)["learning_rate"] == [0.7]
    assert model.fit(SAMPLES, LABELS, optimizer=optimizers.SGD(0.2), **QUIET)["learning_rate"] == [0.2]


def test_a_schedule_keeps_its_form_from_the_rate_that_is_set(backend):
    schedule, rates = schedules.StepDecay(0.8, every=2, factor=0.5), Rates({3: 0.1})
    net(backend).fit(SAMPLES, LABELS, optimizer=optimizers.SGD(schedule), epochs=2, callbacks=[rates], **QUIET)
    assert rates.seen[1:5] == pytest.approx([0.8, 0.4, 0.1, 0.05])
    assert rates.seen[6:] == pytest.approx([0.05, 0.025, 0.025, 0.0125])


def test_steps_are_still_captured_when_a_callback_changes_the_rate(gpu):
    class Watch(Rates):
        def on_train_end(self, model):
            self.captured, self.reason = self.run.executor.captured, self.run.executor.fallback_reason

    watch = Watch({step: 0.1 / step for step in range(1, 40)})
    captured, eager = net(gpu), net("cpu")
    kwargs = {"optimizer": optimizers.SGD(0.1, momentum=0.5), "epochs": 5, **QUIET}
    captured.fit(SAMPLES, LABELS, callbacks=[watch], **kwargs)
    assert watch.captured == 1 and watch.reason is None
    eager.fit(SAMPLES, LABELS, callbacks=[Rates(watch.changes)], **kwargs)
    for name, value in eager.state_dict().items():
        np.testing.assert_allclose(captured.state_dict()[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf, "fast", None, True])
def test_invalid_rates_are_refused(bad):
    def change(self, model):
        self.run.learning_rate = bad

    with pytest.raises(ArgumentError, match="learning_rate"):
        small_net().fit(SAMPLES, LABELS, callbacks=[Do(change)], **QUIET)


def test_a_schedule_at_zero_cannot_be_scaled():
    def change(self, model):
        self.run.learning_rate = 0.0
        self.run.learning_rate = 0.1

    falling = optimizers.SGD(schedules.CosineDecay(0.1, steps=1))
    with pytest.raises(ArgumentError, match=r"the schedule gives 0 at step 1"):
        small_net().fit(SAMPLES, LABELS, optimizer=falling, callbacks=[Do(change)], **QUIET)


@pytest.mark.parametrize("rate", [0.1, schedules.ExponentialDecay(0.1, every=3, factor=0.5)])
@pytest.mark.parametrize("stop", [2, 4, 6, 8])
def test_a_resumed_run_has_the_rates_that_were_set(tmp_path, rate, stop):
    path = tmp_path / "run.safetensors"

    class Set(callbacks.Callback):
        def __init__(self, stop=None):
            self.stop_step = stop

        def on_step_end(self, model, step):
            if step in (1, 4, 5):
                self.run.learning_rate = 0.2 / step
            if step == self.stop_step:
                self.run.save(path)

    def fit(model, *more, **kwargs):
        return model.fit(SAMPLES, LABELS, optimizer=optimizers.Adam(rate), epochs=3, callbacks=more, **QUIET, **kwargs)

    whole, resumed = small_net(), small_net()
    expected = fit(whole, Set(stop))
    found = fit(resumed, Set(), resume_from=path)
    assert dict(found) == dict(expected) and len(found["learning_rate"]) == 3
    assert_same_state(resumed.state_dict(), whole.state_dict())


def test_a_checkpoint_without_rates_can_be_resumed(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    state_dict = xpnet.training.run.Run.state_dict

    def state_of_an_old_file(self):
        arrays, values = state_dict(self)
        del values["history"]["learning_rate"], values["constant_rate"], values["last_rate"]
        return arrays, values

    monkeypatch.setattr("xpnet.training.run.Run.state_dict", state_of_an_old_file)
    small_net().fit(SAMPLES, LABELS, epochs=2, callbacks=[callbacks.Checkpoint(path)], **QUIET)
    history = small_net().fit(SAMPLES, LABELS, epochs=3, resume_from=path, **QUIET)
    assert np.isnan(history["learning_rate"][:2]).all() and history["learning_rate"][2:] == [0.001]


def test_logs_and_progress_displays_do_not_have_the_rate(tmp_path, capsys):
    class Logs(callbacks.Callback):
        def on_epoch_end(self, model, epoch, logs):
            assert set(logs) == {"loss", "accuracy"} == set(self.run.logs())

    log = callbacks.CSVLogger(tmp_path / "log.csv")
    small_net().fit(SAMPLES, LABELS, callbacks=[Logs(), log], verbose=2)
    assert "learning_rate" not in capsys.readouterr().out + (tmp_path / "log.csv").read_text()


def test_a_metric_cannot_be_called_learning_rate():
    metric = metrics.MeanAbsoluteError()
    metric.name = "learning_rate"
    with pytest.raises(ArgumentError, match="own name"):
        small_net().fit(SAMPLES, ONE_HOT, loss="mse", metrics=metric, **QUIET)


# The history of a model --------------------------------------------------------------------------------------------


def test_a_model_has_the_history_of_its_last_fit():
    model = small_net()
    assert model.history is None
    first = model.fit(SAMPLES, LABELS, epochs=2, **QUIET)
    assert model.history is first
    with pytest.raises(ArgumentError):
        model.fit(SAMPLES, LABELS, epochs=0, **QUIET)
    assert model.history is first  # a fit that was refused has none
    seen = []
    second = model.fit(SAMPLES, LABELS, callbacks=[Do(lambda _, model: seen.append(model.history))], **QUIET)
    assert model.history is second and all(history is second for history in seen)
    model.train_on_batch(SAMPLES, LABELS)
    assert model.history is second
    assert dict(copy.deepcopy(model).history) == dict(second)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_history_after_an_error_has_the_completed_epochs(error):
    def fail(self, model):
        if self.run.state.step == 10:  # in the third epoch
            raise error

    model = small_net()
    with pytest.raises(error):
        model.fit(SAMPLES, LABELS, epochs=5, callbacks=[Do(fail)], **QUIET)
    assert {name: len(values) for name, values in model.history.items()} == dict.fromkeys(model.history, 2)


def test_the_history_after_a_divergence():
    def explode(self, model):
        if self.run.state.epoch == 2:
            model.parameters[0].value = np.nan

    model = small_net()
    with pytest.raises(DivergenceError):
        model.fit(SAMPLES, LABELS, epochs=5, callbacks=[Do(explode, at="on_step_end")], **QUIET)
    assert len(model.history["loss"]) == 2 and model.history.stopped == "diverged"
