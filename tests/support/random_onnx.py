"""Random ONNX graphs that grow node by node, each checked by ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper


class RandomGraph:
    """A graph that grows node by node; a node that gives an invalid graph is left out again.

    branching: how probable it is that a node reads an earlier output than the last one.
    """

    def __init__(self, seed, inputs=1, nodes=9, branching=0.2):
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.rng.integers(7, 24))
        self.batch = int(self.rng.choice([0, 0, 1, 2, 3]))  # 0: not fixed
        rank = int(self.rng.choice([1, 2, 2, 3, 3]))
        self.x = {}
        for name in ("x", "x2", "x3")[:inputs]:
            shape = [int(n) for n in self.rng.integers(1, 7, rank)]
            if name != "x" and self.rng.random() < 0.7:
                shape = [self.pick(n, n, 1) for n in self.x["x"].shape[1:]]
            self.x[name] = self.rng.normal(size=(self.batch or 3, *shape)).astype("float32")
        self.nodes, self.constants, self.branching = [], {}, branching
        self.outputs = dict(self.x)  # by name
        for _ in range(int(self.rng.integers(1, nodes))):
            self.grow()

    def pick(self, *options):
        return options[int(self.rng.integers(len(options)))]

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def floats(self, *shape):
        same = [name for name, a in self.constants.items() if a.shape == shape and a.dtype == "float32"]
        if same and self.rng.random() < 0.5:
            return self.pick(*same)
        return self.constant(self.rng.normal(size=shape).astype("float32") + self.pick(0, 2))

    def ints(self, values):
        return self.constant(np.array(values, "int64"))

    def model(self, *outputs):
        constants = [numpy_helper.from_array(a, name) for name, a in self.constants.items()]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [self.batch or "N", *a.shape[1:]])
                for name, a in self.x.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def grow(self):
        kind = self.pick(*[name for name in dir(self) if name.startswith("add_")])
        last = self.rng.random() >= self.branching
        source = next(reversed(self.outputs)) if last else self.pick(*self.outputs)
        before, name = (len(self.nodes), dict(self.constants)), f"t{len(self.nodes)}"
        shape = list(self.outputs[source].shape)
        found = getattr(self, kind)(source, shape) if shape else None
        if found is not None:
            operator, inputs, attributes = found
            self.nodes.append(
                helper.make_node(
                    operator,
                    list(inputs) if isinstance(inputs, tuple) or source in inputs else [source, *inputs],
                    [name],
                    name=f"{operator}_{name}",
                    **attributes,
                )
            )
            found = run(self.model(name), self.x)
            if found is not None and 0 < found[0].size < 10**5:
                (self.outputs[name],) = found
                return
        del self.nodes[before[0] :]
        self.constants = before[1]

    def add_activation(self, source, shape):
        kinds = ["Relu", "Sigmoid", "Tanh", "Softplus", "Neg", "Identity", "Elu", "LeakyRelu", "Exp"]
        kinds += ["HardSigmoid", "HardSwish", "Mish", "Selu", "Celu", "Abs"]
        return self.pick(*kinds), [], {}

    def add_limits(self, source, shape):
        low, high = sorted(self.rng.normal(size=2).astype("float32"))
        if self.rng.random() < 0.5:
            return self.pick("Max", "Min"), [self.constant(self.pick(low, np.float32(0)))], {}
        if self.opset < 11:
            return "Clip", [], {"min": float(low), "max": float(high)}
        return "Clip", [self.constant(low), self.constant(high)], {}

    def add_slopes(self, source, shape):
        return "PRelu", [self.floats(*[self.pick(n, 1) for n in self.pick(shape[1:], shape[-1:])])], {}

    def add_pad(self, source, shape):
        pads = [int(n) for n in self.rng.integers(0, 3, 2 * len(shape))]
        for axis in range(min(len(shape), self.pick(2, 2, 2, 1))):
            pads[axis] = pads[len(shape) + axis] = 0
        return ("Pad", [self.ints(pads)], {}) if self.opset >= 11 else ("Pad", [], {"pads": pads})

    def add_instance_norm(self, source, shape):
        if len(shape) < 3:
            return None
        return "InstanceNormalization", [self.floats(shape[1]), self.floats(shape[1])], {"epsilon": 0.1}

    def add_softmax(self, source, shape):
        return self.pick("Softmax", "LogSoftmax"), [], self.pick({}, {"axis": int(self.rng.integers(0, len(shape)))})

    def add_constant(self, source, shape):
        kept = shape[int(self.rng.integers(0, len(shape) + 1)) :]
        sizes = [self.pick(n, n, 1) for n in kept]
        if self.rng.random() < 0.1:
            sizes = [1, *shape]
        c = self.floats(*sizes)
        return self.pick("Add", "Sub", "Mul", "Div"), self.pick([source, c], [c, source]), {}

    def add_skip(self, source, shape):
        same = [name for name, value in self.outputs.items() if list(value.shape) == shape]
        other = self.pick(*(same if self.rng.random() < 0.8 else self.outputs))
        return self.pick("Add", "Add", "Sub", "Mul"), self.pick([source, other], [other, source]), {}

    def add_merge(self, source, shape):
        same = [name for name, value in self.outputs.items() if value.ndim == len(shape)]
        others = [self.pick(*same) for _ in range(self.pick(0, 1, 1, 2))]
        kind = self.pick("Sum", "Mean", "Max", "Min", "Concat", "Concat")
        constant = [self.floats(*shape[1:])] if self.rng.random() < 0.1 else []
        axis = {"axis": int(self.rng.integers(-len(shape), len(shape)))} if kind == "Concat" else {}
        return kind, [str(name) for name in self.rng.permutation([source, *others, *constant])], axis

    def add_gate(self, source, shape):
        """The first steps of a gate: of one size along all axes but one."""
        axes = [axis for axis in range(1, len(shape)) if axis != self.pick(1, len(shape) - 1)]
        return ("ReduceMean", [], {"axes": axes, "keepdims": 1}) if axes and self.opset < 18 else None

    def add_gemm(self, source, shape):
        units, attributes = int(self.rng.integers(1, 6)), {"transB": self.pick(0, 1), "alpha": self.pick(1.0, 0.5)}
        sizes = (units, shape[-1]) if attributes["transB"] else (shape[-1], units)
        bias = self.pick([], [self.floats(*self.pick((), (1,), (units,), (1, units), (shape[0], 1), (1, 1)))])
        return "Gemm", [self.floats(*sizes), *(bias or [self.floats(1)])], attributes | {"beta": self.pick(1.0, 2.0)}

    def add_matmul(self, source, shape):
        if self.rng.random() < 0.2 and len(shape) > 1:
            return "MatMul", [self.floats(3, shape[-2]), source], {}
        return "MatMul", [self.floats(shape[-1], int(self.rng.integers(1, 6)))], {}

    def windows(self, kernel):
        attributes = {"strides": [self.pick(1, 1, 2, 3), self.pick(1, 1, 2)][: len(kernel)]}
        padding = self.pick("pads", "auto_pad", "")
        if padding == "pads":
            first = [int(self.rng.integers(0, n)) for n in kernel]
            attributes["pads"] = [*first, *self.pick(first, first, [int(self.rng.integers(0, n)) for n in kernel])]
        elif padding:
            attributes["auto_pad"] = self.pick("SAME_UPPER", "SAME_LOWER", "VALID")
        return attributes

    def add_conv(self, source, shape):
        if len(shape) not in (3, 4):
            return None
        kernel, group = [int(n) for n in self.rng.integers(1, 4, len(shape) - 2)], self.pick(1, 1, shape[1])
        filters = group * int(self.rng.integers(1, 3))
        bias = self.pick([], [self.floats(filters)])
        more = {"dilations": [self.pick(1, 1, 2), 1][: len(kernel)], "group": group, **self.windows(kernel)}
        return "Conv", [self.floats(filters, shape[1] // group, *kernel), *bias], more

    def add_conv_transpose(self, source, shape):
        if len(shape) != 4:
            return None
        kernel, group = [int(n) for n in self.rng.integers(1, 4, 2)], self.pick(1, 1, shape[1])
        more = {"group": group, "dilations": [self.pick(1, 1, 2), 1], **self.windows(kernel)}
        if self.rng.random() < 0.3:
            more["output_padding"] = [self.pick(0, more["strides"][0] - 1), 0]
        if self.rng.random() < 0.3:
            more["output_shape"] = [
                n * s + self.pick(0, 0, 1, -1) for n, s in zip(shape[2:], more["strides"], strict=True)
            ]
            more.pop("pads", None)
        return "ConvTranspose", [self.floats(shape[1], 2, *kernel)], more

    def add_pool(self, source, shape):
        if len(shape) not in (3, 4):
            return None
        kernel = [int(n) for n in self.rng.integers(1, 4, len(shape) - 2)]
        more = {"kernel_shape": kernel, **self.windows(kernel)}
        if self.opset >= 10:
            more["ceil_mode"] = self.pick(0, 0, 1)
        if self.rng.random() < 0.5:
            return "MaxPool", [], more
        return "AveragePool", [], more | {"count_include_pad": self.pick(0, 1)}

    def add_global_pool(self, source, shape):
        return (self.pick("GlobalAveragePool", "GlobalMaxPool"), [], {}) if len(shape) in (3, 4) else None

    def add_reduce(self, source, shape):
        axes = sorted({int(axis) for axis in self.rng.integers(-len(shape), len(shape), 2)})
        kind = self.pick("ReduceMean", "ReduceMax", "ReduceSum")
        later = self.opset >= (13 if kind == "ReduceSum" else 18)
        inputs, attributes = ([self.ints(axes)], {}) if later else ([], {"axes": axes})
        return kind, inputs, attributes | self.pick({}, {"keepdims": self.pick(0, 1)})

    def add_batch_norm(self, source, shape):
        if len(shape) < 2:
            return None
        four = [self.constant(np.abs(self.rng.normal(size=shape[1])).astype("float32")) for _ in range(4)]
        return "BatchNormalization", four, {"epsilon": 0.01}

    def add_layer_norm(self, source, shape):
        axis = int(self.rng.integers(-len(shape), len(shape)))
        return "LayerNormalization", [self.floats(*shape[axis:]), self.floats(*shape[axis:])], {"axis": axis}

    def add_transpose(self, source, shape):
        order = [int(i) + 1 for i in self.rng.permutation(len(shape) - 1)]
        if len(shape) == 3 and self.rng.random() < 0.2:  # as before and after recurrent nodes
            return "Transpose", [], {"perm": [1, 0, 2]}
        return "Transpose", [], self.pick({"perm": [0, *order]}, {"perm": [0, *order]}, {})

    def add_part(self, source, shape):
        axis = int(self.rng.integers(self.pick(0, 1, 1, 1) if len(shape) > 1 else 0, len(shape)))
        start = int(self.rng.integers(0, shape[axis]))
        if self.rng.random() < 0.4:
            return "Gather", [self.constant(np.array(self.pick(start, start - shape[axis])))], {"axis": axis}
        stop = self.pick(start + 1, shape[axis], 2**40)
        if self.opset < 10:
            return "Slice", [], {"starts": [start], "ends": [stop], "axes": [axis]}
        return "Slice", [self.ints([start]), self.ints([stop]), self.ints([axis])], {}

    def add_recurrent(self, source, shape):
        """After a Transpose that has moved the batch to axis 1."""
        last = self.nodes[-1] if self.nodes else None
        if last is None or last.op_type != "Transpose" or last.output[0] != source or len(shape) != 3:
            return None
        kind, units = self.pick(("RNN", 1), ("GRU", 3), ("LSTM", 4)), self.pick(1, 3)
        direction, rows = self.pick("forward", "reverse", "bidirectional"), kind[1] * units
        directions = 2 if direction == "bidirectional" else 1
        weights = [self.floats(directions, rows, shape[2]), self.floats(directions, rows, units)]
        bias = self.pick([], [self.floats(directions, 2 * rows)])
        more = {"linear_before_reset": self.pick(0, 1, 1)} if kind[0] == "GRU" else {}
        return kind[0], [*weights, *bias], {"direction": direction, "hidden_size": units, **more}

    def node(self, operator, *inputs, **attributes):
        """The output of a node that belongs to an operator of several nodes."""
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"{operator}_{name}", **attributes))
        return name

    def add_recurrent_layer(self, source, shape):
        """A recurrent operator with the transpositions before and after it."""
        if len(shape) != 3:
            return None
        kind, units = self.pick(("RNN", 1), ("GRU", 3), ("LSTM", 4)), self.pick(1, 2, 3)
        direction, rows = self.pick("forward", "reverse", "bidirectional"), kind[1] * units
        directions = 2 if direction == "bidirectional" else 1
        given = [self.floats(directions, rows, shape[2]), self.floats(directions, rows, units)]
        given += self.pick([], [self.floats(directions, 2 * rows)])
        more = {"linear_before_reset": self.pick(0, 1, 1)} if kind[0] == "GRU" else {}
        more |= {"direction": direction, "hidden_size": units}
        steps, whole = self.node("Transpose", source, perm=[1, 0, 2]), f"n{len(self.nodes) + 1}"
        if self.rng.random() < 0.4:  # the last state
            self.nodes.append(
                helper.make_node(kind[0], [steps, *given], ["", whole], name=f"{kind[0]}_{whole}", **more)
            )
            last = self.node("Transpose", whole, perm=[1, 0, 2])
            return "Reshape", (last, self.ints([0, -1])), {}
        y = self.node("Transpose", self.node(kind[0], steps, *given, **more), perm=[2, 0, 1, 3])
        return "Reshape", (y, self.ints([0, 0, -1])), {}

    def add_attention(self, source, shape):
        """Self-attention (N, T, C) of one or two heads, perhaps without later keys."""
        if len(shape) != 3 or self.opset < 13:
            return None
        width, heads = shape[2], self.pick(1, 2) if shape[2] % 2 == 0 else 1
        apart, order = (
            self.ints([0, 0, heads, width // heads]),
            {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]},
        )
        parts = {}
        for name, perm in order.items():
            y = self.node("MatMul", source, self.floats(width, width))
            y = self.node("Add", y, self.floats(width)) if self.rng.random() < 0.5 else y
            parts[name] = self.node("Transpose", self.node("Reshape", y, apart), perm=perm)
        scores = self.node("MatMul", parts["q"], parts["k"])
        scores = self.node("Mul", scores, self.constant(np.float32((width // heads) ** -0.5)))
        if self.rng.random() < 0.4:
            later = np.triu(np.full((shape[1], shape[1]), self.pick(-np.inf, -1e9), "float32"), 1)
            scores = self.node("Add", scores, self.constant(later))
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=self.pick(-1, -1, -1, 2)), parts["v"])
        joined = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), self.ints([0, 0, width]))
        return "MatMul", (joined, self.floats(width, width)), {}

    def add_split(self, source, shape):
        """The first or the last of two parts of an axis."""
        axis = int(self.rng.integers(self.pick(0, 1, 1), len(shape))) if len(shape) > 1 else 0
        if shape[axis] < 2 or not 2 <= self.opset < 18:
            return None
        first = int(self.rng.integers(1, shape[axis]))
        sizes, names = [first, shape[axis] - first], [f"n{len(self.nodes)}", f"m{len(self.nodes)}"]
        given, more = ([], {"split": sizes}) if self.opset < 13 else ([self.ints(sizes)], {})
        self.nodes.append(helper.make_node("Split", [source, *given], names, name=names[0], axis=axis, **more))
        return "Identity", (self.pick(*names),), {}

    def add_depth_to_space(self, source, shape):
        if len(shape) != 4:
            return None
        mode = {"mode": self.pick("DCR", "CRD")} if self.opset >= 11 else {}
        if self.rng.random() < 0.5:
            return "SpaceToDepth", [], {"blocksize": self.pick(1, 2)}
        return "DepthToSpace", [], {"blocksize": self.pick(1, 2), **mode}

    def add_expand(self, source, shape):
        sizes = [self.pick(n, 1, 3) if n == 1 else n for n in shape]
        return ("Expand", [self.ints(self.pick(sizes, [1, *sizes[1:]]))], {}) if self.opset >= 8 else None

    def add_pattern(self, source, shape):
        """Activations that exporters write as several nodes."""
        one, half = self.constant(np.float32(1)), self.constant(np.float32(0.5))
        match self.pick("gelu", "softplus", "silu", "mish"):
            case "gelu":
                if self.opset < 9:
                    return None
                error = self.node("Erf", self.node("Div", source, self.constant(np.float32(2**0.5))))
                return "Mul", (self.node("Mul", source, self.node("Add", error, one)), half), {}
            case "softplus":
                return "Log", (self.node("Add", self.node("Exp", source), one),), {}
            case "silu":
                return "Mul", (source, self.node("Sigmoid", source)), {}
            case _:
                return "Mul", (source, self.node("Tanh", self.node("Softplus", source))), {}

    def add_rms_norm(self, source, shape):
        return ("RMSNormalization", [self.floats(shape[-1])], {"epsilon": 0.1}) if self.opset >= 23 else None

    def add_reshape(self, source, shape):
        total = int(np.prod(shape[1:]))
        factor = self.pick(*[n for n in range(1, total + 1) if total % n == 0])
        sizes = [factor, total // factor]
        target = self.pick(
            [0, *sizes],
            [-1, *sizes],
            [0, -1],
            [0, factor, -1],
            [0, 0, -1],
            [shape[0], -1],
            [-1, factor],
            [2, -1],
            [0, -1, 1, factor],
            [-1, 1, *sizes],
        )
        return "Reshape", [self.ints(target)], {}

    def add_flatten(self, source, shape):
        return "Flatten", [], self.pick({}, {}, {"axis": int(self.rng.integers(0, len(shape) + 1))})

    def add_axis(self, source, shape):
        axes = [int(self.rng.integers(0, len(shape) + 1))]
        kind = self.pick("Unsqueeze", "Unsqueeze", "Squeeze")
        if kind == "Squeeze":
            axes = [i for i, n in enumerate(shape) if n == 1][-1:] or [1]
        return (kind, [self.ints(axes)], {}) if self.opset >= 13 else (kind, [], {"axes": axes})

    def add_resize(self, source, shape):
        if len(shape) != 4:
            return None
        scales = self.constant(np.float32([1, self.pick(1, 1, 1, 2), self.pick(1, 2, 3, 1.5), self.pick(1, 2, 3)]))
        mode = self.pick("nearest", "linear")
        if self.opset < 10:
            return ("Upsample", [scales], {"mode": mode}) if self.opset == 9 else None
        if self.opset == 10:
            return "Resize", [scales], {"mode": mode}
        coordinates = self.pick("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        rounding = self.pick("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        more = {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
        return "Resize", [self.constant(np.zeros(0, "float32")), scales], more

    def add_dropout(self, source, shape):
        return "Dropout", [], {}

    def add_cast(self, source, shape):
        return "Cast", [], {"to": self.pick(1, 1, 1, 11, 7)}


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, x)
    except Exception:  # an invalid graph
        return None


def with_branches(seed):
    """(a graph with fan-out and merges, the names of one to three outputs)."""
    graph = RandomGraph(seed, inputs=1 + seed % 3, nodes=15, branching=0.6)
    computed = [name for name in graph.outputs if name not in graph.x] or ["x"]
    return graph, computed[-(1 + seed // 3 % 3) :]


def in_file(x, channels_first):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if channels_first and x.ndim == 4 else x
