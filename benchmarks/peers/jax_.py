"""JAX: the whole step is jitted, and weights and optimizer state are donated.

On a GPU an epoch is one `lax.scan` over its batches; with the option "scan", so are a hundred steps. On the CPU, each
batch is a call of the step, because steps in a scan are slower, especially convolutions.

On a GPU the option also has the precision of matrix products and convolutions. JAX reads this setting at every call of
a jitted function, so it must be set at every call.
"""

import contextlib
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.nets import RATES, Net, shapes
from benchmarks.samples import batch_of

SCANNED = 100
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32"}


class Jax:
    def __init__(self, net: Net, batch: int, device: str, option: str) -> None:
        words = option.split()
        self.steps_per_call = SCANNED if "scan" in words else 1
        self.precision = PRECISIONS.get(words[-1]) if words else None
        self._uploaded: tuple = ()
        self.device = jax.devices("gpu" if device.startswith("gpu") else "cpu")[0]
        self.net, self.batch = net, batch
        with jax.default_device(self.device):
            parameters = _parameters(net, jax.random.key(0))
            moments = jax.tree.map(jnp.zeros_like, (parameters, parameters)) if net.optimizer == "adam" else ()
            self.state = (parameters, moments, jnp.zeros((), jnp.int32))
            x, y = batch_of(net, batch)
            self.x, self.y = jnp.asarray(x), jnp.asarray(y)
        self._step = jax.jit(partial(_step, net), donate_argnums=0)
        self._steps_of_rows = jax.jit(partial(_steps_of_rows, net), donate_argnums=(0, 1))
        self._outputs = jax.jit(partial(_outputs, net))
        self._scanned = jax.jit(partial(_scanned, net), donate_argnums=0)

    def settings(self) -> AbstractContextManager[Any]:
        """The precision of matrix products of this peer."""
        return jax.default_matmul_precision(self.precision) if self.precision else contextlib.nullcontext()

    def step(self) -> None:
        if self.steps_per_call > 1:
            self.state, self._loss = self._scanned(self.state, self.x, self.y)
            return
        self.state, self._loss = self._step(self.state, self.x, self.y)[:2]

    def synchronize(self) -> None:
        jax.block_until_ready(self.state)

    def epoch(self, x, y) -> None:
        if not self._uploaded or self.device.platform == "cpu":
            self._uploaded = jnp.asarray(x), jnp.asarray(y)
        x, y = self._uploaded
        order = jax.random.permutation(jax.random.key(1), len(x))
        sums = (jnp.zeros(()), jnp.zeros((), jnp.int32))
        whole = len(x) // self.batch * self.batch
        groups = [order[:whole].reshape(-1, self.batch), order[None, whole:]]
        if self.device.platform == "cpu":
            groups = [order[None, start : start + self.batch] for start in range(0, len(x), self.batch)]
        for rows in groups:
            if rows.size:
                self.state, sums = self._steps_of_rows(self.state, sums, x, y, rows)
        float(sums[0]), int(sums[1])

    def predict(self, x):
        return jax.device_get(self._outputs(self.state[0], jnp.asarray(x), None))


def _parameters(net: Net, key) -> list:
    parameters = []
    for layer, before, _ in shapes(net):
        match layer:
            case ("conv", filters, kernel, _):
                shape = (kernel, kernel, before[-1], filters)
            case ("dense", units):
                shape = (before[0], units)
            case _:
                parameters.append(())
                continue
        key, new = jax.random.split(key)
        fan_in = 1
        for size in shape[:-1]:
            fan_in *= size
        parameters.append((jax.random.normal(new, shape) * (2.0 / fan_in) ** 0.5, jnp.zeros(shape[-1])))
    return parameters


def _outputs(net: Net, parameters: list, x, key):
    for i, (layer, own) in enumerate(zip(net.layers, parameters, strict=True)):
        match layer:
            case ("conv", _, _, padding):
                dimensions = ("NHWC", "HWIO", "NHWC")
                x = lax.conv_general_dilated(x, own[0], (1, 1), padding.upper(), dimension_numbers=dimensions) + own[1]
            case ("dense", _):
                x = x @ own[0] + own[1]
            case ("dropout", rate) if key is not None:
                mask = jax.random.bernoulli(jax.random.fold_in(key, i), 1.0 - rate, x.shape)
                x = jnp.where(mask, x / (1.0 - rate), 0.0)
            case ("flatten",):
                x = x.reshape(len(x), -1)
            case ("pool", size):
                window = (1, size, size, 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
            case ("relu",):
                x = jnp.maximum(x, 0.0)
    return x


def _step(net: Net, state, x, y):
    parameters, moments, count = state

    def loss_of(parameters):
        outputs = _outputs(net, parameters, x, jax.random.fold_in(jax.random.key(2), count))
        losses = -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1)
        return losses.mean(), outputs

    (loss, outputs), grads = jax.value_and_grad(loss_of, has_aux=True)(parameters)
    count, rate = count + 1, RATES[net.optimizer]
    if net.optimizer == "sgd":
        parameters = jax.tree.map(lambda w, g: w - rate * g, parameters, grads)
    else:
        means = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments[0], grads)
        squares = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, moments[1], grads)
        up = 1 / (1 - BETA1**count), 1 / (1 - BETA2**count)
        parameters = jax.tree.map(
            lambda w, m, s: w - rate * m * up[0] / (jnp.sqrt(s * up[1]) + EPSILON), parameters, means, squares
        )
        moments = (means, squares)
    return (parameters, moments, count), loss, outputs


def _scanned(net: Net, state, x, y):
    def one(state, _):
        state, loss, _ = _step(net, state, x, y)
        return state, loss

    return lax.scan(one, state, None, length=SCANNED)


def _steps_of_rows(net: Net, state, sums, x, y, batches):
    def one(carried, rows):
        (state, (total, hits)), targets = carried, y[rows]
        state, loss, outputs = _step(net, state, x[rows], targets)
        return (state, (total + loss * len(rows), hits + (outputs.argmax(1) == targets).sum())), None

    if len(batches) == 1:
        return one((state, sums), batches[0])[0]
    return lax.scan(one, (state, sums), batches)[0]


def make(net: Net, batch: int, device: str, option: str) -> Jax:
    return Jax(net, batch, device, option)
