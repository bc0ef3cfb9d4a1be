"""Code of users in captured steps on the CPU: a training equals the eager one bit for bit, or is eager for a reason.

Each case is a layer, a loss, a metric, an optimizer, a schedule or a callback that a user may write. Some are unwise.
"""

import abc
import array
import collections
import copy
import dataclasses
import enum
import fractions
import functools
import itertools
import logging
import math
import operator
import os
import pathlib
import pickle
import queue
import random
import re
import signal
import sys
import threading
import time
import typing
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import every
import numpy as np
import pytest
from captured_trainings import IMAGES, Own, Watch, X, Y
from small_models import StopAt

import xpnet
from xpnet import augment, callbacks, datasets, layers, losses, metrics, optimizers, schedules
from xpnet.backends.cpu.backend import CPUBackend
from xpnet.backends.cpu.operators import CPUOperators
from xpnet.training import captured_step, traced_step
from xpnet.training.attributes import Attributes
from xpnet.training.side_effects import PythonState
from xpnet.training.state import TrainingState
from xpnet.training.step import TrainingStep

EPOCHS, BATCH = 6, 20  # 66 steps, of which 55 have 20 samples
RARELY = 23  # a step long after the capture and its verification


@pytest.fixture(autouse=True)
def captured_at_once(monkeypatch):
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)


def trained(make, **more):
    """(state, history, watch) of the training that make() describes: (layers, options of fit)."""
    random.seed(5)
    np.random.seed(5)
    stack, options = make()
    options = {"epochs": EPOCHS, "batch_size": BATCH, "optimizer": "adam", "verbose": 0, **options, **more}
    x, y = options.pop("x", X).copy(), options.pop("y", Y)
    dtype, watch = options.pop("dtype", "float32"), Watch()
    model = xpnet.Sequential(stack, x.shape[1:], backend="cpu", seed=3, dtype=dtype)
    before = options.pop("before", None)
    if before:
        before(model)
    history = model.fit(x, y, callbacks=[watch, *options.pop("callbacks", ())], **options)
    return model.state_dict(), dict(history), watch, (random.random(), np.random.random())


def differences(got, want):
    """The names of what differs in a bit."""
    names = [name for name, value in want[0].items() if not np.array_equal(got[0][name], value, equal_nan=True)]
    names += [name for name, values in want[1].items() if not np.array_equal(got[1][name], values, equal_nan=True)]
    return names + ["random numbers"] * (got[3] != want[3])


def with_and_without_captures(monkeypatch, run):
    """What run() returns with captures, and what it returns without."""
    results = []
    for on in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", on)
        results.append(run())
    monkeypatch.delenv("XPNET_CAPTURE")
    return results


def compare(monkeypatch, make):
    """Assert that a training is the same with and without captures. Returns the watch of the former."""
    got, want = with_and_without_captures(monkeypatch, lambda: trained(make))
    assert differences(got, want) == [], got[2].fallback_reason
    assert want[2].captured == 0
    return got[2]


def mlp(*inner, **options):
    stack = [layers.Dense(16), layers.ReLU(), *inner, layers.Dropout(0.2), layers.Dense(10)]
    return stack, options


def net(*stack, seed=3):
    return xpnet.Sequential(stack, (64,), backend="cpu", seed=seed)


def fitted(model, *data, **options):
    """(state, history, watch, None) of a training, as for `differences`. The watch is the first callback, if any."""
    history = model.fit(*data, verbose=0, **options)
    watch, *_ = options.get("callbacks", [None])
    return model.state_dict(), dict(history), watch, None


# Layers --------------------------------------------------------------------------------------------------------------

LAYERS, CAPTURED = {}, set()


def layer(captured=False):
    """Declare a case. captured: whether its steps must be captured; the others may be."""

    def declare(make):
        LAYERS[make.__name__] = make
        if captured:
            CAPTURED.add(make.__name__)
        return make

    return declare


class LayerThatCounts(Own):
    """Its factor changes after so many steps. count: called with the state in each step, returns their number."""

    def __init__(self, count, state):
        self.count, self.state = count, state

    def factor(self, x):
        return 1.0 if self.count(self.state) < RARELY else 0.5


def increased(key):
    def count(items):
        items[key] += 1
        return items[key]

    return count


def increased_attribute(owner):
    owner.n += 1
    return owner.n


@layer(captured=True)
def nothing_unusual():
    return Own()


@layer()
def a_counter():
    class Counting(Own):
        count = 0

        def factor(self, x):
            self.count += 1
            return 1.0 if self.count < RARELY else 0.5

    return Counting()


@layer()
def a_counter_in_a_list():
    return LayerThatCounts(increased(0), [0])


@layer()
def a_list_that_grows():
    return LayerThatCounts(lambda state: state.append(1) or len(state), [])


@layer()
def nested_dictionaries():
    state = {"inner": {"numbers": [(1, [0])]}}
    return LayerThatCounts(lambda state: increased(0)(state["inner"]["numbers"][0][1]), state)


@layer()
def an_object_with_a_counter():
    state = SimpleNamespace(inner=SimpleNamespace(n=0))
    return LayerThatCounts(lambda state: increased_attribute(state.inner), state)


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


@layer()
def an_object_with_slots():
    return LayerThatCounts(increased_attribute, Slotted())


@layer()
def a_closure():
    count = 0

    def number():
        nonlocal count
        count += 1
        return 1.0 if count < RARELY else 0.5

    class Closed(Own):
        def factor(self, x):
            return number()

    return Closed()


COUNT = 0
COUNTS = {"n": 0}


@layer()
def a_global():
    global COUNT
    COUNT = 0

    class Global(Own):
        def factor(self, x):
            global COUNT
            COUNT += 1
            return 1.0 if COUNT < RARELY else 0.5

    return Global()


def _counted():
    COUNTS["n"] += 1
    return 1.0 if COUNTS["n"] < RARELY else 0.5


@layer()
def a_global_of_a_function():
    COUNTS["n"] = 0

    class Global(Own):
        def factor(self, x):
            return _counted()

    return Global()


@layer()
def an_attribute_of_the_class():
    class Shared(Own):
        count = 0

        def factor(self, x):
            type(self).count += 1
            return 1.0 if self.count < RARELY else 0.5

    return Shared()


@layer()
def a_default_argument():
    class Default(Own):
        def factor(self, x, seen=[]):  # noqa: B006
            seen.append(1)
            return 1.0 if len(seen) < RARELY else 0.5

    return Default()


@layer()
def an_attribute_of_a_function():
    def number():
        number.count += 1
        return 1.0 if number.count < RARELY else 0.5

    number.count = 0

    class Attribute(Own):
        def factor(self, x):
            return number()

    return Attribute()


@layer()
def a_partial():
    return LayerThatCounts(functools.partial(lambda counts, _: increased(0)(counts), [0]), None)


@layer()
def an_iterator():
    return LayerThatCounts(next, itertools.count())


@layer()
def a_generator_function():
    def numbers():
        for i in range(10**9):
            yield 1.0 if i < RARELY else 0.5

    class Iterating(Own):
        def __init__(self):
            self.numbers = numbers()

        def factor(self, x):
            return next(self.numbers)

    return Iterating()


@layer()
def a_deque():
    class Turning(Own):
        def __init__(self):
            self.numbers = deque([1.0] * RARELY + [0.5])

        def factor(self, x):
            self.numbers.rotate(-1)
            return self.numbers[-1]

    return Turning()


@layer()
def a_set():
    return LayerThatCounts(lambda state: state.add(len(state)) or len(state), set())


def filled(items):
    items.put(1)
    return items.qsize()


class DictWithAttribute(dict):
    n = 0


