# %% [markdown]
# # Backprop by hand
#
# Backpropagation is the chain rule, applied from the loss back to the inputs. Here is
# every number of it, for a network of three neurons: first with NumPy, one line per
# formula, then with xpnet. At the end you write two backward passes.

# %%
import matplotlib.pyplot as plt
import numpy as np
from exercises import grade

import xpnet
from xpnet import layers, plots

# %% [markdown]
# ## Forward
#
# There are two inputs, two hidden neurons and one output. A neuron adds up its inputs
# times their weights, adds its bias, and applies the sigmoid σ(z) = 1 / (1 + e⁻ᶻ). All
# weights are 1 and all biases 0. The target is 1, and the loss is the squared error.

# %%
x, target = np.array([-2.0, -1.0]), 1.0
w1, w2 = (
    np.ones((2, 2)),
    np.ones(2),
)  # w1: one row per input, one column per hidden neuron


def sigma(z):
    return 1 / (1 + np.exp(-z))


z1 = x @ w1  # the sums of the hidden neurons
h = sigma(z1)
z2 = h @ w2  # the sum of the output neuron
y = sigma(z2)
loss = (y - target) ** 2
print(f"z1 = {z1}\nh = {h.round(5)}\nz2 = {z2:.5f}\ny = {y:.5f}\nL = {loss:.5f}")

# %% [markdown]
# ## Backward
#
# The question is how the loss changes if a weight changes a little: ∂L/∂w. The chain
# rule multiplies the derivatives along the way from the weight to the loss, and the way
# is walked backward, so that no product is computed twice.
#
# Each step needs one **local derivative**, which the values of the forward pass give:
#
# - the loss: ∂L/∂y = 2 (y − target)
# - the sigmoid: ∂y/∂z = y (1 − y)
# - the sum z = Σ wᵢ hᵢ: ∂z/∂wᵢ = hᵢ, and ∂z/∂hᵢ = wᵢ

# %%
grad_y = 2 * (y - target)
grad_z2 = grad_y * y * (1 - y)
grad_w2 = grad_z2 * h
grad_h = grad_z2 * w2
grad_z1 = grad_h * h * (1 - h)
grad_w1 = np.outer(x, grad_z1)
print(f"∂L/∂y = {grad_y:.5f}\n∂L/∂z2 = {grad_z2:.5f}\n∂L/∂w2 = {grad_w2.round(5)}")
print(f"∂L/∂h = {grad_h.round(5)}\n∂L/∂z1 = {grad_z1.round(5)}")
print(f"∂L/∂w1 =\n{grad_w1.round(5)}")

# %% [markdown]
# `grad_w1` is positive: a larger weight makes the loss larger, because its input is
# negative and the output should grow.
#
# Is it right? Change one weight a little in both directions, and see how the loss
# changes. This is a **finite difference**. It needs two forward passes for each weight,
# and backprop needs one backward pass for all of them.


# %%
def loss_for(w):
    """The loss, if the first weight of the first hidden neuron is w."""
    changed = w1.copy()
    changed[0, 0] = w
    return (sigma(sigma(x @ changed) @ w2) - target) ** 2


difference = (loss_for(1 + 1e-5) - loss_for(1 - 1e-5)) / 2e-5
print(f"finite difference {difference:.7f}, backprop {grad_w1[0, 0]:.7f}")
assert abs(difference - grad_w1[0, 0]) < 1e-9

# %% [markdown]
# ## The same with xpnet
#
# `xpnet.explain` runs both passes and shows every number. In each layer, **upstream**
# is what comes from the loss, ∂L/∂output, and **downstream** is what the layer passes
# on, ∂L/∂input. Compare: the downstream gradient of a layer is the upstream gradient of
# the one before it.
#
# - In a `Sigmoid`, downstream = upstream · local.
# - In a `Dense` layer, the local derivative of the outputs is the weights, so
#   downstream = upstream @ weightsᵀ. The gradient of a weight is its input times the
#   upstream gradient of its neuron.

# %%
model = xpnet.Sequential(
    [
        layers.Dense(2, weight_initializer=1.0, use_bias=False),
        layers.Sigmoid(),
        layers.Dense(1, weight_initializer=1.0, use_bias=False),
        layers.Sigmoid(),
    ],
    input_shape=2,
    dtype="float64",
    backend="cpu",
)
explained = xpnet.explain(model, [x], [[target]], loss="mse", optimizer=1.0)
assert np.allclose(explained.parameters["0.weight"].gradient, grad_w1)
assert np.allclose(explained["1"].downstream, grad_z1)
explained

# %% [markdown]
# In the picture, each line has its weight and, after ∂, its gradient.

# %% alt="The network, with the value and the derivative of each weight and bias"
plots.network(model, explanation=explained)

# %% [markdown]
# The gradients of the first layer are small compared with ∂L/∂y = −0.95. Each sigmoid
# on the way multiplies by its slope, which is at most a quarter, and here 0.045 in the
# hidden layer. In deep networks of sigmoids little is left: this is the *vanishing
# gradient*.

# %% alt="The sigmoid and its derivative"
slope = explained["1"].local[0, 0]
print(f"slope of the hidden sigmoids: {slope:.4f}")
assert abs(slope - 0.045) < 5e-4
plots.activation(layers.Sigmoid())

# %% [markdown]
# ## Learn
#
# The update of a weight is −rate · gradient. Repeat that, and the output approaches the
# target.

# %%
losses = []
for _ in range(200):
    explained = xpnet.explain(model, [x], [[target]], loss="mse", optimizer=1.0)
    for parameter in model.parameters:
        parameter.value += explained.parameters[parameter.name].update
    losses.append(explained.loss)
print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}, output {model.predict([x])[0, 0]:.3f}")
assert losses[-1] < 0.01

# %% alt="The loss by training step"
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(losses)
ax.set(xlabel="step", ylabel="loss")
ax.grid(alpha=0.3)

# %% [markdown]
# In real training, `model.fit` does these steps, faster.
#
# ## Exercise 1: a layer without parameters
#
# The layer below computes y = x³. Its `backward` gets `grad_y` = ∂L/∂y, an array in the
# shape of y, and has to return ∂L/∂x. What `forward` stores in `self.work` can be used
# there. Replace `None`, run the cell, then the check.


# %% tags=["exercise"]
class Cube(layers.Layer):
    def forward(self, x):
        self.work.x = x
        return x**3

    def backward(self, grad_y):
        x = self.work.x
        return None  # ∂L/∂x


# %%
grade(
    Cube(), (3,), hint="downstream = upstream · local, and the derivative of x³ is 3x²."
)

# %% [markdown]
# ## Exercise 2: a layer with a parameter
#
# This layer multiplies each feature by a weight of its own: y = x · w, for x (N,
# features). Its `backward` has two tasks: to write ∂L/∂w into `self.weight.grad`, which
# has one number per feature, and to return ∂L/∂x. All N samples of the batch use the
# same weight, so their gradients add up.


# %% tags=["exercise"]
class Scale(layers.Layer):
    def build(self, input_shape):
        self.weight = self.add_parameter("weight", input_shape, "ones")
        return input_shape

    def forward(self, x):
        self.work.x = x
        return x * self.weight.value

    def backward(self, grad_y):
        # self.weight.grad[...] = …
        return None  # ∂L/∂x


# %%
grade(
    Scale(),
    (3,),
    hint="∂y/∂w = x, summed over the samples by self.xp.sum(…, axis=0); ∂y/∂x = w.",
)

# %% [markdown]
# Solutions are in [solutions.py](solutions.py), and [Write a
# layer](../writing-a-layer.md) says what else a layer can do.
