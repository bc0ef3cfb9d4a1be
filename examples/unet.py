"""Segment digits: find the pixels of a digit in an image with so much noise that no threshold separates them.

    python examples/unet.py --plots pictures

A U-Net sees the image at three resolutions. On the way up, each resolution is concatenated with what the way down has
computed for it, so that outlines stay sharp. Ronneberger et al. 2015, "U-Net: Convolutional networks for biomedical
image segmentation".
"""

import numpy
from shared import main

import xpnet
from xpnet import augment, layers, optimizers, schedules

NOISE = 0.4  # the standard deviation; pixels are in [0, 1]


def convolutions(x, filters):
    for _ in range(2):
        # No bias, because the normalization would subtract it.
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, weight_initializer="he_normal")(x)
        x = layers.ReLU()(layers.BatchNorm()(x))
    return x


def build(image_shape, backend="auto", seed=0):
    """(N, height, width, 1) → the logits of ink, one per pixel. Height and width are multiples of 4."""
    image = xpnet.Input(image_shape)
    fine = convolutions(augment.GaussianNoise(NOISE)(image), 8)  # in training only, with new noise in each step
    middle = convolutions(layers.MaxPool2D(2)(fine), 16)
    coarse = convolutions(layers.MaxPool2D(2)(middle), 32)
    middle = convolutions(layers.Concatenate()([layers.Upsample2D(2)(coarse), middle]), 16)
    fine = convolutions(layers.Concatenate()([layers.Upsample2D(2)(middle), fine]), 8)
    return xpnet.Model(image, layers.Conv2D(1, 1)(fine), backend, seed)


def overlap(found, ink):
    """Intersection over union of two sets of pixels, given as boolean arrays."""
    return (found & ink).sum() / (found | ink).sum()


def run(images, options):
    small = images.name == "digits"
    epochs, batch_size = options.epochs or (15 if small else 1), 32 if small else 128
    model = build(images.x.shape[1:], options.backend, options.seed)
    print(model.summary(), end="\n\n")
    steps = epochs * -(-len(images.x) // batch_size)
    model.fit(
        images.x,
        images.x > 0.5,
        loss="binary_cross_entropy",
        optimizer=optimizers.Adam(schedules.OneCycle(1e-2, steps=steps)),
        epochs=epochs,
        batch_size=batch_size,
        on_interrupt="stop",
        verbose=2,
    )
    noise = numpy.random.default_rng(options.seed).normal(scale=NOISE, size=images.x_test.shape)
    noisy, ink = images.x_test + noise, images.x_test > 0.5
    found = model.predict(noisy) > 0  # a logit above 0 is a probability above 0.5
    if options.plots:
        from xpnet import plots  # imported here, because nothing else needs matplotlib

        rows = [a[:8].astype(float) for a in (noisy.clip(0, 1), found, ink)]
        plots.image_grid(numpy.concatenate(rows)).flat[0].figure.savefig(options.plots / "unet.png", dpi=150)
    print(f"\nintersection over union: {overlap(found, ink):.4f} (of a threshold: {overlap(noisy > 0.5, ink):.4f})")


if __name__ == "__main__":
    main(run, plots=True)