class ListWithAttribute(list):
    n = 0


LOCAL = threading.local()
PACKAGE, MODULE = ModuleType("a_package"), ModuleType("a_package.a_module")
PACKAGE.a_module = MODULE


@pytest.fixture(autouse=True)
def a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_package", PACKAGE)
    monkeypatch.setitem(sys.modules, "a_package.a_module", MODULE)


@functools.lru_cache(maxsize=0)
def _counted_behind_a_cache():
    return _counted()


@layer()
def a_user_dictionary():
    return LayerThatCounts(increased("n"), collections.UserDict(n=0))


@layer()
def a_queue():
    return LayerThatCounts(filled, queue.Queue())


@layer()
def a_simple_queue():
    return LayerThatCounts(filled, queue.SimpleQueue())


@layer()
def an_array_of_python():
    return LayerThatCounts(increased(0), array.array("i", [0]))


@layer()
def an_array_of_objects():
    return LayerThatCounts(increased(0), [np.array([0], object)])


@layer()
def an_attribute_of_a_dictionary():
    return LayerThatCounts(increased_attribute, DictWithAttribute())


@layer()
def an_attribute_of_a_list():
    return LayerThatCounts(increased_attribute, ListWithAttribute())


@layer()
def a_variable_of_a_thread():
    LOCAL.n = 0
    return LayerThatCounts(lambda _: increased_attribute(LOCAL), None)


@layer()
def a_method_of_an_iterator():
    return LayerThatCounts(lambda count: count(), itertools.count().__next__)


@layer()
def a_module_as_an_attribute():
    MODULE.n = 0
    return LayerThatCounts(increased_attribute, MODULE)


@layer()
def a_variable_of_a_module_in_a_package():
    MODULE.n = 0

    class Dotted(Own):
        def factor(self, x):
            PACKAGE.a_module.n += 1
            return 1.0 if PACKAGE.a_module.n < RARELY else 0.5

    return Dotted()


@layer()
def a_module_imported_in_a_function():
    MODULE.n = 0

    class Importing(Own):
        def factor(self, x):
            from a_package import a_module

            a_module.n += 1
            return 1.0 if a_module.n < RARELY else 0.5

    return Importing()


@layer()
def a_function_with_a_cache():
    COUNTS["n"] = 0

    class Cached(Own):
        def factor(self, x):
            return _counted_behind_a_cache()

    return Cached()


class Mode(enum.Enum):
    HALF = 1
    WHOLE = 2


class Pair(typing.NamedTuple):
    first: float = 1.0
    second: int = 2


@dataclasses.dataclass(slots=True)
class Options:
    mode: Mode = Mode.WHOLE
    pair: Pair = dataclasses.field(default_factory=Pair)


class Scaling(abc.ABC):
    @abc.abstractmethod
    def scale(self): ...


@functools.singledispatch
def one(x):
    return 1.0


def passing_on(method):
    @functools.wraps(method)
    def wrapper(*args):
        return method(*args)

    return wrapper


LOGGER, WORD, HERE, HALF = logging.getLogger(__name__), re.compile("a"), pathlib.Path(), fractions.Fraction(1, 2)
first_of = operator.itemgetter(0)


@layer(captured=True)
def much_of_python():
    class Much(Own, Scaling):
        def __init__(self):
            self.options, self.words = Options(), collections.Counter("ab")
            self.numbers = collections.defaultdict(list, {"n": [1.0]})
            self.functions = [math.sqrt, np.tanh, len, str.upper, "x".join, functools.partial(pow, 1.0)]
            self.lock, self.inner, self.loss = threading.Lock(), layers.Tanh(), losses.SoftmaxCrossEntropy()

        @functools.cached_property
        def cached(self):
            return 1.0

        @property
        def half(self):
            return float(HALF)

        @staticmethod
        def scale():
            return 2.0

        @passing_on
        def factor(self, x):
            if len(x) == 0:
                LOGGER.info("no rows in %s", WORD.match(str(HERE)))
            with self.lock:
                return self.cached * self.half * self.scale() * one(1) * first_of(self.numbers["n"])

    return Much()


x = np.zeros(2**18)  # 2 MiB, which code with `work.x` does not mean


@layer(captured=True)
def an_attribute_with_the_name_of_a_global():
    class Named(Own):
        def factor(self, x):
            self.work.x = x
            return 1.0 + 0.0 * self.work.x

    return Named()


@layer()
def a_counter_in_backward():
    class Counting(Own):
        def __init__(self):
            self.count = [0]

        def backward(self, grad_y):
            self.count[0] += 1
            return grad_y if self.count[0] < RARELY else grad_y * 0.5

    return Counting()


@layer()
def random_numbers_of_numpy():
    class Noisy(Own):
        def factor(self, x):
            return 1.0 + 0.1 * np.random.random()

    return Noisy()


@layer()
def a_rare_random_branch():
    class Noisy(Own):
        def factor(self, x):
            return 1.0 if np.random.random() < 0.93 else 0.5

    return Noisy()


@layer()
def a_rare_random_branch_of_python():
    class Noisy(Own):
        def factor(self, x):
            return 1.0 if random.random() < 0.93 else 0.5

    return Noisy()


@layer()
def a_generator_of_numpy():
    class Noisy(Own):
        def __init__(self):
            self.rng = np.random.default_rng(3)

        def factor(self, x):
            return 1.0 if self.rng.random() < 0.93 else 0.5

    return Noisy()


@layer()
def a_generator_of_python():
    class Noisy(Own):
        def __init__(self):
            self.rng = random.Random(3)

        def factor(self, x):
            return 1.0 if self.rng.random() < 0.93 else 0.5

    return Noisy()


@layer()
def noise_of_numpy_as_an_array():
    class Noisy(Own):
        def factor(self, x):
            return np.random.normal(1.0, 0.1, x.shape).astype(x.dtype)

    return Noisy()


@layer(captured=True)
def an_array_of_its_own():
    class Scaled(Own):
        def __init__(self):
            self.scale = np.linspace(0.5, 1.5, 16).astype("float32")

        def factor(self, x):
            return self.scale

    return Scaled()


@layer()
def an_array_of_its_own_through_numpy():
    class Scaled(Own):
        def __init__(self):
            self.scale = np.linspace(0.5, 1.5, 16).astype("float32")

        def factor(self, x):
            return np.exp(self.scale)

    return Scaled()


@layer()
def an_array_that_it_writes():
    class Running(Own):
        def __init__(self):
            self.scale = np.ones(16, "float32")

        def factor(self, x):
            self.scale *= 0.99
            return self.scale

    return Running()


@layer()
def an_array_that_it_writes_and_rarely_uses():
    class Running(Own):
        def __init__(self):
            self.count = np.zeros(1)

        def factor(self, x):
            self.count += 1
            return 1.0 if self.count[0] < RARELY else 0.5

    return Running()


@layer()
def an_array_in_a_list_that_it_writes():
    class Running(Own):
        def __init__(self):
            self.counts = [np.zeros(1)]

        def factor(self, x):
            self.counts[0][0] += 1
            return 1.0 if self.counts[0][0] < RARELY else 0.5

    return Running()


@layer()
def an_array_in_a_nested_list_that_it_writes():
    return LayerThatCounts(lambda state: increased(0)(state[0][0]), [[np.zeros(1)]])


@layer()
def an_array_in_an_ordered_dictionary_that_it_writes():
    return LayerThatCounts(lambda state: increased(0)(state["n"]), collections.OrderedDict(n=np.zeros(1)))


@layer()
def an_array_in_a_named_tuple_that_it_writes():
    return LayerThatCounts(lambda state: increased(0)(state.first), Pair(np.zeros(1)))


