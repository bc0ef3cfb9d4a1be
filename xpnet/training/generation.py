"""Generation: sequences of tokens, continued one token at a time."""

from typing import Any, TypeAlias

import numpy

from xpnet.backends import get_backend
from xpnet.config import real_array
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DeviceMemoryError,
    ShapeError,
    StateError,
    shape_text,
)
from xpnet.layers.containers import every_layer
from xpnet.layers.embedding import Embedding
from xpnet.layers.past import Continuation
from xpnet.layers.positions import PositionalEmbedding
from xpnet.training.base_model import BaseModel
from xpnet.training.device_memory import explaining_memory_errors_of

Tokens: TypeAlias = Any  # int64, on the host
Logits: TypeAlias = Any  # float64, on the host


def generated(
    model: BaseModel, prompt: Any, length: int, temperature: float, top_k: int | None, seed: int | None
) -> Tokens:
    """See `xpnet.generate`."""
    next_token = NextToken(model, length)
    given = next_token.checked(prompt)
    count, start = given.shape
    if not get_backend("cpu").can_hold(given.itemsize * count * (start + length)):
        raise DeviceMemoryError(
            f"generate: {count} sequences of {start + length} tokens do not fit into memory: choose a length below "
            f"{length}."
        )
    tokens = numpy.concatenate([given, numpy.zeros((count, length), numpy.int64)], axis=1)
    rng = numpy.random.default_rng(seed)
    for end in range(start, start + length):
        with explaining_memory_errors_of(model, count, "sequences"):
            tokens[:, end] = drawn(next_token.logits(tokens[:, :end]), temperature, top_k, rng)
    return tokens


def drawn(logits: Logits, temperature: float, top_k: int | None, rng: numpy.random.Generator) -> Tokens:
    """A token (N,) for each row of logits (N, vocabulary), drawn from softmax(logits / temperature) of the top k.

    It is argmax(logits / temperature + g) with noise g of the Gumbel distribution. Of equal logits, the first ones are
    in the top k. temperature 0: the first largest logit.
    """
    if temperature == 0:
        return logits.argmax(axis=1)
    scores = (logits - logits.max(axis=1, keepdims=True)) / temperature + rng.gumbel(size=logits.shape)
    if top_k is not None:
        others = numpy.argsort(-logits, axis=1, kind="stable")[:, top_k:]
        numpy.put_along_axis(scores, others, -numpy.inf, axis=1)
    return scores.argmax(axis=1)


