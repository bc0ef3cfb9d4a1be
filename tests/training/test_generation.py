"""xpnet.generate: greedy and random continuations, with and without what layers keep of earlier steps."""

import threading

import numpy as np
import pytest

import xpnet
from xpnet import layers
from xpnet.training.generation import drawn

VOCABULARY = 11
PROMPT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def block(**arguments):
    return layers.TransformerBlock(2, mlp_ratio=2, weight_initializer="normal", **arguments)


def embedding():
    return layers.Embedding(VOCABULARY, 8, weight_initializer="glorot_uniform")


def head():
    return layers.Dense(VOCABULARY, weight_initializer="glorot_uniform")


class Cumulative(layers.Layer):
    """The mean of the steps until now, a causal layer that xpnet does not know."""

    def forward(self, x):
        return self.xp.cumsum(x, axis=1) / self.xp.arange(1.0, x.shape[1] + 1.0).astype(x.dtype)[:, None]


class Doubled(xpnet.Sequential):
    def forward(self, x, training=False):
        return super().forward(x, training) * 2.0


def graph(backend):
    tokens = xpnet.Input((None,))
    x = embedding()(tokens)
    h = layers.Concatenate()([block(rotary=True)(x), layers.Conv1D(3, 2, padding="causal", dilation=2)(x)])
    return xpnet.Model(tokens, head()(h), backend)


def padded(backend):
    table = layers.Embedding(VOCABULARY, 8, padding_index=9, weight_initializer="glorot_uniform")
    return xpnet.Sequential([table, block(rotary=True), layers.GRU(6), head()], (None,), backend, seed=3)


def numbers(backend):
    return xpnet.Sequential([layers.Rescale(0.2), layers.Dense(8), layers.Tanh(), head()], (4,), backend, seed=3)


#: {name: (the length of the context or None, a function that makes the model)}
MODELS = {
    "learned positions": (8, lambda b: chain(b, None, layers.PositionalEmbedding(8), block(), block(use_bias=False))),
    "rotary positions": (None, lambda b: chain(b, None, block(rotary=True, norm="rms"), layers.RMSNorm())),
    "fixed length": (7, lambda b: chain(b, 7, block(rotary=True), layers.LayerNorm())),
    "causal convolutions": (
        None,
        lambda b: chain(b, None, layers.Conv1D(6, 3, padding="causal", dilation=2), layers.ReLU()),
    ),
    "recurrent": (None, lambda b: chain(b, None, layers.LSTM(6), layers.GRU(6), layers.SimpleRNN(6))),
    "last state": (None, lambda b: chain(b, None, layers.LSTM(8, return_sequences=False))),
    "graph": (None, graph),
    "padded": (None, padded),
    "own layer": (6, lambda b: chain(b, 6, Cumulative(), layers.Tanh())),
    "context to one output": (4, lambda b: chain(b, 4, layers.Flatten(), layers.Dense(8), layers.Tanh())),
    "tokens as numbers": (4, numbers),
    "mean of the context": (None, lambda b: chain(b, None, block(causal=False), layers.GlobalAveragePool1D())),
}


def chain(backend, steps, *middle):
    return xpnet.Sequential([embedding(), *middle, head()], (steps,), backend, seed=3)


