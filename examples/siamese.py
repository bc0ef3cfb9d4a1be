"""Decide whether two images show the same digit, with a siamese network.

    python examples/siamese.py

One encoder turns both images into vectors: it is called twice, so its weights are shared, and the gradients of both
calls add up. The answer depends on the distance between the vectors. Afterwards the encoder is used alone: one labeled
image of each digit is enough to classify the others by the nearest vector. Bromley et al. 1993, "Signature verification
using a siamese time delay neural network".
"""

import numpy
from shared import main

import xpnet
from xpnet import layers


def build(image_shape, backend="auto", seed=0):
    """(the encoder, the siamese network): images → vectors (N, 16), and two images → the logit of "same digit"."""
    encoder = xpnet.Sequential(
        [
            *[layers.Conv2D(16, 3, padding="same"), layers.ReLU(), layers.MaxPool2D(2)],
            *[layers.Conv2D(32, 3, padding="same"), layers.ReLU(), layers.MaxPool2D(2)],
            *[layers.Flatten(), layers.Dense(16)],
        ],
        image_shape,
        backend,
        seed,
        name="encoder",
    )
    first, second = xpnet.Input(image_shape, name="first"), xpnet.Input(image_shape, name="second")
    difference = layers.Subtract()([encoder(first), encoder(second)])
    distances = layers.Multiply()([difference, difference])
    return encoder, xpnet.Model([first, second], layers.Dense(1)(distances), seed=seed)


def pairs(x, y, count, rng):
    """Images and answers, ([first, second], same), for up to `count` pairs, half of which show the same digit."""
    first, second = rng.integers(len(x), size=(2, 10 * count))
    same = y[first] == y[second]
    chosen = numpy.concatenate([numpy.flatnonzero(same)[: count // 2], numpy.flatnonzero(~same)[: count // 2]])
    return [x[first[chosen]], x[second[chosen]]], same[chosen]


def nearest(vectors, prototypes):
    """The number of the nearest prototype for each vector."""
    return ((vectors[:, None] - prototypes) ** 2).sum(axis=2).argmin(axis=1)


def run(images, options):
    rng = numpy.random.default_rng(options.seed)
    small = images.name == "digits"
    encoder, model = build(images.x.shape[1:], options.backend, options.seed)
    print(model.summary(), end="\n\n")
    model.fit(
        *pairs(images.x, images.y, 8 * len(images.x) if small else len(images.x), rng),
        loss="binary_cross_entropy",
        epochs=options.epochs or (10 if small else 2),
        batch_size=64 if small else 128,
        on_interrupt="stop",
        verbose=2,
    )
    result = model.evaluate(*pairs(images.x_test, images.y_test, 2000, rng))
    labeled = [numpy.flatnonzero(images.y == digit)[0] for digit in range(10)]
    predicted = nearest(encoder.predict(images.x_test), encoder.predict(images.x[labeled]))
    print(f"\ntest accuracy: {result['accuracy']:.4f} (pairs), {(predicted == images.y_test).mean():.4f} (digits)")


if __name__ == "__main__":
    main(run)
