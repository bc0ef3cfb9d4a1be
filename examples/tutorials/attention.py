"""Attention, number by number: three tokens of two features, one head, forward and backward.

Everything is computed twice: with lists and loops, formula by formula, and by `layers.MultiHeadAttention`. Each token
has a query q, a key k and a value v. The output for a token is a mean of all values. The larger the product of its
query and the key of another token, the larger is the share P of that token's value.
"""

import math

from common import Comparison, main, picture

import xpnet
from xpnet import layers, losses

X = [[1, 0], [0, 1], [1, 1]]  # one row per token
WEIGHTS = {
    "query": [[1, 1], [0, 1]],
    "key": [[1, 0], [1, 1]],
    "value": [[1, 2], [2, 0]],
    "output": [[1, 0], [1, 1]],
}
TARGETS = [[2, 1], [2, 1], [2, 1]]


def product(a, b):
    """The matrix product of two lists of rows."""
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def transposed(a):
    return [list(column) for column in zip(*a, strict=True)]


def softmax(row):
    exponentials = [math.exp(z) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def forward(x, weights, causal=False):
    """All intermediate values, by name: matrices with one row per token."""
    q, k, v = (product(x, weights[part]) for part in ("query", "key", "value"))
    scores = [[z / math.sqrt(len(q[0])) for z in row] for row in product(q, transposed(k))]
    if causal:  # a token does not see later ones: exp(-∞) = 0
        scores = [[z if s <= t else -math.inf for s, z in enumerate(row)] for t, row in enumerate(scores)]
    p = [softmax(row) for row in scores]
    out = product(p, v)
    return {"q": q, "k": k, "v": v, "scores": scores, "P": p, "out": out, "y": product(out, weights["output"])}


def backward(x, weights, values, grad_y):
    """The gradients of all intermediate values, of the weights and of x, from the last formula to the first."""
    q, k, v, p = (values[name] for name in ("q", "k", "v", "P"))
    grad_out = product(grad_y, transposed(weights["output"]))
    grad_p = product(grad_out, transposed(v))
    # The softmax of a row: ∂L/∂score_s = P_s (∂L/∂P_s - Σ_r P_r ∂L/∂P_r).
    means = [sum(a * b for a, b in zip(*rows, strict=True)) for rows in zip(p, grad_p, strict=True)]
    grad_scores = [
        [share * (grad - mean) for share, grad in zip(shares, grads, strict=True)]
        for shares, grads, mean in zip(p, grad_p, means, strict=True)
    ]
    scaled = [[grad / math.sqrt(len(q[0])) for grad in row] for row in grad_scores]
    grads = {
        "query": product(scaled, k),
        "key": product(transposed(scaled), q),
        "value": product(transposed(p), grad_out),
    }
    into_x = [product(grad, transposed(weights[part])) for part, grad in grads.items()]
    return {
        "P": grad_p,
        "scores": grad_scores,
        "output weight": product(transposed(values["out"]), grad_y),
        **{f"{part} weight": product(transposed(x), grad) for part, grad in grads.items()},
        "x": [[sum(three) for three in zip(*rows, strict=True)] for rows in zip(*into_x, strict=True)],
    }


def attention(backend, causal=False):
    """The same by xpnet: a model of one layer."""
    model = xpnet.Sequential(
        [layers.MultiHeadAttention(1, causal=causal, use_bias=False)], (3, 2), backend, dtype="float64"
    )
    for part, weight in WEIGHTS.items():
        setattr(model[0], f"{part}_weight", weight)
    return model


def show(name, matrix):
    rows = ["  ".join(f"{number:8.4f}" for number in row) for row in matrix]
    print(f"{name:18s}{rows[0]}", *(f"{'':18s}{row}" for row in rows[1:]), sep="\n")


def largest_difference(ours, expected):
    """The largest difference between two matrices; NaN if they contain one."""
    differences = [abs(a - b) for rows in zip(ours, expected, strict=True) for a, b in zip(*rows, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("attention")
    loss = losses.HalfSquaredError("sum")

    print("Forward, with loops")
    values = forward(X, WEIGHTS)
    for name, matrix in values.items():
        show(name, matrix)
    model = attention(backend)
    device = model.backend
    y = model.forward([X])
    value = loss(y, [TARGETS])
    print(f"L = ½ Σ (y − target)² = {value:.6f}, with the target (2, 1) for each token")
    estimates = device.to_numpy(y)[0].tolist()
    rows.equal("P of token 1 for token 3", "0.5760", values["P"][0][2])
    rows.equal("y of token 1", "3.8680", estimates[0][0])
    rows.equal("y of token 3", "3.9343", estimates[2][0])
    rows.equal("L", "4.785278", value)
    rows.below("y, loops against xpnet", 1e-12, largest_difference(estimates, values["y"]))

    print("\nBackward, with loops")
    targets = device.asarray([TARGETS], dtype="float64")
    grad_y = loss.gradient(device, y, targets)
    grads = backward(X, WEIGHTS, values, device.to_numpy(grad_y)[0].tolist())
    for name, matrix in grads.items():
        show(f"∂L/∂{name}", matrix)
    ours = {"x": device.to_numpy(model.backward(grad_y))[0].tolist()}
    for part in WEIGHTS:
        ours[f"{part} weight"] = device.to_numpy(getattr(model[0], f"{part}_weight").grad).tolist()
    rows.equal("∂L/∂query weight, first number", "1.9690", ours["query weight"][0][0])
    rows.equal("∂L/∂x of token 1, first number", "3.1830", ours["x"][0][0])
    for name, matrix in ours.items():
        rows.below(f"∂L/∂{name}, loops against xpnet", 1e-12, largest_difference(matrix, grads[name]))

    print("\nCausal: a token does not see later ones")
    values = forward(X, WEIGHTS, causal=True)
    show("P", values["P"])
    show("y", values["y"])
    causal = device.to_numpy(attention(backend, causal=True).forward([X]))[0].tolist()
    rows.exactly("y of token 1, causal", "3", causal[0][0])
    rows.below("y, causal, loops against xpnet", 1e-12, largest_difference(causal, values["y"]))
    if plots:
        with picture(plots, "attention", 6.4, 3.2) as figure:
            draw(figure, {"all tokens": forward(X, WEIGHTS)["P"], "causal": values["P"]})
    return rows


def draw(figure, shares):
    """P as a picture: which token (row) takes how much of which value (column)."""
    for ax, (title, matrix) in zip(figure.subplots(1, len(shares)), shares.items(), strict=True):
        ax.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        for t, row in enumerate(matrix):
            for s, share in enumerate(row):
                ax.text(s, t, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")
        ax.set(title=title, xlabel="value of token", ylabel="output of token")
        ax.set_xticks(range(3), ["1", "2", "3"])
        ax.set_yticks(range(3), ["1", "2", "3"])


if __name__ == "__main__":
    main(run)
