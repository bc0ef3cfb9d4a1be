"""Each pass on a few calls: what it leaves out or changes, and that it does not where one of its conditions fails."""

import numpy as np
import pytest
from traced_programs import STEP, Traced, directly, names, number_of, same_bits

from xpnet.backends.step_numbers import StepNumber
from xpnet.capture import passes
from xpnet.capture.calls import Call
from xpnet.capture.program import Cell, compiled


def arrays(seed=0, dtype="f4"):
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(4, 3)).astype(dtype),
        rng.normal(size=(4, 3)).astype(dtype),
        rng.normal(size=3).astype(dtype),
    ]


class Passed:
    """The calls of function(xp, a, b, v) before and after one pass. `same` says whether a replay is right, too."""

    def __init__(self, function, one, dtype="f4"):
        def numbered(xp, a, b, v, number):
            return function(xp, a, b, v, number) if function.__code__.co_argcount == 5 else function(xp, a, b, v)

        self.traced = traced = Traced(numbered, arrays(0, dtype), passes=False, shared=False)
        self.before, self.calls = list(traced.trace.calls), one(list(traced.trace.calls), traced.memory)
        traced.program = compiled(self.calls)
        self.numbered, self.dtype = numbered, dtype

    @property
    def names(self):
        return names(self.calls)

    @property
    def same(self):
        for seed, step in ((0, STEP), (1, STEP + 1), (2, STEP + 2)):
            given = arrays(seed, self.dtype)
            want = directly(self.numbered, given, step)
            if not all(map(same_bits, self.traced.replay(given, step), want)):
                return False
        return True


def alone(one):
    """A pass that does not ask the memory."""
    return lambda calls, memory: one(calls)


def check(function, one, *, left, dtype="f4"):
    """Assert which calls are left, and that these compute the same as the function."""
    passed = Passed(function, one, dtype)
    assert passed.names == left
    assert passed.same
    return passed


# Constants -----------------------------------------------------------------------------------------------------------


def test_what_is_the_same_in_every_step_is_made_once():
    def function(xp, a, b, v):
        rows = xp.arange(4)
        ones = xp.ones((4, 3), "f4") * 2
        a += ones
        b[rows, rows % 3] = 0.0

    passed = check(function, passes.without_constants, left=["add", "setitem"])
    for call in passed.before:
        if call.name in ("copyto", "multiply", "remainder"):
            assert all(not passed.traced.memory.reusable(array) for array in call.writes)


def test_constants_that_are_written_again_are_made_anew():
    def function(xp, a, b, v):
        total = xp.zeros((4, 3), "f4")
        total += a
        b[...] = total

    check(function, passes.without_constants, left=["copyto", "add", "copyto"])


def test_constants_of_which_a_part_is_written_are_made_anew():
    def function(xp, a, b, v):
        mask = xp.ones((4, 3), "f4")
        mask[0] = v
        b *= mask

    check(function, passes.without_constants, left=["copyto", "copyto", "multiply"])


def test_what_depends_on_the_model_or_on_the_step_is_no_constant():
    def function(xp, a, b, v, n):
        c = v * 2.0
        d = xp.ones(3, "f4") * n
        b += c * d

    check(function, passes.without_constants, left=["multiply", "multiply", "multiply", "add"])


def test_what_the_model_holds_is_written_in_every_step():
    def function(xp, a, b, v):
        a.fill(0)
        b[...] = 1.0

    check(function, passes.without_constants, left=["copyto", "copyto"])


# Repetitions ---------------------------------------------------------------------------------------------------------


def test_an_equal_computation_is_made_once():
    def function(xp, a, b, v):
        c = xp.exp(a)
        d = xp.exp(a)
        b[...] = c * d

    check(function, passes.without_repetitions, left=["exp", "multiply", "copyto"])


def test_sums_that_keep_their_axis_or_not_are_equal():
    def function(xp, a, b, v):
        c = xp.sum(a, axis=1, keepdims=True)
        d = xp.sum(a, axis=1)
        b[...] = c * d[:, None]

    passed = Passed(function, passes.without_repetitions)
    assert passed.same and passed.names.count("reduce") in (1, 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [(1.0, 2.0), (0.0, -0.0), (1, 1.0), (True, 1), (2, 3)],
)
def test_computations_with_other_numbers_are_not_equal(first, second):
    def function(xp, a, b, v):
        c = xp.multiply(a, first)
        d = xp.multiply(a, second)
        a[...] = 1.0 / c
        b[...] = 1.0 / d

    with np.errstate(all="ignore"):
        passed = Passed(function, passes.without_repetitions)
        assert passed.names[:2] == ["multiply", "multiply"] and passed.same


