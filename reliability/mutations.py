"""Mutations of bytes, of values of JSON, and of ONNX models; all random choices come from one `random.Random`."""

import copy
import json
import random
import struct
from typing import Any

import onnx
from altered_files import VALUES, places, value_at
from onnx import TensorProto, helper, numpy_helper

_SIZES = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES = [*VALUES, 2, 3, 4, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**400, 1e-320, -0.0, 1e20, float("-inf"),
           "0", "0.weight", "a.b", "\0", "\ud800", "é" * 300, "x" * 5000, "nan", "same", "valid", "cpu", "__class__",
           [0], [1, 1], [2, -1], [None, 4], [10**9, 10**9], [[]] * 50, [0.0] * 1000, {"same": 0}, {"same": 10**6},
           {"class": "Dense", "config": {"units": 3}}]  # fmt: skip
#: JSON that Python values cannot be, and nesting that a parser may not bear.
_TEXTS = [
    "[" * 100_000,
    '{"a":' * 5000,
    "NaN",
    "1e999",
    "[1,2",
    '"\\ud800"',
    "{}",
    "[]",
    "null",
    " ",
    "[" * 900 + "]" * 900,
]


def mutated_bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """The content with a blind change. other: another valid content, parts of which may replace parts of this one."""
    if not content:
        return rng.randbytes(rng.randrange(1, 40))
    data, at = bytearray(content), rng.randrange(len(content))
    match rng.randrange(9):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at] = rng.choice([0, 255, 127, 128, ord('"'), ord("{"), ord("9"), rng.randrange(256)])
        case 2:
            del data[at:]
        case 3:
            del data[at : at + rng.choice([1, 2, 4, 8, 50])]
        case 4:
            data[at:at] = rng.choice([rng.randbytes(rng.randrange(1, 9)), bytes(rng.choice([1, 4, 100, 5000]))])
        case 5:
            piece = data[at : at + rng.randrange(1, 64)]
            data[at:at] = piece * rng.choice([1, 1, 2, 30])
        case 6:
            start = rng.randrange(len(other)) if other else 0
            data[at : at + rng.choice([0, 8, 64])] = other[start : start + rng.choice([8, 64, 4096])]
        case 7:
            number, size = rng.choice(_SIZES), rng.choice([1, 2, 4, 8])
            data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, rng.choice(["big", "little"]))
        case _:
            data[at : at + 8] = struct.pack("<d", rng.choice([float("nan"), float("inf"), -1.0, 1e300]))
    return bytes(data)


def mutated_json(rng: random.Random, value: Any, donors: list[Any]) -> Any:
    """A JSON value with one value in it changed. donors: other values, parts of which may be put into this one."""
    value = copy.deepcopy(value)
    inner = [place for place in places(value) if place]
    if not inner or rng.random() < 0.01:
        return copy.deepcopy(rng.choice(_VALUES))
    place = rng.choice(inner)
    parent, key = value_at(value, place[:-1]), place[-1]
    match rng.randrange(12):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        case 2 if isinstance(parent, list):
            rng.shuffle(parent)
        case 3 if isinstance(parent, list):
            parent *= rng.choice([2, 3, 100])
        case 4:
            donor = rng.choice(donors)
            parent[key] = copy.deepcopy(value_at(donor, rng.choice(list(places(donor)))))
        case 5 if isinstance(parent, dict):
            parent[rng.choice(["name", "more", "", "class", "config", "same", "units", "layers", "backend"])] = (
                rng.choice(_VALUES)
            )
        case 6:
            parent[key] = [parent[key]]
        case 7 if isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] += rng.choice([-1, 1, 1, 2, 10, 1000])
        case 8 if isinstance(parent[key], int | float):
            parent[key] = parent[key] * rng.choice([-1, 0.5, 2, 10.0**30])
        case _:
            parent[key] = copy.deepcopy(rng.choice(_VALUES))
    return value


