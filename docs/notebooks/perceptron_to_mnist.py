# %% [markdown]
# # From the perceptron to MNIST
#
# One neuron, then a hidden layer, then a convolutional network: each step learns
# something that the step before cannot.

# %%
import os
import time

import matplotlib.pyplot as plt
import numpy as np
from exercises import grade

import xpnet
from xpnet import datasets, layers, losses, optimizers, plots

# %% [markdown]
# ## One neuron
#
# A perceptron outputs 1 if the weighted sum of its inputs is at least 0, and 0
# otherwise. It learns from its mistakes only: if the output is wrong, each weight
# changes by rate · (target − output) · input. In xpnet that is gradient descent on a
# `Step`, which passes the gradient on unchanged.


# %%
def perceptron(gate, epochs=20):
    """A trained perceptron, and the number of wrong rows after each epoch."""
    x, y = datasets.logic_gate(gate)
    model = xpnet.Sequential(
        [layers.Dense(1), layers.Step()], input_shape=2, seed=0, backend="cpu"
    )
    wrong = []
    for _ in range(epochs):
        model.fit(
            x,
            y,
            losses.HalfSquaredError(),
            optimizers.SGD(0.5),
            batch_size=1,
            shuffle=False,
            verbose=0,
        )
        wrong.append(int((model.predict(x) != y).sum()))
    return model, wrong


trained = {gate: perceptron(gate) for gate in ("and", "or", "xor")}
for gate, (_, wrong) in trained.items():
    print(f"{gate:4s} wrong rows after each epoch: {wrong}")
assert trained["and"][1][-1] == trained["or"][1][-1] == 0 < min(trained["xor"][1])

# %% [markdown]
# AND and OR are learned. XOR is not, and more epochs would not help: the boundary of
# one neuron is a straight line, and no straight line separates the two classes of XOR.

# %% alt="The straight boundaries of AND and OR, and one that misses XOR"
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for ax, (gate, (model, _)) in zip(axes, trained.items(), strict=True):
    plots.decision_boundary(model, *datasets.logic_gate(gate), ax=ax)
    ax.set_xlabel(f"$x_1$, {gate.upper()}")

# %% [markdown]
# ## A hidden layer
#
# With four hidden neurons, each of which draws a line of its own, XOR is easy. `Step`
# has no useful slope, so the neurons are smooth now: `Tanh`, and for the output a
# `Sigmoid`.

# %% alt="The loss by epoch, and boundaries that separate the classes of XOR"
x, y = datasets.logic_gate("xor")
xor = xpnet.Sequential(
    [layers.Dense(4), layers.Tanh(), layers.Dense(1), layers.Sigmoid()],
    input_shape=2,
    seed=0,
    backend="cpu",
)
history = xor.fit(
    x,
    y,
    loss="mse",
    optimizer=optimizers.Adam(0.05),
    epochs=300,
    batch_size=None,
    verbose=0,
)
print(xor.predict(x).round(2).ravel(), "for the targets", y.ravel())
assert abs(xor.predict(x) - y).max() < 0.1

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
plots.curves(history, ax=left)
plots.decision_boundary(xor, x, y, ax=right)
plt.show()

# %% [markdown]
# ## Digits
#
# The same works for images: a pixel is an input, and there is an output for each class.
# xpnet ships 1797 handwritten digits of 8×8 pixels. If the folder of MNIST is in the
# environment variable `XPNET_DATA_DIR`, its 28×28 images are used instead: 6000 for
# training, and 5000 for testing.

# %% alt="Sixteen digits with their labels"
if "XPNET_DATA_DIR" in os.environ:
    (x, y), (x_test, y_test) = datasets.mnist()
    x, y, x_test, y_test, scale, epochs = (
        x[:6000],
        y[:6000],
        x_test[:5000],
        y_test[:5000],
        1 / 255,
        5,
    )
else:
    x, y = datasets.digits()
    test = np.arange(len(x)) % 4 == 0
    x_test, y_test, x, y, scale, epochs = (
        x[test],
        y[test],
        x[~test],
        y[~test],
        1 / 16,
        25,
    )
