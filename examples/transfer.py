"""Reuse the features of a trained network for another task, for which there are few labeled images.

    python examples/transfer.py

A network learns to classify handwritten digits. Its features, frozen, then serve a new last layer that learns to
classify clothes (Fashion-MNIST) from 50 images. If one of the datasets is not found, the tasks are the digits from 0 to
4 and those from 5 to 9. For comparison, the last layer is also trained on the features of an untrained network.
"""

from shared import Images, as_images, main

import xpnet
from xpnet import datasets, errors, layers, optimizers

FEW = 50  # labeled images of the second task


def tasks(images):
    """The first task and the second one: their names, images, and labels from 0 on."""
    if images.name == "MNIST":
        try:
            return images, as_images("Fashion-MNIST", *datasets.fashion_mnist(), 255)
        except errors.DownloadError as error:
            print(f"{error}\nFashion-MNIST was not found. The tasks are halves of MNIST instead.\n")

    def part(name, first):
        rows, rows_test = (labels // 5 == first // 5 for labels in (images.y, images.y_test))
        x_test, y_test = images.x_test[rows_test], images.y_test[rows_test]
        return Images(name, images.x[rows], images.y[rows] - first, x_test, y_test - first)

    return part("digits from 0 to 4", 0), part("digits from 5 to 9", 5)


def build(image_shape, classes, backend="auto", seed=0):
    def convolution(filters):
        convolved = layers.Conv2D(filters, 3, padding="same", weight_initializer="he_uniform")
        return [convolved, layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)]

    features = [layers.Flatten(), layers.Dense(64), layers.ReLU(name="features")]
    stack = [*convolution(16), *convolution(32), *features, layers.Dense(classes)]
    return xpnet.Sequential(stack, image_shape, backend, seed)


def with_new_head(base, classes, seed=0):
    """A model with the layers of `base` up to its features, which it does not train, and a last layer of its own."""
    base.trainable = False  # so batch normalization keeps its running statistics too
    return xpnet.Model(base.inputs, layers.Dense(classes, name="head")(base.output_of("features")), seed=seed)


def run(images, options):
    first, second = tasks(images)
    classes, small = int(first.y.max()) + 1, images.name == "digits"
    trained, untrained = (build(images.x.shape[1:], classes, options.backend, options.seed) for _ in range(2))
    print(f"{first.name}: {len(first.x)} images")
    trained.fit(
        first.x,
        first.y,
        epochs=options.epochs or (10 if small else 2),
        batch_size=16 if small else 128,
        on_interrupt="stop",
        verbose=2,
    )
    print(f"test accuracy: {trained.evaluate(first.x_test, first.y_test)['accuracy']:.4f}\n")

    print(f"{second.name}: {FEW} images")
    accuracy = []
    for base in (trained, untrained):
        model = with_new_head(base, classes, options.seed)
        adam = optimizers.Adam(1e-2)
        model.fit(second.x[:FEW], second.y[:FEW], optimizer=adam, epochs=50, batch_size=16, verbose=0)
        accuracy.append(model.evaluate(second.x_test, second.y_test)["accuracy"])
    print(model.summary())
    print(f"\ntest accuracy: {accuracy[0]:.4f} (with untrained features: {accuracy[1]:.4f})")


if __name__ == "__main__":
    main(run)
