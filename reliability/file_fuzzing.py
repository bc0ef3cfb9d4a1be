"""Mutated files: IDX, model files, checkpoints and ONNX files are read right, or refused by an error of xpnet."""

import contextlib
import gzip
import json
import math
import random
import struct
import warnings
from pathlib import Path
from typing import Any, ClassVar

import altered_files
import numpy as np
import onnx
import onnx_files
import onnxruntime
from small_models import StopAt

import xpnet
from reliability.cases import Cases, refused, run_cases
from reliability.mutations import mutated_bytes, mutated_json, mutated_onnx, mutated_text
from reliability.results import Result, scaled
from xpnet import augment, callbacks, datasets, layers, metrics, optimizers
from xpnet.errors import DivergenceError, XpnetError
from xpnet.training import model_files


class Files(Cases):
    """Mutations of valid files of one format.

    seeds: the contents of valid files.
    """

    OUTCOMES: ClassVar[tuple[str, ...]] = ("refused", "loaded")
    seeds: list[bytes]

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self.path = folder / "file"
        warnings.simplefilter("ignore")  # of xpnet, about what loads
        self.prepare()
        for content in self.seeds:
            assert self.check(content) != "refused", "a valid file is refused"

    def prepare(self) -> None:
        """Make the seeds."""
        raise NotImplementedError

    def mutated(self, rng: random.Random, content: bytes) -> bytes:
        """The content with one change; any content is taken."""
        raise NotImplementedError

    def check(self, content: bytes) -> str:
        """Read a file with this content. Raises AssertionError if what is read is wrong."""
        raise NotImplementedError

    def content(self, case: int) -> bytes:
        rng = random.Random(f"{self.seed} {case}")
        content = rng.choice(self.seeds)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            content = self.mutated(rng, content)
        return content

    def run(self, case: int) -> str:
        return self.check(self.content(case))


class IdxFiles(Files):
    """IDX files that are not compressed."""

    def prepare(self) -> None:
        rng = np.random.default_rng(0)
        self.seeds = []
        for i, dtype in enumerate(["uint8", "int8", "int16", "int32", "float32", "float64"]):
            datasets.write_idx(self.path, (rng.normal(size=(2, 3, 4)[: i % 4]) * 50).astype(dtype))
            self.seeds.append(self.path.read_bytes())

    def mutated(self, rng: random.Random, content: bytes) -> bytes:
        if rng.random() < 0.4 or len(content) < 4:
            return mutated_bytes(rng, content, rng.choice(self.seeds))
        axes, data = content[3], bytearray(content)
        match rng.randrange(5):
            case 0:
                data[2] = rng.choice([8, 9, 11, 12, 13, 14, 10, 0, 255])
            case 1:
                data[3] = rng.choice([0, axes - 1 & 255, axes + 1 & 255, 65, 255])
            case 2 | 3:
                at = 4 + 4 * rng.randrange(max(axes, 1))
                number = rng.choice([0, 1, 2, 3, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
                data[at : at + 4] = struct.pack(">I", number)
            case _:
                data[4 + 4 * axes :] = rng.randbytes(rng.choice([0, 1, 8, 12, 24, 48, 96]))
        return bytes(data)

    def check(self, content: bytes) -> str:
        return self._compare(content, content)

    def _compare(self, content: bytes, plain: bytes | None) -> str:
        """plain: the content without compression; None if it must be refused."""
        expected = None if plain is None else _idx_array(plain)
        self.path.write_bytes(content)
        try:
            array = datasets.read_idx(self.path)
        except XpnetError as error:
            assert expected is None, f"a valid file is refused: {error}"
            return refused(error)
        assert expected is not None, f"an invalid file gives an array of shape {array.shape}"
        assert (array.dtype, array.shape, array.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
        return "loaded"


def _idx_array(content: bytes) -> Any:
    """The array that the format defines; None for an invalid file."""
    types = {8: "u1", 9: "i1", 11: "i2", 12: "i4", 13: "f4", 14: "f8"}
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in types or len(content) < 4 + 4 * content[3]:
        return None
    shape, dtype = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]]), np.dtype(types[content[2]])
    data = content[4 + 4 * content[3] :]
    if math.prod(shape) * dtype.itemsize != len(data):
        return None
    try:
        return np.ndarray(shape, dtype.newbyteorder(">"), data).astype(dtype)
    except ValueError:  # NumPy allows 64 axes
        return None