size = x.shape[1:]
print(f"{len(x)} images of {size} pixels for training, {len(x_test)} for testing")
plots.image_grid(x[:16], titles=y[:16])

# %% [markdown]
# Three networks, from the simplest to the best. The last layer of each returns ten
# logits. The loss, softmax cross-entropy, turns them into probabilities.

# %%
networks = {
    "one layer": [layers.Flatten(), layers.Dense(10)],
    "a hidden layer": [
        layers.Flatten(),
        layers.Dense(64),
        layers.ReLU(),
        layers.Dense(10),
    ],
    "convolutions": [
        layers.Reshape((*size, 1)),
        layers.Conv2D(16, 3, padding="same", weight_initializer="he_uniform"),
        layers.ReLU(),
        layers.MaxPool2D(2),
        layers.Conv2D(32, 3, padding="same", weight_initializer="he_uniform"),
        layers.ReLU(),
        layers.MaxPool2D(2),
        layers.Flatten(),
        layers.Dense(10),
    ],
}
models, histories = {}, {}
for name, stack in networks.items():
    models[name] = model = xpnet.Sequential(
        [layers.Rescale(scale), *stack], input_shape=size, seed=0, backend="cpu"
    )
    start = time.perf_counter()
    histories[name] = model.fit(
        x,
        y,
        optimizer=optimizers.Adam(0.003),
        epochs=epochs,
        batch_size=32,
        validation_data=(x_test, y_test),
        verbose=0,
    )
    accuracy, count = (
        histories[name]["val_accuracy"][-1],
        sum(p.size for p in model.parameters),
    )
    seconds = time.perf_counter() - start
    print(f"{name:15s}{count:6,} parameters, accuracy {accuracy:.3f}, {seconds:.1f} s")
final = [history["val_accuracy"][-1] for history in histories.values()]
assert final[2] > max(final[:2])

# %% [markdown]
# One layer is a perceptron for each class, and can only add up the evidence of single
# pixels. The hidden layer combines pixels, which helps with the images of MNIST, and
# little with the small digits. Convolutions look at small neighborhoods, with the same
# weights everywhere, and are best by far.

# %% alt="The validation accuracy of each network by epoch"
plots.curves(histories, "val_accuracy")

# %% [markdown]
# The weights of the first network are images, because there is one weight per pixel and
# class: blue where ink raises the score of the class, red where it lowers it.

# %% alt="The weights of each class as an image"
plots.filters(models["one layer"], size, columns=5)

# %% [markdown]
# Which digits does the best network confuse?

# %% alt="How often each digit was taken for each other one"
best = models["convolutions"]
plots.confusion_matrix(y_true=y_test, y_pred=best.predict(x_test))

# %% alt="Digits that the network gets wrong, with label and guess"
wrong = np.flatnonzero(best.predict(x_test).argmax(axis=1) != y_test)[:8]
guesses = best.predict(x_test[wrong]).argmax(axis=1)
titles = [
    f"{label}, not {guess}" for label, guess in zip(y_test[wrong], guesses, strict=True)
]
plots.image_grid(x_test[wrong], titles=titles)

# %% [markdown]
# ## Exercise: the slope of a ReLU
#
# The hidden neurons above are ReLUs, y = max(x, 0). Write the backward pass of a
# *leaky* ReLU: y = x where x > 0, and y = 0.1 x elsewhere. Both branches are needed,
# for each element of x.


# %% tags=["exercise"]
class Leaky(layers.Layer):
    def forward(self, x):
        self.work.x = x
        return self.xp.where(x > 0, x, 0.1 * x)

    def backward(self, grad_y):
        return None  # ∂L/∂x


# %%
grade(
    Leaky(),
    (3,),
    hint="the local derivative is 1 where x > 0, and 0.1 elsewhere: self.xp.where.",
)

# %% [markdown]
# A solution is in [solutions.py](solutions.py). Next: [a convolution seen from
# inside](convolution_from_inside.py), and [Train on MNIST](../mnist.md) for all its
# 60,000 images.
