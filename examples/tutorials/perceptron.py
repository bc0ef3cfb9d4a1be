"""A perceptron learns AND from three examples, then the other logic gates; XOR it can never learn.

After "Basics of Neural Networks" (Ganesh KT, 2020). It fires, 1, where the weighted sum reaches a threshold of 2.
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
    """Rosenblatt's rule, one example at a time, until an epoch has no mistake. Returns the mistakes of each epoch."""
    x, y = model.backend.asarray(x), model.backend.asarray(y)
    mistakes = []
    for _ in range(epochs):
        mistakes.append(0)
        for i in range(len(x)):
            output = model.forward(x[i : i + 1])  # forward: 0 or 1
            error = output - y[i : i + 1]  # loss: how wrong, -1, 0 or 1
            model.backward(error)  # backward: error · x for the weights; a step lets the error through
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
    print(f"AND of three inputs: no mistake in epoch {len(mistakes)}")
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
        print(f"{name.upper():4s} answers {answers.ravel()} after {len(mistakes)} epochs")
        rows.holds(f"{name.upper()} of two inputs", "learnt", f"epoch {len(mistakes)}", np.array_equal(answers, y))

    # XOR. It asks for b < 2 and w1 + w2 + b < 2, together w1 + w2 + 2b < 4; but also for w1 + b ≥ 2 and w2 + b ≥ 2,
    # together w1 + w2 + 2b ≥ 4. No weights do both: no line parts the two zeros from the two ones.
    x, y = datasets.logic_gate("xor")
    gates["xor"] = perceptron(2, backend, seed)
    mistakes = learn(gates["xor"], x, y, epochs=200)
    before = gates["xor"].state_dict()
    learn(gates["xor"], x, y, epochs=1)
    moved = max(abs(gates["xor"].state_dict()[name] - before[name]).max() for name in before)
    print(f"XOR  never: {mistakes[-1]} mistakes in epoch {len(mistakes)}, whose corrections undo each other:")
    print(f"     an epoch later the weights are where they were, to {moved:.0e}")
    never = min(mistakes) > 0 and moved < 1e-9
    rows.holds("XOR of two inputs", "never learnt", f"{min(mistakes)} or more mistakes an epoch", never)
    if plots:
        draw(plots, gates)
    return rows


def draw(plots, gates):
    from xpnet.plots import decision_boundary

    with picture(plots, "perceptron", 9.6, 7.6) as figure:
        for name, ax in zip(gates, figure.subplots(2, 2).flat, strict=True):
            decision_boundary(gates[name], *datasets.logic_gate(name), ax=ax)
            ax.set_title(name.upper() + (": no line will do" if name == "xor" else ""), pad=26)  # above the legend


if __name__ == "__main__":
    main(run)
