"""Tokenizers: round trips, files and refusals; and windows of tokens to train on."""

import sys

import numpy as np
import pytest
from small_models import assert_same_state
from threads_as_ranks import run_on_ranks

import xpnet
from xpnet import callbacks, layers
from xpnet.datasets import CharTokenizer, RandomWindows, SubwordTokenizer, token_windows
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, FileError, MissingPackageError

TEXT = "to be, or not to be: that is the question — ☺😀\n" * 4
CHARACTERS = CharTokenizer(TEXT)


# Characters --------------------------------------------------------------------------------------------------------


def test_tokens_number_the_sorted_characters():
    tokenizer = CharTokenizer("hello")
    assert tokenizer.vocabulary == ("e", "h", "l", "o")
    assert tokenizer.vocabulary_size == 4
    tokens = tokenizer.encode("hole")
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [1, 3, 2, 0]
    assert tokenizer.decode(tokens) == "hole"
    assert tokenizer.decode([[1, 0], [2, 3]]) == ["he", "lo"]
    assert (tokenizer.decode([]), tokenizer.encode("").tolist()) == ("", [])


def test_a_saved_tokenizer_is_the_same(tmp_path):
    CHARACTERS.save(tmp_path / "characters.json")
    loaded = CharTokenizer.load(tmp_path / "characters.json")
    assert loaded == CHARACTERS != CharTokenizer("to be")
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert repr(loaded) == f"<CharTokenizer of {len(set(TEXT))} characters>"


@pytest.mark.parametrize("content", [
    b"", b"\xff", b"[]", b"{}", b'{"format": "xpnet-characters-1"}',
    b'{"format": "xpnet-characters-2", "vocabulary": ["a"]}',
    b'{"format": "xpnet-characters-1", "vocabulary": ["b", "a"]}',
    b'{"format": "xpnet-characters-1", "vocabulary": ["a", "bc"]}',
    b'{"format": "xpnet-characters-1", "vocabulary": [1]}',
    b'{"format": "xpnet-characters-1", "vocabulary": []}',
])  # fmt: skip
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(FileError, match=r"t\.json: not a file that CharTokenizer\.save wrote"):
        CharTokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: CHARACTERS.encode("to bé"),
            DataError,
            "the text has 'é' at position 4, which is not among the 19 ch",
        ),
        (lambda: CHARACTERS.encode("😀!"), DataError, "has '!' at position 1"),
        (lambda: CHARACTERS.encode(b"to"), ArgumentTypeError, "encode: text must be a str, not bytes"),
        (lambda: CHARACTERS.decode([0, 19]), DataError, "tokens have 19, but the vocabulary has the tokens 0 to 18"),
        (lambda: CHARACTERS.decode([[-1]]), DataError, "tokens have -1"),
        (lambda: CHARACTERS.decode([0.5]), ArgumentTypeError, "must be integers of shape"),
        (lambda: CHARACTERS.decode(3), ArgumentTypeError, r"must be integers of shape .* not int64 of shape \(\)"),
        (lambda: CharTokenizer(""), ArgumentError, "text is empty"),
        (lambda: CharTokenizer(["to", "be"]), ArgumentTypeError, "text must be a str, not list"),
        (lambda: CharTokenizer(), ArgumentTypeError, "CharTokenizer: needs text"),
    ],
)
def test_what_is_not_in_the_vocabulary_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Subwords ----------------------------------------------------------------------------------------------------------


def test_subwords_have_the_interface_of_characters(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = SubwordTokenizer(TEXT, 280)
    tokens = tokenizer.encode(TEXT + "übermut\0")
    assert (tokens.dtype, tokenizer.vocabulary_size, len(tokenizer.vocabulary)) == (np.int64, 280, 280)
    assert len(tokens) < len(TEXT)
    assert tokenizer.decode(tokens) == TEXT + "übermut\0"
    assert tokenizer.decode(tokens[:4].reshape(2, 2)) == [tokenizer.decode(tokens[:2]), tokenizer.decode(tokens[2:4])]
    tokenizer.save(tmp_path / "t.json")
    np.testing.assert_array_equal(SubwordTokenizer.load(tmp_path / "t.json").encode(TEXT), tokenizer.encode(TEXT))
    with pytest.raises(DataError, match="tokens have 280"):
        tokenizer.decode([280])
    with pytest.raises(ArgumentError, match="vocabulary_size must be an integer of at least 256, not 100"):
        SubwordTokenizer(TEXT, 100)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(FileError, match="not a file of the package tokenizers"):
        SubwordTokenizer.load(tmp_path / "t.json")


def test_without_the_package_the_error_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match=r'pip install "xpnet\[text\]"'):
        SubwordTokenizer(TEXT)


