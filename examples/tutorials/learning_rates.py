"""The effect of the learning rate on the OR gate: too small, good and too large rates, and rates that decay.

After "Understanding & Creating Neural Networks with Computational Graphs from Scratch". With a sigmoid, too large a
rate stalls training, because the sigmoid saturates. With a linear neuron, whose cost is quadratic, training diverges.
"""

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import datasets, layers, losses, schedules

EPOCHS = 5000
LOSS = losses.HalfSquaredError()
FINAL_COSTS = {5e-10: "0.088913", 0.5: "0.001126", 5: "0.000097", 1000: "0.125"}  # {rate: cost in the last epoch}
SCHEDULES = {
    "steps: halved every 1000": schedules.StepDecay(5, every=1000, factor=0.5),
    "exponential: × 0.37 in 1000": schedules.ExponentialDecay(5, every=1000, factor=0.37),
    "inverse time: 5 / (1 + t / 1000)": schedules.InverseTimeDecay(5, every=1000),
}


def neuron(backend, activation):
    return xpnet.Sequential(
        [layers.Dense(1, weight_initializer=[[0.1], [0.6]]), activation],
        input_shape=2,
        backend=backend,
        dtype="float64",
    )


def train(model, rate, epochs=EPOCHS):
    """Train, and return the cost of each epoch before its update. rate: a function of the epoch."""
    x, y = (model.backend.asarray(column) for column in datasets.logic_gate("or"))
    costs = []
    for epoch in range(epochs):
        estimate = model.forward(x)  # forward
        costs.append(LOSS(estimate, y))  # loss
        if costs[-1] > 1e6:  # it diverges
            break
        model.backward(LOSS.gradient(model.backend, estimate, y) / len(x))  # backward: the cost is a mean, hence / m
        for parameter in model.parameters:  # update
            parameter.value -= rate(epoch) * parameter.grad
    return costs


def highest_stable_rate():
    """2 / λmax: a step with a larger rate ends at a larger cost, on the other side of the parabola.

    λmax is the largest curvature of the cost ½ mean (Aw - y)², and so the largest eigenvalue of AᵀA / m, where A is x
    with a column of ones.
    """
    x, _ = datasets.logic_gate("or")
    a = np.hstack([x, np.ones((len(x), 1))])
    return 2 / np.linalg.eigvalsh(a.T @ a / len(x)).max()


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("learning rates")
    sigmoid = {rate: train(neuron(backend, layers.Sigmoid()), schedules.Constant(rate)) for rate in (*FINAL_COSTS, 50)}
    for rate, final in FINAL_COSTS.items():
        print(f"rate {rate:g}: cost {sigmoid[rate][0]:.6f} → {sigmoid[rate][-1]:.6f}")
        rows.equal(f"cost in epoch {EPOCHS} at {rate:g}", final, sigmoid[rate][-1])
    first, second, last = sigmoid[50][0], sigmoid[50][1], sigmoid[50][-1]
    print(f"rate 50: cost {first:.6f} → {second:.6f} in one step, because it overshoots; then → {last:.6f}")
    rows.equal("cost at 50, at the start", "0.088913", first)
    rows.equal("cost at 50, after one step", "0.093409", second)
    rows.holds("cost at 50, at the end", "recovers", f"{last:.2g}", last < 0.001)

    limit = highest_stable_rate()
    linear = {
        rate: train(neuron(backend, layers.Identity()), schedules.Constant(rate), epochs=1000)
        for rate in (0.5, 0.98 * limit, 1.02 * limit, 50)
    }
    for rate, costs in linear.items():
        diverges = costs[-1] > 1e6
        result = f"{costs[-1]:.0e} after {len(costs) - 1} steps" if diverges else f"{costs[-1]:.6f} in the end"
        print(f"linear neuron, rate {rate:.4f} = {rate / limit:.2f} × 2/λmax: cost {costs[0]:.6f} → {result}")
        expected, ok = ("diverges", diverges) if rate > limit else ("converges", abs(costs[-1] - 1 / 32) < 1e-9)
        rows.holds(f"linear neuron at {rate / limit:.2f} × 2/λmax = {rate:.3f}", expected, result, ok)

    decayed = {}
    for name, schedule in SCHEDULES.items():
        decayed[name] = train(neuron(backend, layers.Sigmoid()), schedule)
        print(f"{name}: rate {schedule(0):g} → {schedule(EPOCHS - 1):.3g}, cost {decayed[name][-1]:.6f}")
        between = sigmoid[5][-1] < decayed[name][-1] < sigmoid[0.5][-1]
        rows.holds(name, "between 5 and 0.5", f"{decayed[name][-1]:.6f}", between)
    if plots:
        draw(plots, sigmoid, linear, decayed)
    return rows


def draw(plots, sigmoid, linear, decayed):
    from xpnet.plots import curves

    panels = {
        "sigmoid neuron, constant rates": {f"{rate:g}": costs for rate, costs in sorted(sigmoid.items())},
        "sigmoid neuron, decaying rates": decayed,
        "linear neuron": {f"{rate:.4g}": costs[:100] for rate, costs in linear.items()},
    }
    with picture(plots, "learning_rates", 14, 4.4) as figure:
        for ax, (title, histories) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            curves({label: {"cost": costs} for label, costs in histories.items()}, "cost", ax=ax)
            ax.set(title=title, yscale="log")
            ax.legend(title="learning rate", fontsize="small")
            if title != "linear neuron":
                ax.set_xscale("log")  # shows the first steps, where the rates differ most


if __name__ == "__main__":
    main(run)
