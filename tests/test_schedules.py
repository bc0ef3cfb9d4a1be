"""Schedules: values calculated by hand, and how optimizers follow them."""

import itertools
import math

import numpy as np
import pytest
from names import missing_classes, stable_repr

import xpnet
from xpnet import layers, optimizers, schedules
from xpnet.errors import ArgumentError

SCHEDULES = [
    (schedules.Constant(0.1), {0: 0.1, 10**6: 0.1}),
    (schedules.StepDecay(1.0, every=10), {0: 1, 9: 1, 10: 0.1, 19: 0.1, 20: 0.01}),
    (schedules.StepDecay(0.8, every=3, factor=0.5), {2: 0.8, 3: 0.4, 6: 0.2, 8: 0.2}),
    (schedules.ExponentialDecay(1.0, every=10, factor=0.25), {0: 1, 5: 0.5, 10: 0.25, 20: 0.0625}),
    (schedules.InverseTimeDecay(1.0, every=10), {0: 1, 10: 1 / 2, 20: 1 / 3, 90: 0.1}),
    (schedules.InverseTimeDecay(1.0, every=1, decay=0.5), {0: 1, 1: 2 / 3, 2: 0.5, 6: 0.25}),
    (
        schedules.CosineDecay(1.0, steps=12),
        {
            0: 1,
            2: (2 + math.sqrt(3)) / 4,
            3: (2 + math.sqrt(2)) / 4,
            4: 0.75,
            6: 0.5,
            8: 0.25,
            12: 0,
            13: 0,
            10**9: 0,
        },
    ),
    (schedules.CosineDecay(1.0, steps=4, final=0.2), {0: 1, 2: 0.6, 4: 0.2, 400: 0.2}),
    (schedules.LinearWarmup(4, after=0.8), {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 0.8, 99: 0.8}),
    (schedules.LinearWarmup(1, after=0.8), {0: 0.8, 1: 0.8}),
    (
        schedules.LinearWarmup(2, after=schedules.CosineDecay(1.0, steps=4)),
        {0: 0.5, 1: 1, 2: 1, 4: 0.5, 6: 0, 7: 0},
    ),
    (schedules.LinearWarmup(2, after=lambda step: 1 / (1 + step)), {0: 0.5, 1: 1, 2: 1, 3: 0.5, 5: 0.25}),
    # Starts at 1/25 of the peak, reaches the peak after 20 of 101 steps, and ends at 1/250 000 of the peak.
    (
        schedules.OneCycle(1.0, steps=101, warmup=20 / 101),
        {0: 0.04, 10: 0.52, 20: 1, 60: (1 + 4e-6) / 2, 100: 4e-6, 500: 4e-6},
    ),
    (
        schedules.OneCycle(2.0, 5, warmup=0.4, start_factor=10, end_factor=100),
        {0: 0.2, 1: 1.1, 2: 2, 3: 1.001, 4: 0.002},
    ),
    (schedules.OneCycle(1.0, steps=3, warmup=0.0), {0: 1, 1: (1 + 4e-6) / 2, 2: 4e-6}),
    (schedules.OneCycle(1.0, steps=4, warmup=1.0), {0: 0.04, 2: 0.52, 4: 4e-6}),
    (schedules.OneCycle(1.0, steps=1), {0: 0.04, 1: 4e-6}),
]


def test_every_schedule_has_an_example():
    assert not missing_classes(schedules, schedules.Schedule, [schedule for schedule, _ in SCHEDULES])


@pytest.mark.parametrize(
    ("schedule", "values"),
    SCHEDULES,
    ids=lambda value: stable_repr(value) if isinstance(value, schedules.Schedule) else "",
)
def test_schedules_equal_values_calculated_by_hand(schedule, values):
    for step, rate in values.items():
        assert schedule(step) == pytest.approx(rate, rel=1e-12, abs=1e-15)
        assert type(schedule(step)) is float


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (schedules.StepDecay(1.0, 7), 0),
        (schedules.ExponentialDecay(1.0, 7, 0.5), 0),
        (schedules.InverseTimeDecay(1.0, 7), 0),
        (schedules.CosineDecay(1.0, 150), 0),
        (schedules.LinearWarmup(20, schedules.CosineDecay(1.0, 100)), 20),
        (schedules.OneCycle(1.0, 200), 60),
        (schedules.OneCycle(1.0, 77, warmup=0.5), 38.5),
    ],
    ids=repr,
)
def test_rates_rise_until_the_peak_and_then_fall(schedule, peak):
    rates = [schedule(step) for step in range(201)]
    for step, (before, after) in enumerate(itertools.pairwise(rates)):
        assert before <= after if step + 1 <= peak else before >= after or step < peak
        assert min(rates) >= 0
    assert max(rates) <= 1