def mutated_text(rng: random.Random, text: str) -> str:
    """A JSON text that is changed as a text."""
    if rng.random() < 0.3:
        return rng.choice(_TEXTS)
    at = rng.randrange(len(text))
    piece = rng.choice([*_TEXTS, *(json.dumps(v) for v in VALUES), rng.choice('[]{},:"\\0-e.')])
    return text[:at] + piece + text[at + rng.choice([0, 1, 2, 10]) :]


# ONNX -----------------------------------------------------------------------------------------------------------------

_OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain})
_INTEGERS = [0, 1, 2, 3, -1, -2, 5, 17, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
_FLOATS = [0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("nan"), float("inf"), float("-inf")]
_STRINGS = [
    b"",
    b"SAME_UPPER",
    b"SAME_LOWER",
    b"VALID",
    b"NOTSET",
    b"linear",
    b"nearest",
    b"reverse",
    b"\xff\xfe",
    b"x" * 999,
]


def mutated_onnx(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """An ONNX file with one change to its graph, or with a blind one if it is no ONNX file any more."""
    try:
        model = onnx.ModelProto.FromString(content)
        _change_onnx(rng, model, onnx.ModelProto.FromString(other))
        return model.SerializeToString()
    except Exception:  # the package protobuf has several of its own
        return mutated_bytes(rng, content, other)


def _change_onnx(rng: random.Random, model: Any, other: Any) -> None:
    graph = model.graph
    names = [
        *(n for node in graph.node for n in (*node.output, *node.input)),
        *(i.name for i in graph.input),
        "none",
        "",
    ]
    node = rng.choice(graph.node) if graph.node else graph.node.add()
    match rng.randrange(22):
        case 0:
            node.op_type = rng.choice(_OPERATORS)
        case 1 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        case 2:
            node.input.append(rng.choice(names))
        case 3 if node.input:
            del node.input[rng.randrange(len(node.input)) :]
        case 4 if node.output:
            node.output[rng.randrange(len(node.output))] = rng.choice(names)
        case 5:
            node.output.append(rng.choice(["more", *names]))
        case 6 | 7 | 8:
            _change_attribute(rng, node)
        case 9:
            nodes = list(graph.node)
            rng.choice([lambda: nodes.pop(rng.randrange(len(nodes))), lambda: rng.shuffle(nodes), nodes.reverse,
                        lambda: nodes.append(nodes[0])])()  # fmt: skip
            copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
            del graph.node[:]
            graph.node.extend(copies)
        case 10 if other.graph.node:
            graph.node.insert(rng.randrange(len(graph.node) + 1), rng.choice(other.graph.node))
        case 11:
            rng.choice([*model.opset_import] or [model.opset_import.add()]).version = rng.choice(
                [*range(1, 30), -1, 0, 2**40, 2**63 - 1]
            )
        case 12:
            added = model.opset_import.add()
            added.domain, added.version = rng.choice(["", "ai.onnx", "com.microsoft", "x"]), rng.choice([1, 7, 13, 99])
        case 13 | 14 if graph.initializer:
            _change_tensor(rng, rng.choice(graph.initializer))
        case 15 if graph.initializer:
            tensor = rng.choice(graph.initializer)
            rng.choice([lambda: setattr(tensor, "name", rng.choice(names)), lambda: graph.initializer.remove(tensor),
                        lambda: graph.initializer.append(tensor)])()  # fmt: skip
        case 16 if graph.input:
            _change_type(rng, rng.choice(graph.input))
        case 17 if graph.input:
            rng.choice([lambda: graph.input.append(graph.input[0]), lambda: graph.input.pop(), lambda: setattr(
                rng.choice(graph.input), "name", rng.choice(names))])()  # fmt: skip
        case 18 if graph.output:
            rng.choice([lambda: graph.output.append(onnx.ValueInfoProto(name=rng.choice(names))),
                        lambda: graph.output.pop(), lambda: _change_type(rng, rng.choice(graph.output)),
                        lambda: setattr(rng.choice(graph.output), "name", rng.choice(names))])()  # fmt: skip
        case 19:
            node.domain = rng.choice(["ai.onnx", "ai.onnx.ml", "x", "com.microsoft"])
        case 20:
            model.ir_version = rng.choice([0, 1, 3, 4, 7, 10, 99, 2**40])
        case 21 if rng.random() < 0.5:
            added = model.metadata_props.add()
            added.key, added.value = "xpnet.images", rng.choice(["channels first", "channels last", "", "x"])
        case _:
            node.name = rng.choice([*names, "\n", "x" * 300])


def _change_attribute(rng: random.Random, node: Any) -> None:
    if not node.attribute or rng.random() < 0.15:
        schemas = [s for s in onnx.defs.get_all_schemas_with_history() if s.name == node.op_type and s.attributes]
        known = sorted(rng.choice(schemas).attributes) if schemas else []
        value = rng.choice([1, 0, -1, 2.0, b"x", [0, 1], [1.0], helper.make_tensor("t", 1, [1], [2.0])])
        node.attribute.append(helper.make_attribute(rng.choice([*known, "axis", "more", ""]), value))
        return
    a = rng.choice(node.attribute)
    kinds = onnx.AttributeProto
    match rng.randrange(6):
        case 0:
            node.attribute.remove(a)
        case 1:
            a.type = rng.choice([*kinds.AttributeType.values(), 99])
        case 2:
            node.attribute.append(a)
        case 3:
            a.name = rng.choice(["axis", "axes", "perm", "pads", "alpha", ""])
        case _ if a.type == kinds.INTS:
            numbers = list(a.ints)
            rng.choice([numbers.reverse, lambda: numbers.append(rng.choice(_INTEGERS)), lambda: numbers.pop(),
                        lambda: numbers.__setitem__(0, rng.choice(_INTEGERS)),
                        lambda: numbers.__setitem__(-1, numbers[-1] + rng.choice([-1, 1, 2]))])()  # fmt: skip
            del a.ints[:]
            a.ints.extend(numbers)
        case _ if a.type == kinds.TENSOR:
            _change_tensor(rng, a.t)
        case _:
            a.i, a.f, a.s = rng.choice(_INTEGERS), rng.choice(_FLOATS), rng.choice(_STRINGS)


def _change_tensor(rng: random.Random, tensor: Any) -> None:
    match rng.randrange(8):
        case 0:
            tensor.data_type = rng.choice([*TensorProto.DataType.values(), 99, -1])
        case 1 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_INTEGERS)
        case 2:
            dims = list(tensor.dims)
            rng.choice([dims.reverse, lambda: dims.append(rng.choice([1, 1, 2, 0])), lambda: dims.pop()])()
            del tensor.dims[:]
            tensor.dims.extend(dims)
        case 3:
            tensor.raw_data = mutated_bytes(rng, tensor.raw_data, b"")
        case 4:
            tensor.data_location = rng.choice([0, 1])
            entry = tensor.external_data.add()
            entry.key, entry.value = rng.choice(["location", "offset", "length"]), rng.choice(
                ["/etc/passwd", "../x", "x", "-1", "1e9", "", "g.onnx"])  # fmt: skip
        case 5:
            tensor.float_data.extend([1.0] * rng.choice([1, 4, 1000]))
        case 6:
            array = numpy_helper.to_array(tensor).copy()
            if array.size:
                array.reshape(-1)[rng.randrange(array.size)] = rng.choice(
                    _FLOATS if array.dtype.kind == "f" else [n for n in _INTEGERS if abs(n) < 2**31]
                )
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        case _:
            tensor.ClearField(rng.choice(["raw_data", "dims", "data_type", "name"]))


def _change_type(rng: random.Random, value: Any) -> None:
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    match rng.randrange(6):
        case 0:
            tensor.elem_type = rng.choice([*TensorProto.DataType.values(), 99])
        case 1 if dims:
            rng.choice(dims).dim_value = rng.choice(_INTEGERS)
        case 2 if dims:
            rng.choice(dims).dim_param = rng.choice(["N", "T", ""])
        case 3 if dims:
            dims.pop()
        case 4:
            dims.add().dim_value = rng.choice(_INTEGERS)
        case _:
            rng.choice([lambda: value.ClearField("type"), lambda: tensor.ClearField("shape"), lambda: (
                value.type.sequence_type.elem_type.tensor_type.CopyFrom(tensor))])()  # fmt: skip