@layer()
def an_array_in_a_named_tuple_beside_another_that_it_writes():
    return LayerThatCounts(lambda state: increased(0)(state[1].first), [np.zeros(1), Pair(np.zeros(1))])


@layer()
def an_object_beside_an_array():
    return LayerThatCounts(lambda state: increased_attribute(state[1]), [np.zeros(1), SimpleNamespace(n=0)])


@layer()
def a_set_beside_an_array():
    state = {"array": np.zeros(1), "set": set()}
    return LayerThatCounts(lambda state: state["set"].add(len(state["set"])) or len(state["set"]), state)


@layer()
def an_average_that_it_replaces():
    class Running(Own):
        def __init__(self):
            self.average = np.zeros(16, "float32")

        def factor(self, x):
            self.average = 0.9 * self.average + 0.1 * x.mean(axis=0)
            return 1.0 / (1.0 + self.xp.abs(self.average))

    return Running()


@layer(captured=True)
def what_forward_keeps_on_self():
    class Keeping(Own):
        def forward(self, x):
            self.x = x
            return self.xp.tanh(x)

        def backward(self, grad_y):
            return grad_y * (1 - self.xp.tanh(self.x) ** 2)

    return Keeping()


@layer()
def what_the_step_before_kept():
    class Late(Own):
        last = None

        def factor(self, x):
            factor = 1.0 if self.last is None or len(self.last) != len(x) else 1.0 + 0.01 * self.xp.tanh(self.last)
            self.last = x.copy()
            return factor

    return Late()


@layer(captured=True)
def numpy_functions():
    class Plain(Own):
        def factor(self, x):
            return np.tanh(np.abs(x)) + np.sum(x, axis=1, keepdims=True)

    return Plain()


@layer()
def conversions_to_numpy():
    class Plain(Own):
        def factor(self, x):
            return np.tanh(np.asarray(x))

    return Plain()


@layer()
def values_on_the_host():
    class Reading(Own):
        def factor(self, x):
            return 1.0 / (1.0 + float(abs(x).max()))

    return Reading()


@layer()
def branches_on_values():
    class Branching(Own):
        def factor(self, x):
            return 0.5 if (x > 6).any() else 1.0

    return Branching()


@layer()
def a_view_of_its_weight_kept_since_the_first_step():
    class Viewing(Own):
        view = None

        def build(self, shape):
            self.weight = self.add_parameter("weight", shape, "ones")
            return shape

        def factor(self, x):
            if self.view is None:
                self.view = np.asarray(self.weight.value)
            self.work.x = x
            return 1.0 if np.abs(self.view).max() < 1.02 else 0.5

        def backward(self, grad_y):
            self.weight.grad[...] = self.xp.sum(self.work.x * grad_y, axis=0)
            return grad_y * self.work.factor

    return Viewing()


@layer()
def the_input_itself():
    class Same(layers.Layer):
        def forward(self, x):
            return x

        def backward(self, grad_y):
            return grad_y

    return Same()


@layer(captured=True)
def views_and_operations_in_place():
    class Halves(layers.Layer):
        def forward(self, x):
            y = x.copy()
            left, right = y[:, :8], y[:, 8:]
            left += right
            right *= 0.5
            y[:, ::2] = self.xp.maximum(y[:, ::2], 0)
            self.work.mask = y > 0
            return y

        def backward(self, grad_y):
            grad = grad_y.copy()
            grad[:, ::2] *= self.work.mask[:, ::2]
            grad[:, 8:] = grad[:, 8:] * 0.5 + grad[:, :8]
            return grad

    return Halves()


@layer()
def an_inner_layer_called_twice():
    class Twice(layers.Sequential):
        def __init__(self):
            super().__init__([layers.Dense(16), layers.Tanh()])

        def forward(self, x):
            return super().forward(super().forward(x))

        def backward(self, grad_y):
            return super().backward(grad_y)

    return Twice()


@layer()
def an_inner_layer_that_it_builds():
    class Outer(layers.Layer):
        def build(self, shape):
            self.inner = layers.Tanh()
            self.inner.build(shape, backend="cpu", seed=0)
            return shape

        def forward(self, x):
            self.calls = getattr(self, "calls", 0)
            return self.inner.forward(x)

        def backward(self, grad_y):
            return self.inner.backward(grad_y)

    return Outer()


@layer()
def a_method_of_its_own_that_it_replaces():
    class Changing(Own):
        def __init__(self):
            self.count = [0]

        def forward(self, x):
            self.count[0] += 1
            if self.count[0] == RARELY:
                self.forward = lambda x: x * 0.5
            return super().forward(x)

    return Changing()


@layer()
def the_number_of_the_step():
    class Annealed(Own):
        def factor(self, x):
            return 1.0 if self.context.step < RARELY else 0.5

    return Annealed()


@layer()
def the_number_of_the_step_in_its_noise_key():
    class Annealed(Own):
        def factor(self, x):
            return 1.0 if self.noise_key[2] < RARELY else 0.5

    return Annealed()


@layer()
def the_number_of_the_step_compared_for_equality():
    class Annealed(Own):
        def factor(self, x):
            return 0.5 if self.noise_key[2] == RARELY else 1.0

    return Annealed()


@layer()
def the_number_of_the_step_in_a_text():
    class Annealed(Own):
        def factor(self, x):
            return 0.5 if str(self.noise_key[2]) == str(RARELY) else 1.0

    return Annealed()


@layer()
def the_number_of_the_step_as_a_key():
    class Annealed(Own):
        def factor(self, x):
            return {RARELY: 0.5}.get(self.context.current_step, 1.0)

    return Annealed()


@layer()
def the_number_of_the_step_of_the_state():
    class Annealed(Own):
        def factor(self, x):
            return 1.0 if self.context.current_step < RARELY else 0.5

    return Annealed()


@layer(captured=True)
def noise_of_the_library():
    class Noisy(Own):
        def factor(self, x):
            return (self.random_bits(x) >> 31).astype(x.dtype) + 0.5

    return Noisy()


@layer()
def a_counter_in_its_workspace():
    class Counting(Own):
        def factor(self, x):
            self.work.count = getattr(self.work, "count", 0) + 1
            return 1.0 if self.work.count < RARELY else 0.5

    return Counting()


@layer()
def an_average_in_its_workspace():
    class Averaging(Own):
        def factor(self, x):
            average = self.work.average if hasattr(self.work, "average") else x.mean(axis=0)
            self.work.average = 0.9 * average + 0.1 * x.mean(axis=0)
            return 1.0 / (1.0 + abs(self.work.average))

    return Averaging()


@layer()
def a_counter_in_its_buffer():
    class Counting(Own):
        def factor(self, x):
            count = self.work.buffer("count", (1,))
            if not getattr(self.work, "begun", False):
                self.work.begun = True
                count.fill(0)
            count += 1
            return self.xp.where(count < RARELY, 1.0, 0.5).astype(x.dtype)

    return Counting()


@layer(captured=True)
def scatter_and_gather():
    class Gathering(layers.Layer):
        def forward(self, x):
            self.work.order = self.xp.argsort(x, axis=1)
            self.work.shape = x.shape
            return self.xp.take_along_axis(x, self.work.order, axis=1)

        def backward(self, grad_y):
            grad = self.xp.zeros_like(grad_y)
            rows = self.xp.arange(len(grad_y))[:, None]
            grad[rows, self.work.order] = grad_y
            return grad

    return Gathering()


@layer()
def errors_that_numpy_raises():
    class Strict(Own):
        def factor(self, x):
            try:
                with np.errstate(over="raise"):
                    np.exp(x * 30)
            except FloatingPointError:
                return 0.5
            return 1.0

    return Strict()


