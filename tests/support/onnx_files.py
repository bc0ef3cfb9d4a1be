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
        "the (inputs|outputs) have",
        r"opset \d+",
        "the (shape|input|output|initializer)",
        "an (input|output) of",
        "the layers depend on the length",
    ]
)


def outcome(model, x, expected, path, rtol=1e-3, atol=1e-6):
    """("equal", ""), ("refused", message), or ("wrong", what is wrong) for an ONNX model.

    x, expected: an array, or a list of arrays if there are several inputs or outputs.
    """
    onnx.save(model, path)
    try:
        imported = xpnet.import_onnx(path, "cpu")
    except ArgumentError as error:
        return "refused", str(error)
    except Exception as error:  # any other error is a fault
        return "wrong", repr(error)
    return compared(imported, x, expected, rtol, atol)


def compared(imported, x, expected, rtol, atol):
    """("equal", "") or ("wrong", what is wrong) for an imported model."""
    x, expected = (list(a) if isinstance(a, list | tuple) else [a] for a in (x, expected))
    shapes = imported.input_shape if len(x) > 1 else [imported.input_shape]
    try:
        candidates = itertools.product(*[_in_order(a, shape) for a, shape in zip(x, shapes, strict=True)])
        outputs = [imported.predict(list(given) if len(given) > 1 else given[0]) for given in candidates]
    except Exception as error:
        return "wrong", f"predict: {error!r}"
    for got in outputs:
        got = got if isinstance(got, list) else [got]
        if len(got) == len(expected) and all(
            _close(y, want, rtol, atol) for y, want in zip(got, expected, strict=True)
        ):
            types = [(y.dtype, want.dtype) for y, want in zip(got, expected, strict=True)]
            return ("equal", "") if all(a == b for a, b in types) else ("wrong", f"(dtype, expected): {types}")
    shapes = [y.shape for y in expected]
    return "wrong", f"not {shapes}, or other values: {imported.input_shape}, {imported.output_shape}, {imported.layers}"


def _close(y, want, rtol, atol):
    """Whether an output is equal, in the order of axes of xpnet or, for images, with channels first."""
    orders = [y, y.transpose(0, 3, 1, 2)] if y.ndim == 4 else [y]
    return any(a.shape == want.shape and np.allclose(a, want, rtol=rtol, atol=atol, equal_nan=True) for a in orders)


def _in_order(x, shape):
    """x as it is, and images with channels last, if such samples have this shape."""
    orders = [x] if x.ndim != 4 else [x, x.transpose(0, 2, 3, 1)]
    return [
        a
        for a in orders
        if a.ndim == len(shape) + 1 and all(m in (None, n) for n, m in zip(a.shape[1:], shape, strict=True))
    ]


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


def variants(model, inputs, outputs):
    """(model, x, expected): the model itself; and each model that has one float input, the others as constants."""
    names = [value.name for value in model.graph.input]
    inputs_, expected = ([_array(a) for a in values] for values in (inputs, outputs))
    yield model, inputs_, expected
    if len(names) > 1:
        for name, x in itertools.islice(zip(names, inputs_, strict=False), 4):
            if len(names) == len(inputs):
                try:
                    yield with_constants(model, inputs, name), x, expected[0]
                except (TypeError, ValueError, AttributeError, NotImplementedError):  # sequences and optional values
                    continue


def _array(a):
    """The array of a tensor; an arbitrary one for sequences and optional values, which are always refused."""
    a = onnx.numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a
    return a if isinstance(a, np.ndarray) else np.zeros(1)