class GzipFiles(IdxFiles):
    """IDX files compressed by gzip. Some decompress to 300 MB, and announce less."""

    def prepare(self) -> None:
        super().prepare()
        self._plain = self.seeds
        self._bomb = gzip.compress(self._plain[2]) + gzip.compress(bytes(2**20)) * 300
        self.seeds = [gzip.compress(content, mtime=0) for content in self._plain]
        self.seeds.append(self.seeds[1] + gzip.compress(b"", mtime=0))  # two members

    def mutated(self, rng: random.Random, content: bytes) -> bytes:
        chance = rng.random()
        if chance < 0.01:
            at = rng.randrange(20)
            return self._bomb[:at] + bytes([rng.randrange(256)]) + self._bomb[at + 1 :]
        if chance < 0.5 and len(content) < 10_000:
            try:
                return gzip.compress(super().mutated(rng, gzip.decompress(content)), mtime=0)
            except Exception:  # several errors, also of zlib
                pass
        return mutated_bytes(rng, content, rng.choice(self.seeds))

    def check(self, content: bytes) -> str:
        if not content.startswith(b"\x1f\x8b"):
            return self._compare(content, content)
        plain = None
        if len(content) < 100_000:  # not the bomb, which announces little
            with contextlib.suppress(Exception):  # several errors, also of zlib
                plain = gzip.decompress(content)
        return self._compare(content, plain)


class ModelFiles(Files):
    """Model files; most mutations are signed again, so that they get beyond the checksum."""

    def prepare(self) -> None:
        self.seeds = []
        for model in _models():
            model.save(self.path)
            self.seeds.append(self.path.read_bytes())
        self._donors = [altered_files.File(content).values for content in self.seeds]

    def mutated(self, rng: random.Random, content: bytes) -> bytes:
        chance = rng.random()
        if chance < 0.2:
            return mutated_bytes(rng, content, rng.choice(self.seeds))
        try:
            return _mutated_header(rng, content) if chance < 0.3 else _signed_again(rng, content, self._donors)
        except Exception:  # it is no file of this format any more
            return mutated_bytes(rng, content, rng.choice(self.seeds))

    def check(self, content: bytes) -> str:
        self.path.write_bytes(content)
        try:
            model = xpnet.load(self.path, "cpu")
        except XpnetError as error:
            assert str(self.path) in str(error), f"the message does not name the file: {error}"
            return refused(error)
        file = altered_files.File(content)
        assert file.signed, "a file with a wrong checksum is loaded"
        state = model.state_dict()
        assert state.keys() == {name for name in file.arrays if not name.startswith("training/")}, "other names"
        for name, array in state.items():
            given = file.arrays[name]
            assert (array.dtype, array.shape, array.tobytes()) == (given.dtype, given.shape, given.tobytes()), name
        described = json.loads(json.dumps(model_files.architecture(model)))
        _assert_described(file.values["architecture"], described, ())
        _assert_predicts(model)
        return "loaded"


def _assert_described(given: Any, described: Any, place: tuple[Any, ...]) -> None:
    """Every value of the architecture in a file must be in that of the loaded model."""
    if place[-1:] in (("calls",), ("outputs",)):  # they can be in several orders
        return
    if place in (("seed",), ("dtype",)) and given is None:  # which stands for another one
        return
    if place == ("frozen",):
        given, described = (sorted(set(names)) for names in (given, described))
    if isinstance(given, dict) and isinstance(described, dict):
        for name, value in given.items():
            assert name in described, f"{(*place, name)} is lost"
            _assert_described(value, described[name], (*place, name))
    elif isinstance(given, list) and isinstance(described, list):
        assert len(given) == len(described), f"{place}: {given} has become {described}"
        for i, (one, two) in enumerate(zip(given, described, strict=True)):
            _assert_described(one, two, (*place, i))
    else:
        one_for_all = isinstance(described, list) and set(np.ravel(described).tolist()) == {given}
        assert given == described or one_for_all, f"{place}: {given!r} has become {described!r}"


def _inputs(model: Any, samples: int, seed: int = 0) -> list[Any]:
    """Samples for each input. They are integers, which every layer takes."""
    rng = np.random.default_rng(seed)
    shapes = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    return [rng.integers(0, 2, (samples, *(5 if n is None else n for n in shape))) for shape in shapes]


def _assert_predicts(model: Any) -> None:
    """The model predicts, if its arrays are small."""
    sizes = [math.prod(n or 1 for n in shape) for shape in _shapes(model)]
    if max(sizes) > 10**5:
        return
    x = _inputs(model, 3)
    try:
        outputs = model.predict(x if len(x) > 1 else x[0])
    except XpnetError as error:
        refused(error)
        return
    shapes = model.output_shape if isinstance(model.output_shape, list) else [model.output_shape]
    for y, shape in zip(outputs if isinstance(outputs, list) else [outputs], shapes, strict=True):
        assert y.shape[0] == 3 and len(y.shape) == 1 + len(shape), f"{y.shape} is predicted, not {shape}"
        assert all(n is None or n == m for m, n in zip(y.shape[1:], shape, strict=True)), f"{y.shape}, not {shape}"


