"""One neuron: the sigmoid of two inputs times their weights plus a bias.

After "A simple and quick guideline" (following Victor Zhou's introduction to neural networks).
"""

from common import Comparison, main, picture

import xpnet
from xpnet import layers


def neuron(backend):
    return xpnet.Sequential(
        [layers.Dense(1, weight_initializer=[[0], [1]], bias_initializer=[4]), layers.Sigmoid()],
        input_shape=2,
        backend=backend,
        dtype="float64",
    )


def run(backend="auto", seed=0, plots=None):
    model = neuron(backend)
    y = model.predict([[2.0, 3.0]])[0, 0]  # forward: σ(0·2 + 1·3 + 4)
    print(y)
    rows = Comparison("a neuron")
    rows.equal("output", "0.9990889488055994", y)
    if plots:
        from xpnet.plots import network

        with picture(plots, "neuron", 5, 3) as figure:
            network(model, ax=figure.subplots())
    return rows


if __name__ == "__main__":
    main(run)
