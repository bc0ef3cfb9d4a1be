"""The OR gate as a computational graph: the forward value and the gradient of each node.

After "Understanding & Creating Neural Networks with Computational Graphs from Scratch", one example at a time. A node
multiplies its local gradient by the upstream gradient, and the product is the upstream gradient of its inputs.
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


def forward_backward(model, x, y):
    """Print both passes of one example node by node. Returns ŷ, L and the gradients."""
    linear, sigmoid = model.layers
    backend = model.backend
    x, y, one = backend.asarray([x]), backend.asarray([[y]]), backend.asarray([[1.0]])

    z = linear.forward(x)  # forward, node by node
    estimate = sigmoid.forward(z)
    loss = LOSS(estimate, y)  # loss
    weights = {name: number(value) for name, value in zip(("w1", "w2"), linear.weight.value, strict=True)}
    bias = {"b": number(linear.bias.value)} if linear.use_bias else {}
    print("forward   " + ", ".join(f"{name} = {value:.5f}" for name, value in (weights | bias).items()))
    print(f"          z = {number(z):.5f}, ŷ = σ(z) = {number(estimate):.5f}, L = ½ (ŷ − y)² = {loss:.5f}")

    # Backward. The local gradient of a layer is its backward pass with an upstream gradient of 1.
    local = {"ŷ": number(LOSS.gradient(backend, estimate, y)), "z": number(sigmoid.backward(one))}
    linear.backward(one)
    local |= gradients(linear)

    upstream = LOSS.gradient(backend, estimate, y)  # ∂L/∂ŷ
    total = {"ŷ": number(upstream)}
    upstream = sigmoid.backward(upstream)  # ∂L/∂z = ∂L/∂ŷ · ∂ŷ/∂z
    total["z"] = number(upstream)
    linear.backward(upstream)  # ∂L/∂w = ∂L/∂z · ∂z/∂w
    total |= gradients(linear)
    print("backward  node  local gradient  × upstream  = ∂L/∂node")
    for node, gradient in local.items():
        above = 1.0 if node == "ŷ" else total["ŷ" if node == "z" else "z"]
        print(f"          {node:4s}  {gradient:14.5f}  {above:10.5f}  {total[node]:10.5f}")
    return number(estimate), loss, total


def gradients(linear):
    """The gradients of the parameters after the backward pass of the linear node."""
    weights = {"w1": number(linear.weight.grad[0]), "w2": number(linear.weight.grad[1])}
    return weights | ({"b": number(linear.bias.grad)} if linear.use_bias else {})


def number(array):
    return float(array.reshape(-1)[0])


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("OR gate as a graph")
    x, y = [0.0, 0.0], 0.0

    print("Without a bias, x = (0, 0), y = 0")
    estimate, loss, gradient = forward_backward(neuron(backend, bias=False), x, y)
    rows.exactly("ŷ", "0.5", estimate)
    rows.exactly("L", "0.125", loss)
    rows.exactly("∂L/∂w1", "0", gradient["w1"])
    rows.exactly("∂L/∂w2", "0", gradient["w2"])

    print("\nThe weights cannot learn from inputs of 0. With a bias:")
    model = neuron(backend, bias=True)
    _, _, gradient = forward_backward(model, x, y)
    rows.exactly("∂L/∂b", "0.125", gradient["b"])

    print("\nAfter one step of gradient descent with a learning rate of 1:")
    for parameter in model.parameters:  # update
        parameter.value -= 1.0 * parameter.grad
    estimate, loss, _ = forward_backward(model, x, y)
    rows.exactly("b after one step", "-0.125", number(model.parameters[1].value))
    rows.equal("ŷ after one step", "0.46879", estimate)
    rows.equal("L after one step", "0.10988", loss)
    if plots:
        from xpnet.plots import network

        with picture(plots, "or_gate_graph", 5, 3) as figure:
            network(model, ax=figure.subplots())
    return rows


if __name__ == "__main__":
    main(run)
