"""Solutions of the exercises in the notebooks. They have the names of the classes there."""

from xpnet import layers


class Cube(layers.Layer):
    """Backprop by hand, exercise 1."""

    def forward(self, x):
        self.work.x = x
        return x**3

    def backward(self, grad_y):
        return grad_y * 3 * self.work.x**2


class Scale(layers.Layer):
    """Backprop by hand, exercise 2."""

    def build(self, input_shape):
        self.weight = self.add_parameter("weight", input_shape, "ones")
        return input_shape

    def forward(self, x):
        self.work.x = x
        return x * self.weight.value

    def backward(self, grad_y):
        self.weight.grad[...] = self.xp.sum(grad_y * self.work.x, axis=0)
        return grad_y * self.weight.value
