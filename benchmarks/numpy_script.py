"""The training of a net with one hidden layer as a plain NumPy script: what `Sequential.fit` is compared with.

It imports nothing of xpnet, and does what `fit` does by default: a new order of the samples in each epoch, and the mean
loss and the accuracy of each epoch, from the outputs before each update.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def train(
    x: np.ndarray, y: np.ndarray, weights: Sequence[np.ndarray], rate: float, epochs: int, batch_size: int, rng: Any
) -> tuple[dict[str, list[float]], list[np.ndarray]]:
    """Train Dense, ReLU, Dense with softmax cross-entropy and SGD. Returns the history and the trained weights.

    x (N, D): float32.  y (N,): class numbers.  weights: w1 (D, H), b1 (H,), w2 (H, K), b2 (K,), which are not changed.
    rng: a numpy.random.Generator, for the order of the samples.
    """
    w1, b1, w2, b2 = (array.copy() for array in weights)
    history: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for _ in range(epochs):
        order = rng.permutation(len(x))
        total_loss, total_correct = 0.0, 0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            batch, labels = x[rows], y[rows]
            count = len(rows)
            samples = np.arange(count)

            hidden = np.maximum(batch @ w1 + b1, 0)
            logits = hidden @ w2 + b2
            logits -= logits.max(axis=1, keepdims=True)
            p = np.exp(logits)
            p /= p.sum(axis=1, keepdims=True)
            total_loss -= float(np.log(p[samples, labels]).sum())
            total_correct += int((p.argmax(axis=1) == labels).sum())

            grad_logits = p
            grad_logits[samples, labels] -= 1
            grad_logits /= count
            grad_hidden = grad_logits @ w2.T
            grad_hidden *= hidden > 0
            w2 -= rate * (hidden.T @ grad_logits)
            b2 -= rate * grad_logits.sum(axis=0)
            w1 -= rate * (batch.T @ grad_hidden)
            b1 -= rate * grad_hidden.sum(axis=0)
        history["loss"].append(total_loss / len(x))
        history["accuracy"].append(total_correct / len(x))
    return history, [w1, b1, w2, b2]