def test_an_optimizer_follows_its_schedule_step_by_step(backend):
    model = xpnet.Sequential([layers.Dense(1, use_bias=False, weight_initializer=0.0)], 1, backend, dtype="float64")
    sgd = optimizers.SGD(schedules.StepDecay(1.0, every=2, factor=0.5))
    steps = []
    for _ in range(5):
        before = model.state_dict()["0.weight"].item()
        model.train_on_batch([[1.0]], [[before + 1.0]], loss="half_squared_error", optimizer=sgd)
        steps.append(model.state_dict()["0.weight"].item() - before)
    assert steps == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.StepDecay(1.0, 0), "StepDecay: every must be an integer of at least 1, not 0"),
        (lambda: schedules.ExponentialDecay(1.0, -1, 0.5), "ExponentialDecay: every must be .* not -1"),
        (lambda: schedules.InverseTimeDecay(1.0, 0), "InverseTimeDecay: every"),
        (lambda: schedules.CosineDecay(1.0, 0), "CosineDecay: steps"),
        (lambda: schedules.LinearWarmup(0, 0.1), "LinearWarmup: steps"),
        (lambda: schedules.OneCycle(1.0, 0), "OneCycle: steps"),
        (lambda: schedules.OneCycle(1.0, 10, warmup=1.5), "OneCycle: warmup must be a number from 0 to 1, not 1.5"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_schedules_with_equal_settings_are_equal():
    assert schedules.CosineDecay(1.0, 5) == schedules.CosineDecay(1.0, 5) != schedules.CosineDecay(1.0, 6)
    assert repr(schedules.LinearWarmup(3, schedules.Constant(0.1))) == "LinearWarmup(3, Constant(0.1))"


def test_a_schedule_class_is_refused_as_a_learning_rate():
    with pytest.raises(ArgumentError, match="a schedule, not <class"):
        optimizers.SGD(schedules.CosineDecay)


@pytest.mark.parametrize("bad", [-0.1, "0.1", None, True, np.nan, np.inf, 1j, [0.1]], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        schedules.Constant,
        lambda bad: schedules.StepDecay(bad, 3),
        lambda bad: schedules.StepDecay(0.1, 3, bad),
        lambda bad: schedules.StepDecay(0.1, bad),
        lambda bad: schedules.ExponentialDecay(bad, 3, 0.5),
        lambda bad: schedules.ExponentialDecay(0.1, 3, bad),
        lambda bad: schedules.InverseTimeDecay(bad, 3),
        lambda bad: schedules.InverseTimeDecay(0.1, 3, bad),
        lambda bad: schedules.CosineDecay(bad, 3),
        lambda bad: schedules.CosineDecay(0.1, bad),
        lambda bad: schedules.CosineDecay(0.1, 3, bad),
        lambda bad: schedules.LinearWarmup(3, bad),
        lambda bad: schedules.LinearWarmup(bad, 0.1),
        lambda bad: schedules.OneCycle(bad, 3),
        lambda bad: schedules.OneCycle(0.1, 3, bad),
        lambda bad: schedules.OneCycle(0.1, 3, start_factor=bad),
        lambda bad: schedules.OneCycle(0.1, 3, end_factor=bad),
    ],
)
def test_rates_and_factors_must_be_finite_numbers_that_are_not_negative(make, bad):
    with pytest.raises(ArgumentError):
        make(bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.StepDecay(0.1, 3, 0),
        lambda: schedules.ExponentialDecay(0.1, 3, 0),
        lambda: schedules.OneCycle(0.1, 3, start_factor=0),
        lambda: schedules.OneCycle(0.1, 3, end_factor=0),
        lambda: schedules.LinearWarmup(3, schedules.CosineDecay),
        lambda: schedules.LinearWarmup(3, schedules.CosineDecay(-0.1, 5)),
        lambda: optimizers.SGD(schedules.CosineDecay),
        lambda: optimizers.SGD(schedules.CosineDecay(-0.1, 100)),
    ],
)
def test_zero_factors_classes_and_nested_negative_rates_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


@pytest.mark.parametrize("rate", ["0.1", None, True, [0.1], np.ones(1), 1j, -0.1, np.nan, np.inf], ids=repr)
def test_a_function_of_the_step_must_return_a_number(rate):
    with pytest.raises(
        ArgumentError,
        match="SGD: the schedule .* must return a finite number of at least 0, but returned .* for step 7",
    ):
        optimizers.SGD(lambda step: rate).rate(7)
    model = xpnet.Sequential([layers.Dense(1)], (2,), "cpu")
    before = model.state_dict()["0.weight"]
    with pytest.raises(ArgumentError, match="must return a finite number"):
        model.train_on_batch(np.ones((3, 2)), np.ones(3), "mse", optimizers.SGD(lambda step: rate))
    np.testing.assert_array_equal(model.state_dict()["0.weight"], before)


@pytest.mark.parametrize("rate", [0.25, np.float32(0.25), np.array(0.25)], ids=repr)
def test_a_function_of_the_step_may_return_any_kind_of_number(rate):
    got = optimizers.SGD(lambda step: rate).rate(0)
    assert got == 0.25 and type(got) is float
