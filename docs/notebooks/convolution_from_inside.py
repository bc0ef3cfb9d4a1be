# %% [markdown]
# # A convolution seen from inside
#
# A convolution moves a small window over an image, and computes the same weighted sum
# everywhere. Here you see each step of it on a digit of 8×8 pixels: the loops, the
# pictures, the gradient, and what a trained one has learned.

# %%
import matplotlib.pyplot as plt
import numpy as np
from exercises import grade

import xpnet
from xpnet import attribution, datasets, layers, optimizers, plots

images, labels = datasets.digits()
images = images / 16.0  # 0 for paper, 1 for ink
image = images[0]
assert labels[0] == 0

# %% [markdown]
# ## One window
#
# The **kernel** has 3×3 weights. At each place, the output is the sum of the nine
# pixels under it times the weights. This kernel subtracts the pixels on the left from
# those on the right: it finds vertical edges.

# %%
kernel = np.array([[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]])
patch = image[2:5, 1:4]
print(patch.round(2), "\ntimes the kernel, added up:", (patch * kernel).sum().round(3))

# %% [markdown]
# The whole output needs two loops. There are 6×6 places for a window of 3×3 in 8×8
# pixels.


# %% alt="A digit, and its vertical and horizontal edges"
def convolve(image, kernel):
    height, width = (
        image.shape[0] - kernel.shape[0] + 1,
        image.shape[1] - kernel.shape[1] + 1,
    )
    output = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            output[i, j] = (
                image[i : i + kernel.shape[0], j : j + kernel.shape[1]] * kernel
            ).sum()
    return output


vertical, horizontal = convolve(image, kernel), convolve(image, kernel.T)
fig, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
pictures = {
    "the digit": (image, "gray"),
    "vertical edges": (vertical, "RdBu"),
    "horizontal edges": (horizontal, "RdBu"),
}
for ax, (title, (values, cmap)) in zip(axes, pictures.items(), strict=True):
    limit = abs(values).max()
    ax.imshow(values, cmap=cmap, vmin=0 if cmap == "gray" else -limit, vmax=limit)
    ax.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# Blue is where the ink begins, from left to right or from top to bottom, and red is
# where it ends.
#
# `Conv2D` is the same with many kernels at once. Images are (N, height, width,
# channels), and the weights (3, 3, channels, filters):

# %%
conv = xpnet.Sequential(
    [
        layers.Conv2D(
            2,
            3,
            use_bias=False,
            weight_initializer=np.stack([kernel, kernel.T], axis=-1)[:, :, None],
        )
    ],
    input_shape=(8, 8, 1),
    dtype="float64",
    backend="cpu",
)
output = conv.predict(image[None, :, :, None])
assert np.allclose(output[0, :, :, 0], vertical)
assert np.allclose(output[0, :, :, 1], horizontal)
output.shape

# %% [markdown]
# ## Why not a Dense layer?
#
# A `Dense` layer from 64 pixels to these 72 outputs has a weight for each pair. The
# convolution has 18 weights, because every place uses the same nine. So what it finds
# in one place, it finds everywhere. If the image moves, the output moves with it:

# %%
dense = xpnet.Sequential(
    [layers.Flatten(), layers.Dense(72, use_bias=False)],
    input_shape=(8, 8, 1),
    backend="cpu",
)
print(
    "weights:",
    dense.parameters[0].size,
    "of Dense,",
    conv.parameters[0].size,
    "of Conv2D",
)
moved = np.roll(image, 1, axis=1)  # by a pixel to the right
assert np.allclose(convolve(moved, kernel)[:, 2:], vertical[:, 1:-1])

# %% [markdown]
# ## Edges, steps and pooling
#
# - `padding="same"` adds zeros around the image, so that the output is as large as the
#   image.
# - `strides=2` moves the window by two pixels, so that the output is half as high and
#   wide.
# - `MaxPool2D(2)` keeps the largest of each 2×2 values: whether something was found,
#   and roughly where.

# %%
for layer in (
    layers.Conv2D(2, 3),
    layers.Conv2D(2, 3, padding="same"),
    layers.Conv2D(2, 3, padding="same", strides=2),
    layers.MaxPool2D(2),
):
    shape = layer.build((8, 8, 1), backend="cpu")
    print(f"{layer!r:42} (N, 8, 8, 1) → (N, {str(shape)[1:]}")

# %% [markdown]
# ## Backward
#
# Each weight is used at all 36 places, so its gradient is a sum over all of them: the
# pixel under the weight, times the upstream gradient of the place. A pixel is under up
# to nine windows, and its gradient is a sum over these.


# %%
def gradients(image, kernel, upstream):
    """∂L/∂kernel and ∂L/∂image, for the gradient of each output."""
    grad_kernel, grad_image = np.zeros(kernel.shape), np.zeros(image.shape)
    for i, j in np.ndindex(upstream.shape):
        window = slice(i, i + kernel.shape[0]), slice(j, j + kernel.shape[1])
        grad_kernel += upstream[i, j] * image[window]
        grad_image[window] += upstream[i, j] * kernel
    return grad_kernel, grad_image


