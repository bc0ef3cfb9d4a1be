"""Random chains and graphs of all layers: refused when they are built, or trained, saved, loaded and copied right."""

import copy
import math
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import xpnet
from reliability.cases import Cases, refused, run_cases
from reliability.results import Result, scaled
from xpnet import layers
from xpnet.errors import ShapeError, XpnetError

#: Layers of several inputs.
_MERGES = ("Add", "Average", "Concatenate", "Dot", "Maximum", "Multiply", "Subtract", "MultiHeadAttention")
_LARGEST = 3000  # numbers in a sample of any tensor


def _size(rng: random.Random) -> int:
    return rng.choice([1, 1, 2, 2, 3, 4, 5])


def _few(rng: random.Random) -> int:
    return rng.choice([1, 1, 2])


def _flag(rng: random.Random) -> bool:
    return rng.random() < 0.6


def _pair(rng: random.Random) -> Any:
    return rng.choice([_size(rng), (_size(rng), _size(rng))])


def _padding(rng: random.Random, *more: Any) -> Any:
    return rng.choice(["valid", "same", 1, 0, *more])


def _order(rng: random.Random, shape: Any) -> Any:
    axes = list(range(len(shape)))
    rng.shuffle(axes)
    return axes


def _target(rng: random.Random, shape: Any) -> Any:
    total = math.prod(n or 1 for n in shape)
    factor = rng.choice([n for n in range(1, total + 1) if total % n == 0])
    return rng.choice([(factor, -1), (-1, factor), (total // factor, 1, factor), (total,), (total + 1,)])


def _inner(rng: random.Random, shape: Any) -> list[Any]:
    return [layers.Dense(shape[-1] or 1), layers.Tanh()][: rng.choice([1, 2])]


def _recurrent(rng: random.Random) -> Any:
    kind = rng.choice([layers.LSTM, layers.GRU, layers.SimpleRNN])
    return kind(_size(rng), rng.random() < 0.6, rng.random() < 0.4, use_bias=rng.random() < 0.8)


#: By the names of classes: (a source of random choices, the shape of a sample) → a layer, which may not fit the shape.
MAKERS: dict[str, Callable[[random.Random, Any], Any]] = {
    "AvgPool1D": lambda r, s: layers.AvgPool1D(_size(r), _few(r), _padding(r), count_include_pad=_flag(r)),
    "AvgPool2D": lambda r, s: layers.AvgPool2D(_pair(r), _few(r), _padding(r), count_include_pad=_flag(r)),
    "BatchNorm": lambda r, s: layers.BatchNorm(r.choice([0.1, 0.5]), center=_flag(r), scale=_flag(r)),
    "Bidirectional": lambda r, s: layers.Bidirectional(_recurrent(r)),
    "Conv1D": lambda r, s: layers.Conv1D(
        _size(r), _size(r), _few(r), _padding(r, "causal"), _few(r), groups=_few(r), use_bias=_flag(r)),
    "Conv2D": lambda r, s: layers.Conv2D(
        _size(r), _pair(r), _few(r), _padding(r), dilation=_few(r), groups=_few(r), use_bias=_flag(r)),
    "Conv2DTranspose": lambda r, s: layers.Conv2DTranspose(
        _size(r), _pair(r), _size(r), _padding(r), groups=_few(r), output_padding=r.choice([0, 0, 1])),
    "Dense": lambda r, s: layers.Dense(_size(r), use_bias=_flag(r), l1=r.choice([0, 0.1]), l2=r.choice([0, 0.1])),
    "DepthwiseConv2D": lambda r, s: layers.DepthwiseConv2D(_pair(r), _size(r), _padding(r), depth_multiplier=_size(r)),
    "Dropout": lambda r, s: layers.Dropout(r.choice([0, 0.3, 0.9])),
    "ELU": lambda r, s: layers.ELU(r.choice([0.5, 1.0])),
    "Embedding": lambda r, s: layers.Embedding(2 + _size(r), _size(r), padding_index=r.choice([None, 0, 1])),
    "Flatten": lambda r, s: layers.Flatten(),
    "GELU": lambda r, s: layers.GELU(r.choice(["none", "tanh"])),
    "GRU": lambda r, s: layers.GRU(_size(r), _flag(r), _flag(r)),
    "GlobalAveragePool1D": lambda r, s: layers.GlobalAveragePool1D(),
    "GlobalAveragePool2D": lambda r, s: layers.GlobalAveragePool2D(),
    "GlobalMaxPool1D": lambda r, s: layers.GlobalMaxPool1D(),
    "GlobalMaxPool2D": lambda r, s: layers.GlobalMaxPool2D(),
    "GroupNorm": lambda r, s: layers.GroupNorm(_size(r), center=_flag(r)),
    "HardSigmoid": lambda r, s: layers.HardSigmoid(),
    "HardSwish": lambda r, s: layers.HardSwish(),
    "HardTanh": lambda r, s: layers.HardTanh(r.choice([-1.0, -0.1]), r.choice([0.1, 2.0])),
    "Identity": lambda r, s: layers.Identity(),
    "InstanceNorm": lambda r, s: layers.InstanceNorm(),
    "LSTM": lambda r, s: layers.LSTM(_size(r), _flag(r), _flag(r)),
    "LayerNorm": lambda r, s: layers.LayerNorm(center=_flag(r), scale=_flag(r)),
    "LeakyReLU": lambda r, s: layers.LeakyReLU(r.choice([0.0, 0.1, 1.0])),
    "LogSoftmax": lambda r, s: layers.LogSoftmax(),
    "Masking": lambda r, s: layers.Masking(0.0),
    "MaxPool1D": lambda r, s: layers.MaxPool1D(_size(r), r.choice([None, 1, 2]), _padding(r)),
    "MaxPool2D": lambda r, s: layers.MaxPool2D(_pair(r), r.choice([None, 1, 2]), _padding(r)),
    "Mish": lambda r, s: layers.Mish(),
    "MultiHeadAttention": lambda r, s: layers.MultiHeadAttention(_few(r), causal=_flag(r),
                                                                 dropout=r.choice([0, 0.2]), rotary=r.random() < 0.3),
    "PReLU": lambda r, s: layers.PReLU(shared=_flag(r)),
    "Permute": lambda r, s: layers.Permute(_order(r, s)),
    "PositionalEmbedding": lambda r, s: layers.PositionalEmbedding(r.choice([3, 8, 16])),
    "RMSNorm": lambda r, s: layers.RMSNorm(),
    "ReLU": lambda r, s: layers.ReLU(),
    "ReLU6": lambda r, s: layers.ReLU6(),
    "Rescale": lambda r, s: layers.Rescale(r.choice([0.0, -1.5, 2.0]), r.choice([0.0, 1.0])),
    "Reshape": lambda r, s: layers.Reshape(_target(r, s)),
    "Residual": lambda r, s: layers.Residual(*_inner(r, s)),
    "Sequential": lambda r, s: layers.Sequential(_inner(r, s)),
    "SiLU": lambda r, s: layers.SiLU(),
    "Sigmoid": lambda r, s: layers.Sigmoid(),
    "SimpleRNN": lambda r, s: layers.SimpleRNN(_size(r), _flag(r), _flag(r)),
    "Slice": lambda r, s: layers.Slice(r.choice([0, 1, -1, -2]), r.choice([None, 2, -1]), r.choice([0, -1])),
    "Softmax": lambda r, s: layers.Softmax(),
    "Softplus": lambda r, s: layers.Softplus(),
    "Step": lambda r, s: layers.Step(r.choice([0.0, 0.3])),
    "Tanh": lambda r, s: layers.Tanh(),
    "TransformerBlock": lambda r, s: layers.TransformerBlock(
        _few(r), r.choice([1, 2]), causal=_flag(r), norm=r.choice(["layer", "rms"]),
        activation=r.choice(["gelu", "silu", "relu"]), rotary=r.random() < 0.3),
    "Upsample2D": lambda r, s: layers.Upsample2D(r.choice([1, 2, (2, 3)]), r.choice(["nearest", "bilinear"])),
    "ZeroPadding2D": lambda r, s: layers.ZeroPadding2D(r.choice([0, 1, ((1, 0), (2, 0))])),
    "Add": lambda r, s: layers.Add(),
    "Average": lambda r, s: layers.Average(),
    "Concatenate": lambda r, s: layers.Concatenate(r.choice([-1, 0])),
    "Dot": lambda r, s: layers.Dot(),
    "Maximum": lambda r, s: layers.Maximum(),
    "Multiply": lambda r, s: layers.Multiply(),
    "Subtract": lambda r, s: layers.Subtract(),
}  # fmt: skip


def _first_shape(rng: random.Random, tokens: bool) -> tuple[Any, ...]:
    if tokens:
        return rng.choice([(), (3,), (5,), (None,)])
    rank = rng.choice([1, 1, 2, 2, 3, 3])
    if rank == 2 and rng.random() < 0.2:
        return (None, _size(rng))
    return tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rank))


def _fitting(rng: random.Random, shape: Any, names: Any) -> Any:
    """A new layer that takes samples of this shape, or of these shapes; None if some tries did not find one."""
    for _ in range(12):
        with_shape = shape[0] if isinstance(shape, list) else shape
        try:
            layer = MAKERS[rng.choice(names)](rng, with_shape)
            output = copy.deepcopy(layer).build(shape, backend="cpu")
        except XpnetError as error:
            refused(error)
            continue
        if math.prod(n or 8 for n in output) <= _LARGEST:
            return layer
    return None


_OF_ONE = [name for name in MAKERS if name not in (*_MERGES[:-1], "Embedding")]


def random_model(rng: random.Random, dtype: str = "float32") -> Any:
    """A Sequential or a Model of random layers. Raises XpnetError if it cannot be built."""
    return _chain(rng, dtype) if rng.random() < 0.5 else _graph(rng, dtype)


def _chain(rng: random.Random, dtype: str) -> Any:
    tokens = rng.random() < 0.15
    shape, stack = _first_shape(rng, tokens), []
    first, current = shape, shape
    for i in range(rng.randint(1, 7)):
        layer = _fitting(rng, current, ["Embedding"] if tokens and i == 0 else _OF_ONE)
        if layer is not None:
            stack.append(layer)
            current = copy.deepcopy(layer).build(current, backend="cpu")
    if rng.random() < 0.1:  # perhaps one that does not fit
        stack.insert(rng.randrange(len(stack) + 1), MAKERS[rng.choice(list(MAKERS))](rng, shape))
    return xpnet.Sequential(stack, first, "cpu", rng.randrange(100), dtype)


def _graph(rng: random.Random, dtype: str) -> Any:
    inputs = [xpnet.Input(_first_shape(rng, tokens=False)) for _ in range(rng.choice([1, 1, 2, 3]))]
    tensors, used = list(inputs), list[Any]()
    for _ in range(rng.randint(2, 9)):
        one = rng.choice(tensors[-4:])
        if rng.random() < 0.35:
            same = [t for t in tensors if len(t.shape) == len(one.shape)]
            given: Any = [one, *(rng.choice(same) for _ in range(rng.choice([1, 1, 2])))]
            layer = _fitting(rng, [t.shape for t in given], _MERGES)
        else:
            given = one
            again = [layer for layer, shape in used if shape == one.shape]
            layer = rng.choice(again) if again and rng.random() < 0.3 else _fitting(rng, one.shape, _OF_ONE)
        if layer is None:
            continue
        tensors.append(layer(given))
        if given is one:
            used.append((layer, one.shape))
    outputs = rng.sample(tensors[len(inputs) :], min(rng.choice([1, 1, 2]), len(tensors) - len(inputs)))
    reached = xpnet.Model(inputs, outputs, "cpu", dtype=dtype) if outputs else None
    if reached is None:
        return xpnet.Model(inputs, [layers.Identity()(inputs[0])], "cpu", dtype=dtype)
    return reached


def samples_for(rng: np.random.Generator, model: Any, count: int, length: int = 5) -> Any:
    """Samples for a model: integers where its first layer is an Embedding."""
    shapes = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    tokens = isinstance(model.layers[0], layers.Embedding)
    x = []
    for shape in shapes:
        size = (count, *(length if n is None else n for n in shape))
        x.append(rng.integers(0, 3, size) if tokens else rng.normal(size=size).astype(model.dtype))
    return x if len(x) > 1 else x[0]


def as_list(y: Any) -> list[Any]:
    return y if isinstance(y, list) else [y]


class Architectures(Cases):
    """Each case is a random model."""

    OUTCOMES = ("refused at build", "refused at first use", "right")
    SECONDS, MEGABYTES = 20.0, 2000  # loops are compiled

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        missing = {name for name in layers.__all__ if name not in MAKERS} - {"Layer", "Tensor", "Input"}
        assert not missing, f"reliability/architectures.py makes no {sorted(missing)}"
        warnings.simplefilter("ignore")  # such as a loss on logits after a Softmax

    def run(self, case: int) -> str:
        rng = random.Random(f"{self.seed} {case}")
        dtype = rng.choice(["float32", "float32", "float64"])
        try:
            model = random_model(rng, dtype)
        except XpnetError as error:
            refused(error)
            return "refused at build"
        try:
            x = samples_for(np.random.default_rng(case), model, 6)
            try:
                first = as_list(model.predict(x))
            except XpnetError as error:
                # Sequences of open length may not fit a layer, and what is embedded must be integers.
                is_open = any(None in shape for shape in as_list(model.input_shape))
                if "Embedding" not in str(error) and not (is_open and isinstance(error, ShapeError)):
                    raise
                refused(error)
                return "refused at first use"
            self._check(model, x, first, case)
        except Exception as error:
            error.add_note(f"{model.layers}")
            raise
        return "right"

    def _check(self, model: Any, x: Any, first: list[Any], case: int) -> None:
        rng = np.random.default_rng(case)
        shapes = as_list(model.output_shape)
        for y, shape in zip(first, shapes, strict=True):
            fits = len(y.shape) == 1 + len(shape) and all(
                n in (None, m) for m, n in zip(y.shape[1:], shape, strict=True)
            )
            assert fits and len(y) == 6 and y.dtype == model.dtype, f"{y.dtype} {y.shape} is predicted, not {shape}"
            assert np.isfinite(y).all(), "the predictions are not finite"
        y = [rng.normal(size=a.shape).astype(model.dtype) for a in first]
        targets = y if len(y) > 1 else y[0]
        for _ in range(2 if model.parameters else 0):
            logs = model.train_on_batch(x, targets, loss="mse", optimizer="adam")
            assert math.isfinite(logs["loss"]), f"the loss is {logs['loss']}"
        for parameter in model.parameters:
            assert np.isfinite(parameter.value).all(), f"{parameter.name} is not finite"
        want = as_list(model.predict(x))
        model.save(self.folder / "m")
        twins = {"a loaded model": xpnet.load(self.folder / "m", "cpu"), "a copy": copy.deepcopy(model),
                 "an unpickled model": pickle.loads(pickle.dumps(model))}  # fmt: skip
        for name, twin in twins.items():
            _assert_same(as_list(twin.predict(x)), want, f"{name} predicts other numbers")
            assert str(twin.summary()) == str(model.summary()), f"{name} has another summary"
        _assert_same(as_list(model.predict(x)), want, "the model predicts other numbers after it was copied")
        for size in (1, 4):
            tolerance = 1e-4 if model.dtype == "float32" else 1e-9
            for a, b in zip(as_list(model.predict(x, batch_size=size)), want, strict=True):
                np.testing.assert_allclose(
                    a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(b).max(initial=0))),
                    err_msg=f"in batches of {size}",
                )  # fmt: skip
        if model.parameters:
            for one in (model, twins["a copy"]):
                one.train_on_batch(x, targets, loss="mse", optimizer="adam")
            after = twins["a copy"].state_dict()
            for name, value in model.state_dict().items():
                assert value.tobytes() == after[name].tobytes(), f"a copy is trained in another way: {name}"


def _assert_same(given: list[Any], want: list[Any], what: str) -> None:
    for a, b in zip(given, want, strict=True):
        assert a.dtype == b.dtype, what
        assert a.shape == b.shape, what
        assert a.tobytes() == b.tobytes(), what


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    return [run_cases("random architectures", Architectures, scaled(3000, scale, least=20), seed, folder)]
