"""examples/tutorials: the numbers of the five tutorials on every backend, and the programs as users run them.

Numbers that the tutorials state exactly must agree in all their digits. Results that depend on random weights must meet
their bounds for 20 seeds. Other tests assert that every comparison fails if something is wrong.
"""

import importlib
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import xpnet
from xpnet import datasets, layers, losses, optimizers

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "examples" / "tutorials"
GALLERY = ROOT / "docs" / "tutorials.md"

if not TUTORIALS.exists():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)

sys.path.insert(0, str(TUTORIALS))  # as Python does when it runs one of the programs
common = importlib.import_module("common")
PROGRAMS = tuple(sorted(path.stem for path in TUTORIALS.glob("[!_]*.py") if path.stem != "common"))

# The numbers that the tutorials state exactly: {program: {quantity: digits}}.
EXACT = {
    "attention": {
        "P of token 1 for token 3": "0.5760",
        "y of token 1": "3.8680",
        "y of token 3": "3.9343",
        "L": "4.785278",
        "∂L/∂query weight, first number": "1.9690",
        "∂L/∂x of token 1, first number": "3.1830",
        "y of token 1, causal": "3",
    },
    "perceptron": {"predict (0, 1, 0)": "0", "predict (1, 1, 1)": "1"},
    "neuron": {"output": "0.9990889488055994"},
    "two_two_one": {
        "h1 = h2": "0.9525741268224334",
        "output": "0.7216325609518421",
        "MSE of (1, 0, 0, 1) against zeros": "0.5",
        "output, all weights 1": "0.5237",
        "∂L/∂w1": "0.0214695",
    },
    "or_gate_graph": {
        "ŷ": "0.5",
        "L": "0.125",
        "∂L/∂w1": "0",
        "∂L/∂w2": "0",
        "∂L/∂b": "0.125",
        "b after one step": "-0.125",
        "ŷ after one step": "0.46879",
        "L after one step": "0.10988",
    },
    "or_gate_batch": {
        "cost at the start": "0.0889129",
        "∂Cost/∂w1 at the start": "-0.048006",
        "∂Cost/∂w2 at the start": "-0.038659",
        "∂Cost/∂b at the start": "-0.037024",
        "cost after one step": "0.0840096",
        "∂Cost/∂w1 after one step": "-0.044287",
        "∂Cost/∂w2 after one step": "-0.035004",
        "∂Cost/∂b after one step": "-0.031313",
        "cost after 5000 epochs": "0.0005276",
        "w1 after 5000 epochs": "6.4342",
        "w2 after 5000 epochs": "6.4342",
        "b after 5000 epochs": "-2.9730",
    },
    "learning_rates": {
        "cost in epoch 5000 at 5e-10": "0.088913",
        "cost in epoch 5000 at 0.5": "0.001126",
        "cost in epoch 5000 at 5": "0.000097",
        "cost in epoch 5000 at 1000": "0.125",
        "cost at 50, at the start": "0.088913",
        "cost at 50, after one step": "0.093409",
    },
    "gradient_descent": {"the minimum": "2.249965", "steps": "70"},
    "loops_and_matrices": {
        "h1": "0.8909",
        "h2": "0.9677",
        "h3": "0.9910",
        "output, loops": "0.8354557",
        "output, matrices": "0.8354557",
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    with common.one_thread():
        yield


def run(program, backend="cpu", seed=0):
    return importlib.import_module(program).run(backend, seed)


def wrong(rows):
    return {row.quantity for row in rows if row.ok is False}


# The numbers -------------------------------------------------------------------------------------------------------


LONG = ("handwritten_digits", "learning_rates", "or_gate_batch", "weight_height")  # half a minute on the stand-ins


def programs(long):
    """All programs, the long ones among the slow tests."""
    return [pytest.param(program, marks=[pytest.mark.sweep] * (program in long)) for program in PROGRAMS]


@pytest.mark.parametrize("program", programs(LONG))
def test_every_number_agrees(program, backend, monkeypatch):
    check_numbers(program, backend, monkeypatch)


@pytest.mark.parametrize("program", LONG)
def test_every_number_of_the_long_programs_agrees_on_the_cpu(program, monkeypatch):
    check_numbers(program, xpnet.get_backend("cpu"), monkeypatch)


def check_numbers(program, backend, monkeypatch):
    if program == "learning_rates" and backend.name != "cpu":
        # Saves 15 000 steps, which are 15 times as slow on the stand-ins. Schedules do not depend on the backend.
        monkeypatch.setattr(importlib.import_module(program), "SCHEDULES", {})
    rows = run(program, backend)
    assert rows and not wrong(rows), wrong(rows)
    ours = {row.quantity: row for row in rows}
    assert len(ours) == len(rows)
    for quantity, digits in EXACT.get(program, {}).items():
        assert ours[quantity].tutorial == digits
        if not backend.name.startswith("gpu"):  # exp of a GPU may differ in the last of 16 digits, which `ok` allows
            assert ours[quantity].ours == digits, quantity


# With these seeds, the network crosses a plateau and meets its bounds after 1500 iterations instead of 1000.
# The code of the tutorial is no better: with 38 of 500 seeds of numpy.random.randn it misses the bounds.
LATE = {"exam_scores": {7, 15}}


@pytest.mark.sweep
@pytest.mark.parametrize("program", ["exam_scores", "weight_height", "xor", "perceptron"])
def test_bounds_hold_for_twenty_seeds(program, backend, monkeypatch):
    # Two seeds are enough for the other backends, which compute the same ten times as slowly.
    seeds = range(20) if backend.name == "cpu" else range(2)
    missed = {seed for seed in seeds if wrong(run(program, backend, seed))}
    assert missed <= LATE.get(program, set())
    for seed in missed:
        monkeypatch.setattr(importlib.import_module(program), "ITERATIONS", 1500)
        assert not wrong(run(program, backend, seed)), seed


@pytest.mark.sweep
def test_bounds_of_the_digits_hold_for_other_seeds():
    program = importlib.import_module("handwritten_digits")
    train, test = program.data()
    for seed in range(20):
        model, _ = program.modern("cpu", seed, *train)
        assert program.accuracy(model, *test) >= 0.97, seed
    for seed in range(1, 6):
        model, _ = program.as_written("cpu", seed, *train)
        assert program.accuracy(model, *test) >= 0.86, seed


def test_digits_are_scaled_by_statistics_of_the_training_part():
    (x, digits), (x_test, digits_test) = importlib.import_module("handwritten_digits").data()
    assert (len(x), len(x_test)) == (1078, 719)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-12)
    assert set(x.std(axis=0).round(12)) == {0.0, 1.0}  # 0 for pixels that are always blank
    assert abs(x_test.mean(axis=0)).max() > 0.01
    assert sorted([*digits, *digits_test]) == sorted(datasets.digits()[1])


def test_loops_and_matrices_agree_to_1e12_for_other_nets(backend):
    program = importlib.import_module("loops_and_matrices")
    for seed in range(5):
        for weights, biases, x in program.nets(seed).values():
            model = program.network(weights, biases, backend)
            assert abs(model.predict([x])[0] - program.looped_forward(x, weights, biases)).max() < 1e-12


# `fit` gives the same weights as the loops of the programs, bit for bit.
def by_loop(program, backend):
    module = importlib.import_module(program)
    if program == "perceptron":
        model = module.perceptron(3, backend, 0)
        module.learn(model, *datasets.perceptron_and(), epochs=3)
    elif program == "exam_scores":
        model = module.network(backend, 0)
        module.gradient_descent(model, *datasets.exam_scores())
    elif program == "or_gate_batch":
        model = module.neuron(backend)
        x, y = (backend.asarray(column) for column in datasets.logic_gate("or"))
        module.train(model, x, y, 100)
    else:
        model = module.network(backend, 0)
        module.train(model, *(datasets.xor_with_constant() if program == "xor" else datasets.weight_height()))
    return model


def by_fit(program, backend):
    module = importlib.import_module(program)
    model = {
        "perceptron": lambda: module.perceptron(3, backend, 0),
        "or_gate_batch": lambda: module.neuron(backend),
    }.get(program, lambda: module.network(backend, 0))()
    data, loss, rate, epochs, batch_size = {
        "perceptron": (datasets.perceptron_and(), losses.HalfSquaredError(), 0.1, 3, 1),
        "exam_scores": (datasets.exam_scores(), losses.HalfSquaredError("sum"), 0.1, 1000, None),
        "or_gate_batch": (datasets.logic_gate("or"), losses.HalfSquaredError(), 1.0, 100, None),
        "xor": (datasets.xor_with_constant(), losses.HalfSquaredError("sum"), 2.0, 1500, None),
        "weight_height": (datasets.weight_height(), losses.MeanSquaredError(), 0.1, 1000, 1),
    }[program]
    model.fit(*data, loss=loss, optimizer=optimizers.SGD(rate), epochs=epochs, batch_size=batch_size, shuffle=False,
              verbose=0)  # fmt: skip
    return model


@pytest.mark.parametrize("program", ["perceptron", "exam_scores", "or_gate_batch", "xor", "weight_height"])
def test_fit_gives_the_same_weights_as_the_loop(program):
    backend = xpnet.get_backend("cpu")
    looped, fitted = (train(program, backend).state_dict() for train in (by_loop, by_fit))
    for name in looped:
        np.testing.assert_array_equal(looped[name], fitted[name])


# Comparisons fail if something is wrong ------------------------------------------------------------------------------


def wrong_weights(patch, module):
    """Add 0.1 to the initial values of all parameters."""
    original = xpnet.Sequential.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for parameter in self.parameters:
            parameter.value += 0.1

    patch.setattr(xpnet.Sequential, "__init__", init)


def wrong_gradients(patch, module, factor=1.0, offset=0.1):
    original = layers.Dense.backward

    def backward(self, grad_y):
        grad_x = original(self, grad_y)
        for parameter in self.parameters:
            parameter.grad = parameter.grad * factor + offset
        return grad_x

    patch.setattr(layers.Dense, "backward", backward)


def zero_gradients(patch, module):
    wrong_gradients(patch, module, factor=0.0, offset=0.0)


def wrong_sigmoid(patch, module):
    original = layers.Sigmoid.forward
    patch.setattr(layers.Sigmoid, "forward", lambda self, x: original(self, x) * 1.01)


def inverted_predictions(patch, module):
    original = xpnet.Sequential.predict
    patch.setattr(xpnet.Sequential, "predict", lambda self, x: 1.0 - original(self, x))


def doubled_loss(patch, module):
    original = losses.MeanSquaredError.samples
    patch.setattr(losses.MeanSquaredError, "samples", lambda *args: 2 * original(*args))


def xor_becomes_or(patch, module):
    original = datasets.logic_gate
    patch.setattr(datasets, "logic_gate", lambda name: original("or" if name == "xor" else name))


def wrong_loop(patch, module):
    name = "looped_gradients" if hasattr(module, "looped_gradients") else "looped_layer"
    original = getattr(module, name)
    if name == "looped_layer":
        patch.setattr(module, name, lambda *args: original(*args) * (1 + 1e-4))
    else:
        patch.setattr(module, name, lambda *args: (original(*args)[0] * (1 + 1e-12), original(*args)[1]))


def slow_matrices(patch, module):
    slow = {module.looped_forward: 1e-6}
    patch.setattr(module, "best_time", lambda function, *args: slow.get(function, 1.0))


def wrong_derivative(patch, module):
    original = module.Quartic.backward
    patch.setattr(module.Quartic, "backward", lambda self, grad_y: original(self, grad_y) * 1.01)


def wrong_attention(patch, module):
    original = layers.MultiHeadAttention.forward
    patch.setattr(layers.MultiHeadAttention, "forward", lambda self, x: original(self, x) * (1 + 1e-4))


def wrong_softmax(patch, module):
    original = module.softmax
    patch.setattr(module, "softmax", lambda row: [1.01 * share for share in original(row)])


def too_few_epochs(patch, module):
    patch.setattr(module, "ITERATIONS", 20)
    patch.setattr(module, "MODERN_EPOCHS", 1)


FAULTS = {
    "attention": [wrong_attention, wrong_softmax],
    "perceptron": [inverted_predictions, xor_becomes_or],
    "exam_scores": [zero_gradients, wrong_gradients],
    "neuron": [wrong_weights],
    "two_two_one": [wrong_weights, doubled_loss],
    "weight_height": [inverted_predictions],
    "xor": [zero_gradients],
    "or_gate_graph": [wrong_sigmoid, wrong_gradients],
    "or_gate_batch": [wrong_weights, wrong_gradients, wrong_loop],
    "learning_rates": [zero_gradients, wrong_weights, wrong_sigmoid],
    "gradient_descent": [wrong_derivative],
    "loops_and_matrices": [wrong_loop, slow_matrices, wrong_weights],
    "weight_and_bias": [wrong_weights],
    "handwritten_digits": [too_few_epochs],
}


@pytest.mark.parametrize("program", programs(["learning_rates"]))
def test_every_comparison_can_fail(program):
    module = importlib.import_module(program)
    failed, rows = set(), []
    for fault in FAULTS[program]:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            fault(patch, module)
            rows = run(program)
        failed |= wrong(rows)
    compared = {row.quantity for row in rows if row.ok is not None}  # None means that it is not compared
    assert compared - failed == set()


def test_comparisons_accept_only_equal_digits():
    rows = common.Comparison("a system")
    for ours in (0.12344, 0.123451, 0.12354, 0.12356, math.nan, math.inf, -0.1235):
        rows.equal("x", "0.1235", ours)
    assert [row.ok for row in rows] == [False, True, True, False, False, False, False]
    rows = common.Comparison("a system")
    for ours in (0.9990889488055994, 0.9990889488055990, 0.9990889488055999):
        rows.equal("x", "0.9990889488055994", ours)
    assert [row.ok for row in rows] == [True, False, False]
    for ours in (0.5 + 1e-15, 0.5 + 1e-9, math.nan, math.inf):
        rows.exactly("x", "0.5", ours)
    assert [row.ok for row in rows[3:]] == [True, False, False, False]
    rows.below("x", 0.1, math.nan)
    rows.above("x", 0.1, math.nan)
    assert not rows[-1].ok and not rows[-2].ok


@pytest.mark.parametrize(("ours", "status"), [(0.5, 0), (0.6, 1)])
def test_the_exit_status_says_whether_all_numbers_agree(ours, status, monkeypatch, capsys):
    def program(backend, seed, plots):
        rows = common.Comparison("a system")
        rows.equal("a quantity", "0.5", ours)
        return rows

    monkeypatch.setattr(sys, "argv", ["program", "--backend", "cpu"])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        common.main(program)
    assert stop.value.code == status
    assert re.search(r"a system +a quantity +0\.5 +0\.[56] +\S+ +(ok|WRONG)", capsys.readouterr().out)


# The programs --------------------------------------------------------------------------------------------------------


def start(*arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(xpnet.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run_without_errors(program):
    done = start(TUTORIALS / f"{program}.py", "--backend", "cpu", "--seed", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tutorial" in done.stdout and "WRONG" not in done.stdout


def test_an_unknown_backend_is_a_one_line_error():
    done = start(TUTORIALS / "neuron.py", "--backend", "nonsense")
    assert done.returncode == 1
    assert done.stderr.startswith("neuron.py: ") and done.stderr.count("\n") == 1


@pytest.mark.sweep
@pytest.mark.slow
def test_all_programs_write_their_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    done = start("-m", "examples.tutorials", "--backend", "cpu", "--plots", tmp_path / "new" / "folder")
    assert (done.returncode, done.stderr) == (0, "")
    for program in PROGRAMS:
        assert program in done.stdout
    pictures = {path.name: path.stat().st_size for path in (tmp_path / "new" / "folder").iterdir()}
    assert max(pictures.values()) < 60_000
    assert pictures.keys() == {path.name for path in (GALLERY.parent / "pictures").iterdir()}


def test_pictures_do_not_depend_on_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("one", "two"):
        done = start(TUTORIALS / "weight_and_bias.py", "--backend", "cpu", "--plots", tmp_path / folder)
        assert (done.returncode, done.stderr) == (0, "")
    one, two = ((tmp_path / folder / "weight_and_bias.png").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_the_folder_can_be_run_as_a_program():
    done = start("examples/tutorials", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--plots" in done.stdout


def test_plots_can_be_shown_in_windows(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    figures = []
    monkeypatch.setattr(pyplot, "show", lambda: figures.append(len(pyplot.get_fignums())))
    importlib.import_module("neuron").run("cpu", 0, common.SHOW)
    assert figures == [1]
    assert pyplot.get_fignums() == []


def test_the_page_has_all_links_pictures_and_exact_numbers():
    text = GALLERY.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    for link in links:
        if not link.startswith("http"):
            assert (GALLERY.parent / link).exists(), link
    for program in PROGRAMS:
        assert f"../examples/tutorials/{program}.py" in links
    pictures = list((GALLERY.parent / "pictures").iterdir())
    assert all(f"pictures/{path.name}" in links for path in pictures)
    assert max(path.stat().st_size for path in pictures) < 60_000
    for program, numbers in EXACT.items():
        for digits in numbers.values():
            assert digits.replace("-", "−") in text, (program, digits)


def test_the_list_of_programs_is_complete():
    listed = re.findall(r'^    "(\w+)",$', (TUTORIALS / "__main__.py").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(listed) == list(PROGRAMS)