@layer()
def the_time():
    class Timed(Own):
        def factor(self, x):
            return 1.0 if time.time() > 0 and time.perf_counter() > 0 else 0.5

    return Timed()


@layer()
def output():
    class Printing(Own):
        def factor(self, x):
            print("a line for each step", len(x))
            return 1.0

    return Printing()


@layer()
def a_log():
    class Logging(Own):
        def factor(self, x):
            logging.getLogger("of a layer").warning("a line for each step")
            return 1.0

    return Logging()


@layer()
def a_file():
    class Writing(Own):
        def factor(self, x):
            with open(os.devnull, "w") as file:
                file.write("a line for each step")
            return 1.0

    return Writing()


@layer()
def a_lock_and_a_thread():
    class Threaded(Own):
        def factor(self, x):
            found = []
            thread = threading.Thread(target=lambda: found.append(np.tanh(x)))
            thread.start()
            thread.join()
            return found[0]

    return Threaded()


@layer()
def scalars_of_sums():
    class Scalars(Own):
        def factor(self, x):
            total = x.sum()
            before = total
            total *= 2
            return before / (1 + abs(total))

    return Scalars()


@layer()
def an_element_that_changes_later():
    class Elements(Own):
        def factor(self, x):
            first = x.copy()[0]
            number = first[0]
            first[0] = 5.0
            return 1.0 / (1.0 + abs(number))

    return Elements()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_ones_own(monkeypatch, name):
    watch = compare(monkeypatch, lambda: mlp(LAYERS[name]()))
    assert watch.captured >= 1 or watch.fallback_reason
    if name in CAPTURED:
        assert watch.fallback_reason is None, watch.fallback_reason
    if name in ("the_time", "output", "a_log", "a_file"):
        assert watch.fallback_reason.endswith("which a replay would not do")


# Losses, metrics, optimizers, schedules ------------------------------------------------------------------------------


class OwnLoss(losses.Loss):
    """Half the squared distance to one-hot targets, times a factor."""

    def factor(self, outputs):
        return 1.0

    def samples(self, backend, outputs, targets):
        return self.factor(outputs) * 0.5 * backend.xp.sum(self.errors(backend, outputs, targets) ** 2, axis=1)

    def gradient(self, backend, outputs, targets):
        return self.factor(outputs) * self.errors(backend, outputs, targets)

    def errors(self, backend, outputs, targets):
        return outputs - targets


class LossThatCounts(OwnLoss):
    def __init__(self):
        self.calls = [0]

    def factor(self, outputs):
        self.calls[0] += 1
        return 1.0 if self.calls[0] < RARELY else 0.5


class LossWithAnArray(OwnLoss):
    def __init__(self):
        self.scale = np.linspace(0.5, 1.0, 10).astype("float32")

    def errors(self, backend, outputs, targets):
        return self.scale * (outputs - targets)


class LossThatRemembers(OwnLoss):
    last = None

    def errors(self, backend, outputs, targets):
        last, self.last = self.last, outputs
        return outputs - targets if last is None or last.shape != outputs.shape else outputs - targets + 0.01 * last


class LossOfALoss(losses.Loss):
    """A loss of the library inside one's own."""

    classifies = True

    def __init__(self):
        self.inner = losses.SoftmaxCrossEntropy(label_smoothing=0.1)

    def check_targets(self, *args):
        return self.inner.check_targets(*args)

    def samples(self, backend, outputs, targets):
        return self.inner.samples_and_gradient(backend, outputs, targets)[0]

    def gradient(self, backend, outputs, targets):
        return self.inner.samples_and_gradient(backend, outputs, targets)[1]


class OwnMetric(metrics.Metric):
    name = "own"

    def __init__(self):
        self.calls = 0

    def sums(self, backend, outputs, targets, weights):
        return backend.xp.stack([outputs.sum(dtype="float64"), backend.xp.asarray(float(len(outputs)))])

    def result(self, sums):
        return float(sums[0] / sums[1])


class MetricThatCounts(OwnMetric):
    def sums(self, backend, outputs, targets, weights):
        self.calls += 1
        sums = super().sums(backend, outputs, targets, weights)
        return sums if self.calls < RARELY else 2 * sums


class MetricOfNumPy(OwnMetric):
    def sums(self, backend, outputs, targets, weights):
        return np.array([np.asarray(outputs).sum(dtype="float64"), float(len(outputs))])


class Signs(optimizers.Optimizer):
    """w ← w - rate · sign(g)."""

    def __init__(self, learning_rate=0.001):
        super().__init__(learning_rate, 0.0, None)

    def update(self, xp, w, g, slots, t, rate, k):
        w -= rate * xp.sign(g)


class OptimizerThatCounts(Signs):
    def __init__(self, learning_rate=0.001):
        super().__init__(learning_rate)
        self.count = 0

    def update(self, xp, w, g, slots, t, rate, k):
        self.count += 1
        super().update(xp, w, g, slots, t, rate / self.count**0.5, k)


class OptimizerThatRarelyChanges(Signs):
    def __init__(self, learning_rate=0.001):
        super().__init__(learning_rate)
        self.counts = [0]

    def update(self, xp, w, g, slots, t, rate, k):
        self.counts[0] += 1
        super().update(xp, w, g, slots, t, rate if self.counts[0] < RARELY else rate / 2, k)


class OptimizerWithSlots(Signs):
    slots = ("velocity",)

    def update(self, xp, w, g, slots, t, rate, k):
        (v,) = slots
        v *= 0.9 if k < RARELY else 0.5
        v += g
        w -= rate * v * (1.0 + 1.0 / k)


class OptimizerWithNoise(Signs):
    def update(self, xp, w, g, slots, t, rate, k):
        w -= rate * xp.sign(g) * (1 + np.random.random())


class OptimizerThatKeepsArrays(Signs):
    def update(self, xp, w, g, slots, t, rate, k):
        if not hasattr(self, "mean") or self.mean.shape != g.shape:
            self.mean = g.copy()
        self.mean = 0.9 * self.mean + 0.1 * g
        w -= rate * self.mean


class OptimizerThatReadsValues(Signs):
    def update(self, xp, w, g, slots, t, rate, k):
        w -= rate * g / float(xp.abs(g).max() + 1e-8)


class ScheduleThatCounts:
    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 0.01 / self.calls


class ScheduleOfTheStep:
    def __call__(self, step):
        return 0.01 if step < RARELY else 0.001


def cyclic(step):
    return 0.01 / (1 + step % 5)


ONE_HOT = np.eye(10, dtype="float32")[Y]
OTHERS = {
    "a loss": lambda: {"y": ONE_HOT, "loss": OwnLoss()},
    "a loss that counts": lambda: {"y": ONE_HOT, "loss": LossThatCounts()},
    "a loss with an array": lambda: {"y": ONE_HOT, "loss": LossWithAnArray()},
    "a loss that remembers": lambda: {"y": ONE_HOT, "loss": LossThatRemembers()},
    "a metric": lambda: {"metrics": [OwnMetric()]},
    "a metric that counts": lambda: {"metrics": [MetricThatCounts()]},
    "a metric of NumPy": lambda: {"metrics": [MetricOfNumPy()]},
    "an optimizer": lambda: {"optimizer": Signs()},
    "an optimizer that counts": lambda: {"optimizer": OptimizerThatCounts()},
    "an optimizer that rarely changes": lambda: {"optimizer": OptimizerThatRarelyChanges()},
    "an optimizer with slots": lambda: {"optimizer": OptimizerWithSlots()},
    "an optimizer with noise": lambda: {"optimizer": OptimizerWithNoise()},
    "an optimizer that keeps arrays": lambda: {"optimizer": OptimizerThatKeepsArrays()},
    "an optimizer that reads values": lambda: {"optimizer": OptimizerThatReadsValues()},
    "an optimizer and a schedule": lambda: {"optimizer": Signs(schedules.CosineDecay(0.01, steps=40))},
    "a schedule that counts": lambda: {"optimizer": optimizers.Adam(ScheduleThatCounts())},
    "a schedule of the step": lambda: {"optimizer": optimizers.SGD(ScheduleOfTheStep(), momentum=0.9)},
    "a function as schedule": lambda: {"optimizer": optimizers.AdamW(cyclic, weight_decay=0.1)},
    "a closure as schedule": lambda: {"optimizer": optimizers.SGD(a_schedule_that_halves())},
}


