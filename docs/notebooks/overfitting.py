# %% [markdown]
# # Overfitting and its cures
#
# A network overfits if it learns its training samples by heart, with their errors,
# instead of what they have in common. Here you provoke that, see how to notice it, and
# compare five cures.

# %%
import matplotlib.pyplot as plt
import numpy as np
from exercises import grade

import xpnet
from xpnet import augment, callbacks, datasets, layers, optimizers, plots

# %% [markdown]
# ## Few samples, some of them wrong
#
# There are 300 digits for training, and a fifth of their labels are replaced by random
# ones, as careless people would. The 400 digits for validation and the 997 for testing
# have their true labels.

# %%
rng = np.random.default_rng(0)
images, labels = datasets.digits()
order = rng.permutation(len(images))
images, labels = images[order] / 16.0, labels[order]
validation, test = (images[:400], labels[:400]), (images[400:1397], labels[400:1397])
x, y = images[1397:1697], labels[1397:1697].copy()
careless = rng.random(300) < 0.2
y[careless] = rng.integers(0, 10, careless.sum())
print(f"{(y != labels[1397:1697]).sum()} of {len(y)} labels are wrong")

# %% [markdown]
# The network is larger than the task needs: 256 hidden neurons.


# %% alt="The training loss falls to 0, while the validation loss rises again"
def network(hidden=256, before=(), after=()):
    """before, after: layers before and after the hidden one."""
    stack = [
        layers.Reshape((8, 8, 1)),
        *before,
        layers.Flatten(),
        layers.Dense(hidden),
        layers.ReLU(),
        *after,
    ]
    return xpnet.Sequential(
        [*stack, layers.Dense(10)], input_shape=(8, 8), seed=0, backend="cpu"
    )


def train(model, optimizer=None, stop=()):
    return model.fit(
        x,
        y,
        optimizer=optimizer or optimizers.Adam(0.003),
        epochs=150,
        batch_size=32,
        validation_data=validation,
        callbacks=stop,
        verbose=0,
    )


model = network()
history = train(model)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plots.curves(history, ax=left)
plots.curves(history, "accuracy", ax=right)
best, last = max(history["val_accuracy"]), history["val_accuracy"][-1]
print(f"training accuracy {history['accuracy'][-1]:.3f}")
print(f"validation accuracy {last:.3f}, at best {best:.3f}")
assert history["accuracy"][-1] == 1.0
assert best - last > 0.05

# %% [markdown]
# Compare the solid and the dashed curves. The training loss falls to 0, and the network
# has learned every label, also the wrong ones. The validation loss falls at first,
# while the network learns what digits look like, and then rises, while it learns the
# errors. So always look at data that the network does not train on: the training loss
# cannot tell.
#
# To watch such curves while a network trains, pass `callbacks=plots.LivePlot()` to
# `fit`: a notebook then redraws them after each epoch.
#
# ## The cures
#
# - **Stop early**: keep the weights of the epoch with the lowest validation loss.
# - **A smaller network** has no room for the exceptions.
# - **Weight decay** pulls all weights toward 0, so that only what helps many samples
#   stays.
# - **Dropout** sets half of the hidden neurons to 0 in each step, at random. No neuron
#   can rely on a single other one, and a single sample cannot be memorized by a few of
#   them.
# - **Augmentation** turns and shifts each image a little, differently in each epoch.
#   The network never sees an image twice.

# %%
cures = {
    "none": (network(), {}),
    "early stopping": (network(), {"stop": [callbacks.EarlyStopping(patience=10)]}),
    "8 hidden neurons": (network(hidden=8), {}),
    "weight decay": (
        network(),
        {"optimizer": optimizers.AdamW(0.003, weight_decay=1.0)},
    ),
    "dropout": (network(after=[layers.Dropout(0.5)]), {}),
    "augmentation": (
        network(before=[augment.RandomAffine(rotation=10, shift=0.7)]),
        {},
    ),
}
histories, accuracies = {}, {}
print(f"{'cure':18s}epochs  training  test")
for name, (cured, options) in cures.items():
    histories[name] = train(cured, **options)
    accuracies[name] = cured.evaluate(*test)["accuracy"]
    seen = histories[name]["accuracy"]
    print(f"{name:18s}{len(seen):6d}  {seen[-1]:8.3f} {accuracies[name]:6.3f}")

# %% alt="The validation loss by epoch, without a cure and with each of the five"
plots.curves(histories, "val_loss")

# %% [markdown]
# Every cure helps. Look at the training accuracy too: without a cure it is 1, although
# a fifth of the labels is wrong. A network that ignored the wrong labels would reach
# 243 / 300 = 0.81, and the cured ones come nearer to that.
#
# The cures can be combined:

# %%
combined = network(
    before=[augment.RandomAffine(rotation=10, shift=0.7)], after=[layers.Dropout(0.5)]
)
histories["combined"] = train(combined, stop=[callbacks.EarlyStopping(patience=20)])
accuracies["combined"] = combined.evaluate(*test)["accuracy"]
epochs = len(histories["combined"]["loss"])
print(f"test accuracy {accuracies['combined']:.3f} after {epochs} epochs")
assert min(accuracies.values()) == accuracies["none"]
assert accuracies["combined"] > accuracies["none"] + 0.1

# %% [markdown]
# The best cure of all is missing here, because it costs work: more samples, with the
# right labels.
#
# ## Exercise: the backward pass of dropout
#
# In training, dropout multiplies each number by 0 with the probability `rate`, and
# otherwise by 1 / (1 − rate), so that the mean stays the same. The mask is random, but
# backward must use the mask of its forward pass.


# %% tags=["exercise"]
class Drop(layers.Layer):
    rate = 0.5

    def forward(self, x):
        kept = self.random_bits(x) >= self.rate * 2**32  # uniform integers below 2³²
        self.work.mask = kept.astype(x.dtype) / (1 - self.rate)
        return x * self.work.mask

    def backward(self, grad_y):
        return None  # ∂L/∂x


# %%
grade(Drop(), (6,), hint="in this pass, y = x · mask. The mask does not depend on x.")

# %% [markdown]
# A solution is in [solutions.py](solutions.py).
