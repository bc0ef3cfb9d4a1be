"""A model with two inputs and two outputs, and data for it, that several test modules share."""

import numpy as np

import xpnet
from xpnet import layers

N = 60
RNG = np.random.default_rng(7)
SCENE, META = RNG.normal(size=(N, 5)), RNG.normal(size=(N, 3))
DIGIT, SIZE = (SCENE[:, 0] > 0).astype(int) + (META[:, 0] > 0.5), (META @ [[1.0], [-2.0], [0.5]]) + 0.3
X, Y = [SCENE, META], [DIGIT, SIZE]
LOSSES = {"digit": "softmax_cross_entropy", "size": "mse"}
WEIGHTS = RNG.uniform(0.1, 2.0, size=(2, N))


def two_headed(backend="cpu", dtype="float32", *, noise=0.0, extra=()):
    """Inputs "scene" (5,) and "meta" (3,); outputs "digit", logits of 3 classes, and "size", a number."""
    scene, meta = xpnet.Input((5,), name="scene"), xpnet.Input((3,), name="meta")
    h = layers.Tanh()(layers.Dense(6, l2=1e-3)(layers.Concatenate()([scene, meta])))
    for layer in (layers.Dropout(noise) if noise else layers.Identity(), *extra):
        h = layer(h)
    digit, size = layers.Dense(3, name="digit")(h), layers.Dense(1, name="size")(layers.Concatenate()([h, meta]))
    return xpnet.Model([scene, meta], [digit, size], backend, dtype=dtype)


def fitted(model, x=X, y=Y, **kwargs):
    """The history of a short training."""
    kwargs = {"loss": LOSSES, "batch_size": 16, "epochs": 2, "verbose": 0, **kwargs}
    return model.fit(x, y, **kwargs)