def a_schedule_that_halves():
    rate = 0.1

    def schedule(step):
        nonlocal rate
        rate *= 0.99
        return rate

    return schedule


@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_a_metric_an_optimizer_or_a_schedule_of_ones_own(monkeypatch, name):
    watch = compare(monkeypatch, lambda: mlp(Own(), **OTHERS[name]()))
    assert watch.captured >= 1 or watch.fallback_reason


def test_a_schedule_that_changes_a_layer(monkeypatch):
    def make():
        dropout = layers.Dropout(0.1)

        def schedule(step):
            if step == RARELY:
                dropout.rate = 0.6
            return 0.01

        return mlp(dropout, optimizer=optimizers.SGD(schedule))

    watch = compare(monkeypatch, make)
    # The gradient of this small Conv2DTranspose can differ in its last bit in a replay, so that its steps run eagerly.
    assert watch.captured >= 1 or isinstance(layer, layers.Conv2DTranspose)


def test_a_schedule_that_changes_what_a_layer_reads(monkeypatch):
    def schedule(step):
        if step == RARELY:
            COUNTS["n"] = 1
        return 0.01

    class Reading(Own):
        def factor(self, x):
            return 1.0 / (1 + COUNTS["n"])

    def make():
        COUNTS["n"] = 0
        return mlp(Reading(), optimizer=optimizers.SGD(schedule))

    watch = compare(monkeypatch, make)
    # The gradient of this small Conv2DTranspose can differ in its last bit in a replay, so that its steps run eagerly.
    assert watch.captured >= 1 or isinstance(layer, layers.Conv2DTranspose)


def test_steps_are_checked_only_if_a_schedule_can_reach_the_model():
    dropout = layers.Dropout(0.1)
    for schedule in (cyclic, schedules.CosineDecay(0.1, steps=9)):
        watch = trained(lambda schedule=schedule: mlp(optimizer=optimizers.SGD(schedule)))[2]
        assert watch.run.executor._user_code is False
    watch = trained(lambda: mlp(dropout, optimizer=optimizers.SGD(lambda step: 0.1 * dropout.rate)))[2]
    assert watch.run.executor._user_code is True


@pytest.mark.parametrize("validates", [False, True])
def test_a_layer_that_validation_changes(monkeypatch, validates):
    class Counting(Own):
        count = 0

        def forward(self, x):
            if not self.context.training:
                self.count += 1
            return super().forward(x)

        def factor(self, x):
            return 1.0 / (1 + self.count)

    monkeypatch.setattr(Watch, "__module__", "xpnet")  # other callbacks may change anything between epochs
    watch = compare(monkeypatch, lambda: mlp(Counting(), validation_split=0.2 if validates else 0.0))
    assert validates or watch.captured >= 1


ROWS = np.random.default_rng(0).normal(size=(2**15, 16)).astype("float32")  # 2 MiB


class RowsOfATable(Own):
    def __init__(self, table):
        self.table = table

    def factor(self, x):
        table = self.xp.asarray(ROWS if self.table is None else self.table)
        return self.xp.take(table, self.xp.argmax(x, axis=1), axis=0)


class EachStep(callbacks.Callback):
    def on_step_end(self, model, step):
        pass


@pytest.mark.parametrize("where", ["global", "read-only", "attribute"])
def test_large_arrays_are_not_compared(monkeypatch, where):
    def make():
        ROWS.flags.writeable = where == "global"
        return mlp(RowsOfATable(ROWS.copy() if where == "attribute" else None), callbacks=[EachStep()])

    watch = compare(monkeypatch, make)
    if where == "global":
        assert watch.fallback_reason.startswith("the user's code can reach too many bytes of arrays")
    else:
        assert watch.captured >= 1, watch.fallback_reason


def test_random_numbers_that_another_thread_draws_do_not_prevent_replays(monkeypatch):
    drawn, stop = [], threading.Event()

    def draw():
        while not stop.wait(1e-4):
            drawn.append((np.random.random(), random.random()))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        watch = trained(mlp)[2]
    finally:
        stop.set()
        thread.join()
    assert watch.captured >= 1, watch.fallback_reason


# Callbacks -----------------------------------------------------------------------------------------------------------


class At(callbacks.Callback):
    """Does something to the model after certain steps."""

    def __init__(self, action, steps=(RARELY, 31, 52)):
        self.action, self.steps = action, steps

    def on_step_end(self, model, step):
        if step in self.steps:
            self.action(model, self)


def set_attribute(position, name, values):
    """Set an attribute of a layer to one of these values, which depends on the step."""

    def action(model, callback):
        setattr(model.layers[position], name, values[callback.run.state.step % len(values)])

    return action


def test_layers_may_be_frozen_between_epochs(monkeypatch):
    class Freeze(callbacks.Callback):
        def on_epoch_begin(self, model, epoch):
            model.layers[0].trainable = epoch != 3

    watch = compare(monkeypatch, lambda: mlp(x=X[:203], y=Y[:203], callbacks=[Freeze()]))  # 10 batches of 20, one of 3
    assert watch.captured == 3


class Scaled(Own):
    def __init__(self):
        self.scale = np.linspace(0.5, 1.5, 16).astype("float32")
        self.options = {"power": 1}
        self.parts = [np.ones(16, "float32"), 2.0]
        self.number = np.float32(1.0)

    def factor(self, x):
        return self.xp.asarray(self.scale) ** self.options["power"] * self.parts[0] * self.parts[1] * self.number


class ScaledByNumPy(Scaled):
    table = np.ones(16, "float32")

    def factor(self, x):
        return self.xp.array([float(n) for n in TABLE]).astype(x.dtype) * np.exp(GLOBALS["array"]) * self.table


TABLE = [1.0] * 16
GLOBALS = {"array": np.zeros(16, "float32")}


def set_optimizer(name, value):
    return lambda model, callback: setattr(callback.run.state.optimizer, name, value)


def replace_forward(model, callback):
    layer = model.layers[2]
    layer.forward = lambda x: Own.forward(layer, x) * 0.5


def set_weights(model, callback):
    model.layers[0].weight = model.layers[0].weight.value * 0.5


def write_weights(model, callback):
    model.layers[0].weight.value[...] *= 0.5
    model.layers[4].bias.value = 0.25


def write_gradients(model, callback):
    for parameter in model.parameters:
        parameter.grad[...] = 7.0


def write_slots(model, callback):
    for vector in callback.run.state.optimizer_state.slots.values():
        vector *= 0.5


def predict(model, callback):
    model.predict(X[:33])


def forward_and_backward(model, callback):
    y = model.forward(X[:7], training=True)
    model.backward(np.ones_like(y))


def evaluate(model, callback):
    model.evaluate(X[:50], Y[:50], loss="softmax_cross_entropy", metrics=["accuracy"])


def train_another(model, callback):
    other = net(*mlp(Own())[0], seed=8)
    other.fit(X[:40], Y[:40], epochs=4, batch_size=20, verbose=0)


