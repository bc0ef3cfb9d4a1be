"""Handwritten digits of 8×8 pixels: a 64-30-10 network, trained as in the tutorial and with modern methods.

After "Neural Networks Tutorial – A Pathway to Deep Learning" (adventuresinmachinelearning.com). See examples/mnist.py
for the digits of MNIST.
"""

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import datasets, initializers, layers, losses, optimizers, schedules

LEARNING_RATE, ITERATIONS = 0.25, 3000
LOSS = losses.HalfSquaredError()

# Chosen by cross-validation on the training part.
MODERN_RATE, MODERN_EPOCHS, MODERN_BATCH = 0.02, 60, 32


def data():
    """((x, digits) for training, (x, digits) for the test): 60 % and 40 %, the same for every seed.

    Each pixel is scaled to mean 0 and standard deviation 1 by the statistics of the training part alone.
    """
    x, digits = datasets.digits()
    x = x.reshape(len(x), 64).astype("float64")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = np.split(order, [round(0.6 * len(x))])
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    x = (x - mean) / np.where(deviation > 0, deviation, 1)  # the deviation of pixels that are always blank is 0
    return (x[train], digits[train]), (x[test], digits[test])


def network(stack, backend, seed):
    return xpnet.Sequential(stack, input_shape=64, backend=backend, seed=seed, dtype="float64")


def as_written(backend, seed, x, digits):
    """Two sigmoid layers, the squared error of ten outputs, and steps over the whole training part."""
    uniform = initializers.Uniform(0, 1)
    hidden = [layers.Dense(30, weight_initializer=uniform), layers.Sigmoid()]
    output = [layers.Dense(10, weight_initializer=uniform), layers.Sigmoid()]
    model = network(hidden + output, backend, seed)
    x, y = model.backend.asarray(x), model.backend.asarray(np.eye(10)[digits])  # one-hot: 3 is 0001000000
    costs = []
    for _ in range(ITERATIONS):
        h = model.forward(x)  # forward
        costs.append(LOSS(h, y))  # loss
        model.backward(LOSS.gradient(model.backend, h, y) / len(x))  # backward: the cost is a mean, hence / m
        for parameter in model.parameters:  # update
            parameter.value -= LEARNING_RATE * parameter.grad
    return model, costs


def modern(backend, seed, x, digits):
    """The same network with cross-entropy, AdamW and small batches. The loss contains the softmax."""
    model = network([layers.Dense(30), layers.Sigmoid(), layers.Dense(10)], backend, seed)
    steps = MODERN_EPOCHS * -(-len(x) // MODERN_BATCH)
    history = model.fit(
        x,
        digits,
        loss=losses.SoftmaxCrossEntropy(label_smoothing=0.1),
        optimizer=optimizers.AdamW(schedules.OneCycle(MODERN_RATE, steps), weight_decay=0.1),
        epochs=MODERN_EPOCHS,
        batch_size=MODERN_BATCH,
        on_interrupt="stop",
        verbose=0,
    )
    return model, history


def accuracy(model, x, digits):
    return float(np.mean(model.predict(x).argmax(axis=1) == digits))


def run(backend="auto", seed=0, plots=None):
    train, test = data()
    old, costs = as_written(backend, seed, *train)
    new, history = modern(backend, seed, *train)
    print(f"as written:     test accuracy {accuracy(old, *test):.4f} after {ITERATIONS} steps")
    print(f"modern methods: test accuracy {accuracy(new, *test):.4f} after {MODERN_EPOCHS} epochs")
    rows = Comparison("digits, 64-30-10")
    rows.above("test accuracy as written", 0.86, accuracy(old, *test))
    rows.above("test accuracy with modern methods", 0.97, accuracy(new, *test))
    if plots:
        draw(plots, old, new, costs, history, *test)
    return rows


def draw(plots, old, new, costs, history, x, digits):
    from xpnet.plots import confusion_matrix, curves, filters

    with picture(plots, "handwritten_digits", 14, 4.4) as figure:
        left, middle, right = figure.subplots(1, 3)
        curves({"cost": costs}, "cost", ax=left)
        left.set(title="as written", xlabel="iteration")
        curves(history, ("loss", "accuracy"), ax=middle)
        middle.set(title="modern methods", ylabel="on the training part")
        counts = new.evaluate(x, digits, metrics=["confusion_matrix"])["confusion_matrix"]
        confusion_matrix(counts, ax=right)
        right.set_title("modern methods, test part")
    with picture(plots, "handwritten_digits_filters", 8, 2.8) as figure:
        filters(new, image_shape=(8, 8), columns=10, figure=figure)


if __name__ == "__main__":
    main(run)