def test_a_computation_is_repeated_if_its_input_was_changed():
    def function(xp, a, b, v):
        c = xp.exp(a)
        a *= 0.5
        d = xp.exp(a)
        b[...] = c - d

    check(function, passes.without_repetitions, left=["exp", "multiply", "exp", "subtract", "copyto"])


def test_a_computation_is_repeated_if_a_part_of_its_input_was_changed():
    def function(xp, a, b, v):
        c = xp.exp(a)
        a[1, :2] = v[:2]
        d = xp.exp(a)
        b[...] = c - d

    check(function, passes.without_repetitions, left=["exp", "copyto", "exp", "subtract", "copyto"])


def test_a_computation_is_repeated_if_one_of_the_results_is_changed():
    def first_changed(xp, a, b, v):
        c = xp.exp(a)
        c += 1.0
        d = xp.exp(a)
        b[...] = c - d

    def second_changed(xp, a, b, v):
        c = xp.exp(a)
        d = xp.exp(a)
        d += 1.0
        b[...] = c - d

    def first_changed_later(xp, a, b, v):
        c = xp.exp(a)
        d = xp.exp(a)
        c += 1.0
        b[...] = c - d

    for function in (first_changed, second_changed, first_changed_later):
        passed = Passed(function, passes.without_repetitions)
        assert passed.names.count("exp") == 2 and passed.same


def test_a_computation_is_repeated_if_a_view_of_its_result_is_used():
    def function(xp, a, b, v):
        c = xp.exp(a)
        d = xp.exp(a)
        b[...] = c + d[::-1]

    passed = Passed(function, passes.without_repetitions)
    assert passed.names.count("exp") == 2 and passed.same


def test_what_the_model_holds_is_computed_each_time():
    def function(xp, a, b, v):
        xp.exp(v, out=a[0])
        xp.exp(v, out=a[1])

    check(function, passes.without_repetitions, left=["exp", "exp"])


def test_operations_in_place_are_repeated():
    def function(xp, a, b, v):
        c = a.copy()
        for _ in range(3):
            xp.tanh(c, out=c)
        b[...] = c

    check(function, passes.without_repetitions, left=["copyto", "tanh", "tanh", "tanh", "copyto"])


def test_results_of_another_dtype_are_not_equal():
    def function(xp, a, b, v):
        c, d = xp.empty((4, 3), "f4"), xp.empty((4, 3), "f8")
        xp.add(a, v, out=c)
        xp.add(a, v, out=d)
        b[...] = c * 0.1 + d * 0.1

    passed = Passed(function, passes.without_repetitions)
    assert len(passed.calls) == len(passed.before) and passed.same


def test_results_of_another_shape_are_not_equal():
    def function(xp, a, b, v):
        p, q = xp.empty((2, 3, 2), "f4"), xp.empty((4, 3, 1), "f4")
        column = v.reshape(3, 1)
        xp.copyto(p, column)
        xp.copyto(q, column)
        xp.add(q, p.sum(), out=a.reshape(4, 3, 1))

    check(function, passes.without_repetitions, left=["copyto", "copyto", "reduce", "add"])


def test_results_with_other_strides_are_not_reshaped():
    def function(xp, a, b, v):
        cube = (a[:, :, None] * v).transpose(2, 1, 0)
        b[...] = xp.sum(cube, axis=1).T + xp.sum(cube, axis=1, keepdims=True)[:, 0].T

    passed = Passed(function, passes.without_repetitions)
    assert passed.names.count("reduce") == 2 and passed.same


def test_computations_of_other_views_dtypes_and_axes_are_not_equal():
    def function(xp, a, b, v):
        c, d = xp.exp(a), xp.exp(a[::-1])
        e, f = xp.sum(a, axis=0), xp.sum(a, axis=1)
        g, h = xp.sum(a, axis=0, dtype="f8"), xp.max(a, axis=0)
        i, j = xp.argmax(a, axis=0), xp.argmin(a, axis=0)
        b[...] = c + d + e * f[0] + g + h + i - j

    passed = Passed(function, passes.without_repetitions)
    assert len(passed.calls) == len(passed.before) and passed.same