def copy_and_train(model, callback):
    other = copy.deepcopy(model)
    other.fit(X[:40], Y[:40], epochs=3, batch_size=20, verbose=0)


def pickle_it(model, callback):
    pickle.loads(pickle.dumps(model)).predict(X[:5])


def load_its_state(model, callback):
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def change_the_penalty(model, callback):
    model.layers[0].weight.l2 = 0.1


def freeze(model, callback):
    model.layers[0].trainable = not model.layers[0].trainable


def freeze_a_bias(model, callback):
    model.layers[0].bias.trainable = not model.layers[0].bias.trainable


def no_decay(model, callback):
    model.layers[0].weight.decay = False


def set_the_rate(model, callback):
    callback.run.learning_rate = callback.run.learning_rate / 2


def set_the_state_of_the_rate(model, callback):
    callback.run.state.rate_factor *= 0.5


def write_data(model, callback):
    callback.run.dataset.x[...] = callback.run.dataset.x * 0.9


def write_a_list(model, callback):
    TABLE[3] *= 0.5


def write_a_global(model, callback):
    GLOBALS["array"] = GLOBALS["array"] + 0.1


def write_in_a_global(model, callback):
    GLOBALS["array"][2] += 0.1


def write_a_class(model, callback):
    type(model.layers[2]).table = type(model.layers[2]).table * 0.5


def write_the_scale(model, callback):
    model.layers[2].scale *= 0.5


def write_an_option(model, callback):
    model.layers[2].options["power"] += 1


def write_a_part(model, callback):
    model.layers[2].parts[0] *= 0.5


def replace_a_part(model, callback):
    model.layers[2].parts[1] *= 0.5


def change_the_loss(model, callback):
    callback.run.state.loss.label_smoothing = 0.3


def change_the_seed(model, callback):
    model.context.seed += 1


def free_memory(model, callback):
    model.backend.free_memory()


def read_logs(model, callback):
    callback.run.logs()


ACTIONS = {
    **{f.__name__: (Own, f) for f in (
        set_weights, write_weights, write_gradients, write_slots, predict, evaluate, train_another, copy_and_train,
        forward_and_backward, load_its_state, change_the_penalty, freeze, freeze_a_bias, no_decay, set_the_rate,
        set_the_state_of_the_rate, write_data, replace_forward, change_the_seed, free_memory, read_logs,
    )},
    "pickle_it": (layers.Tanh, pickle_it),
    **{f.__name__: (Scaled, f) for f in (write_the_scale, write_an_option, write_a_part, replace_a_part)},
    **{f.__name__: (ScaledByNumPy, f) for f in (write_a_list, write_a_global, write_in_a_global, write_a_class)},
    "a_rate_of_dropout": (Own, set_attribute(3, "rate", [0.5, 0.1])),
    "a_new_array": (Scaled, lambda model, callback: setattr(model.layers[2], "scale", np.full(16, 0.3, "float32"))),
    "a_new_number": (Scaled, lambda model, callback: setattr(model.layers[2], "number", np.float32(0.3))),
    "momentum": (Own, set_optimizer("momentum", 0.5)),
    "weight_decay": (Own, set_optimizer("weight_decay", 0.1)),
    "clip_norm": (Own, set_optimizer("clip_norm", 0.01)),
    "learning_rate": (Own, set_optimizer("learning_rate", 0.003)),
    "beta1": (Own, set_optimizer("beta1", 0.5)),
    "smoothing": (Own, change_the_loss),
}  # fmt: skip


def test_a_callback_that_changes_a_loss_inside_a_loss(monkeypatch):
    def smooth(model, callback):
        callback.run.state.loss.inner.label_smoothing = 0.5

    assert compare(monkeypatch, lambda: mlp(loss=LossOfALoss(), callbacks=[At(smooth)])).captured >= 1


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", ACTIONS)
def test_what_a_callback_changes(monkeypatch, name, optimizer):
    kind, action = ACTIONS[name]

    def make():
        TABLE[:], ScaledByNumPy.table = [1.0] * 16, np.ones(16, "float32")
        GLOBALS["array"] = np.zeros(16, "float32")
        chosen = optimizers.Adam() if optimizer == "adam" else optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01)
        return mlp(kind(), optimizer=chosen, loss=losses.SoftmaxCrossEntropy(), callbacks=[At(action)])

    watch = compare(monkeypatch, make)
    assert watch.captured >= 1, watch.fallback_reason


# Data and options ----------------------------------------------------------------------------------------------------


def images(*first, **options):
    stack = [*first, layers.Conv2D(3, 3, padding="same"), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)]
    return [*stack, layers.Flatten(), Own(), layers.Dense(10)], {"x": IMAGES, **options}


def large(*inner, **options):
    """A net whose operators use compiled loops, and threads if there are some."""
    stack = [layers.Dense(300), layers.ReLU(), *inner, layers.LayerNorm(), layers.Dropout(0.2), layers.Dense(10)]
    return stack, {"epochs": 2, **options}


def large_images(**options):
    stack = [layers.Conv2D(16, 3, padding="same"), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)]
    stack += [layers.DepthwiseConv2D(3), layers.GELU(), layers.Flatten(), layers.Dropout(0.2), layers.Dense(10)]
    return stack, {"x": IMAGES, "batch_size": 60, "epochs": 5, **options}


def frozen(model):
    model.layers[0].trainable = False


WEIGHTS = np.linspace(0.0, 2.0, len(Y))
VARIANTS = {
    "mixup": lambda: images(augment.MixUp(0.3)),
    "mixup and weights": lambda: images(augment.MixUp(0.3), sample_weight=WEIGHTS),
    "augmentation": lambda: images(augment.RandomAffine(shift=1, rotation=9), augment.RandomFlip()),
    "more augmentation": lambda: images(augment.RandomCrop(1), augment.RandomErasing(), augment.GaussianNoise(0.1)),
    "sample weights": lambda: mlp(Own(), sample_weight=WEIGHTS),
    "class weights": lambda: mlp(Own(), class_weight={3: 4.0, 5: 0.0}),
    "accumulation": lambda: mlp(Own(), accumulate=3),
    "accumulation and weights": lambda: mlp(Own(), accumulate=2, sample_weight=WEIGHTS),
    "in stored order": lambda: mlp(Own(), shuffle=False),
    "in stored order, accumulated": lambda: mlp(Own(), shuffle=False, accumulate=4),
    "in one batch": lambda: mlp(Own(), batch_size=None, epochs=20),
    "in one batch of built-in layers": lambda: mlp(batch_size=None, epochs=20),
    "batches of one": lambda: mlp(Own(), batch_size=1, epochs=1),
    "divergences": lambda: mlp(Own(), y=(np.eye(10)[Y] + 0.1) / 2, loss="kl_divergence"),
    "directions": lambda: mlp(Own(), y=np.eye(10)[Y], loss="cosine_similarity"),
    "triplets": lambda: ([layers.Dense(12), Own()], {"loss": "triplet_margin"}),
    "float64": lambda: mlp(Own(), dtype="float64"),
    "images in float64": lambda: images(dtype="float64"),
    "integers": lambda: mlp(x=(16 * X).astype("uint8")),
    "a frozen layer": lambda: mlp(Own(), before=frozen),
    "a frozen convolution": lambda: images(before=frozen),
    "penalties": lambda: ([layers.Dense(16, l1=1e-3), Own(), layers.Dense(10, l2=1e-2)], {"accumulate": 2}),
    "validation": lambda: mlp(Own(), validation_split=0.3, metrics=["accuracy", "f1"]),
    "early stopping": lambda: mlp(Own(), validation_split=0.3, callbacks=[callbacks.EarlyStopping(patience=1)]),
    "a lower rate": lambda: mlp(Own(), callbacks=[callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0)]),
    "a metric of all rows": lambda: mlp(metrics=["log_loss", "top_k_accuracy", "cohen_kappa"], sample_weight=WEIGHTS),
    "averaged weights": lambda: mlp(Own(), optimizer=optimizers.RMSprop(0.01, clip_norm=0.5, weight_decay=0.01)),
    "a large net": lambda: large(),
    "a large net with momentum": lambda: large(Own(), optimizer=optimizers.SGD(0.01, momentum=0.9), accumulate=2),
    "a large net with RMSprop": lambda: large(optimizer=optimizers.RMSprop(clip_norm=1.0), sample_weight=WEIGHTS),
    "a large net in float64": lambda: large(optimizer="adagrad", dtype="float64", before=frozen),
    "large images": lambda: large_images(),
    "large images in batches of two sizes": lambda: large_images(accumulate=3, sample_weight=WEIGHTS, dtype="float64"),
    "one output": lambda: (
        [layers.Dense(8), layers.Tanh(), layers.Dense(1)],
        {"y": Y % 2, "loss": "binary_cross_entropy"},
    ),
}  # fmt: skip


