"""The OR gate as a computational graph: what flows forward through each node, and what comes back.

After "Understanding & Creating Neural Networks with Computational Graphs from Scratch", one example at a time. A node
knows only its own, local gradient; it multiplies that by the gradient from upstream and hands the product on.
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


def walk(model, x, y):
    """One example through the graph and back, printed node by node. Returns ŷ, L and the gradient of each parameter."""
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

    # Backward. A layer's own slope is what it makes of an upstream gradient of 1.
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
    for node, slope in local.items():
        above = 1.0 if node == "ŷ" else total["ŷ" if node == "z" else "z"]
        print(f"          {node:4s}  {slope:14.5f}  {above:10.5f}  {total[node]:10.5f}")
    return number(estimate), loss, total


def gradients(linear):
    """What the linear node's backward has left at its parameters."""
    found = {"w1": number(linear.weight.grad[0]), "w2": number(linear.weight.grad[1])}
    return found | ({"b": number(linear.bias.grad)} if linear.use_bias else {})


def number(array):
    return float(array.reshape(-1)[0])


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("OR gate as a graph")
    x, y = [0.0, 0.0], 0.0

    print("Without a bias, x = (0, 0), y = 0")
    estimate, loss, slopes = walk(neuron(backend, bias=False), x, y)
    rows.exactly("ŷ", "0.5", estimate)
    rows.exactly("L", "0.125", loss)
    rows.exactly("∂L/∂w1", "0", slopes["w1"])
    rows.exactly("∂L/∂w2", "0", slopes["w2"])

    print("\nThe weights cannot learn from inputs of 0. With a bias:")
    model = neuron(backend, bias=True)
    _, _, slopes = walk(model, x, y)
    rows.exactly("∂L/∂b", "0.125", slopes["b"])

    print("\nA step of 1 down the gradient:")
    for parameter in model.parameters:  # update
        parameter.value -= 1.0 * parameter.grad
    estimate, loss, slopes = walk(model, x, y)
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
