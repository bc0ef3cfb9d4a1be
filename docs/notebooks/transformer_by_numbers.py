# %% [markdown]
# # A transformer, number by number
#
# A transformer is a stack of blocks, and the heart of each block is **attention**: the
# tokens of a sequence look at each other. Here you compute attention for three tokens
# by hand, forward and backward, build a block around it, and look into a small
# transformer that has learned to reverse words.

# %%
import matplotlib.pyplot as plt
import numpy as np
from exercises import grade

import xpnet
from xpnet import layers, optimizers

np.set_printoptions(precision=4, suppress=True)

# %% [markdown]
# ## Queries, keys and values
#
# Three tokens with two features each, one token per row. Each token makes three vectors
# of its features: a **query**, what it looks for; a **key**, what it offers; and a
# **value**, what it gives.

# %%
x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
w_query = np.array([[1.0, 1.0], [0.0, 1.0]])
w_key = np.array([[1.0, 0.0], [1.0, 1.0]])
w_value = np.array([[1.0, 2.0], [2.0, 0.0]])
w_output = np.array([[1.0, 0.0], [1.0, 1.0]])

q, k, v = x @ w_query, x @ w_key, x @ w_value
print(f"q =\n{q}\nk =\n{k}\nv =\n{v}")

# %% [markdown]
# ## Scores and shares
#
# The score of a token for another one is the product of query and key: large if the one
# offers what the other looks for. It is divided by √2, where 2 is the number of
# features, so that scores do not grow with it. A softmax turns the scores of each row
# into shares P that add up to 1.


# %%
def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


scores = q @ k.T / np.sqrt(2)
shares = softmax(scores)
print(f"scores =\n{scores}\nP =\n{shares}")
assert np.allclose(shares.sum(axis=1), 1)

# %% [markdown]
# The output of a token is the mean of all values, weighted by its shares, times a last
# matrix.

# %%
mean = shares @ v
y = mean @ w_output
products = " + ".join(
    f"{p:.4f} · {value}" for p, value in zip(shares[0], v, strict=True)
)
print(f"token 1: {products} = {mean[0]}")
print(f"y =\n{y}")

# %% [markdown]
# xpnet computes the same:

# %%
model = xpnet.Sequential(
    [layers.MultiHeadAttention(1, use_bias=False)],
    input_shape=(3, 2),
    dtype="float64",
    backend="cpu",
)
for name, weight in {
    "query": w_query,
    "key": w_key,
    "value": w_value,
    "output": w_output,
}.items():
    setattr(model[0], f"{name}_weight", weight)
assert np.allclose(model.predict(x[None])[0], y)

# %% [markdown]
# A model that writes text must not look at later tokens. **Causal** attention sets
# their scores to −∞, so that their shares are 0:

# %% alt="The shares of all tokens in each output, without and with a causal mask"
later = np.triu(np.ones((3, 3), bool), 1)
causal = softmax(np.where(later, -np.inf, scores))
fig, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for ax, (title, matrix) in zip(
    axes, {"all tokens": shares, "causal": causal}.items(), strict=True
):
    ax.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(matrix):
        ax.text(
            column,
            row,
            f"{share:.2f}",
            ha="center",
            va="center",
            color="white" if share > 0.5 else "black",
        )
    ax.set(title=title, xlabel="value of token", ylabel="output of token")
    ax.set_xticks(range(3), ["1", "2", "3"])
    ax.set_yticks(range(3), ["1", "2", "3"])

# %% [markdown]
# ## Backward
#
# With the target (2, 1) for each token and the loss L = ½ Σ (y − target)², go back. All
# steps but one are matrix products, as in a dense layer. The softmax is the new one:
# the shares of a row add up to 1, so a larger share makes the others smaller. The
# gradient of a score is therefore its share times the difference of two things, the
# gradient of that share and the mean of the gradients of all shares in the row:
#
# ∂L/∂score_s = P_s (∂L/∂P_s − Σ_r P_r ∂L/∂P_r)

# %%
target = np.array([[2.0, 1.0]] * 3)
grad_y = y - target
grad_mean = grad_y @ w_output.T
grad_v, grad_shares = shares.T @ grad_mean, grad_mean @ v.T
grad_scores = shares * (grad_shares - (shares * grad_shares).sum(axis=1, keepdims=True))
grad_q, grad_k = grad_scores @ k / np.sqrt(2), grad_scores.T @ q / np.sqrt(2)
grad_x = grad_q @ w_query.T + grad_k @ w_key.T + grad_v @ w_value.T
print(f"L = {0.5 * (grad_y**2).sum():.6f}\n∂L/∂P =\n{grad_shares}")
print(f"∂L/∂scores =\n{grad_scores}\n∂L/∂x =\n{grad_x}")
assert np.allclose(grad_scores.sum(axis=1), 0)