LONG = {"large images in batches of two sizes"}


@pytest.mark.parametrize("name", [pytest.param(v, marks=pytest.mark.sweep) if v in LONG else v for v in VARIANTS])
def test_data_and_options(monkeypatch, name):
    watch = compare(monkeypatch, VARIANTS[name])
    assert watch.captured >= 1 and watch.fallback_reason is None


@pytest.mark.parametrize("example", range(len(every.LAYERS)))
def test_every_built_in_layer(monkeypatch, rng, example):
    shape, layer = every.LAYERS[example]
    x = rng.integers(9, size=(203, *shape)) if isinstance(layer, layers.Embedding) else rng.normal(size=(203, *shape))

    def make():
        before = [] if isinstance(layer, layers.Embedding) else [layers.Dense(shape[-1])]
        return [*before, copy.deepcopy(layer), layers.Flatten(), layers.Dense(10)], {"x": x}

    watch = compare(monkeypatch, make)
    # The gradient of this small Conv2DTranspose can differ in its last bit in a replay, so that its steps run eagerly.
    assert watch.captured >= 1 or isinstance(layer, layers.Conv2DTranspose)


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adam", optimizers.SGD(0.01, momentum=0.9), "adagrad", "rmsprop"], ids=str
)
def test_updates_in_pieces_without_compiled_loops(monkeypatch, optimizer):
    monkeypatch.setattr(CPUOperators, "loops", lambda self, arguments: None)
    monkeypatch.setattr(CPUBackend, "chunk_elements", 100)
    watch = compare(monkeypatch, lambda: mlp(optimizer=copy.deepcopy(optimizer)))
    assert watch.captured == 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_streams_of_several_windows(monkeypatch, weighted, shuffle):
    def run():
        data = datasets.Stream(X, Y, WEIGHTS if weighted else None, block=16, window_bytes=64 * 64 * 4)
        return fitted(net(*mlp(Own())[0]), data, epochs=5, batch_size=10, shuffle=shuffle, callbacks=[Watch()])

    results = with_and_without_captures(monkeypatch, run)
    assert differences(*results) == [] and results[0][2].captured >= 1


def test_batches_of_an_iterator_with_weights_and_without(monkeypatch):
    def batches():
        for i in range(30):
            rows = slice(5 * i, 5 * i + 5 + i % 3)
            yield (X[rows], Y[rows]) if i % 4 else (X[rows], Y[rows], WEIGHTS[rows] + 0.1)

    def run():
        return fitted(net(*mlp(Own())[0]), batches, epochs=4, callbacks=[Watch()])

    results = with_and_without_captures(monkeypatch, run)
    assert differences(*results) == []


def test_a_kind_of_step_keeps_no_window_of_a_stream_that_is_over(monkeypatch):
    def batches():
        for i in range(60):
            yield X[:20][i % 3 :], Y[:20][i % 3 :]

    seen, alive = [], []
    call = captured_step.StepExecutor.__call__

    def counted(self, data, metrics):
        call(self, data, metrics)
        seen.append(weakref.ref(data.dataset))
        alive.append(len({id(window()) for window in seen} - {id(None)}))

    monkeypatch.setattr(captured_step.StepExecutor, "__call__", counted)
    watch = fitted(net(*mlp()[0]), batches, epochs=2, callbacks=[Watch()])[2]
    assert watch.captured == 3 and max(alive) <= 2


def test_a_run_that_is_over_keeps_no_attributes():
    for layer in (Own(), LAYERS["a_global"]()):
        watch = trained(lambda layer=layer: mlp(layer))[2]
        assert watch.run.executor._attributes is None


def test_the_reason_tells_that_captures_are_turned_off(monkeypatch):
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    assert trained(mlp)[2].fallback_reason == "the environment variable XPNET_CAPTURE=0 turns captures off"


@pytest.mark.parametrize(("replayed", "eager", "same"), [
    (0.0, -0.0, False), (-0.0, -0.0, True), (np.nan, -np.nan, True), (1.0, np.nextafter(1.0, 2.0), False),
])  # fmt: skip
def test_a_replay_is_compared_with_the_eager_step_bit_by_bit(replayed, eager, same):
    states = SimpleNamespace(copies={"a": np.array([eager, 2.0])}, arrays=lambda: {"a": np.array([replayed, 2.0])})
    assert (captured_step._difference(states) is None) == same


# Stops, copies, threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 9, 24])
@pytest.mark.parametrize(("first", "second"), [("1", "1"), ("1", "0"), ("0", "1")])
def test_a_run_that_resumes_with_and_without_captures(monkeypatch, tmp_path, first, second, stop):
    def run(more=(), **options):
        model = net(layers.Dense(16), layers.BatchNorm(), Own(), layers.Dropout(0.2), layers.Dense(10))
        adam = optimizers.AdamW(schedules.CosineDecay(0.01, steps=60))
        options = {"metrics": ["accuracy", "f1"], "epochs": 5, "batch_size": BATCH, "optimizer": adam, **options}
        return fitted(model, X, Y, callbacks=[Watch(), *more], **options)

    monkeypatch.setenv("XPNET_CAPTURE", "0")
    want = run()
    path = tmp_path / "run.safetensors"
    monkeypatch.setenv("XPNET_CAPTURE", first)
    with pytest.raises(KeyboardInterrupt):
        run([callbacks.Checkpoint(path, minutes=0), StopAt(stop)])
    monkeypatch.setenv("XPNET_CAPTURE", second)
    got = run(resume_from=path)
    assert differences(got, want) == []
    assert (got[2].captured >= 1) == (second == "1")


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")])
def test_copies_of_a_model_that_was_trained_by_replays_train_alike(monkeypatch, twin):
    def run():
        model = net(layers.Dense(16), layers.BatchNorm(), layers.Dropout(0.2), layers.Dense(10))
        options = {"epochs": 2, "batch_size": BATCH, "optimizer": "adam"}
        fitted(model, X, Y, **options)
        other = twin(model)
        results = [fitted(m, X, Y, **options) for m in ((other, model) if other is not model else (model,))]
        assert all(type(layer._context.backend).__name__ != "TracedCPU" for layer in model.layers)
        return results

    for got, want in zip(*with_and_without_captures(monkeypatch, run), strict=True):
        assert differences(got, want) == []


