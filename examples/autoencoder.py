"""Train a variational autoencoder on images of digits, and let its decoder draw new ones.

    python examples/autoencoder.py --plots pictures

The encoder gives the mean μ and the logarithm v of the variance of a normal distribution of codes; a layer of this
program draws a code z from it, and the decoder reconstructs the image from z. The loss is the cross-entropy of the
pixels plus the KL divergence from the distribution of codes to the standard normal one, from which new codes are drawn.
Kingma and Welling 2014, "Auto-encoding variational Bayes".
"""

import numpy
from shared import main

import xpnet
from xpnet import layers, losses, optimizers

CODE = 8  # numbers per code


class Sampling(layers.Layer):
    """z = μ + exp(v / 2) ε with normal noise ε, from [μ, v]: two (N, features) → (N, features). In inference, z = μ."""

    def build(self, input_shape):
        return input_shape[0]

    def forward(self, x):
        mean, log_variance = x
        if not self.context.training:
            return mean
        self.work.noise = self.xp.exp(log_variance * 0.5) * self.random_normal(mean)
        return mean + self.work.noise

    def backward(self, grad_z):
        """∂z/∂μ = 1, and ∂z/∂v = exp(v / 2) ε / 2."""
        return [grad_z, grad_z * self.work.noise * 0.5]


class KLFromNormal(losses.Loss):
    """ℓ = Σ (μ² + exp(v) - v - 1) / 2 for outputs (N, 2 · features), first μ and then v. It ignores the targets."""

    def samples(self, backend, outputs, targets):
        mean, log_variance = backend.xp.split(outputs, 2, axis=1)
        return backend.xp.sum(mean**2 + backend.xp.exp(log_variance) - log_variance - 1.0, axis=1) * 0.5

    def gradient(self, backend, outputs, targets):
        """∂ℓ/∂μ = μ, and ∂ℓ/∂v = (exp(v) - 1) / 2."""
        mean, log_variance = backend.xp.split(outputs, 2, axis=1)
        return backend.xp.concatenate([mean, (backend.xp.exp(log_variance) - 1.0) * 0.5], axis=1)


def build(image_shape, backend="auto", seed=0):
    """(the decoder, the autoencoder with its two outputs): logits of pixels, and the distribution of the code."""
    pixels = int(numpy.prod(image_shape))
    hidden = [layers.Dense(256), layers.ReLU(), layers.Dense(pixels), layers.Reshape(image_shape)]
    decoder = xpnet.Sequential(hidden, CODE, backend, seed, name="decoder")
    image = xpnet.Input(image_shape)
    h = layers.ReLU()(layers.Dense(256)(layers.Flatten()(image)))
    mean, log_variance = layers.Dense(CODE)(h), layers.Dense(CODE)(h)
    distribution = layers.Concatenate(name="distribution")([mean, log_variance])
    return decoder, xpnet.Model(image, [decoder(Sampling()([mean, log_variance])), distribution], seed=seed)


def targets(x):
    return {"decoder": x, "distribution": numpy.zeros((len(x), 2 * CODE), "float32")}


def run(images, options):
    small = images.name == "digits"
    decoder, model = build(images.x.shape[1:], options.backend, options.seed)
    print(model.summary(), end="\n\n")
    model.fit(
        images.x,
        targets(images.x),
        loss={"decoder": "binary_cross_entropy", "distribution": KLFromNormal()},
        loss_weights={"decoder": images.x[0].size, "distribution": 1},  # a sum over pixels, not their mean
        optimizer=optimizers.Adam(2e-3 if small else 1e-3),
        metrics=[],
        epochs=options.epochs or (40 if small else 5),
        batch_size=32 if small else 128,
        on_interrupt="stop",
        verbose=2,
    )
    if options.plots:
        from xpnet import plots  # imported here, because nothing else needs matplotlib

        generator = xpnet.Model(decoder.inputs, layers.Sigmoid()(decoder.outputs[0]))  # probabilities, not logits
        drawn = generator.predict(numpy.random.default_rng(options.seed).normal(size=(32, CODE)))
        plots.image_grid(drawn).flat[0].figure.savefig(options.plots / "autoencoder.png", dpi=150)
    result = model.evaluate(images.x_test, targets(images.x_test))
    mean = images.x.mean(axis=0).clip(1e-6, 1 - 1e-6)
    constant = -(images.x_test * numpy.log(mean) + (1 - images.x_test) * numpy.log(1 - mean)).sum() / len(images.x_test)
    print(f"\ntest loss: {result['loss']:.2f} nats per image ({constant:.2f} with the mean image in place of a model)")


if __name__ == "__main__":
    main(run, plots=True)
