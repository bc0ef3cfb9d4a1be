"""The check of the exercises: gradients against finite differences, and a hint."""

import math

import numpy as np

import xpnet
from xpnet import layers


def grade(layer, input_shape, hint):
    """Print whether `backward` of this layer is right, for inputs (N, *input_shape).

    `xpnet.check_gradients` compares it with finite differences, in a small network.
    hint: printed if it is not right.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, *input_shape)), rng.normal(size=(4, 2))
    try:
        model = xpnet.Sequential(
            [layer, layers.Tanh(), layers.Flatten(), layers.Dense(2)],
            input_shape,
            "cpu",
        )
        errors = xpnet.check_gradients(model, x, y, "mse", inputs=True)
    except Exception as error:  # of the learner's code
        print(f"Not yet: {type(error).__name__}: {error}\nHint: {hint}")
        return
    own = {
        name.removeprefix("0."): error
        for name, error in errors.items()
        if not name.startswith("3.")
    }
    wrong = {
        ("x" if name == "inputs" else name): error
        for name, error in own.items()
        if error >= 1e-6
    }
    if not wrong:
        largest = max(own.values())
        print(f"Right: backward agrees with finite differences (error {largest:.0e}).")
        return
    print("Not yet:")
    for name, error in wrong.items():
        print(
            f"  ∂L/∂{name} is missing."
            if math.isinf(error)
            else f"  ∂L/∂{name} is wrong: relative error {error:.2g}."
        )
    print(f"Hint: {hint}")