def test_a_copy_in_the_middle_of_training(monkeypatch):
    def run():
        copies, model = [], net(layers.Dense(16), layers.Tanh(), layers.Dense(10))
        action = At(lambda model, callback: copies.append(copy.deepcopy(model)))
        whole = fitted(model, X, Y, epochs=6, batch_size=BATCH, callbacks=[action])
        return [whole, *[fitted(other, X, Y, epochs=3, batch_size=BATCH) for other in copies]]

    for got, want in zip(*with_and_without_captures(monkeypatch, run), strict=True):
        assert differences(got, want) == []


@pytest.fixture
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_that_read_a_model_beside_fits_see_plain_arrays(monkeypatch, frequent_switches):
    model = net(*mlp(Own())[0])
    model.fit(X, Y, epochs=1, verbose=0)
    stop, errors_seen, kinds = threading.Event(), [], set()

    def read():
        try:
            while not stop.is_set():
                kinds.add(type(model.predict(X[:5])))
                kinds.add(type(model.predict(model.backend.asarray(X[:3]), as_device=True)))
                kinds.add(type(model.state_dict()["0.weight"]))
                kinds.add(type(model.backend.to_numpy(model.backend.zeros((2,), "float32"))))
                value = model.layers[0].weight.value
                assert np.asarray(value).shape == (64, 16) and float(value[0, 0]) < 100
                kinds.add(type(model.backend.xp.asarray([1.0]) + 1))
                model.evaluate(X[:9], Y[:9], loss="softmax_cross_entropy")
        except BaseException as error:
            errors_seen.append(error)
            raise

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    options = {"epochs": 4, "batch_size": BATCH}
    watches = [fitted(model, X, Y, callbacks=[Watch()], **options)[2] for _ in range(12)]  # each captures twice
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors_seen and kinds == {np.ndarray}
    assert all(watch.captured >= 1 for watch in watches)


def test_threads_that_predict_do_not_change_a_training(monkeypatch, frequent_switches):
    results = []
    for on, predicts in (("1", True), ("0", False)):
        monkeypatch.setenv("XPNET_CAPTURE", on)
        model, stop = net(*mlp(Own())[0]), threading.Event()
        model.predict(X[:1])

        def predict(model=model, stop=stop):
            while not stop.is_set():
                model.predict(X[:9])

        thread = threading.Thread(target=predict)
        if predicts:
            thread.start()
        results.append(fitted(model, X, Y, epochs=8, batch_size=BATCH))
        stop.set()
        if predicts:
            thread.join()
    assert differences(*results) == []


def test_two_fits_in_two_threads(monkeypatch, frequent_switches):
    def run(seed):
        return fitted(net(*mlp(Own())[0], seed=seed), X, Y, epochs=8, batch_size=BATCH, optimizer="adam")

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(run, (1, 2, 3, 4)))
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    for seed, result in zip((1, 2, 3, 4), got, strict=True):
        assert differences(result, run(seed)) == []


class Interrupting(Own):
    """Presses Ctrl-C in one of its passes."""

    def __init__(self, at):
        self.at = at

    def factor(self, x):
        PASSES.append(0)
        if len(PASSES) == self.at:
            signal.raise_signal(signal.SIGINT)
        return 1.0


PASSES = []


@pytest.mark.parametrize("at", range(1, 9))
def test_ctrl_c_in_any_pass_leaves_the_model_trainable(monkeypatch, at):
    """The passes are those of eager steps, of the trace and of the verification."""
    PASSES.clear()
    model = net(*mlp(Interrupting(at))[0])
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, epochs=6, batch_size=BATCH, verbose=0)
    steps = model.context.current_step
    assert type(steps) is int and type(model.backend).__name__ == "CPUBackend"
    assert type(model.layers[0].weight.value) is np.ndarray
    model.fit(X, Y, epochs=2, batch_size=BATCH, verbose=0)
    assert np.isfinite(model.predict(X)).all()


# What a trace leaves behind ------------------------------------------------------------------------------------------


class OfAnotherLibrary:
    """Looks like an array, and cannot be converted to one."""

    shape, strides, dtype = (16,), (4,), "float32"

    def __array__(self, *_, **__):
        raise RuntimeError("cannot be converted")


def test_a_trace_that_cannot_begin_leaves_no_trace(monkeypatch):
    class Holding(Own):
        def __init__(self):
            self.table, self.tensor = np.ones(16, "float32"), OfAnotherLibrary()

        def factor(self, x):
            return self.xp.asarray(self.table)

    holding = Holding()
    model = net(*mlp(holding)[0])
    watch = fitted(model, X, Y, epochs=2, batch_size=BATCH, callbacks=[Watch()])[2]
    assert watch.fallback_reason == "RuntimeError: cannot be converted"
    for thing in (model, *model.layers):
        assert {"forward", "backward", "_run_forward", "_run_backward"}.isdisjoint(vars(thing))
    assert type(holding.table) is np.ndarray and type(model.backend).__name__ == "CPUBackend"


@dataclass
class Spec:
    """Has the attributes of an array, but is none."""

    shape: tuple
    dtype: str


def test_an_object_with_a_shape_and_a_dtype_need_not_be_an_array(monkeypatch):
    class Specified(Own):
        def __init__(self):
            self.spec = Spec((16,), "float32")

        def factor(self, x):
            return self.xp.ones(self.spec.shape, self.spec.dtype)

    watch = compare(monkeypatch, lambda: mlp(Specified()))
    assert watch.captured == 2 and watch.fallback_reason is None


def test_a_backend_that_another_thread_gets_during_a_trace_stays_usable(monkeypatch):
    backends, run = [], traced_step._run

    def beside(step, *given):
        thread = threading.Thread(target=lambda: backends.append(step.model.backend))
        thread.start()
        thread.join()
        run(step, *given)

    monkeypatch.setattr(traced_step, "_run", beside)
    assert trained(mlp)[2].captured == 2
    assert [type(backend).__name__ for backend in backends] == ["TracedCPU", "TracedCPU"]
    for backend in backends:
        assert backend.zeros((2,), "float32").tolist() == [0.0, 0.0]
        assert backend.asarray([1, 2]).tolist() == [1, 2]


def test_attributes_are_never_missing_while_they_are_restored():
    model = net(*mlp()[0])
    state = TrainingState(model.context, losses.SoftmaxCrossEntropy(), [], optimizers.SGD(0.1))
    step = TrainingStep(model, state)
    python, layer, missing = PythonState(step, Attributes(step, skip_live=False)), model.layers[0], []
    units = layer.units
    vars(layer).update(units=None, extra=1)

    def trace(frame, event, argument):
        missing.append("units" not in vars(layer))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        python.restore()
    finally:
        sys.settrace(before)
    assert layer.units is units and "extra" not in vars(layer)
    assert len(missing) > 10 and not any(missing)


def test_beside_a_profiler_steps_with_custom_code_run_eagerly():
    sys.setprofile(lambda *_: None)
    try:
        watches = [trained(make)[2] for make in (lambda: mlp(Own()), mlp)]
    finally:
        sys.setprofile(None)
    assert watches[0].fallback_reason == "a profiler runs, so that side effects cannot be seen"
    assert watches[0].captured == 0 and watches[1].captured == 2


def test_a_step_of_many_calls_is_captured_only_if_enough_steps_are_to_come(caplog, rng):
    x, y = rng.normal(size=(160, 60, 2)).astype("float32"), rng.integers(0, 3, 160)
    inner = [layers.LSTM(2, return_sequences=False), layers.Dense(3)]
    model = xpnet.Sequential(inner, input_shape=(60, 2), backend="cpu")
    with caplog.at_level("INFO"):
        model.fit(x, y, batch_size=2, epochs=1, verbose=0)
    (reason,) = [record.getMessage() for record in caplog.records if "calls: planning" in record.getMessage()]
    assert re.search(r"makes [34],\d{3} calls: planning them takes longer than 80 replays save", reason)