def _shapes(model: Any) -> list[Any]:
    """The shapes of samples throughout a model."""
    found = list(model.input_shape) if isinstance(model.input_shape, list) else [model.input_shape]
    for layer in model.layers:
        for shape in (layer.input_shape, layer.output_shape):
            found += shape if isinstance(shape, list) else [shape]
        if hasattr(layer, "layers"):
            found += _shapes(layer)
    return found


def _models() -> list[Any]:
    """Small models with most kinds of layers and arguments."""
    image, sequence = (6, 6, 2), (4, 4)
    stacks = [
        ([augment.RandomAffine(shift=1.0), layers.Conv2D(2, 3, padding="same"), layers.BatchNorm(), layers.Flatten(),
          layers.Residual(layers.Dense(72), layers.Tanh()), layers.Dense(3, weight_initializer="he_normal", l2=0.1),
          layers.LeakyReLU(0.1), layers.Dropout(0.2)], image),
        ([layers.Conv2DTranspose(2, 2, strides=2), layers.MaxPool2D(2), layers.Upsample2D(2), layers.AvgPool2D(3),
          layers.DepthwiseConv2D(2), layers.GroupNorm(1), layers.ZeroPadding2D(1), layers.GlobalMaxPool2D()], image),
        ([layers.Conv1D(4, 2, padding="causal"), layers.PositionalEmbedding(6), layers.TransformerBlock(2),
          layers.Bidirectional(layers.LSTM(2)), layers.GRU(3, return_sequences=False), layers.Softmax()], sequence),
        ([layers.Embedding(7, 4, padding_index=0), layers.MultiHeadAttention(2, rotary=True), layers.RMSNorm(),
          layers.Slice(-1), layers.Reshape((2, 2)), layers.Permute((1, 0)), layers.Rescale(2.0)], (None,)),
        ([layers.Sequential([layers.Dense(4, name="first"), layers.PReLU()]), layers.Step(0.5), layers.Dense(2)], (3,)),
    ]  # fmt: skip
    models: list[Any] = [xpnet.Sequential(stack, shape, "cpu") for stack, shape in stacks]
    models.append(xpnet.Sequential([layers.Dense(3), layers.ELU()], (2,), "cpu", dtype="float64"))
    models[-1].layers[0].trainable = False
    one, two, shared = xpnet.Input((6,), name="one"), xpnet.Input((6,)), layers.Dense(4)
    merged = layers.Concatenate()([shared(one), layers.Tanh()(shared(two))])
    outputs = [layers.Dense(2, name="a")(merged), layers.Add()([shared(one), layers.Dense(4)(two)])]
    models.append(xpnet.Model([one, two], outputs, "cpu"))
    tokens, table = xpnet.Input((4,)), layers.Embedding(6, 3)
    models.append(xpnet.Model(tokens, layers.Dense(6, tied_to=table)(layers.LayerNorm()(table(tokens))), "cpu"))
    return models


