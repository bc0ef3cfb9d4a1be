"""The OR gate as a computational graph: the forward value and the gradient of each node.

After "Understanding & Creating Neural Networks with Computational Graphs from Scratch", one example at a time. A node
multiplies its local gradient by the upstream gradient, and the product is the upstream gradient of its inputs.
`xpnet.explain` shows all of them.
"""

from common import Comparison, main, picture

import xpnet
from xpnet import layers, losses

LOSS = losses.HalfSquaredError()


def neuron(backend, bias):
    return xpnet.Sequential(
        [layers.Dense(1, use_bias=bias, weight_initializer=[[0.1], [0.6]]), layers.Sigmoid()],
        input_shape=2,
        backend=backend,
        dtype="float64",
    )


def explain(model, x, y):
    """Print both passes of one example layer by layer. Returns the explanation, ŷ and the gradients."""
    explained = xpnet.explain(model, [x], [[y]], LOSS, optimizer=1.0)
    print(explained)
    sigmoid, parameters = explained["1"], explained.parameters
    gradients = dict(zip(("w1", "w2"), parameters["0.weight"].gradient[:, 0], strict=True))
    if "0.bias" in parameters:
        gradients["b"] = parameters["0.bias"].gradient[0]
    return explained, sigmoid.output[0, 0], gradients


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("OR gate as a graph")
    x, y = [0.0, 0.0], 0.0

    print("Without a bias, x = (0, 0), y = 0")
    explained, estimate, gradient = explain(neuron(backend, bias=False), x, y)
    rows.exactly("ŷ", "0.5", estimate)
    rows.exactly("L", "0.125", explained.loss)
    rows.exactly("∂L/∂w1", "0", gradient["w1"])
    rows.exactly("∂L/∂w2", "0", gradient["w2"])

    print("\nThe weights cannot learn from inputs of 0. With a bias:")
    model = neuron(backend, bias=True)
    explained, _, gradient = explain(model, x, y)
    rows.exactly("∂L/∂b", "0.125", gradient["b"])

    print("\nAfter one step of gradient descent with a learning rate of 1:")
    for parameter in model.parameters:  # update
        parameter.value = explained.parameters[parameter.name].value + explained.parameters[parameter.name].update
    explained, estimate, _ = explain(model, x, y)
    rows.exactly("b after one step", "-0.125", explained.parameters["0.bias"].value[0])
    rows.equal("ŷ after one step", "0.46879", estimate)
    rows.equal("L after one step", "0.10988", explained.loss)
    if plots:
        from xpnet.plots import network

        with picture(plots, "or_gate_graph", 7, 3.2) as figure:
            network(model, ax=figure.subplots(), explanation=explained)
    return rows


if __name__ == "__main__":
    main(run)
