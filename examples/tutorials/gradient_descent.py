"""Gradient descent in one dimension: from x = 6 down the curve f(x) = x⁴ − 3x³ + 2, in steps of 0.01 · f′(x).

After "Neural Networks Tutorial – A Pathway to Deep Learning" (adventuresinmachinelearning.com). The curve is a custom
layer: its forward computes f, and its backward applies the chain rule with f′. The descent changes the input.
"""

from common import Comparison, main, picture

import xpnet
from xpnet import layers

START, STEP, PRECISION = 6.0, 0.01, 0.00001


class Quartic(layers.Layer):
    """y = x⁴ − 3x³ + 2, with its minimum at x = 9/4."""

    def forward(self, x):
        self.work.x = x
        return x**4 - 3 * x**3 + 2

    def backward(self, grad_y):
        """dy/dx = 4x³ − 9x²."""
        x = self.work.x
        return grad_y * (4 * x**3 - 9 * x**2)


def descend(curve, max_steps=1000):
    """The points of the descent, which ends when a step is not longer than the precision."""
    x, one = curve.backend.asarray([[START]]), curve.backend.asarray([[1.0]])
    path = [START]
    for _ in range(max_steps):
        curve.forward(x)  # forward: the value of f, which here is the loss
        slope = curve.backward(one)  # backward
        x = x - STEP * slope  # update
        path.append(float(x[0, 0]))
        if abs(path[-1] - path[-2]) <= PRECISION:
            break
    return path


def run(backend="auto", seed=0, plots=None):
    curve = Quartic()
    curve.build((1,), backend=backend, dtype="float64")
    path = descend(curve)
    print(f"The local minimum occurs at {path[-1]:f}, after {len(path) - 1} steps")
    errors = xpnet.check_gradients(
        xpnet.Sequential([Quartic()], input_shape=1, backend=backend), [[6.0]], [[0.0]], loss="mse", inputs=True
    )
    rows = Comparison("descent in one dimension")
    rows.equal("the minimum", "2.249965", path[-1])
    rows.exactly("steps", "70", len(path) - 1)
    rows.below("f′, error against central differences", 1e-6, errors["inputs"])
    if plots:
        draw(plots, path)
    return rows


def draw(plots, path):
    from xpnet.plots import descent

    with picture(plots, "gradient_descent", 9.6, 4) as figure:
        left, right = figure.subplots(1, 2)
        for ax, part, title in ((left, path, "the whole descent"), (right, path[1:], "without the first step")):
            descent(lambda x: x**4 - 3 * x**3 + 2, part, ax=ax)
            ax.set_title(title)


if __name__ == "__main__":
    main(run)
