"""Train an LSTM to spell words of different lengths, and let it invent new ones.

    python examples/names.py                       # the words of a text that ships with xpnet, or of tiny Shakespeare
    python examples/names.py --file names.txt      # a list of your own, such as names of people, one per line

Each word is a row of letters, padded at its end. `Embedding(padding_index=0)` starts a mask that excludes the padding
from the recurrence, the loss and the accuracy. The network predicts each letter from those before it, and the end.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy

import xpnet
from xpnet import datasets, errors, layers

PADDING, END = 0, 1  # END is before the first letter and after the last one
UNITS = 96


def vocabulary(words):
    """The number of each letter."""
    return {letter: i for i, letter in enumerate(sorted(set("".join(words))), start=2)}


def sequences(words, numbers):
    """(x, y), both (words, longest + 1): x is END and the letters of each word, y the letters and END."""
    x = numpy.full((len(words), max(map(len, words)) + 1), PADDING)
    y = x.copy()
    for row, word in enumerate(words):
        letters = [numbers[letter] for letter in word]
        x[row, : len(word) + 1] = [END, *letters]
        y[row, : len(word) + 1] = [*letters, END]
    return x, y


def build(letters, backend="auto", seed=0):
    """Letters (N, T) → the logits of the letter after each of them, (N, T, letters + 2)."""
    stack = [layers.Embedding(letters + 2, 24, padding_index=PADDING), layers.LSTM(UNITS), layers.Dropout(0.2)]
    return xpnet.Sequential([*stack, layers.Dense(letters + 2)], input_shape=(None,), backend=backend, seed=seed)


def invented(model, numbers, count, longest, seed=0):
    """`count` words of at most `longest` letters, which the model spells letter by letter."""
    letters = {number: letter for letter, number in numbers.items()}
    start = numpy.full((count, 1), END)
    rows = xpnet.generate(model, start, longest, temperature=0.8, seed=seed)[:, 1:]
    return ["".join(letters.get(int(n), "\n") for n in row).split("\n")[0] for row in rows]


def read(path):
    """The words of a file, or those of at least four letters in the text of `datasets.shakespeare`."""
    if path is None:
        return sorted(set(re.findall(r"\b[a-z]{4,}\b", datasets.shakespeare().lower())))
    try:
        words = sorted({line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""})
    except UnicodeDecodeError as error:
        raise errors.FileError(f"{path} must be a text file in UTF-8: {error}") from error
    if len(words) < 10:
        raise errors.DataError(f"{path} has {len(words)} different words: give at least 10, one per line.")
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a text file with one word per line")
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and order of words (default: 0)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    options = parser.parse_args()
    try:
        words = read(options.file)
        numbers = vocabulary(words)
        x, y = sequences(words, numbers)
        order = numpy.random.default_rng(options.seed).permutation(len(words))
        train, test = order[len(words) // 10 :], order[: len(words) // 10]
        model = build(len(numbers), options.backend, options.seed)
        print(model.summary(), end="\n\n")
        model.fit(
            x[train],
            y[train],
            validation_data=(x[test], y[test]),
            loss="softmax_cross_entropy",
            optimizer=xpnet.optimizers.Adam(4e-3),
            epochs=options.epochs,
            batch_size=32,
            on_interrupt="stop",
            verbose=2,
        )
        new = [word for word in invented(model, numbers, 40, x.shape[1], options.seed) if word not in words]
        print(f"\ninvented: {' '.join(new[:20])}")
        print(f"test loss per letter: {model.evaluate(x[test], y[test])['loss']:.4f}")
    except (errors.XpnetError, OSError) as error:
        sys.exit(f"names.py: {error}")


if __name__ == "__main__":
    main()
