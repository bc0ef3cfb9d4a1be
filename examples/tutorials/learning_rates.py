"""What the learning rate does to the OR gate: too small, good, too large; and rates that fall as training goes on.

After "Understanding & Creating Neural Networks with Computational Graphs from Scratch". A sigmoid flattens out, so a
rate too large stalls it. Where the cost is a parabola, as a linear neuron's is, such a rate throws it out for good.
"""

import numpy as np
from common import Comparison, main, picture

import xpnet
from xpnet import datasets, layers, losses, schedules

EPOCHS = 5000
LOSS = losses.HalfSquaredError()
FIGURES = {5e-10: "0.088913", 0.5: "0.001126", 5: "0.000097", 1000: "0.125"}  # the cost in the last epoch
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
    """`rate` is a function of the epoch. Returns the cost of each epoch, taken before its own update."""
    x, y = (model.backend.asarray(column) for column in datasets.logic_gate("or"))
    costs = []
    for epoch in range(epochs):
        estimate = model.forward(x)  # forward
        costs.append(LOSS(estimate, y))  # loss
        if costs[-1] > 1e6:  # on its way to infinity
            break
        model.backward(LOSS.gradient(model.backend, estimate, y) / len(x))  # backward: of a mean, hence / m
        for parameter in model.parameters:  # update
            parameter.value -= rate(epoch) * parameter.grad
    return costs


def highest_stable_rate():
    """2 / λmax: a step beyond it lands higher on the other side of the parabola than it left.

    λmax is the greatest curvature of ½ mean (Aw - y)², the largest eigenvalue of AᵀA / m; A is x and a column of ones.
    """
    x, _ = datasets.logic_gate("or")
    a = np.hstack([x, np.ones((len(x), 1))])
    return 2 / np.linalg.eigvalsh(a.T @ a / len(x)).max()


def run(backend="auto", seed=0, plots=None):
    rows = Comparison("learning rates")
    sigmoid = {rate: train(neuron(backend, layers.Sigmoid()), schedules.Constant(rate)) for rate in (*FIGURES, 50)}
    for rate, figure in FIGURES.items():
        print(f"rate {rate:g}: cost {sigmoid[rate][0]:.6f} → {sigmoid[rate][-1]:.6f}")
        rows.equal(f"cost in epoch {EPOCHS} at {rate:g}", figure, sigmoid[rate][-1])
    first, second, last = sigmoid[50][0], sigmoid[50][1], sigmoid[50][-1]
    print(f"rate 50: cost {first:.6f} → {second:.6f} in one step, overshot; → {last:.6f}, recovered")
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
        fate = f"{costs[-1]:.0e} after {len(costs) - 1} steps" if diverges else f"{costs[-1]:.6f} in the end"
        print(f"linear neuron, rate {rate:.4f} = {rate / limit:.2f} × 2/λmax: cost {costs[0]:.6f} → {fate}")
        expected, ok = ("diverges", diverges) if rate > limit else ("converges", abs(costs[-1] - 1 / 32) < 1e-9)
        rows.holds(f"linear neuron at {rate / limit:.2f} × 2/λmax = {rate:.3f}", expected, fate, ok)

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
        "sigmoid neuron, falling rates": decayed,
        "linear neuron": {f"{rate:.4g}": costs[:100] for rate, costs in linear.items()},
    }
    with picture(plots, "learning_rates", 14, 4.4) as figure:
        for ax, (title, histories) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            curves({label: {"cost": costs} for label, costs in histories.items()}, "cost", ax=ax)
            ax.set(title=title, yscale="log")
            ax.legend(title="learning rate", fontsize="small")
            if title != "linear neuron":
                ax.set_xscale("log")  # or the first steps, where rates differ most, would not be seen


if __name__ == "__main__":
    main(run)
