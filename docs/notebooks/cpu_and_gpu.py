# %% [markdown]
# # The same run on the CPU and on a GPU
#
# A layer of xpnet is written once, against an array module `xp`: NumPy on the CPU, CuPy
# on a GPU. Here you train the same network on each device of this machine, and compare
# the numbers. Without a GPU, this notebook runs too, and says which comparisons are
# missing.

# %%
import time

import numpy as np
from exercises import grade

import xpnet
from xpnet import datasets, layers, optimizers, plots

# %% [markdown]
# ## What is there?
#
# `available_backends` says which devices can be used, and for others why not.

# %%
devices = []
for device, reason in xpnet.available_backends().items():
    print(f"{device}: {'can be used' if reason is None else reason}")
    if reason is None:
        devices.append(device)
has_gpu = "gpu" in devices
print(
    "\nThis page compares the CPU with",
    "a GPU." if has_gpu else "no GPU: there is none.",
)

# %% [markdown]
# ## One formula, two modules
#
# A function that takes its arrays' module as an argument runs on both.
# `backend.asarray` moves an array to the device, and `backend.to_numpy` moves it back.


# %%
def softplus(xp, x):
    return xp.log1p(xp.exp(x))


for device in devices:
    backend = xpnet.get_backend(device)
    x = backend.asarray(np.linspace(-2, 2, 5))
    y = softplus(backend.xp, x)
    print(f"{device}: {backend.xp.__name__}, {type(y)}, {backend.to_numpy(y).round(4)}")

# %% [markdown]
# ## The same run
#
# The seed determines the initial weights, the order of the batches and the noise of
# `Dropout`, on every device. The random numbers are made by the same integer
# arithmetic, so they are equal bit for bit. Sums of floats are not: each device adds in
# an order of its own, and rounds differently.

# %%
x, y = datasets.digits()
test = np.arange(len(x)) % 4 == 0


def train(device, dtype="float32", seed=0):
    """(the trained model, its history, the seconds that training took)."""
    model = xpnet.Sequential(
        [
            layers.Rescale(1 / 16),
            layers.Flatten(),
            layers.Dense(128),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Dense(10),
        ],
        input_shape=(8, 8),
        backend=device,
        seed=seed,
        dtype=dtype,
    )
    start = time.perf_counter()
    history = model.fit(
        x[~test],
        y[~test],
        optimizer=optimizers.Adam(0.002),
        epochs=15,
        batch_size=64,
        validation_data=(x[test], y[test]),
        verbose=0,
    )
    return model, history, time.perf_counter() - start


runs = {device: train(device) for device in devices}
for device, (_, history, seconds) in runs.items():
    loss, accuracy = history["loss"][-1], history["val_accuracy"][-1]
    print(f"{device}: loss {loss:.6f}, test accuracy {accuracy:.3f}, {seconds:.1f} s")

# %% alt="The loss by epoch on each device"
plots.curves({device: history for device, (_, history, _) in runs.items()})

# %% [markdown]
# How far apart are the devices? (The time for so small a network says little about a
# GPU, which is made for thousands of numbers at once. [Performance](../performance.md)
# has measurements.)

# %%
if has_gpu:
    pairs = zip(runs["cpu"][1]["loss"], runs["gpu"][1]["loss"], strict=True)
    for epoch, (on_cpu, on_gpu) in enumerate(pairs, 1):
        difference = abs(on_cpu - on_gpu)
        print(
            f"epoch {epoch:2d}: {on_cpu:.6f}, {on_gpu:.6f}, difference {difference:.0e}"
        )
else:
    print("There is no GPU here, so the CPU's losses are compared with nothing.")

# %% [markdown]
# On one device, the same run repeats bit for bit, at least on a CPU:

# %%
again, _, _ = train("cpu")
before = runs["cpu"][0].state_dict()
assert all(
    np.array_equal(weights, before[name])
    for name, weights in again.state_dict().items()
)
print("equal weights, bit for bit")

# %% [markdown]
# What another rounding does can be seen without a GPU: float64 rounds later than
# float32. Only the rounding differs, and the curves stay together. With another seed,
# everything differs.

# %%
histories = {
    "float32": runs["cpu"][1],
    "float64": train("cpu", dtype="float64")[1],
    "float32, another seed": train("cpu", seed=1)[1],
}
losses = {name: np.array(history["loss"]) for name, history in histories.items()}
rounding = abs(losses["float32"] - losses["float64"]).max()
chance = abs(losses["float32"] - losses["float32, another seed"]).max()
print(f"largest difference by rounding {rounding:.0e}, by another seed {chance:.0e}")
assert rounding < chance / 100

# %% [markdown]
# ## Move a model
#
# `model.to(device)` moves weights, optimizer state and buffers, and `save` and `load`
# work across devices.

# %%
model = runs[devices[-1]][0]
before = model.predict(x[:5])
model.to("cpu")
print(
    model.backend.name,
    "largest difference of the outputs after the move:",
    abs(model.predict(x[:5]) - before).max(),
)

# %% [markdown]
# ## Exercise: a layer for every device
#
# This activation is called softsign, y = x / (1 + |x|). Write its backward pass with
# `self.xp`, never with `np`, and it runs on a GPU too. Its slope is 1 / (1 + |x|)².


# %% tags=["exercise"]
class Softsign(layers.Layer):
    def forward(self, x):
        self.work.size = 1.0 + self.xp.abs(x)
        return x / self.work.size

    def backward(self, grad_y):
        return None  # ∂L/∂x


# %%
grade(
    Softsign(),
    (3,),
    hint="forward has stored 1 + |x| as self.work.size; neither np nor xp is needed.",
)

# %% [markdown]
# A solution is in [solutions.py](solutions.py). [CPU and GPU](../backends.md) describes
# the backends, and [Train on a GPU](../gpu.md) how a step runs there.