def _mutated_header(rng: random.Random, content: bytes) -> bytes:
    """Another length of the header, or another JSON header, without a new checksum."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        new = rng.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_001])
        return (new % 2**64).to_bytes(8, "little") + content[8:]
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.5:  # an entry of an array
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name] = mutated_json(rng, header[name], [header])
    else:
        header = mutated_json(rng, header, [header])
    text = json.dumps(header).encode("utf-8", errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _signed_again(rng: random.Random, content: bytes, donors: list[Any]) -> bytes:
    """A file whose JSON texts or arrays are changed, with the right checksum."""
    file = altered_files.File(content)
    chance = rng.random()
    if chance < 0.7:
        name = rng.choice(list(file.values))
        file.values[name] = mutated_json(rng, file.values[name], [donor.get(name, 0) for donor in donors])
    elif chance < 0.8:
        name = rng.choice(list(file.values))
        file.values[name] = mutated_text(rng, json.dumps(file.values[name]))
    elif chance < 0.85:
        file.texts[rng.choice(["format", "more", "architecture", "training"])] = rng.choice(["", "x", "xpnet-model-3"])
    else:
        _change_array(rng, file.arrays)
    return file.content()


def _change_array(rng: random.Random, arrays: dict[str, Any]) -> None:
    name = rng.choice(list(arrays))
    a = arrays[name]
    flat = a.reshape(-1)
    changes: list[Any] = [
        lambda: arrays.pop(name), lambda: a[None], lambda: flat[:1].copy(), lambda: a[..., :0].copy(),
        lambda: np.zeros((*a.shape[:-1], (a.shape or (1,))[-1] + 1), a.dtype), lambda: a.T.copy(),
        lambda: a.astype(rng.choice(["float16", "float32", "float64", "int8", "int64", "bool"])),
        lambda: (a * rng.choice([0, -1, 2, 1e30])).astype(a.dtype), lambda: np.full_like(a, rng.choice([0, 1])),
        lambda: np.where(np.arange(a.size).reshape(a.shape) == 0, float(rng.choice(["nan", "inf"])), a).astype(a.dtype),
        lambda: arrays.update({rng.choice(["", "more", f"training/{name}", rng.choice(list(arrays))]): a}) or a,
    ]  # fmt: skip
    with np.errstate(all="ignore"):
        new = rng.choice(changes)()
    if name in arrays:
        arrays[name] = np.ascontiguousarray(new)


class Checkpoints(ModelFiles):
    """Checkpoints, from which a model resumes. A refused one leaves the model as it was."""

    OUTCOMES = ("refused", "loaded", "diverged")

    def prepare(self) -> None:
        rng = np.random.default_rng(0)
        self._x, self._y = rng.random((40, 4, 4, 1)).astype("float32"), rng.integers(3, size=40)
        self._log = self.folder / "log.csv"
        self.seeds, self._whole = [], _checkpoint_net()
        for step in (8, 6):  # within the third epoch, and at its start
            try:
                self._fit(_checkpoint_net(), extra=[StopAt(step), callbacks.Checkpoint(self.folder / "run", minutes=0)])
            except KeyboardInterrupt:
                self.seeds.append((self.folder / "run").read_bytes())
        self._log_before = self._log.read_bytes()
        self._fit(self._whole)
        self._donors = [altered_files.File(content).values for content in self.seeds]
        self._originals = [altered_files.File(content) for content in self.seeds]
        self._renew()

    def _renew(self) -> None:
        """A model that was trained in another way, which a resumed run replaces."""
        self._model = _checkpoint_net()
        self._model.fit(self._x, self._y, optimizer="adam", batch_size=40, verbose=0)
        self._before = _everything(self._model)

    def _fit(self, model: Any, path: Any = None, extra: Any = ()) -> None:
        own = [callbacks.EarlyStopping("loss", patience=9), callbacks.ReduceLROnPlateau("loss", patience=0),
               callbacks.CSVLogger(self._log)]  # fmt: skip
        model.fit(
            self._x, self._y, optimizer=optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy", metrics.F1()], epochs=4,
            batch_size=8, accumulate=2, sample_weight=np.linspace(0.5, 1.5, 40), verbose=0, callbacks=[*own, *extra],
            resume_from=path,
        )  # fmt: skip

    def check(self, content: bytes) -> str:
        self.path.write_bytes(content)
        self._log.write_bytes(self._log_before)
        try:
            self._fit(self._model, self.path)
        except DivergenceError:
            self._renew()
            return "diverged"
        except XpnetError as error:
            assert str(error).startswith(f"{self.path}: "), f"the message does not begin with the file: {error}"
            after = _everything(self._model)
            changed = [name for name, value in self._before.items() if not _same(value, after.get(name))]
            if changed or after.keys() != self._before.keys():
                self._renew()
                raise AssertionError(f"a refused checkpoint has changed {changed}: {error}") from error
            assert self._log.read_bytes() == self._log_before, "a refused checkpoint has changed a file"
            return refused(error)
        except BaseException:
            self._renew()
            raise
        state = self._model.state_dict()
        self._renew()
        file = altered_files.File(content)
        assert file.signed, "a checkpoint with a wrong checksum is resumed"
        for original in self._originals:
            if _is_same_run(original, file):
                whole = self._whole.state_dict()
                assert all(_same(whole[name], value) for name, value in state.items()), "the run goes on differently"
        return "loaded"


def _checkpoint_net() -> Any:
    stack = [layers.Conv2D(2, 3), layers.BatchNorm(), layers.ReLU(), layers.Flatten(), layers.Dropout(0.2),
             layers.Dense(3)]  # fmt: skip
    return xpnet.Sequential(stack, (4, 4, 1), "cpu")


#: The values of a checkpoint that are settings of the rest of a run: others give another run.
_SETTINGS = ("callbacks", "constant_rate", "rate_factor", "stopped")


def _is_same_run(original: altered_files.File, file: altered_files.File) -> bool:
    """Whether a checkpoint has the arrays and settings of the original, so that its run must end in the same way."""
    training, given = original.values["training"], file.values["training"]
    names = (*_SETTINGS, "step", "epoch", "seen", "under_way")
    same_arrays = original.arrays.keys() == file.arrays.keys() and all(
        _same(a, file.arrays[name]) for name, a in original.arrays.items()
    )
    return same_arrays and all(given.get(name) == training[name] for name in names)


def _everything(model: Any) -> dict[str, Any]:
    """All that a refused checkpoint must leave alone."""
    state = model._state
    slots = {f"slot {name}": np.array(vector) for name, vector in state.optimizer_state.slots.items()}
    numbers = {"step": state.step, "epoch": state.epoch, "factor": state.rate_factor,
               "constant rate": str(state.optimizer_state.constant_rate), "optimizer": repr(state.optimizer),
               "frozen": [p.trainable for p in model.parameters]}  # fmt: skip
    return {**model.state_dict(), **slots, **{name: np.array(value) for name, value in numbers.items()}}


def _same(a: Any, b: Any) -> bool:
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class OnnxFiles(Files):
    """ONNX files. An imported model must predict what ONNX Runtime computes, if that takes the file."""

    OUTCOMES = ("refused", "equal", "imported, without a number to compare", "imported, refused by ONNX Runtime")
    FOUND_OUTSIDE = "crashes of ONNX Runtime"

    def prepare(self) -> None:
        from random_onnx import RandomGraph

        self.seeds = []
        for model in _models():
            try:
                xpnet.export_onnx(model, self.path)
            except XpnetError:
                continue
            self.seeds.append(self.path.read_bytes())
        for seed in range(12):
            graph = RandomGraph(seed, inputs=1 + seed % 2, nodes=8)
            model = graph.model(next(reversed(graph.outputs)))
            self.seeds.append(model.SerializeToString())
        self.seeds = [content for content in self.seeds if self.check(content) == "equal"]

    def mutated(self, rng: random.Random, content: bytes) -> bytes:
        other = rng.choice(self.seeds)
        return mutated_bytes(rng, content, other) if rng.random() < 0.25 else mutated_onnx(rng, content, other)

    def check(self, content: bytes) -> str:
        self.path.write_bytes(content)
        try:
            model = xpnet.import_onnx(self.path, "cpu")
        except XpnetError as error:
            assert len(str(error)) > 20, f"the message says little: {error}"
            return refused(error)
        if max(math.prod(n or 1 for n in shape) for shape in _shapes(model)) > 10**5:
            return "imported, without a number to compare"
        file = onnx.ModelProto.FromString(content)
        with self.in_reference():
            x, expected = _onnx_reference(file, model)
        if expected is None:
            _assert_predicts(model)
            return "imported, refused by ONNX Runtime"
        numbers = [*expected, *model.state_dict().values()]  # ONNX Runtime limits some activations
        if not all(np.isfinite(a).all() and np.abs(a).max(initial=0) < 1e6 for a in numbers):
            return "imported, without a number to compare"
        scale = max(1.0, *(float(np.abs(y).max(initial=0)) for y in expected))
        outcome, message = onnx_files.compared(model, x, expected, rtol=1e-3, atol=1e-4 * scale)
        assert outcome == "equal", message
        return "equal"


def _onnx_reference(file: Any, model: Any) -> tuple[list[Any], list[Any] | None]:
    """(inputs for a file, its outputs by ONNX Runtime or None if that refuses the file)."""
    rng = np.random.default_rng(0)
    constants = {c.name for c in file.graph.initializer}
    shapes = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    x, inputs = {}, [i for i in file.graph.input if i.name not in constants]
    batch = max(i.type.tensor_type.shape.dim[0].dim_value for i in inputs) or 3
    try:
        for value, ours in zip(inputs, shapes, strict=True):
            dims = value.type.tensor_type.shape.dim
            assert batch < 1000
            opened = [d.dim_value or (3 if None in ours else ours[i]) for i, d in enumerate(dims[1:])]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            a = rng.normal(size=(batch, *opened)) if dtype.kind == "f" else rng.integers(0, 2, (batch, *opened))
            x[value.name] = a.astype(dtype)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(x.values()), session.run(None, x)
    except Exception:  # of ONNX Runtime, which has several
        return list(x.values()), None


KINDS = [
    ("mutated IDX files", IdxFiles),
    ("mutated IDX files in gzip", GzipFiles),
    ("mutated model files", ModelFiles),
    ("mutated checkpoints", Checkpoints),
    ("mutated ONNX files", OnnxFiles),
]


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    count = scaled(100_000, scale, least=40)
    return [run_cases(title, kind, count, seed, folder) for title, kind in KINDS]
