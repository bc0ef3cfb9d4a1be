"""Gradient descent in one dimension: down the curve f(x) = x⁴ − 3x³ + 2 from x = 6, by steps of 0.01 · f′(x).

After "Neural Networks Tutorial – A Pathway to Deep Learning" (adventuresinmachinelearning.com). The curve is a layer
of our own: forward is f, backward the chain rule with f′. What descends is its input.
"""

from common import Comparison, main, picture

import xpnet
from xpnet import layers

START, STEP, PRECISION = 6.0, 0.01, 0.00001


class Quartic(layers.Layer):
    """y = x⁴ − 3x³ + 2, lowest at x = 9/4."""

    def forward(self, x):
        self.work.x = x
        return x**4 - 3 * x**3 + 2

    def backward(self, grad_y):
        """dy/dx = 4x³ − 9x²."""
        x = self.work.x
        return grad_y * (4 * x**3 - 9 * x**2)


def descend(curve, most=1000):
    """The way from the start to where a step is no longer than the precision."""
    x, one = curve.backend.asarray([[START]]), curve.backend.asarray([[1.0]])
    way = [START]
    for _ in range(most):
        curve.forward(x)  # forward: the height, which here is the loss
        slope = curve.backward(one)  # backward
        x = x - STEP * slope  # update
        way.append(float(x[0, 0]))
        if abs(way[-1] - way[-2]) <= PRECISION:
            break
    return way


def run(backend="auto", seed=0, plots=None):
    curve = Quartic()
    curve.build((1,), backend=backend, dtype="float64")
    way = descend(curve)
    print(f"The local minimum occurs at {way[-1]:f}, after {len(way) - 1} steps")
    errors = xpnet.check_gradients(
        xpnet.Sequential([Quartic()], input_shape=1, backend=backend), [[6.0]], [[0.0]], loss="mse", inputs=True
    )
    rows = Comparison("descent in one dimension")
    rows.equal("the minimum", "2.249965", way[-1])
    rows.exactly("steps", "70", len(way) - 1)
    rows.below("f′, error against central differences", 1e-6, errors["inputs"])
    if plots:
        draw(plots, way)
    return rows


def draw(plots, way):
    from xpnet.plots import descent

    with picture(plots, "gradient_descent", 9.6, 4) as figure:
        left, right = figure.subplots(1, 2)
        for ax, part, title in ((left, way, "the whole way"), (right, way[1:], "from the first step on")):
            descent(lambda x: x**4 - 3 * x**3 + 2, part, ax=ax)
            ax.set_title(title)


if __name__ == "__main__":
    main(run)
