"""Tokens: texts as arrays of integers, and windows of them to train a model that predicts the next token."""

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy
from numpy.typing import ArrayLike, NDArray

from xpnet.config import ExplainedArguments, explain_arguments, integer
from xpnet.data.files import as_path, read_bytes, write_atomically
from xpnet.data.sources import host_array
from xpnet.data.streaming import Stream
from xpnet.datasets.samples import Samples
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, FileError, MissingPackageError

Tokens = NDArray[numpy.int64]

_FORMAT = "xpnet-characters-1"


class CharTokenizer(ExplainedArguments):
    """Numbers the characters of a text: token i is character i of `vocabulary`, its different characters in order.

    `vocabulary_size` is their number, such as that of an Embedding.
    """

    def __init__(self, text: str) -> None:
        self._set(sorted(set(_checked_text("CharTokenizer", text))))

    def _set(self, characters: Sequence[str]) -> None:
        self.vocabulary = tuple(characters)
        self._codes = _codes("".join(characters))

    @property
    def vocabulary_size(self) -> int:
        return len(self.vocabulary)

    @explain_arguments
    def encode(self, text: str) -> Tokens:
        """The tokens of a text, (characters,). Raises DataError for a character that is not in the vocabulary."""
        codes = _codes(_checked_text("encode", text, empty=True))
        tokens = numpy.searchsorted(self._codes, codes)
        unknown = self._codes[numpy.minimum(tokens, len(self._codes) - 1)] != codes
        if unknown.any():
            position = int(unknown.argmax())
            raise DataError(
                f"the text has {text[position]!r} at position {position}, which is not among the "
                f"{self.vocabulary_size} characters of the vocabulary. Make the CharTokenizer from a text that has all "
                "characters, or remove it."
            )
        return tokens.astype(numpy.int64, copy=False)

    @explain_arguments
    def decode(self, tokens: ArrayLike) -> Any:
        """The text of tokens (T,), or a list of N texts for tokens (N, T). Raises DataError for unknown tokens."""
        array = _checked_tokens("decode: tokens", tokens, self.vocabulary_size)
        if array.ndim == 2:
            return [self.decode(row) for row in array]
        return "".join([self.vocabulary[token] for token in array])

    @explain_arguments
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary to a file, as JSON. Raises FileError if that fails."""
        content = {"format": _FORMAT, "vocabulary": self.vocabulary}
        write_atomically(as_path("save", "path", path), json.dumps(content).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The tokenizer that `save` wrote. Raises FileError if the file is missing or of another format."""
        content = read_bytes(as_path("load", "path", path))
        try:
            saved = json.loads(content)
            characters = saved["vocabulary"]
            different = sorted({str(character) for character in characters if len(character) == 1})
            if saved["format"] != _FORMAT or not different or characters != different:
                raise ValueError("its vocabulary is no list of different characters in order")
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}: not a file that CharTokenizer.save wrote: {error}.") from error
        tokenizer = cls.__new__(cls)
        tokenizer._set(characters)
        return tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.vocabulary == other.vocabulary

    def __hash__(self) -> int:
        return hash(self.vocabulary)

    def __repr__(self) -> str:
        return f"<CharTokenizer of {self.vocabulary_size} characters>"


