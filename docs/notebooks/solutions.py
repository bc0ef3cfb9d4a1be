"""Solutions of the exercises, with the names of the classes in the notebooks."""

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


class Leaky(layers.Layer):
    """From the perceptron to MNIST."""

    def forward(self, x):
        self.work.x = x
        return self.xp.where(x > 0, x, 0.1 * x)

    def backward(self, grad_y):
        return grad_y * self.xp.where(self.work.x > 0, 1.0, 0.1)


class Pairs(layers.Layer):
    """A convolution seen from inside."""

    def build(self, input_shape):
        (time,) = input_shape
        self.weight = self.add_parameter("weight", (2,), "ones")
        return (time - 1,)

    def forward(self, x):
        self.work.x = x
        a, b = self.weight.value
        return a * x[:, :-1] + b * x[:, 1:]

    def backward(self, grad_y):
        x = self.work.x
        a, b = self.weight.value
        grad_x = self.xp.zeros_like(x)
        self.weight.grad[0] = self.xp.sum(grad_y * x[:, :-1])
        self.weight.grad[1] = self.xp.sum(grad_y * x[:, 1:])
        grad_x[:, :-1] += a * grad_y
        grad_x[:, 1:] += b * grad_y
        return grad_x


class Drop(layers.Layer):
    """Overfitting and its cures."""

    rate = 0.5

    def forward(self, x):
        kept = self.random_bits(x) >= self.rate * 2**32  # uniform integers below 2³²
        self.work.mask = kept.astype(x.dtype) / (1 - self.rate)
        return x * self.work.mask

    def backward(self, grad_y):
        return grad_y * self.work.mask


class Softsign(layers.Layer):
    """The same run on the CPU and on a GPU."""

    def forward(self, x):
        self.work.size = 1.0 + self.xp.abs(x)
        return x / self.work.size

    def backward(self, grad_y):
        return grad_y / self.work.size**2


class RowSoftmax(layers.Layer):
    """A transformer, number by number."""

    def forward(self, x):
        e = self.xp.exp(x - self.xp.max(x, axis=-1, keepdims=True))
        self.work.shares = e / self.xp.sum(e, axis=-1, keepdims=True)
        return self.work.shares

    def backward(self, grad_y):
        shares = self.work.shares
        return shares * (grad_y - self.xp.sum(shares * grad_y, axis=-1, keepdims=True))
