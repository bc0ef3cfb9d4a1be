"""A perceptron learns AND from three examples, and other logic gates; it cannot learn XOR.

After "Basics of Neural Networks" (Ganesh KT, 2020). Its output is 1 if the weighted sum is at least 2, and 0 otherwise.
"""

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import datasets, initializers, layers

LEARNING_RATE = 0.1


def perceptron(inputs, backend, seed):
    return xpnet.Sequential(
        [layers.Dense(1, weight_initializer=initializers.Uniform(0, 1)), layers.Step(threshold=2)],
        input_shape=inputs,
        backend=backend,
        seed=seed,
        dtype="float64",
    )


def learn(model, x, y, epochs=1000):
    """Apply Rosenblatt's rule example by example until an epoch has no mistake. Returns the mistakes of each epoch."""
    x, y = model.backend.asarray(x), model.backend.asarray(y)
    mistakes = []
    for _ in range(epochs):
        mistakes.append(0)
        for i in range(len(x)):
            output = model.forward(x[i : i + 1])  # forward: 0 or 1
            error = output - y[i : i + 1]  # loss: the error, -1, 0 or 1
            model.backward(error)  # backward: error · x for the weights; Step passes the error on
            for parameter in model.parameters:  # update
                parameter.value -= LEARNING_RATE * parameter.grad
            mistakes[-1] += int(error.any())
        if not mistakes[-1]:
            break
    return mistakes


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("perceptron")
    model = perceptron(3, backend, seed)
    mistakes = learn(model, *datasets.perceptron_and())
    print(f"AND of three inputs: no mistakes in epoch {len(mistakes)}")
    for inputs, truth in (((0, 1, 0), "0"), ((1, 1, 1), "1")):
        answer = model.predict(np.array([inputs]))[0, 0]
        print(f"predict {list(inputs)}: {answer:g}")
        rows.exactly(f"predict {inputs}", truth, answer)

    gates = {}
    for name in ("and", "or", "nand"):
        x, y = datasets.logic_gate(name)
        gates[name] = perceptron(2, backend, seed)
        mistakes = learn(gates[name], x, y)
        answers = gates[name].predict(x)
        print(f"{name.upper():4s} outputs {answers.ravel()} after {len(mistakes)} epochs")
        rows.holds(f"{name.upper()} of two inputs", "learned", f"epoch {len(mistakes)}", np.array_equal(answers, y))

    # XOR needs b < 2 and w1 + w2 + b < 2, so that w1 + w2 + 2b < 4. It also needs w1 + b ≥ 2 and w2 + b ≥ 2, so that
    # w1 + w2 + 2b ≥ 4. This is a contradiction: no line separates the two zeros from the two ones.
    x, y = datasets.logic_gate("xor")
    gates["xor"] = perceptron(2, backend, seed)
    mistakes = learn(gates["xor"], x, y, epochs=200)
    before = gates["xor"].state_dict()
    learn(gates["xor"], x, y, epochs=1)
    moved = max(abs(gates["xor"].state_dict()[name] - before[name]).max() for name in before)
    print(f"XOR  is never learned: {mistakes[-1]} mistakes in epoch {len(mistakes)}, whose corrections cancel out:")
    print(f"     one more epoch changes the weights by {moved:.0e}")
    never = min(mistakes) > 0 and moved < 1e-9
    rows.holds("XOR of two inputs", "never learned", f"{min(mistakes)} or more mistakes per epoch", never)
    if plots:
        draw(plots, gates)
    return rows


def draw(plots, gates):
    from xpnet.plots import decision_boundary

    with picture(plots, "perceptron", 9.6, 7.6) as figure:
        for name, ax in zip(gates, figure.subplots(2, 2).flat, strict=True):
            decision_boundary(gates[name], *datasets.logic_gate(name), ax=ax)
            ax.set_title(name.upper() + (": not learned" if name == "xor" else ""), pad=26)  # above the legend


if __name__ == "__main__":
    main(run)