single = xpnet.Sequential(
    [layers.Conv2D(1, 3, use_bias=False, weight_initializer=kernel[:, :, None, None])],
    input_shape=(8, 8, 1),
    dtype="float64",
    backend="cpu",
)
explained = xpnet.explain(
    single, image[None, :, :, None], np.zeros((1, 6, 6, 1)), "half_squared_error"
)
upstream = explained["0"].upstream[0, :, :, 0]
grad_kernel, grad_image = gradients(image, kernel, upstream)
assert np.allclose(grad_kernel, explained.parameters["0.weight"].gradient[:, :, 0, 0])
assert np.allclose(grad_image, explained["0"].downstream[0, :, :, 0])
explained

# %% [markdown]
# ## What a trained network looks for
#
# Eight kernels, trained on three quarters of the digits. Nobody tells the network what
# an edge is.

# %% alt="The filters of the trained layer, as blue and red images"
test = np.arange(len(images)) % 4 == 0
model = xpnet.Sequential(
    [
        layers.Reshape((8, 8, 1)),
        layers.Conv2D(8, 3, padding="same"),
        layers.ReLU(),
        layers.MaxPool2D(2),
        layers.Flatten(),
        layers.Dense(10),
    ],
    input_shape=(8, 8),
    seed=0,
    backend="cpu",
)
model.fit(
    images[~test],
    labels[~test],
    optimizer=optimizers.Adam(0.005),
    epochs=20,
    batch_size=32,
    verbose=0,
)
accuracy = model.evaluate(images[test], labels[test])["accuracy"]
print(f"test accuracy {accuracy:.3f}")
assert accuracy > 0.95
plots.filters(model)

# %% [markdown]
# The outputs of the eight kernels for one digit, after the ReLU. Some answer to
# vertical strokes, some to horizontal ones, some to the ink itself.

# %% alt="The digit as each of the eight filters sees it"
found = model.activations(images[:1])["2"][0]
plots.image_grid(np.moveaxis(found, -1, 0), titles=range(8))

# %% [markdown]
# Which pixels does the decision depend on? The downstream gradient of the first layer
# says how the loss changes with each pixel: where it is blue, more ink makes the loss
# larger, and where it is red, smaller.

# %% alt="Six digits, and below each the gradient of the loss by its pixels"
chosen = np.flatnonzero(test)[:6]
explained = xpnet.explain(
    model, images[chosen], labels[chosen], "softmax_cross_entropy"
)
fig, axes = plt.subplots(2, 6, figsize=(10, 3.6), layout="constrained")
for column, (i, gradient) in enumerate(
    zip(chosen, explained["0"].downstream, strict=True)
):
    axes[0, column].imshow(images[i], cmap="gray")
    limit = abs(gradient).max()
    axes[1, column].imshow(gradient, cmap="RdBu", vmin=-limit, vmax=limit)
    axes[0, column].set_title(labels[i])
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])

# %% [markdown]
# The loss mixes all classes. `attribution.saliency` is the gradient of a single score,
# that of the predicted digit, drawn over the image: more ink on blue pixels raises the
# score, on red ones it lowers it. `attribution.occlusion` erases 2×2 pixels at a time,
# and measures by how much the score falls.

# %% alt="Over six digits, the saliency of each pixel, and below, its occlusion"
gradient = attribution.saliency(model, images[chosen])
fall = attribution.occlusion(model, images[chosen], size=(2, 2), stride=1)
plots.attribution(
    np.concatenate([gradient, fall]), np.tile(images[chosen], (2, 1, 1)), columns=6
)

# %% [markdown]
# And which image has the highest score? `maximize_activation` begins with noise, and
# follows the gradient of the score of each digit uphill. The traces of digits are
# there, but no such image is in the data: the network knows what tells digits apart,
# not what digits are.

# %% alt="For each digit, the image with the highest score: noise and traces of it"
best = attribution.maximize_activation(model, range(10), limits=(0.0, 1.0))
scores = model.predict(best).diagonal()
assert (scores > model.predict(images).max(axis=0)).all()
plots.image_grid(best, titles=range(10), columns=10)

# %% [markdown]
# [What a network has learned](../what-a-network-sees.md) has more of these views, and
# says how far to trust them.
#
# ## Exercise: a convolution over time
#
# For a series x (N, time), this layer computes y_t = a x_t + b x_{t+1}, with two
# weights in `self.weight`. There is one output less than inputs. Write `backward`: two
# numbers for the weights, each a sum over all places and samples; and ∂L/∂x, in which
# each x_t gets something from y_t and from y_{t-1}.


# %% tags=["exercise"]
class Pairs(layers.Layer):
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
        grad_x = self.xp.zeros_like(x)
        # self.weight.grad[0] = …
        # self.weight.grad[1] = …
        # grad_x[:, :-1] += …
        # grad_x[:, 1:] += …
        return grad_x


# %%
grade(
    Pairs(),
    (5,),
    hint="as in `gradients` above: weight a meets x[:, :-1], weight b meets x[:, 1:].",
)

# %% [markdown]
# A solution is in [solutions.py](solutions.py). [Write a layer](../writing-a-layer.md)
# develops such a layer in full, and [Images](../image-models.md) shows larger networks.