class SubwordTokenizer(ExplainedArguments):
    """Byte-level byte-pair encoding, by the package `tokenizers`: frequent parts of words are tokens.

    It learns at most vocabulary_size tokens, at least 256, from a text, or from an iterable of texts. Every text can
    be encoded, and decoding gives it back. The attribute `tokenizer` is the `tokenizers.Tokenizer`.
    Raises MissingPackageError if the package is missing: pip install "xpnet[text]".
    Sennrich, Haddow and Birch 2016, "Neural machine translation of rare words with subword units".
    """

    def __init__(self, text: str | Iterable[str], vocabulary_size: int = 1024) -> None:
        size = integer(self, "vocabulary_size", vocabulary_size, at_least=256)
        texts = [text] if isinstance(text, str) else text
        package = _tokenizers()
        self.tokenizer = package.Tokenizer(package.models.BPE())
        self.tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=size, show_progress=False, initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet()
        )
        self.tokenizer.train_from_iterator(texts, trainer)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens as the package writes them: a space is "Ġ"."""
        return tuple(self.tokenizer.id_to_token(token) for token in range(self.vocabulary_size))

    @property
    def vocabulary_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @explain_arguments
    def encode(self, text: str) -> Tokens:
        """The tokens of a text, (T,)."""
        return numpy.array(self.tokenizer.encode(_checked_text("encode", text, empty=True)).ids, dtype=numpy.int64)

    @explain_arguments
    def decode(self, tokens: ArrayLike) -> Any:
        """The text of tokens (T,), or a list of N texts for tokens (N, T). Raises DataError for unknown tokens."""
        array = _checked_tokens("decode: tokens", tokens, self.vocabulary_size)
        if array.ndim == 2:
            return [self.decode(row) for row in array]
        return self.tokenizer.decode(array.tolist(), skip_special_tokens=False)

    @explain_arguments
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a file, as the package's JSON. Raises FileError if that fails."""
        write_atomically(as_path("save", "path", path), self.tokenizer.to_str().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The tokenizer of a file, such as a published tokenizer.json. Raises FileError if it cannot be read."""
        tokenizer, package, content = cls.__new__(cls), _tokenizers(), read_bytes(as_path("load", "path", path))
        try:
            tokenizer.tokenizer = package.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises Exception itself
            raise FileError(f"{path}: not a file of the package tokenizers: {error}.") from error
        return tokenizer

    def __repr__(self) -> str:
        return f"<SubwordTokenizer of {self.vocabulary_size} tokens>"


@explain_arguments
def token_windows(tokens: ArrayLike, length: int) -> Samples:
    """Cut tokens (T,) into adjacent windows: x (N, length), and y (N, length), the token after each of x.

    `model.fit(*token_windows(tokens, 64), ...)` trains on each token once per epoch, in shuffled windows, and
    `model.evaluate(*token_windows(tokens, 64))` is the loss over the whole text. N = (T - 1) // length: tokens at the
    end that do not fill a window are left out.
    """
    length, tokens = integer("", "length", length), _sequence_of_tokens(tokens)
    count = (len(tokens) - 1) // length
    _refuse_short(tokens, length)
    return Samples(
        tokens[: count * length].reshape(count, length), tokens[1 : count * length + 1].reshape(count, length)
    )


class RandomWindows(Stream):
    """A stream of batches of windows at random places of tokens (T,), to train the prediction of the next token.

    Each of the `batches` of an epoch has x (batch_size, length), and y of the same shape, the token after each of x.
    Windows are drawn when they are needed, and may overlap. tokens: in memory, or a `numpy.memmap`.

    In `model.fit(RandomWindows(...))`, each epoch has new windows, which follow from the seed of the model and the
    number of the epoch; with shuffle=False, and in `evaluate`, they are always the same.
    """

    @explain_arguments
    def __init__(self, tokens: ArrayLike, length: int, batch_size: int, batches: int) -> None:
        self.tokens, self.length = _sequence_of_tokens(tokens), integer(self, "length", length)
        self.batch_size = integer(self, "batch_size", batch_size, at_most=2**31 - 1)
        self.count = integer(self, "batches", batches)
        _refuse_short(self.tokens, self.length)
        super().__init__(self.batches)

    def batches(self, key: Sequence[int] | None = None) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """The batches of one epoch, (x, y)."""
        generator, steps = numpy.random.default_rng(key or 0), numpy.arange(self.length + 1)
        for _ in range(self.count):
            starts = generator.integers(0, len(self.tokens) - self.length, self.batch_size)
            windows = self.tokens[starts[:, None] + steps]
            yield windows[:, :-1], windows[:, 1:]


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise MissingPackageError(
            f"SubwordTokenizer needs the package tokenizers, which cannot be imported ({error}): "
            'pip install "xpnet[text]"'
        ) from error


def _codes(text: str) -> NDArray[numpy.uint32]:
    """The Unicode code points of a text."""
    return numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _checked_text(owner: str, text: Any, empty: bool = False) -> str:
    if not isinstance(text, str):
        raise ArgumentTypeError(f"{owner}: text must be a str, not {type(text).__name__}.")
    if not (text or empty):
        raise ArgumentError(f"{owner}: text is empty. Give it a text that has all characters.")
    return text


def _checked_tokens(name: str, tokens: Any, limit: int) -> NDArray[Any]:
    """Tokens (T,) or (N, T) as a NumPy array, which must be integers from 0 and below `limit`."""
    array = host_array(tokens, name)
    if array.size == 0 and array.ndim == 1:
        return numpy.empty(0, dtype=numpy.int64)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise ArgumentTypeError(
            f"{name} must be integers of shape (T,) or (N, T), not {array.dtype} of shape {array.shape}."
        )
    outside = (array < 0) | (array >= limit)
    if outside.any():
        value = array.reshape(-1)[int(outside.argmax())]
        raise DataError(f"{name} have {value}, but the vocabulary has the tokens 0 to {limit - 1}.")
    return array


def _sequence_of_tokens(tokens: Any) -> NDArray[Any]:
    array = host_array(tokens, "tokens")
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ArgumentTypeError(
            f"tokens must be integers of shape (T,), such as those of CharTokenizer(text).encode(text), not "
            f"{array.dtype} of shape {array.shape}."
        )
    return array


def _refuse_short(tokens: NDArray[Any], length: int) -> None:
    if len(tokens) <= length:
        raise DataError(
            f"there are {len(tokens)} tokens, but a window of length={length} and the token after it take {length + 1}."
        )
