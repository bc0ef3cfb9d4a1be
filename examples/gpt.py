"""Train a GPT that writes in the style of Shakespeare, character by character.

    python examples/gpt.py                                    # on a GPU if one can be used, else on the CPU
    python examples/gpt.py --config full --backend gpu        # a larger model, for a GPU
    python examples/gpt.py --sample 2000 --save gpt.safetensors

Radford et al. 2019, "Language models are unsupervised multitask learners". The sizes, the initial weights and the
training are those of Karpathy's nanoGPT.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy
from mnist import positive, seed

import xpnet
from xpnet import datasets, errors, initializers, layers, optimizers, schedules


class Config(NamedTuple):
    """The sizes of a model and of its training."""

    blocks: int
    heads: int
    features: int
    context: int  # the number of tokens that the model sees
    dropout: float
    batch_size: int
    steps: int


CONFIGS = {
    "small": Config(4, 4, 128, 64, 0.0, 12, 2000),
    "full": Config(6, 6, 384, 256, 0.2, 64, 5000),
}


def build(config, vocabulary_size, backend="auto", seed=0):
    """Tokens (N, T) → the logits of the token after each of them, (N, T, vocabulary_size)."""
    normal = initializers.Normal(std=0.02)
    blocks = [
        layers.TransformerBlock(config.heads, dropout=config.dropout, use_bias=False, weight_initializer=normal)
        for _ in range(config.blocks)
    ]
    model = xpnet.Sequential(
        [
            layers.Embedding(vocabulary_size, config.features, weight_initializer=normal),
            layers.PositionalEmbedding(config.context, weight_initializer=normal),
            layers.Dropout(config.dropout),
            *blocks,
            layers.LayerNorm(center=False),
            layers.Dense(vocabulary_size, use_bias=False, weight_initializer=normal),
        ],
        input_shape=(None,),
        backend=backend,
        seed=seed,
    )
    for parameter in model.parameters:  # each block adds two branches to its input, so let each add less
        if parameter.name.endswith(("attention.output_weight", "contract.weight")):
            parameter.value *= 1 / math.sqrt(2 * config.blocks)
    return model


def train(model, tokens, config, verbose=2):
    """Train on windows at random places of the tokens. Ctrl-C ends the training early."""
    warmup, epochs = min(100, config.steps), math.gcd(config.steps, 10)
    decay = schedules.CosineDecay(1e-3, steps=max(config.steps - warmup, 1), final=1e-4)
    rate = schedules.LinearWarmup(warmup, after=decay)
    return model.fit(
        datasets.RandomWindows(tokens, config.context, config.batch_size, batches=config.steps // epochs),
        loss="softmax_cross_entropy",
        optimizer=optimizers.AdamW(rate, beta1=0.9, beta2=0.99, weight_decay=0.1, clip_norm=1.0),
        epochs=epochs,
        metrics=[],
        on_interrupt="stop",
        verbose=verbose,
    )


def run(options):
    """Train, write a sample, and print the loss on the last tenth of the text, which the model has not seen."""
    for label, description in options.backend.describe():
        print(f"{label:9s}{description}")
    text = datasets.shakespeare(options.data_dir)
    tokenizer = datasets.CharTokenizer(text)
    training, validation = numpy.split(tokenizer.encode(text), [round(0.9 * len(text))])
    print(f"data     {len(text):,} characters, {tokenizer.vocabulary_size} different ones; the last 10 % validate\n")

    config = CONFIGS[options.config]
    config = config._replace(steps=options.steps or config.steps)
    model = build(config, tokenizer.vocabulary_size, options.backend, options.seed)
    print(model.summary(), end="\n\n")

    start = time.perf_counter()
    history = train(model, training, config)
    seconds = time.perf_counter() - start - history.compile_seconds
    steps = config.steps * len(history["loss"]) // math.gcd(config.steps, 10)
    speed = steps * config.batch_size * config.context / seconds
    print(f"\ntrained for {seconds:.1f} s, {speed:,.0f} tokens per second\n")
    if options.save:
        model.save(options.save)

    prompt = tokenizer.encode("\n")[None]
    print(tokenizer.decode(xpnet.generate(model, prompt, options.sample, temperature=0.8, seed=options.seed)[0]))
    loss = model.evaluate(*datasets.token_windows(validation, config.context), batch_size=64)["loss"]
    print(f"\nvalidation loss: {loss:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--config", choices=CONFIGS, default="small", help="the sizes (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights, noise, windows and sample (default: 0)")
    parser.add_argument("--steps", type=positive(int), help="training steps (default: those of the config)")
    parser.add_argument("--data-dir", type=Path, help="a folder with the text of tiny Shakespeare, input.txt")
    parser.add_argument("--sample", type=positive(int), default=500, help="characters to write (default: 500)")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the model there, as a .safetensors file")
    options = parser.parse_args()
    try:
        options.backend = xpnet.get_backend(options.backend)
        if options.save:
            options.save.parent.mkdir(parents=True, exist_ok=True)
        run(options)
    except (errors.XpnetError, OSError) as error:
        sys.exit(f"gpt.py: {error}")


if __name__ == "__main__":
    main()
