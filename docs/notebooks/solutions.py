"""Solutions of the exercises: the method `backward` of each class in the notebooks.

To try one, copy it into the cell of the exercise.
"""


class Cube:
    """Backprop by hand, exercise 1."""

    def backward(self, grad_y):
        return grad_y * 3 * self.work.x**2


class Scale:
    """Backprop by hand, exercise 2."""

    def backward(self, grad_y):
        self.weight.grad[...] = self.xp.sum(grad_y * self.work.x, axis=0)
        return grad_y * self.weight.value


class Leaky:
    """From the perceptron to MNIST."""

    def backward(self, grad_y):
        return grad_y * self.xp.where(self.work.x > 0, 1.0, 0.1)


class Pairs:
    """A convolution seen from inside."""

    def backward(self, grad_y):
        x = self.work.x
        a, b = self.weight.value
        grad_x = self.xp.zeros_like(x)
        self.weight.grad[0] = self.xp.sum(grad_y * x[:, :-1])
        self.weight.grad[1] = self.xp.sum(grad_y * x[:, 1:])
        grad_x[:, :-1] += a * grad_y
        grad_x[:, 1:] += b * grad_y
        return grad_x


class Drop:
    """Overfitting and its cures."""

    def backward(self, grad_y):
        return grad_y * self.work.mask


class Softsign:
    """The same run on the CPU and on a GPU."""

    def backward(self, grad_y):
        return grad_y / self.work.size**2


class RowSoftmax:
    """A transformer, number by number."""

    def backward(self, grad_y):
        shares = self.work.shares
        return shares * (grad_y - self.xp.sum(shares * grad_y, axis=-1, keepdims=True))