# Copies --------------------------------------------------------------------------------------------------------------


def test_a_result_is_written_where_it_would_be_copied():
    def function(xp, a, b, v):
        b[...] = xp.exp(a)

    check(function, passes.without_copies, left=["exp"])


def test_a_result_may_be_written_over_its_own_input():
    def function(xp, a, b, v):
        a[...] = a * 2.0

    check(function, passes.without_copies, left=["multiply"])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_result_is_not_written_over_another_view_of_its_input(dtype):
    def function(xp, a, b, v):
        a[...] = a[::-1] * 2.0
        b[1:] = b[:-1] * 2.0

    check(function, passes.without_copies, left=["multiply", "copyto", "multiply", "copyto"], dtype=dtype)


def test_a_product_is_not_written_over_its_factor():
    def function(xp, a, b, v):
        a[:3] = xp.matmul(a[:3], b[:3])

    check(function, passes.without_copies, left=["matmul", "copyto"])


def test_a_result_that_is_used_again_is_copied():
    def function(xp, a, b, v):
        c = xp.exp(a)
        b[...] = c
        a[...] = c + 1.0

    passed = Passed(function, passes.without_copies)
    assert passed.names.count("exp") == 1 and "copyto" in passed.names and passed.same


def test_a_result_is_copied_if_its_place_is_used_in_between():
    def read(xp, a, b, v):
        c = xp.exp(a)
        a += b
        b[...] = c

    def written(xp, a, b, v):
        c = xp.exp(a)
        b += 1.0
        b[...] = c

    for function in (read, written):
        check(function, passes.without_copies, left=["exp", "add", "copyto"])


def test_a_copy_to_another_dtype_or_shape_or_under_a_condition_stays():
    def function(xp, a, b, v):
        b[...] = xp.exp(a.astype("f8"))
        a[...] = xp.exp(v)
        c = xp.exp(a)
        xp.copyto(a, c, where=b > 0)

    passed = Passed(function, passes.without_copies)
    assert passed.names.count("copyto") == 4 and passed.same


def test_a_function_that_rounds_by_strides_keeps_them():
    def function(xp, a, b, v):
        b[:, 0] = xp.log1p(a[:, 1] * a[:, 1])
        b[:, 1] = a[:, 1] + a[:, 2]

    check(function, passes.without_copies, left=["multiply", "log1p", "copyto", "add"], dtype="f8")


def test_a_sum_to_strides_of_two_axes_is_copied():
    def function(xp, a, b, v):
        b.T[...] = xp.sum(a.reshape(2, 2, 3)[..., None] * xp.ones((4,), "f4"), axis=(0, 1))

    passed = Passed(function, passes.without_copies)
    assert passed.names[-2:] == ["reduce", "copyto"] and passed.same


# Unused results ------------------------------------------------------------------------------------------------------


def test_results_that_nothing_reads_are_left_out():
    def function(xp, a, b, v):
        c = xp.exp(a)
        (c * 2.0).sum()
        b += 1.0

    check(function, passes.without_unused_results, left=["add"])


def test_results_of_which_a_part_is_read_and_those_of_the_model_stay():
    def function(xp, a, b, v):
        c = xp.exp(a)
        v += c[1]
        a.fill(0)

    check(function, passes.without_unused_results, left=["exp", "add", "copyto"])


def test_a_write_into_a_part_that_nothing_reads_is_left_out():
    def function(xp, a, b, v):
        c = a.copy()
        c[0] = 1.0
        c[1] = 2.0
        b[...] = c[1:2]

    check(function, passes.without_unused_results, left=["copyto", "copyto", "copyto"])


def test_calls_of_the_user_stay():
    traced = Traced(lambda xp, a, b, v, n: None, arrays(), passes=False, shared=False)
    call = Call(lambda: None, (), opaque=True)
    assert passes.without_unused_results([call], traced.memory) == [call]
    assert passes.without_constants([call], traced.memory) == [call]


# Forms for NumPy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", ["sum", "max", "min"])
def test_a_reduction_over_a_few_columns_is_a_call_for_each(name, dtype):
    def function(xp, a, b, v):
        b[...] = getattr(xp, name)(a, axis=1, keepdims=True)

    left = ["add"] * 3 if name == "sum" else ["maximum" if name == "max" else "minimum"] * 2
    check(function, alone(passes.by_columns), left=[*left, "copyto"], dtype=dtype)


