"""The OR gate, trained on all four rows at once: the cost is the mean of their losses.

After "Understanding & Creating Neural Networks with Computational Graphs from Scratch". Gradients are computed in two
ways, in a loop over the rows and for the whole matrix at once. They are equal, and the matrix is faster.
"""

import timeit

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import datasets, layers, losses

LEARNING_RATE, EPOCHS = 1.0, 5000
LOSS = losses.HalfSquaredError()  # ½ (ŷ - y)² of one row; the mean over several rows is the cost


def neuron(backend):
    return xpnet.Sequential(
        [layers.Dense(1, weight_initializer=[[0.1], [0.6]]), layers.Sigmoid()],
        input_shape=2,
        backend=backend,
        dtype="float64",
    )


def vectorized_gradients(model, x, y):
    """Cost and gradients from one pass over the whole table."""
    estimate = model.forward(x)  # forward
    cost = LOSS(estimate, y)  # loss
    model.backward(LOSS.gradient(model.backend, estimate, y) / len(x))  # backward: the cost is a mean, hence / m
    return cost, [parameter.grad.copy() for parameter in model.parameters]


def looped_gradients(model, x, y):
    """Cost and gradients accumulated row by row."""
    cost, totals = 0.0, [parameter.grad * 0.0 for parameter in model.parameters]
    for i in range(len(x)):
        estimate = model.forward(x[i : i + 1])
        cost += LOSS(estimate, y[i : i + 1]) / len(x)
        model.backward(LOSS.gradient(model.backend, estimate, y[i : i + 1]))
        for total, parameter in zip(totals, model.parameters, strict=True):
            total += parameter.grad / len(x)
    return cost, totals


def train(model, x, y, epochs):
    """Train, and return the cost of every epoch and the path of the two weights."""
    costs, path = [], []
    for _ in range(epochs):
        path.append(model.state_dict()["0.weight"].ravel())
        cost, gradients = vectorized_gradients(model, x, y)
        for parameter, gradient in zip(model.parameters, gradients, strict=True):  # update
            parameter.value -= LEARNING_RATE * gradient
        costs.append(cost)
    return costs, path


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("OR gate, batched")
    model = neuron(backend)
    table = datasets.logic_gate("or")
    x, y = (model.backend.asarray(column) for column in table)

    looped = looped_gradients(model, x, y)
    vectorized = vectorized_gradients(model, x, y)
    difference = max(abs(a - b).max() for a, b in zip(flat(model, looped), flat(model, vectorized), strict=True))
    rows.below("gradients, difference of loop and matrix", 1e-15, difference)
    times = [best_time(function, model, x, y) for function in (looped_gradients, vectorized_gradients)]
    rows.measured("gradients, time of loop / matrix", "matrix faster", f"{times[0] / times[1]:.1f}×")
    print(f"loop {times[0] * 1e6:.0f} µs, matrix {times[1] * 1e6:.0f} µs, gradients differ by {difference:.0e}")

    costs, path = [], []
    for step in ("at the start", "after one step"):
        some, steps = train(model, x, y, 1)
        costs, path = costs + some, path + steps
        weights, bias = (model.backend.to_numpy(parameter.grad).ravel() for parameter in model.parameters)
        print(f"{step}: cost {some[0]:.7f}, ∂Cost/∂W {weights}, ∂Cost/∂b {bias}")
        values = {
            "at the start": ("0.0889129", "-0.048006", "-0.038659", "-0.037024"),
            "after one step": ("0.0840096", "-0.044287", "-0.035004", "-0.031313"),
        }[step]
        names = ("cost", "∂Cost/∂w1", "∂Cost/∂w2", "∂Cost/∂b")
        for name, value, ours in zip(names, values, (some[0], *weights, *bias), strict=True):
            rows.equal(f"{name} {step}", value, ours)

    some, steps = train(model, x, y, EPOCHS - 2)
    costs, path = costs + some, path + steps
    costs.append(LOSS(model.forward(x), y))
    weights, bias = (value.ravel() for value in model.state_dict().values())
    print(f"after {EPOCHS} epochs: cost {costs[-1]:.7f}, W {weights}, b {bias}")
    rows.equal(f"cost after {EPOCHS} epochs", "0.0005276", costs[-1])
    rows.equal(f"w1 after {EPOCHS} epochs", "6.4342", weights[0])
    rows.equal(f"w2 after {EPOCHS} epochs", "6.4342", weights[1])
    rows.equal(f"b after {EPOCHS} epochs", "-2.9730", bias[0])
    if plots:
        draw(plots, model, table, costs, path)
    return rows


def flat(model, cost_and_gradients):
    cost, gradients = cost_and_gradients
    return [np.array(cost), *(model.backend.to_numpy(gradient) for gradient in gradients)]


def best_time(function, *arguments):
    return min(timeit.repeat(lambda: function(*arguments), number=20, repeat=5)) / 20


def draw(plots, model, table, costs, path):
    from xpnet.plots import cost_surface, curves, decision_boundary

    with picture(plots, "or_gate_batch", 13, 4) as figure:
        left, middle, right = figure.subplots(1, 3)
        curves({"cost": costs}, "cost", ax=left)
        decision_boundary(model, *table, ax=middle)
        cost_surface(model, *table, LOSS, (("0.weight", (0, 0)), ("0.weight", (1, 0))), path=path, ax=right)


if __name__ == "__main__":
    main(run)
