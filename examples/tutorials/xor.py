"""XOR, learned by a 3-4-1 network without biases; a third input that is always 1 replaces them.

After the tutorial of a two-layer network in plain NumPy. The loss is the sum of squares, the learning rate is 1.
"""

from common import Comparison, main, picture

import xpnet
from xpnet import datasets, initializers, layers, losses

ITERATIONS = 1500
SQUARES = losses.MeanSquaredError()  # (y - ŷ)² of each row; the gradient is that of the sum over the rows


def network(backend, seed):
    uniform = initializers.Uniform(0, 1)
    return xpnet.Sequential(
        [
            layers.Dense(4, use_bias=False, weight_initializer=uniform),
            layers.Sigmoid(),
            layers.Dense(1, use_bias=False, weight_initializer=uniform),
            layers.Sigmoid(),
        ],
        input_shape=3,
        backend=backend,
        seed=seed,
        dtype="float64",
    )


def train(model, x, y):
    """Train, and return the sum of squares of every iteration."""
    x, y = model.backend.asarray(x), model.backend.asarray(y)
    history = []
    for _ in range(ITERATIONS):
        output = model.forward(x)  # feedforward
        history.append(len(x) * SQUARES(output, y))  # loss
        model.backward(SQUARES.gradient(model.backend, output, y))  # backprop
        for parameter in model.parameters:  # update
            parameter.value -= parameter.grad
    return history


def run(backend="auto", seed=0, plots=None):
    x, y = datasets.xor_with_constant()
    model = network(backend, seed)
    history = train(model, x, y)
    outputs = model.predict(x)
    print(outputs)
    rows = Comparison("XOR with a constant, 3-4-1")
    rows.below("furthest output from (0, 1, 1, 0)", 0.1, abs(outputs - y).max())
    if plots:
        draw(plots, model, history)
    return rows


def draw(plots, model, history):
    from xpnet.plots import curves, network

    with picture(plots, "xor", 10.4, 4.4) as figure:
        left, right = figure.subplots(1, 2)
        curves({"loss": history}, "loss", ax=left)
        left.set(xlabel="iteration", ylabel="sum of squares")
        network(model, ax=right)


if __name__ == "__main__":
    main(run)