class NextToken:
    """The logits of the next token of sequences that grow.

    If all layers can continue a sequence, a call computes only the steps that earlier calls have not, until the context
    is longer than the model takes. From then on, and if a layer cannot continue, it computes the whole context.
    """

    def __init__(self, model: BaseModel, length: int) -> None:
        """length: how many tokens will be generated. Raises ArgumentError if the model does not predict tokens."""
        self._model, self._length = model, length
        self._steps = _steps_of(model)
        layers = list(every_layer(model))
        ahead = next((layer for layer in layers if not layer.causal), None)
        predicts_each_step = len(model.output_shape) == 2
        if ahead is not None and predicts_each_step:
            raise ArgumentError(
                f"generate: in {ahead._label}, the output of a step depends on later steps, which a token that is to "
                "be predicted does not have. Make it causal, or let the model give one output for the whole sequence."
            )
        custom = model._overrides or any(layer.is_custom for layer in layers if layer is not model)
        embeds = any(isinstance(layer, Embedding) for layer in layers)  # otherwise, tokens are the features of a layer
        self._can_continue = ahead is None and embeds and not custom
        #: The fewest tokens that the model takes, and the most, or None.
        self._fewest = 1 if self._can_continue or predicts_each_step else self._steps or 1
        tables = [layer.max_length for layer in layers if isinstance(layer, PositionalEmbedding)]
        self._most = min([*tables, *([] if self._steps is None else [self._steps])], default=None)
        self._continuation: Continuation | None = None

    def checked(self, prompt: Any) -> Tokens:
        """The prompt (N, T) as integers on the host. Raises an error of errors.py if the model does not take it."""
        model, tokens = self._model, real_array(prompt, "prompt")
        if tokens.dtype.kind not in "iu":
            raise ArgumentTypeError(f"prompt must contain integers, the numbers of tokens, not {tokens.dtype}.")
        if tokens.ndim != 2:
            hint = " For a single sequence, add the batch axis: prompt[None]." if tokens.ndim == 1 else ""
            raise ShapeError(f"prompt must have shape (N, T), but has {tokens.shape}.{hint}")
        count, vocabulary = tokens.shape[1], model.output_shape[-1]
        if tokens.size == 0:
            raise DataError(f"prompt is empty: it has shape {tokens.shape}. Give each sequence at least one token.")
        if count < self._fewest:
            raise ShapeError(f"prompt has {count} tokens, but the model takes {self._fewest}: give at least these.")
        with model.backend.device():
            model.check_input(0, model.backend.asarray(tokens), "prompt")
            try:
                model.check_input(0, model.backend.asarray([[vocabulary - 1]]), "its last token")
            except DataError as error:
                raise ArgumentError(f"generate: the model predicts {vocabulary} tokens, but {error}") from error
        return tokens.astype(numpy.int64)

    def logits(self, tokens: Tokens) -> Logits:
        """Logits (N, vocabulary) from all tokens (N, T) until now, which begin with those of earlier calls."""
        model, most, count = self._model, self._most, tokens.shape[1]
        if not self._can_continue or (most is not None and count > most):
            self._continuation, start = None, 0 if most is None else max(count - most, 0)
        else:
            if self._continuation is None:
                at_end = count + self._length
                self._continuation = Continuation(model.backend, at_end if most is None else min(at_end, most))
            start = self._continuation.steps
        outputs = model.context.exclusively(self._last_outputs, tokens[:, start:])
        with numpy.errstate(divide="ignore"):  # a probability may be 0
            logits = numpy.log(outputs) if model.gives_probabilities else outputs
        if not numpy.isfinite(logits.max(axis=1)).all():
            raise StateError("generate: the outputs of the model are NaN or infinite, and perhaps its weights too.")
        return logits

    def _last_outputs(self, tokens: Tokens) -> Any:
        """The outputs for the last of these tokens, on the host, as a copy: the next pass overwrites buffers."""
        model, continuation, count = self._model, self._continuation, tokens.shape[1]
        if continuation is None and self._steps is not None:  # what follows does not change earlier outputs
            tokens = numpy.pad(tokens, ((0, 0), (0, self._steps - count)))
        dtype = numpy.int64 if model.accepts_integers else model.context.dtype
        x = model.backend.asarray(tokens, dtype=dtype)
        if continuation is None:
            outputs = model.inference_outputs(x)
        else:
            model.context.continuation = continuation
            try:
                outputs = model.forward_pass(x, inference=True)
            finally:
                model.context.continuation = None
            continuation.steps += count
        return model.backend.to_numpy(outputs[:, count - 1] if outputs.ndim == 3 else outputs).astype(numpy.float64)


def _steps_of(model: BaseModel) -> int | None:
    """The number of tokens that the model takes, None for any. Raises ArgumentError if it does not predict tokens."""
    given: Any = model.input_shape
    predicted: Any = model.output_shape
    one = not isinstance(given, list) and not isinstance(predicted, list) and len(given) == 1
    if one and (len(predicted) == 1 or (len(predicted) == 2 and predicted[0] == given[0])):
        return given[0]  # type: ignore[no-any-return]
    raise ArgumentError(
        "generate: the model must take tokens (N, T) and predict the next one, with outputs (N, T, vocabulary) after "
        f"each or (N, vocabulary) after the last; but it takes {shape_text(given)} and gives {shape_text(predicted)}."
    )
