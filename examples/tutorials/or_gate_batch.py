"""The OR gate learnt from all four rows at once: the cost is the mean of their losses.

After "Understanding & Creating Neural Networks with Computational Graphs from Scratch". Gradients are gathered in two
ways, in a loop over the rows and in one go for the whole matrix: they are the same, and the matrix is faster.
"""

import timeit

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import datasets, layers, losses

LEARNING_RATE, EPOCHS = 1.0, 5000
LOSS = losses.HalfSquaredError()  # of one row ½ (ŷ - y)²; of several their mean, the cost


def neuron(backend):
    return xpnet.Sequential(
        [layers.Dense(1, weight_initializer=[[0.1], [0.6]]), layers.Sigmoid()],
        input_shape=2,
        backend=backend,
        dtype="float64",
    )


def vectorised_gradients(model, x, y):
    """Cost and gradients from one pass with the whole table."""
    estimate = model.forward(x)  # forward
    cost = LOSS(estimate, y)  # loss
    model.backward(LOSS.gradient(model.backend, estimate, y) / len(x))  # backward: of a mean, hence / m
    return cost, [parameter.grad.copy() for parameter in model.parameters]


def looped_gradients(model, x, y):
    """The same row by row, in accumulators."""
    cost, totals = 0.0, [parameter.grad * 0.0 for parameter in model.parameters]
    for i in range(len(x)):
        estimate = model.forward(x[i : i + 1])
        cost += LOSS(estimate, y[i : i + 1]) / len(x)
        model.backward(LOSS.gradient(model.backend, estimate, y[i : i + 1]))
        for total, parameter in zip(totals, model.parameters, strict=True):
            total += parameter.grad / len(x)
    return cost, totals


def train(model, x, y, epochs):
    """Returns the cost of every epoch, and the way of the two weights."""
    costs, way = [], []
    for _ in range(epochs):
        way.append(model.state_dict()["0.weight"].ravel())
        cost, gradients = vectorised_gradients(model, x, y)
        for parameter, gradient in zip(model.parameters, gradients, strict=True):  # update
            parameter.value -= LEARNING_RATE * gradient
        costs.append(cost)
    return costs, way


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("OR gate, batched")
    model = neuron(backend)
    table = datasets.logic_gate("or")
    x, y = (model.backend.asarray(column) for column in table)

    looped = looped_gradients(model, x, y)
    vectorised = vectorised_gradients(model, x, y)
    apart = max(abs(a - b).max() for a, b in zip(flat(model, looped), flat(model, vectorised), strict=True))
    rows.below("loop over rows against matrix, gradients", 1e-15, apart)
    times = [best_time(function, model, x, y) for function in (looped_gradients, vectorised_gradients)]
    rows.measured("the same, time", "matrix quicker", f"{times[0] / times[1]:.1f}×")
    print(f"loop {times[0] * 1e6:.0f} µs, matrix {times[1] * 1e6:.0f} µs, gradients {apart:.0e} apart")

    costs, way = [], []
    for step in ("at the start", "after one step"):
        some, steps = train(model, x, y, 1)
        costs, way = costs + some, way + steps
        weights, bias = (model.backend.to_numpy(parameter.grad).ravel() for parameter in model.parameters)
        print(f"{step}: cost {some[0]:.7f}, ∂Cost/∂W {weights}, ∂Cost/∂b {bias}")
        figures = {
            "at the start": ("0.0889129", "-0.048006", "-0.038659", "-0.037024"),
            "after one step": ("0.0840096", "-0.044287", "-0.035004", "-0.031313"),
        }[step]
        names = ("cost", "∂Cost/∂w1", "∂Cost/∂w2", "∂Cost/∂b")
        for name, figure, ours in zip(names, figures, (some[0], *weights, *bias), strict=True):
            rows.equal(f"{name} {step}", figure, ours)

    some, steps = train(model, x, y, EPOCHS - 2)
    costs, way = costs + some, way + steps
    costs.append(LOSS(model.forward(x), y))
    weights, bias = (value.ravel() for value in model.state_dict().values())
    print(f"after {EPOCHS} epochs: cost {costs[-1]:.7f}, W {weights}, b {bias}")
    rows.equal(f"cost after {EPOCHS} epochs", "0.0005276", costs[-1])
    rows.equal(f"w1 after {EPOCHS} epochs", "6.4342", weights[0])
    rows.equal(f"w2 after {EPOCHS} epochs", "6.4342", weights[1])
    rows.equal(f"b after {EPOCHS} epochs", "-2.9730", bias[0])
    if plots:
        draw(plots, model, table, costs, way)
    return rows


def flat(model, cost_and_gradients):
    cost, gradients = cost_and_gradients
    return [np.array(cost), *(model.backend.to_numpy(gradient) for gradient in gradients)]


def best_time(function, *arguments):
    return min(timeit.repeat(lambda: function(*arguments), number=20, repeat=5)) / 20


def draw(plots, model, table, costs, way):
    from xpnet.plots import cost_surface, curves, decision_boundary

    with picture(plots, "or_gate_batch", 13, 4) as figure:
        left, middle, right = figure.subplots(1, 3)
        curves({"cost": costs}, "cost", ax=left)
        decision_boundary(model, *table, ax=middle)
        cost_surface(model, *table, LOSS, (("0.weight", (0, 0)), ("0.weight", (1, 0))), path=way, ax=right)


if __name__ == "__main__":
    main(run)
