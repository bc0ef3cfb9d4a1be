"""The effect of weight and bias on a sigmoid neuron: the weight determines its slope, the bias its position.

After "Neural Networks Tutorial – A Pathway to Deep Learning" (adventuresinmachinelearning.com).
"""

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import layers

X = np.linspace(-8, 8, 161)[:, None]
WEIGHTS = (0.5, 1.0, 2.0)  # with a bias of 0
BIASES = (-8.0, 0.0, 8.0)  # with a weight of 5


def neuron(weight, bias, backend):
    return xpnet.Sequential(
        [layers.Dense(1, weight_initializer=[[weight]], bias_initializer=[bias]), layers.Sigmoid()],
        input_shape=1,
        backend=backend,
        dtype="float64",
    )


def slope(model, x):
    """dh/dx, by the backward pass with an upstream gradient of 1."""
    model.forward([[x]])
    return float(model.backward([[1.0]])[0, 0])


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("weight and bias")
    by_weight = {f"w = {w:g}": neuron(w, 0.0, backend) for w in WEIGHTS}
    by_bias = {f"b = {b:g}": neuron(5.0, b, backend) for b in BIASES}
    for w, (name, model) in zip(WEIGHTS, by_weight.items(), strict=True):
        print(f"{name}: slope {slope(model, 0.0):g} at x = 0")
        rows.exactly(f"slope at 0, {name}", f"{w / 4:g}", slope(model, 0.0))  # σ′(0) = ¼
    for b, (name, model) in zip(BIASES, by_bias.items(), strict=True):
        h = model.predict([[-b / 5]])[0, 0]
        print(f"{name}: h = {h:g} at x = {0 - b / 5:g}")
        rows.exactly(f"h at x = {0 - b / 5:g}, {name}", "0.5", h)
    if plots:
        draw(plots, by_weight, by_bias)
    return rows


def draw(plots, by_weight, by_bias):
    from xpnet.plots import COLORS

    with picture(plots, "weight_and_bias", 9.6, 4) as figure:
        for ax, models in zip(figure.subplots(1, 2), (by_weight, by_bias), strict=True):
            for (name, model), color, style in zip(models.items(), COLORS, ("-", "--", "-."), strict=False):
                ax.plot(X, model.predict(X), style, color=color, label=name)  # forward
            ax.set(xlabel="x", ylabel="h(x)")
            ax.grid(alpha=0.3)
            ax.legend()


if __name__ == "__main__":
    main(run)
