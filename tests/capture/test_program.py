"""Compiled programs: numbers of the step, loads of rows, parallel parts, and values of all kinds as arguments."""

import numpy as np
import pytest

from xpnet.backends.step_numbers import StepNumber, current, of_step
from xpnet.capture.calls import Call
from xpnet.capture.program import INPUTS, Cell, Load, compiled, every_call, part_of
from xpnet.errors import CaptureError

NO_LOADERS = (None,) * len(INPUTS)


def add(a, number):
    return Call(np.add, (a, number, a), reads=(a,), writes=(a,))


def replayed(calls, step=0, rows=None, loaders=NO_LOADERS):
    compiled(calls)(step, rows, *loaders)


def step_number():
    return StepNumber(lambda step: step, 3)


# Numbers of the step -------------------------------------------------------------------------------------------------

FORMULAS = {
    "sum": lambda n: n + 2, "reflected sum": lambda n: 2 + n, "difference": lambda n: n - 2.5,
    "reflected difference": lambda n: 2.5 - n, "product": lambda n: n * -3, "reflected product": lambda n: -3 * n,
    "quotient": lambda n: n / 4, "reflected quotient": lambda n: 4 / (n + 1), "power": lambda n: n**2,
    "reflected power": lambda n: 0.9**n, "power of a negative number": lambda n: (-2) ** n, "negative": lambda n: -n,
    "power of a negative": lambda n: (-n) ** 2, "negative of a power": lambda n: -(n**2),
    "negative exponent": lambda n: (n + 1) ** -1,
    "several": lambda n: (1 - 0.9 ** (n + 1)) * (n - 2) / (3 - (1 - n)), "powers of powers": lambda n: (2**n) ** 0.5,
    "two of the step": lambda n: n * n - n / (n + 1), "infinity": lambda n: n * float("inf") + 1,
    "function": lambda n: of_step(max, n, 5), "function of two": lambda n: of_step(pow, n / 2, n),
    "function of a formula": lambda n: of_step(np.float32, n / 3), "of numpy numbers": lambda n: n * np.float64(0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_with_the_step_is_computed_anew_in_each_replay(name):
    formula, out = FORMULAS[name], np.zeros(1)
    number = formula(step_number())
    assert current(number) == formula(3)
    replay = compiled([Call(np.copyto, (out, number), writes=(out,))])
    for step in (3, 1, 4, 20):
        replay(step, None, *NO_LOADERS)
        assert out[0] == formula(step)


def test_functions_of_the_step_are_called_once_per_replay():
    calls, out = [], np.zeros(1)
    number = StepNumber(lambda step: calls.append(step) or 2.0 * step, 0.0)
    replay = compiled([add(out, number), add(out, number * 2), add(out, Cell(number, "f8"))])
    replay(5, None, *NO_LOADERS)
    assert calls == [5] and out[0] == 10 + 20 + 10


def test_of_step_with_ordinary_numbers_is_a_call():
    assert of_step(max, 1, 2) == 2 and type(of_step(np.float32, 0.5)) is np.float32
    assert current(0.5) == 0.5


@pytest.mark.parametrize(
    "use",
    [
        float, int, bool, round, abs, range, hash and (lambda n: n == 1), lambda n: n != 1, lambda n: n < 1,
        lambda n: n >= 1, lambda n: n % 2, lambda n: 2 % n, lambda n: n // 2, lambda n: 2 // n, lambda n: max(n, 1),
        lambda n: [1, 2][n], lambda n: np.float32(n),
    ],
)  # fmt: skip
def test_the_value_of_a_number_of_the_step_cannot_be_read(use):
    with pytest.raises(CaptureError, match="changes from step to step"):
        use(step_number())


@pytest.mark.parametrize("other", ["1", None, 1j, np.ones(2), [1]])
def test_other_operands_of_a_number_of_the_step_are_type_errors(other):
    with pytest.raises(TypeError):
        step_number() + other


# Loads ---------------------------------------------------------------------------------------------------------------


def test_loads_take_the_rows_of_the_step():
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10)
    first, second, labels = np.zeros((3, 2)), np.zeros((2, 2)), np.zeros(5, int)
    calls = [
        Call(Load("x", 0, 3, whole=False), (first,), writes=(first,)),
        Call(Load("x", 3, 2, whole=False), (second,), writes=(second,)),
        Call(Load("y", 0, 5, whole=True), (labels,), writes=(labels,)),
    ]

    def load(array):
        def copy(rows, out):
            out[...] = array[rows]

        return copy

    replay = compiled(calls)
    for rows in (np.array([9, 1, 3, 3, 0]), slice(4, 9)):
        replay(0, rows, load(x), load(y), None, None)
        np.testing.assert_array_equal(np.concatenate([first, second]), x[rows])
        np.testing.assert_array_equal(labels, y[rows])


def test_parts_of_rows():
    assert part_of(slice(10, 30), 5, 8) == slice(15, 18)
    np.testing.assert_array_equal(part_of(np.array([4, 2, 9, 7]), 1, 3), [2, 9])


def test_a_load_is_not_called():
    with pytest.raises(NotImplementedError):
        Load("x", 0, 1, whole=True)(None)


# Calls ---------------------------------------------------------------------------------------------------------------


def test_arguments_of_all_kinds_reach_the_function():
    found = []

    def take(*args, **kwargs):
        found.append((args, kwargs))

    array, thing = np.ones(2), object()
    args = (1, -1, 0.1, -0.0, 1e300, float("nan"), float("inf"), True, None, "text 'quoted'", array, thing, (1, array),
            [array, 2.0], np.float32(0.1), slice(1, 2), ..., 10**30, b"x")  # fmt: skip
    replayed([Call(take, args, {"axis": 1, "out": array, "where": True})])
    got, kwargs = found[0]
    assert kwargs == {"axis": 1, "out": array, "where": True} and kwargs["out"] is array
    for value, want in zip(got, args, strict=True):
        assert type(value) is type(want)
        if not isinstance(want, tuple | list | np.ndarray):
            assert value is want or value == want or (value != value and want != want)
    assert (
        str(got[3]) == "-0.0" and got[10] is array and got[11] is thing and got[12][1] is array and got[13][0] is array
    )


def test_equal_objects_with_other_identities_stay_apart():
    a, b = np.zeros(2), np.zeros(2)
    replayed([add(a, 1.0), add(b, 2.0), add(a, 10.0)])
    assert a.tolist() == [11, 11] and b.tolist() == [2, 2]


def test_returned_values_are_copied_into_their_arrays():
    a, out = np.arange(3.0), np.zeros(())
    replayed([Call(np.sum, (a,), result=out, reads=(a,), writes=(out,))])
    assert out == 3.0


def test_maximum_and_minimum_take_no_third_positional_argument():
    a, out = np.array([-1.0, 2.0]), np.zeros(2)
    replayed([Call(np.maximum, (a, 0, out)), Call(np.minimum, (out, 1, out))])
    assert out.tolist() == [0, 1]


def test_a_number_of_the_step_inside_a_list_is_refused():
    with pytest.raises(NotImplementedError):
        compiled([Call(print, ([step_number()],))])


def test_an_error_of_a_call_is_raised():
    def fail():
        raise ValueError("of a call")

    with pytest.raises(ValueError, match="of a call"):
        replayed([Call(fail, ())])


def test_parallel_parts_are_given_to_the_function_that_runs_them():
    a = np.zeros(6)
    order = []

    def run(parts):
        order.append(len(parts))
        for part in reversed(parts):
            part()

    halves = a[:3], a[3:]
    number = step_number()
    work = Call(run, (), parts=[[add(h, number), Call(order.append, (i,))] for i, h in enumerate(halves)])
    again = Call(run, (), parts=[[add(h, 1.0)] for h in halves] + [[Call(order.append, ("third",))]])
    calls = [add(a, 0.5), work, again, add(a, number)]
    replayed(calls, step=4)
    assert a.tolist() == [0.5 + 4 + 1 + 4] * 6
    assert order == [2, 1, 0, 3, "third"]
    assert len(list(every_call(calls))) == 2 + 4 + 3
    assert sum(array is a for call in every_call(calls) for array in (*call.reads, *call.writes)) == 4


def test_parts_inside_parts():
    a = np.zeros(2)

    def run(parts):
        for part in parts:
            part()

    inner = Call(run, (), parts=[[add(a, 1.0)], [add(a, 2.0)]])
    replayed([Call(run, (), parts=[[inner, add(a, 4.0)], [add(a, 8.0)]])])
    assert a.tolist() == [15, 15]