# Windows -----------------------------------------------------------------------------------------------------------

TOKENS = np.arange(100) % 7


@pytest.mark.parametrize(("tokens", "count"), [(100, 24), (97, 24), (96, 23), (5, 1)])
def test_adjacent_windows_have_each_token_once(tokens, count):
    x, y = token_windows(np.arange(tokens), 4)
    assert x.tolist() == np.arange(4 * count).reshape(count, 4).tolist()
    np.testing.assert_array_equal(y, x + 1)


def test_random_windows_are_drawn_anew_in_each_epoch():
    windows = RandomWindows(np.arange(1000, dtype="uint16"), 8, batch_size=4, batches=30)
    first = list(windows.batches([0, 2, 0]))
    assert len(first) == 30
    for x, y in first:
        assert x.shape == (4, 8)
        assert x.dtype == np.uint16
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(np.diff(x), 1)
    starts = np.concatenate([x[:, 0] for x, _ in first])
    assert len(set(starts.tolist())) > 100  # of 120
    assert starts.min() < 100 and 900 < starts.max() < 992
    again, other = (np.concatenate([x[:, 0] for x, _ in windows.batches([0, 2, epoch])]) for epoch in (0, 1))
    np.testing.assert_array_equal(again, starts)
    assert (other != starts).mean() > 0.9
    short = RandomWindows(np.arange(5), 3, batch_size=50, batches=1)  # the first and the last window are drawn
    ((x, y),) = short.batches()
    assert {*x[:, 0].tolist()} == {0, 1}
    assert y.max() == 4


def predictor(backend="cpu"):
    return xpnet.Sequential([layers.Embedding(7, 8), layers.Dense(7)], (None,), backend)


def test_a_model_learns_the_next_token_from_either_kind_of_windows(backend):
    options = {"optimizer": "adam", "loss": "softmax_cross_entropy", "epochs": 8, "verbose": 0}
    optimizer = xpnet.optimizers.Adam(0.1)
    for data in ((RandomWindows(TOKENS, 6, batch_size=4, batches=5),), token_windows(TOKENS, 6)):
        model = predictor(backend)
        history = model.fit(*data, batch_size=4, **{**options, "optimizer": optimizer})
        assert history["loss"][-1] < 0.2 < history["loss"][0]
        assert model.evaluate(*token_windows(TOKENS, 9))["accuracy"] == 1.0


def test_random_windows_follow_the_seed_and_a_run_is_resumed_exactly(tmp_path):
    windows, path = RandomWindows(TOKENS, 6, batch_size=4, batches=5), tmp_path / "run"
    options = {"loss": "softmax_cross_entropy", "verbose": 0}
    whole, stopped, resumed, other = (predictor() for _ in range(4))
    history = whole.fit(windows, epochs=4, **options)
    stopped.fit(windows, epochs=2, callbacks=callbacks.Checkpoint(path), **options)
    resumed.fit(windows, epochs=4, resume_from=path, **options)
    assert_same_state(resumed.state_dict(), whole.state_dict())
    again = other.fit(windows, epochs=4, **options)
    assert again["loss"] == history["loss"]
    assert whole.evaluate(windows) == whole.evaluate(windows)


def test_ranks_share_each_batch():
    windows, options = RandomWindows(TOKENS, 6, batch_size=4, batches=5), {"loss": "softmax_cross_entropy"}
    alone = predictor()
    alone.fit(windows, epochs=2, verbose=0, **options)

    def train(communicator):
        model = predictor()
        model.fit(windows, epochs=2, verbose=0, distributed=communicator, **options)
        return model.state_dict()

    for state in run_on_ranks(2, train):
        for name, value in alone.state_dict().items():
            np.testing.assert_allclose(state[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: token_windows(np.arange(4), 4), DataError, "there are 4 tokens, .*take 5"),
        (lambda: token_windows([[1, 2]], 1), ArgumentTypeError, r"integers of shape \(T,\).*shape \(1, 2\)"),
        (lambda: token_windows([0.5, 1.0], 1), ArgumentTypeError, "not float64"),
        (lambda: token_windows(TOKENS, 0), ArgumentError, "length must be an integer of at least 1"),
        (lambda: RandomWindows(TOKENS, 100, 1, 1), DataError, "there are 100 tokens"),
        (lambda: RandomWindows(TOKENS, 4, 0, 1), ArgumentError, "RandomWindows: batch_size must be"),
        (lambda: RandomWindows(TOKENS, 4, 1), ArgumentTypeError, "RandomWindows: needs batches"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
