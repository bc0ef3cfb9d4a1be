"""Import ONNX models and compare them with the outputs of another implementation."""

import itertools
import pathlib

import numpy as np
import onnx

import xpnet
from xpnet.errors import ArgumentError

#: What every refusal says: the operator and the node, or what it is about the whole graph.
NAMED = "|".join(
    [
        r"operator \w+ .*\(node '.*'\)",
        "the graph must have",
        r"opset \d+",
        "the (shape|input|output|initializer)",
        "an (input|output) of",
    ]
)


def outcome(model, x, expected, path, rtol=1e-3, atol=1e-6):
    """("equal", ""), ("refused", message), or ("wrong", what is wrong) for an ONNX model with one input."""
    onnx.save(model, path)
    try:
        imported = xpnet.import_onnx(path, "cpu")
    except ArgumentError as error:
        return "refused", str(error)
    except Exception as error:  # any other error is a fault
        return "wrong", repr(error)
    try:
        outputs = [imported.predict(image) for image in _in_order(x, imported.input_shape)]
    except Exception as error:
        return "wrong", f"predict: {error!r}"
    for got in outputs:
        for y in (got, got.transpose(0, 3, 1, 2)) if got.ndim == 4 else (got,):
            if y.shape == expected.shape and np.allclose(y, expected, rtol=rtol, atol=atol, equal_nan=True):
                return ("equal", "") if y.dtype == expected.dtype else ("wrong", f"{y.dtype}, not {expected.dtype}")
    shapes = [y.shape for y in outputs]
    return "wrong", f"{shapes}, not {expected.shape}, or other values: {imported.input_shape}, {imported.layers}"


def _in_order(x, shape):
    """x as it is, and images with channels last, if such samples have this shape."""
    orders = [x] if x.ndim != 4 else [x, x.transpose(0, 2, 3, 1)]
    return [a for a in orders if a.shape[1:] == tuple(shape)]


def with_constants(model, inputs, kept):
    """The model with all inputs but one as initializers, and with its first output only."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for value, array in zip(list(model.graph.input), inputs, strict=True):
        if value.name != kept:
            is_tensor = isinstance(array, onnx.TensorProto)
            constant = model.graph.initializer.add()
            constant.CopyFrom(array if is_tensor else onnx.numpy_helper.from_array(np.asarray(array)))
            constant.name = value.name
            model.graph.input.remove(value)
    del model.graph.output[1:]
    return model


def contents(test):
    """(model, inputs, outputs) of a test of the package onnx, in memory or, in some versions, in files."""
    if test.data_sets is not None:
        return test.model, *test.data_sets[0]
    folder = pathlib.Path(test.model_dir)
    model, values = onnx.load(folder / "model.onnx"), []
    for kind, infos in (("input", model.graph.input), ("output", model.graph.output)):
        files = [folder / "test_data_set_0" / f"{kind}_{i}.pb" for i in range(len(infos))]
        tensors = all(info.type.HasField("tensor_type") for info in infos)
        values.append([onnx.TensorProto.FromString(f.read_bytes()) if tensors else None for f in files])
    return model, *values


def variants(model, inputs):
    """(model, x): the model if it has one input, and each model that has one float input, the others as constants."""
    names = [value.name for value in model.graph.input]
    arrays = [onnx.numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a for a in inputs]
    if len(names) == 1:
        yield model, arrays[0]
        return
    for name, x in itertools.islice(zip(names, arrays, strict=False), 4):
        if isinstance(x, np.ndarray) and len(names) == len(inputs):
            try:
                yield with_constants(model, inputs, name), x
            except (TypeError, ValueError, AttributeError, NotImplementedError):  # sequences and optional values
                continue