def recomputed(model, prompt, length, most, temperature=0.0, seed=0):
    """What `generate` returns, by predictions of the whole context, as long as the model takes it."""
    tokens, rng = np.asarray(prompt), np.random.default_rng(seed)
    for _ in range(length):
        context = tokens if most is None else tokens[:, -most:]
        steps, last = model.input_shape[0], context.shape[1] - 1
        if steps is not None:  # outputs do not depend on what follows
            context = np.pad(context, ((0, 0), (0, steps - last - 1)), constant_values=7)
        outputs = model.predict(context)
        logits = (outputs if outputs.ndim == 2 else outputs[:, last]).astype("float64")
        tokens = np.concatenate([tokens, drawn(logits, temperature, None, rng)[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_generation_equals_recomputation_of_the_context(name, backend):
    most, make = MODELS[name]
    model = make(backend)
    for temperature in (0.0, 1.5):
        tokens = xpnet.generate(model, PROMPT, 9, temperature)
        assert tokens.dtype == np.int64 and (tokens[:, :5] == PROMPT).all()
        np.testing.assert_array_equal(tokens, recomputed(model, PROMPT, 9, most, temperature))
    assert len(np.unique(tokens[:, 5:])) > 3
    if backend.name != "cpu":
        np.testing.assert_array_equal(tokens, xpnet.generate(make("cpu"), PROMPT, 9, temperature))


def test_each_step_computes_one_token_until_the_context_is_full(monkeypatch):
    model = MODELS["learned positions"][1]("cpu")
    counts, forward = [], layers.Embedding.forward
    monkeypatch.setattr(layers.Embedding, "forward", lambda self, x: counts.append(x.shape[1]) or forward(self, x))
    xpnet.generate(model, PROMPT, 6)
    assert counts == [5, 1, 1, 1, 8, 8]


def test_a_prompt_longer_than_the_context_is_cropped():
    model = MODELS["learned positions"][1]("cpu")
    long = np.tile(PROMPT, 3)
    tokens = xpnet.generate(model, long, 5)
    np.testing.assert_array_equal(tokens[:, 15:], xpnet.generate(model, long[:, -8:], 5)[:, 8:])


# Draws ----------------------------------------------------------------------------------------------------------------


def frequencies(logits, temperature, top_k):
    rows = np.tile(np.asarray(logits, float), (40_000, 1))
    return np.bincount(drawn(rows, temperature, top_k, np.random.default_rng(1)), minlength=len(logits)) / len(rows)


@pytest.mark.parametrize(("temperature", "top_k", "counted"), [
    (1.0, None, [0, 1, 2, 3, 4]), (0.5, None, [0, 1, 2, 3, 4]), (2.0, 3, [1, 2, 3]), (1.0, 9, [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_tokens_are_drawn_from_the_softmax_of_the_largest_logits(temperature, top_k, counted):
    logits = np.array([-1.0, 1.0, 0.5, 0.5, -np.inf]) + 1000.0
    expected = np.zeros(5)
    expected[counted] = np.exp((logits[counted] - 1000.0) / temperature)
    np.testing.assert_allclose(frequencies(logits, temperature, top_k), expected / expected.sum(), atol=0.01)


def test_of_equal_logits_the_first_are_in_the_top_k():
    assert frequencies([0.0, 2.0, 2.0, 2.0], 1.0, 2)[[0, 3]].max() == 0
    assert frequencies([0.0, 2.0, 2.0, 2.0], 1.0, 1)[1] == frequencies([0.0, 2.0, 2.0, 2.0], 0, None)[1] == 1
    assert frequencies([0.0, 1e-3], 1e-300, None)[1] == 1


def test_the_seed_decides_and_none_draws_anew():
    model = MODELS["rotary positions"][1]("cpu")
    same, again, other = (xpnet.generate(model, PROMPT, 30, seed=seed) for seed in (5, 5, 6))
    assert (same == again).all() and (same != other).any()
    np.testing.assert_array_equal(xpnet.generate(model, PROMPT, 20, seed=5), same[:, :25])
    assert (xpnet.generate(model, PROMPT, 30, seed=None) != xpnet.generate(model, PROMPT, 30, seed=None)).any()


def test_probabilities_are_drawn_as_their_logits(backend):
    model = MODELS["causal convolutions"][1](backend)
    logits = xpnet.generate(model, PROMPT, 12)
    for last in (layers.Softmax(), layers.LogSoftmax()):
        other = xpnet.Model(model.inputs, last(model.outputs[0]))
        np.testing.assert_array_equal(xpnet.generate(other, PROMPT, 12), logits)


# Arguments ------------------------------------------------------------------------------------------------------------


def test_prompts_of_any_integer_type_and_lists_are_accepted():
    model = MODELS["rotary positions"][1]("cpu")
    expected = xpnet.generate(model, PROMPT, 4)
    for prompt in (PROMPT.astype("uint8"), PROMPT.astype("int16"), PROMPT.tolist()):
        np.testing.assert_array_equal(xpnet.generate(model, prompt, 4), expected)
    np.testing.assert_array_equal(xpnet.generate(model, PROMPT, 0), PROMPT)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"prompt": PROMPT[0]}, xpnet.errors.ShapeError, r"shape \(N, T\), but has \(5,\).*prompt\[None\]"),
    ({"prompt": PROMPT / 2}, xpnet.errors.ArgumentTypeError, "integers, the numbers of tokens, not float64"),
    ({"prompt": PROMPT > 2}, xpnet.errors.ArgumentTypeError, "integers, the numbers of tokens, not bool"),
    ({"prompt": [[]]}, xpnet.errors.ArgumentTypeError, "integers"),
    ({"prompt": PROMPT[:, :0]}, xpnet.errors.DataError, "prompt is empty.*at least one token"),
    ({"prompt": PROMPT + 7}, xpnet.errors.DataError, "prompt holds 11 in sample 0"),
    ({"length": -1}, xpnet.errors.ArgumentError, "generate: length must be an integer of at least 0, not -1"),
    ({"temperature": -0.1}, xpnet.errors.ArgumentError, "temperature must be a finite number of at least 0"),
    ({"top_k": 0}, xpnet.errors.ArgumentError, "top_k must be an integer of at least 1.*None"),
    ({"seed": "a"}, xpnet.errors.ArgumentError, "seed must be"),
    ({"topk": 3}, xpnet.errors.ArgumentTypeError, "top_k"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, error, message):
    model = MODELS["rotary positions"][1]("cpu")
    with pytest.raises(error, match=message):
        xpnet.generate(**{"model": model, "prompt": PROMPT, "length": 3} | arguments)


def two_inputs():
    a, b = xpnet.Input((None,)), xpnet.Input((None,))
    table = embedding()
    return xpnet.Model([a, b], head()(layers.Add()([table(a), table(b)])), "cpu")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: chain("cpu", None, block(causal=False)), r"layer 1 \(TransformerBlock\).*later steps"),
    (lambda: chain("cpu", None, layers.Conv1D(8, 3, padding="same")), r"layer 1 \(Conv1D\).*later steps"),
    (lambda: chain("cpu", None, layers.Bidirectional(layers.GRU(3))), r"layer 1 \(Bidirectional\).*later steps"),
    (two_inputs, "must take tokens"),
    (lambda: xpnet.Sequential([layers.Dense(4)], (3, 4), "cpu"), r"takes \(N, 3, 4\)"),
    (lambda: xpnet.Sequential([embedding(), layers.Dense(20)], (None,), "cpu"), "predicts 20 tokens, but its last"),
])  # fmt: skip
def test_models_that_do_not_predict_tokens_are_refused(make, message):
    with pytest.raises(xpnet.errors.ArgumentError, match=message):
        xpnet.generate(make(), PROMPT, 3)


def test_a_model_of_whole_contexts_needs_a_prompt_of_that_length():
    with pytest.raises(xpnet.errors.ShapeError, match="prompt has 3 tokens, but the model takes 4"):
        xpnet.generate(MODELS["context to one output"][1]("cpu"), PROMPT[:, :3], 2)


def test_models_without_weights_or_with_nan_are_refused():
    with pytest.raises(xpnet.errors.StateError, match="not built yet, so it cannot generate"):
        xpnet.generate(xpnet.Sequential([embedding(), head()]), PROMPT, 3)
    model = MODELS["rotary positions"][1]("cpu")
    model.parameters[-1].value[...] = np.nan
    with pytest.raises(xpnet.errors.StateError, match="NaN"):
        xpnet.generate(model, PROMPT, 3)
    model.parameters[-1].value[...] = 0.0  # the model still works
    assert xpnet.generate(model, PROMPT, 3).shape == (2, 8) and model.context.continuation is None


def test_a_model_with_a_forward_of_its_own_computes_the_whole_context():
    model = Doubled([embedding(), layers.RMSNorm(), head()], (None,), "cpu")
    np.testing.assert_array_equal(xpnet.generate(model, PROMPT, 6), recomputed(model, PROMPT, 6, None, 1.0))


def test_several_threads_generate_with_one_model():
    model = MODELS["learned positions"][1]("cpu")
    prompts = [np.roll(PROMPT, k) for k in range(4)]
    expected = [xpnet.generate(model, prompt, 12) for prompt in prompts]
    found = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: xpnet.generate(model, prompts[k], 12)})) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[k] == expected[k]).all() for k in range(4))