def test_other_reductions_are_one_call():
    def function(xp, a, b, v):
        c = xp.sum(a, axis=1, dtype="f8"), xp.sum(a, axis=0), xp.sum(a), xp.prod(a, axis=1), xp.max(a.T, axis=1)
        d = xp.sum(xp.concatenate([a, b], axis=1), axis=1), xp.sum(a.astype("i8"), axis=1), xp.max(a[:, ::2], axis=1)
        e = xp.empty(4, "f4")
        xp.sum(a, axis=1, dtype="f8", out=e)
        v += sum((x.sum() for x in (*c, *d, e)), xp.zeros(()))

    passed = Passed(function, alone(passes.by_columns))
    assert passed.names == names(passed.before) and passed.same


def test_zeros_keep_their_sign_in_sums_of_columns():
    def function(xp, a, b, v):
        a *= -0.0
        b[...] = xp.sum(a, axis=1, keepdims=True)

    assert Passed(function, alone(passes.by_columns)).same


def test_functions_become_methods():
    def function(xp, a, b, v):
        c = xp.empty((4, 4), "f4")
        xp.matmul(a, b.T, out=c)
        d = xp.dot(a, v)
        e = xp.argmax(a, axis=1)
        b[...] = (c.sum() + d + e)[:, None]

    passed = check(function, alone(passes.with_methods), left=[
        "dot", "dot", "argmax", "reduce", "add", "add", "copyto",
    ])  # fmt: skip
    assert [isinstance(call.function, type(np.zeros(1).dot)) for call in passed.calls[:3]] == [True] * 3


@pytest.mark.parametrize(
    "product",
    [
        lambda xp, a, b, v: xp.matmul(a[:, :1], b[:, :1].T[:, :1]),  # 1 × 1
        lambda xp, a, b, v: xp.matmul(a[::-1], v[::-1][:, None]),  # one column, and strides
        lambda xp, a, b, v: xp.matmul(a[None], b.T[None])[0],
        lambda xp, a, b, v: xp.matmul(a.astype("i8"), b.T.astype("i8")),
        lambda xp, a, b, v: xp.matmul(a, v),
    ],
)
def test_products_that_dot_adds_up_otherwise_stay(product):
    def function(xp, a, b, v):
        b[...] = product(xp, a, b, v).sum()

    passed = Passed(function, alone(passes.with_methods))
    assert "matmul" in passed.names and passed.same


def test_numbers_become_arrays_without_axes():
    def function(xp, a, b, v, n):
        a *= 2.0
        b += n
        v[...] = xp.maximum(v, 0)

    passed = check(function, alone(passes.with_arrays_for_numbers), left=["multiply", "add", "maximum", "copyto"])
    first, second, third, _ = passed.calls
    assert first.args[1].shape == () and isinstance(second.args[1], Cell) and third.args[1].dtype == np.float32


def test_numbers_beside_integers_and_two_dtypes_stay():
    def function(xp, a, b, v):
        c = a.astype("i8") + 2
        d = xp.add(a.astype("f8"), b)
        e = xp.equal(c, 2)
        b[...] = c + d * e

    passed = Passed(function, alone(passes.with_arrays_for_numbers))
    assert next(call.args[1] for call in passed.calls if call.name in ("add", "equal")) == 2 and passed.same


def test_the_number_of_the_step_is_written_into_its_cell():
    number = StepNumber(number_of, 0.0)
    cell = Cell(number, "f4")
    out = np.zeros(2, "f4")
    replay = compiled([Call(np.add, (out, cell, out), reads=(out,), writes=(out,))])
    for step, want in ((3, 3.5), (4, 8.0)):
        replay(step, None, None, None, None, None)
        assert out.tolist() == [want, want]


def test_all_passes_together():
    def function(xp, a, b, v):
        rows = xp.arange(4)
        hidden = xp.maximum(xp.matmul(a, b.T), 0)
        mask, again = hidden > 0, hidden > 0
        a[...] = (hidden * mask * again)[:, :3]
        (hidden.max(axis=1)).sum()
        b[rows, xp.argmax(a, axis=1)] -= 1.0
        b[...] = xp.exp(b - xp.max(b, axis=1, keepdims=True))

    def everything(calls, memory):
        return passes.for_numpy(passes.simplified(calls, memory))

    passed = Passed(function, everything)
    assert passed.same and len(passed.calls) < len(passed.before)
