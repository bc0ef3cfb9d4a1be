"""Exam scores from hours of sleep and study: a 2-3-1 network, trained by gradient descent.

After "Basics of Neural Networks" (Ganesh KT, 2020). No biases; the cost is J = ½ Σ (y − ŷ)².
"""

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import datasets, initializers, layers, losses

LEARNING_RATE, ITERATIONS = 0.1, 1000
COST = losses.HalfSquaredError(reduction="sum")


def network(backend, seed):
    normal = initializers.Normal(0, 1)
    return xpnet.Sequential(
        [
            layers.Dense(3, use_bias=False, weight_initializer=normal),  # z2 = X W1
            layers.Sigmoid(),  # a2 = σ(z2)
            layers.Dense(1, use_bias=False, weight_initializer=normal),  # z3 = a2 W2
            layers.Sigmoid(),  # ŷ = σ(z3)
        ],
        input_shape=2,
        backend=backend,
        seed=seed,
        dtype="float64",
    )


def gradient_descent(model, x, y):
    """Train, and return J of every iteration and the path of two of the weights."""
    x, y = model.backend.asarray(x), model.backend.asarray(y)
    costs, path = [], []
    for _ in range(ITERATIONS):
        estimate = model.forward(x)  # forward
        costs.append(COST(estimate, y))  # loss
        path.append((float(model.parameters[0].value[0, 0]), float(model.parameters[1].value[0, 0])))
        model.backward(COST.gradient(model.backend, estimate, y))  # backward: dJ/dW1 and dJ/dW2
        for parameter in model.parameters:  # update
            parameter.value -= LEARNING_RATE * parameter.grad
    return costs, path


def run(backend="auto", seed=0, plots=None):
    x, y = datasets.exam_scores()
    model = network(backend, seed)
    print("estimates before training", model.predict(x).ravel())
    errors = xpnet.check_gradients(model, x, y, loss=COST)
    costs, path = gradient_descent(model, x, y)
    outputs = model.forward(x)
    costs.append(COST(outputs, y))
    model.backward(COST.gradient(model.backend, outputs, model.backend.asarray(y)))
    slopes = model.backend.to_numpy(model.parameters[0].grad)
    print("estimates after training ", model.predict(x).ravel(), "for", y.ravel())
    print(f"J {costs[0]:.6f} → {costs[-1]:.6f}\ndJ/dW1\n{slopes}")

    rows = Comparison("exam scores, 2-3-1")
    rows.holds("J over the iterations", "falls", f"at each of {ITERATIONS} steps", max(np.diff(costs)) < 0)
    rows.below("J at the end", 0.01, costs[-1])
    rows.below("largest dJ/dW1 at the end", 0.005, abs(slopes).max())
    rows.below("gradients, error against central differences", 1e-6, max(errors.values()))
    if plots:
        draw(plots, model, x, y, costs, path)
    return rows


def draw(plots, model, x, y, costs, path):
    from xpnet.plots import activation, cost_surface, curves

    with picture(plots, "exam_scores", 9.6, 4) as figure:
        left, right = figure.subplots(1, 2)
        curves({"J": costs}, "J", ax=left)
        left.set(yscale="log", xlabel="iteration", ylabel="cost J")
        cost_surface(model, x, y, COST, (("0.weight", (0, 0)), ("2.weight", (0, 0))), path=path, ax=right)
    with picture(plots, "sigmoid") as figure:
        activation(layers.Sigmoid(), ax=figure.subplots())


if __name__ == "__main__":
    main(run)
