"""Custom layers, shared by several test modules."""

import numpy as np

from xpnet import layers


class Counted(layers.Layer):
    """x · gain, and a buffer that counts the training samples. It has constructor arguments, for tests of files."""

    def __init__(self, start=2.0, inner=None):
        self.start, self.inner = start, inner

    def build(self, input_shape):
        self.gain = self.add_parameter("gain", input_shape, self.start)
        self.count = self.add_buffer("count", np.zeros(3))
        return input_shape

    def forward(self, x):
        self.work.x = x
        if self.context.training:
            self.count.value += float(len(x))
        return x * self.gain.value

    def backward(self, grad_y):
        self.gain.grad[...] = self.xp.sum(grad_y * self.work.x, axis=0)
        return grad_y * self.gain.value


class Spy(layers.Layer):
    """y = x; records each training input on the host."""

    def build(self, input_shape):
        self.seen = []
        return input_shape

    def forward(self, x):
        if self.context.training:
            self.seen.append(self.backend.to_numpy(x).copy())
        return x

    def backward(self, grad_y):
        return grad_y
