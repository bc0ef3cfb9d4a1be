"""Gender from weight and height, by stochastic gradient descent with one person per step.

After "A simple and quick guideline" (following Victor Zhou's introduction to neural networks).
"""

from common import Comparison, main, picture

import xpnet
from xpnet import datasets, initializers, layers, losses

LEARNING_RATE, EPOCHS = 0.1, 1000
MSE = losses.MeanSquaredError()


def network(backend, seed):
    normal = initializers.Normal(0, 1)
    return xpnet.Sequential(
        [
            layers.Dense(2, weight_initializer=normal, bias_initializer=normal),  # w1 … w4, b1, b2
            layers.Sigmoid(),  # h1, h2
            layers.Dense(1, weight_initializer=normal, bias_initializer=normal),  # w5, w6, b3
            layers.Sigmoid(),  # o1
        ],
        input_shape=2,
        backend=backend,
        seed=seed,
        dtype="float64",
    )


def train(model, x, y):
    """Train, and return the loss of all four people after every tenth epoch."""
    x, y = model.backend.asarray(x), model.backend.asarray(y)
    history = []
    for epoch in range(EPOCHS):
        for i in range(len(x)):
            person, truth = x[i : i + 1], y[i : i + 1]
            estimate = model.forward(person)  # forward
            slope = MSE.gradient(model.backend, estimate, truth)  # loss: dL/dŷ = -2 (y - ŷ)
            model.backward(slope)  # backward
            for parameter in model.parameters:  # update
                parameter.value -= LEARNING_RATE * parameter.grad
        if epoch % 10 == 0:
            history.append(MSE(model.forward(x), y))
            print(f"epoch {epoch} loss {history[-1]:.3f}")
    return history


def run(backend="auto", seed=0, plots=None):
    x, y = datasets.weight_height()
    model = network(backend, seed)
    history = train(model, x, y)
    emily, frank = model.predict([[-7.0, -3.0], [20.0, 2.0]]).ravel()
    print(f"Emily {emily:.3f}, Frank {frank:.3f}")

    rows = Comparison("weight and height → gender")
    rows.below("MSE at the end", 0.005, MSE(model.predict(x), y))
    rows.above("Emily, (−7, −3)", 0.9, emily)
    rows.below("Frank, (20, 2)", 0.1, frank)
    if plots:
        draw(plots, model, x, y, history)
    return rows


def draw(plots, model, x, y, history):
    from xpnet.plots import curves, decision_boundary

    with picture(plots, "weight_height", 9.6, 4) as figure:
        left, right = figure.subplots(1, 2)
        curves({"loss": history}, "loss", ax=left)
        left.set(xlabel="tens of epochs", ylabel="mean squared error")
        decision_boundary(model, x, y, ax=right, labels=("male", "female"))
        right.set(xlabel="weight − 135 pounds", ylabel="height − 66 inches")


if __name__ == "__main__":
    main(run)
