"""Training runs of small networks whose steps are captured, shared by several test modules."""

import pytest

import xpnet
from xpnet import callbacks, datasets, layers

X, Y = (a[:203] for a in datasets.digits())
X = X.reshape(203, 64).astype("float32") / 16
IMAGES = X.reshape(-1, 8, 8, 1)
BATCH, STEPS = 20, 11  # the last of them has 3 samples


def mlp(backend, dtype="float32", **options):
    stack = [layers.Dense(24), layers.ReLU(), layers.Dropout(0.3), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=backend, seed=3, dtype=dtype, **options)


def cnn(backend, dtype="float32"):
    stack = [
        *[layers.Conv2D(4, 3, padding="same"), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)],
        *[layers.Residual(layers.Conv2D(4, 3, padding="same"), layers.Tanh()), layers.DepthwiseConv2D(3)],
        *[layers.Conv2DTranspose(4, 3, groups=2), layers.Conv2D(4, 2, groups=2), layers.Softplus()],
        *[layers.AvgPool2D(2), layers.Flatten(), layers.LayerNorm(), layers.Dense(12, l2=1e-3), layers.GELU()],
        *[layers.Dropout(0.2), layers.Dense(10, l1=1e-4)],
    ]
    return xpnet.Sequential(stack, (8, 8, 1), backend=backend, seed=3, dtype=dtype)


class Own(layers.Layer):
    """y = factor(x) · x. Subclasses say what the factor is."""

    def factor(self, x):
        return 1.0

    def forward(self, x):
        self.work.factor = self.factor(x)
        return x * self.work.factor

    def backward(self, grad_y):
        return grad_y * self.work.factor


class Watch(callbacks.Callback):
    """Keeps the fallback reason of the run, and what it captured."""

    def on_train_end(self, model):
        self.fallback_reason, self.captured = self.run.executor.fallback_reason, self.run.executor.captured


def fit(model, x=X, y=Y, more=(), **options):
    """Train and return (history, watch)."""
    watch = Watch()
    options = {"epochs": 3, "batch_size": BATCH, "optimizer": "adam", "verbose": 0, **options}
    return model.fit(x, y, callbacks=[watch, *more], **options), watch


def emulated_cupy(gpu):
    """The emulated cupy, which counts launches and transfers. Skips the test on a real GPU."""
    if gpu.name != "emulated":
        pytest.skip("only the emulation counts")
    return gpu.xp