# %% [markdown]
# The gradients of each row of scores add up to 0: adding the same number to all scores
# of a row changes nothing. A token gets three gradients, through its query, its key and
# its value.

# %%
loss = xpnet.losses.HalfSquaredError("sum")
explained = xpnet.explain(model, x[None], target[None], loss)
assert np.allclose(explained["0"].downstream[0], grad_x)
assert np.allclose(explained.parameters["0.query_weight"].gradient, x.T @ grad_q)
explained

# %% [markdown]
# ## The order of the tokens
#
# Attention itself does not know the order. If the tokens are shuffled, the outputs are
# shuffled in the same way, and nothing else changes:

# %%
order = [2, 0, 1]
assert np.allclose(model.predict(x[order][None])[0], y[order])

# %% [markdown]
# So a transformer adds a vector for each position to its tokens, the
# `PositionalEmbedding`.
#
# ## A block
#
# A `TransformerBlock` has two parts, attention and a small network for each token
# separately. Each part normalizes its input first and **adds** its result to it, so
# that gradients reach the first block directly. `explain` shows the parts with their
# names:

# %%
block = xpnet.Sequential(
    [layers.TransformerBlock(1, causal=False)],
    input_shape=(3, 2),
    seed=0,
    backend="cpu",
)
inside = xpnet.explain(block, x[None], target[None], loss)
for name, part in inside.layers.items():
    print(f"{name:13s} {part.layer:28s} output of token 1: {part.output[0, 0]}")

# %% [markdown]
# ## Train one
#
# The task: reverse a word of six letters. To write the first letter, the model must
# look at the last one, and so on. There is one block with one head, and the model sees
# all letters at once.

# %%
letters, length = 8, 6
rng = np.random.default_rng(0)
words = rng.integers(0, letters, size=(2000, length))
reversed_words = words[:, ::-1].copy()
reverser = xpnet.Sequential(
    [
        layers.Embedding(letters, 32),
        layers.PositionalEmbedding(length),
        layers.TransformerBlock(1, causal=False),
        layers.LayerNorm(),
        layers.Dense(letters),
    ],
    input_shape=(length,),
    seed=0,
    backend="cpu",
)
history = reverser.fit(
    words[200:],
    reversed_words[200:],
    optimizer=optimizers.AdamW(0.003),
    epochs=5,
    batch_size=64,
    validation_data=(words[:200], reversed_words[:200]),
    verbose=0,
)
print("accuracy on new words, after each epoch:", history["val_accuracy"])
assert history["val_accuracy"][-1] > 0.99

# %% [markdown]
# Where does it look? The shares are recomputed here from the input of the attention
# layer and its weights.

# %% alt="Each letter of the result attends to its counterpart in the word"
word = words[:1]
seen = xpnet.explain(reverser, word, reversed_words[:1], "softmax_cross_entropy")[
    "2.attention"
]
weights = {name: p.value for name, p in seen.parameters.items()}
h = seen.input[0]
q, k = (
    h @ weights[f"{part}_weight"] + weights[f"{part}_bias"] for part in ("query", "key")
)
learned = softmax(q @ k.T / np.sqrt(32))
text = "".join("abcdefgh"[i] for i in word[0])
result = "".join("abcdefgh"[i] for i in reverser.predict(word).argmax(axis=-1)[0])
print(f"the word {text}, reversed by the model: {result}")
assert (learned.argmax(axis=1) == np.arange(length)[::-1]).all()

fig, ax = plt.subplots(figsize=(4, 4), layout="constrained")
ax.imshow(learned, cmap="Blues", vmin=0, vmax=1)
ax.set(xlabel="letter of the word", ylabel="letter of the result")
ax.set_xticks(range(length), list(text))
ax.set_yticks(range(length), list(text[::-1]))
plt.show()

# %% [markdown]
# The dark squares run from the top right to the bottom left: for its first letter the
# model looks at the last one, and so on. Nobody has told it so.
#
# ## Exercise: the backward pass of a softmax
#
# The rows of the input are scores, and forward has stored the shares. Write ∂L/∂x with
# the formula above. `self.xp.sum(…, axis=-1, keepdims=True)` adds up each row.


# %% tags=["exercise"]
class RowSoftmax(layers.Layer):
    def forward(self, x):
        e = self.xp.exp(x - self.xp.max(x, axis=-1, keepdims=True))
        self.work.shares = e / self.xp.sum(e, axis=-1, keepdims=True)
        return self.work.shares

    def backward(self, grad_y):
        shares = self.work.shares
        return None  # ∂L/∂x


# %%
grade(
    RowSoftmax(),
    (4,),
    hint="the formula of `grad_scores` above, with `grad_y` for `grad_shares`.",
)

# %% [markdown]
# A solution is in [solutions.py](solutions.py). [A transformer from
# scratch](../transformers.md) goes on to a model that writes text.
