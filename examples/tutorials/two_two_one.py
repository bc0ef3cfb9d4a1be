"""A network of three neurons, two hidden and one output, step by step: forward, the loss, and one derivative.

After "A simple and quick guideline" (following Victor Zhou's introduction to neural networks).
"""

from common import Comparison, main, picture

import xpnet
from xpnet import layers, losses


def network(hidden, output, backend):
    """hidden, output: weights with one row per input and one column per neuron."""
    return xpnet.Sequential(
        [
            layers.Dense(2, weight_initializer=hidden),  # h1, h2; biases start at 0
            layers.Sigmoid(),
            layers.Dense(1, weight_initializer=output),  # o1
            layers.Sigmoid(),
        ],
        input_shape=2,
        backend=backend,
        dtype="float64",
    )


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("2-2-1 by hand")
    mse = losses.MeanSquaredError()

    # The forward pass, with the weights (0, 1) in every neuron.
    model = network([[0, 0], [1, 1]], [[0], [1]], backend)
    h = model.activations([[2.0, 3.0]])["1"][0, 0]
    output = model.predict([[2.0, 3.0]])[0, 0]
    print(f"h1 = h2 = {h}\no1 = {output}")
    rows.equal("h1 = h2", "0.9525741268224334", h)
    rows.equal("output", "0.7216325609518421", output)

    # The loss of a network that always predicts 0, male.
    rows.exactly("MSE of (1, 0, 0, 1) against zeros", "0.5", mse([[0.0]] * 4, [1, 0, 0, 1]))

    # The derivative of Alice's loss with respect to w1, with all weights 1.
    model = network([[1, 1], [1, 1]], [[1], [1]], backend)
    alice, female = [[-2.0, -1.0]], [[1.0]]
    explained = xpnet.explain(model, alice, female, mse)  # forward, loss and backward
    print(explained)
    y = explained["3"].output[0, 0]
    slope = explained.parameters["0.weight"].gradient[0, 0]  # w1 is the weight of the first input of h1
    print(f"ŷ = {y:.4f}, L = {explained.loss:.4f}, ∂L/∂w1 = {slope:.7f}: the loss increases a little with w1")
    rows.equal("output, all weights 1", "0.5237", y)
    rows.equal("∂L/∂w1", "0.0214695", slope)
    if plots:
        from xpnet import plots as draw

        with picture(plots, "two_two_one", 9, 4) as figure:
            draw.network(model, ax=figure.subplots(), explanation=explained)
    return rows


if __name__ == "__main__":
    main(run)
