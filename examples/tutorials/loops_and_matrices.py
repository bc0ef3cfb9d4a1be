"""Feed-forward in two ways, with loops over numbers and with one matrix product per layer, and their speed.

After "Neural Networks Tutorial – A Pathway to Deep Learning" (adventuresinmachinelearning.com). A matrix product costs
one call of a library whatever its size, so it pays for wide layers and for many samples at once.
"""

import math
import timeit

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import layers

BATCHES = (1, 10, 100, 1000)  # samples at once
LOOP_TIMES = {"3-3-1": "40 µs", "3-3-3-1": "70 µs"}  # in the tutorial, on its author's machine


def network(weights, biases, backend):
    """weights: one row per neuron, as in the tutorial; the weights of xpnet have one column per neuron."""
    stack = []
    for w, b in zip(weights, biases, strict=True):
        stack += [layers.Dense(len(b), weight_initializer=np.transpose(w), bias_initializer=b), layers.Sigmoid()]
    return xpnet.Sequential(stack, input_shape=len(weights[0][0]), backend=backend, dtype="float64")


def looped_layer(x, w, b):
    """The outputs of a layer: for each neuron, the sigmoid of its row of weights times x plus its bias."""
    h = np.zeros(len(w))
    for i in range(len(w)):
        total = 0.0
        for j in range(len(x)):
            total += w[i][j] * x[j]
        h[i] = 1 / (1 + math.exp(-(total + b[i])))
    return h


def looped_forward(x, weights, biases):
    for w, b in zip(weights, biases, strict=True):
        x = looped_layer(x, w, b)
    return x


def matrix_forward(model, x):
    """The same as `model.forward`: for each layer, xW + b for all neurons and samples at once, then the sigmoid."""
    for layer in model.layers:
        x = layer.forward(x)
    model.backend.synchronize()
    return x


def nets(seed):
    """{name: (weights, biases, input)} of the tutorial's networks of three and four layers, and of one for MNIST."""
    w1, b1 = np.array([[0.2] * 3, [0.4] * 3, [0.6] * 3]), np.full(3, 0.8)
    w2, b2 = np.array([[0.5] * 3]), np.array([0.2])
    rng = np.random.default_rng(seed)
    wide = [rng.normal(0, 0.1, size=shape) for shape in ((128, 784), (10, 128))]
    return {
        "3-3-1": ([w1, w2], [b1, b2], np.array([1.5, 2.0, 3.0])),
        "3-3-3-1": ([w1, w1, w2], [b1, b1, b2], np.array([1.5, 2.0, 3.0])),
        "784-128-10": (wide, [np.full(128, 0.1), np.full(10, 0.1)], rng.uniform(size=784)),
    }


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("loops against matrices")
    times = {}
    for name, (weights, biases, x) in nets(seed).items():
        model = network(weights, biases, backend)
        batches = {n: model.backend.asarray(np.tile(x, (n, 1))) for n in BATCHES}
        looped = looped_forward(x, weights, biases)
        matrices = model.backend.to_numpy(matrix_forward(model, batches[1]))[0]
        if name == "3-3-1":
            hidden = looped_layer(x, weights[0], biases[0])
            print(f"h = {hidden}\noutput {looped[0]} with loops, {matrices[0]} with matrices")
            for i, value in enumerate(("0.8909", "0.9677", "0.9910")):
                rows.equal(f"h{i + 1}", value, hidden[i])
            rows.equal("output, loops", "0.8354557", looped[0])
            rows.equal("output, matrices", "0.8354557", matrices[0])
        rows.below(f"{name}: difference of the outputs", 1e-12, abs(matrices - looped).max())

        loop = best_time(looped_forward, x, weights, biases)
        times[name] = loop, [best_time(matrix_forward, model, batch) / n for n, batch in batches.items()]
        one, batched = times[name][1][0], times[name][1][-1]
        print(f"{name}: a sample takes {loop * 1e6:.1f} µs with loops, {one * 1e6:.1f} µs with matrices, "
              f"{batched * 1e6:.2f} µs in a batch of {BATCHES[-1]}")  # fmt: skip
        rows.measured(f"{name}: loops, one sample", LOOP_TIMES.get(name, ""), f"{loop * 1e6:.1f} µs")
        ours = f"{one * 1e6:.1f} µs, {rounded(loop / one)} × as fast"
        rows.measured(f"{name}: matrices, one sample", "faster", ours)
        ours = f"{batched * 1e6:.2f} µs each, {rounded(loop / batched)} × as fast"
        rows.holds(f"{name}: matrices, {BATCHES[-1]} samples at once", "faster", ours, batched < loop)
    if plots:
        draw(plots, times)
    return rows


def best_time(function, *arguments):
    """Seconds per call, in the fastest of five repetitions."""
    once = timeit.timeit(lambda: function(*arguments), number=1)
    number = max(1, min(200, int(0.01 / max(once, 1e-9))))
    return min(timeit.repeat(lambda: function(*arguments), number=number, repeat=5)) / number


def rounded(ratio):
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def draw(plots, times):
    from xpnet.plots import COLORS, MARKERS

    with picture(plots, "loops_and_matrices") as figure:
        ax = figure.subplots()
        for (name, (loop, matrices)), color, marker in zip(times.items(), COLORS, MARKERS, strict=False):
            ax.axhline(loop * 1e6, color=color, linestyle="--", label=f"{name}, loops")
            ax.plot(BATCHES, np.array(matrices) * 1e6, color=color, marker=marker, label=f"{name}, matrices")
        ax.set(xscale="log", yscale="log", xlabel="samples at once", ylabel="µs per sample")
        ax.grid(alpha=0.3)
        ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small")


if __name__ == "__main__":
    main(run)
