"""Train one network with two outputs: which digit an image shows, and whether it is odd.

    python examples/two_heads.py

Both heads read the features of one body, whose gradient is the sum of theirs. The total loss is weighted, since the
digit is the harder question. Labels, losses and metrics are given by the names of the outputs.
"""

from shared import main

import xpnet
from xpnet import layers


def build(image_shape, backend="auto", seed=0):
    image = xpnet.Input(image_shape, name="image")
    features = image
    for filters in (16, 32):
        features = layers.Conv2D(filters, 3, padding="same", weight_initializer="he_uniform")(features)
        features = layers.MaxPool2D(2)(layers.ReLU()(features))
    features = layers.Flatten()(features)
    digit = layers.Dense(10, name="digit")(features)  # the logits of ten classes
    odd = layers.Dense(1, name="odd")(features)  # the logit of yes
    return xpnet.Model(image, [digit, odd], backend, seed)


def labels(y):
    return {"digit": y, "odd": y % 2}


def run(images, options):
    model = build(images.x.shape[1:], options.backend, options.seed)
    print(model.summary(), end="\n\n")
    small = images.name == "digits"
    model.fit(
        images.x,
        labels(images.y),
        loss={"digit": "softmax_cross_entropy", "odd": "binary_cross_entropy"},
        loss_weights={"digit": 1.0, "odd": 0.5},
        epochs=options.epochs or (20 if small else 2),
        batch_size=16 if small else 128,
        on_interrupt="stop",
        verbose=2,
    )
    result = model.evaluate(images.x_test, labels(images.y_test))
    print(f"\ntest accuracy: {result['digit_accuracy']:.4f} (digit), {result['odd_accuracy']:.4f} (odd or even)")


if __name__ == "__main__":
    main(run)
