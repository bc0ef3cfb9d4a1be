"""The tests of single operators in the package onnx: equal, or refused by name."""

import collections
import re
import warnings

import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
loader = pytest.importorskip("onnx.backend.test.loader", reason="this version of onnx has no tests of operators")

import onnx_files  # noqa: E402

#: The least number of tests that must be equal, of the operators that layers can express.
AT_LEAST = {
    "Abs": 1, "Add": 2, "AveragePool": 9, "BatchNormalization": 2, "Cast": 3, "Celu": 1, "Clip": 8, "Concat": 6,
    "Conv": 6, "ConvTranspose": 7, "DepthToSpace": 2, "Dropout": 2, "Elu": 3, "Flatten": 3, "Gelu": 4, "Gemm": 8,
    "GlobalAveragePool": 2, "GlobalMaxPool": 2, "GroupNormalization": 2, "HardSigmoid": 3, "HardSwish": 1,
    "InstanceNormalization": 2, "LayerNormalization": 10, "LeakyRelu": 3, "LogSoftmax": 6, "LSTM": 1, "MatMul": 1,
    "Max": 4, "MaxPool": 8, "Mean": 2, "Min": 4, "Mish": 1, "Mul": 2, "Neg": 2, "Pow": 1, "PRelu": 1,
    "ReduceMax": 4, "ReduceMean": 4, "ReduceMin": 4, "Relu": 1, "Reshape": 6, "Resize": 2, "RNN": 1, "Selu": 3,
    "Sigmoid": 2, "Slice": 2, "Softmax": 6, "Softplus": 2, "Split": 4, "Squeeze": 1, "Sub": 2, "Sum": 2, "Tanh": 2,
    "Transpose": 2, "Unsqueeze": 5, "Upsample": 1,
}  # fmt: skip
#: The least number of tests with a single input that must be equal.
WITH_ONE_INPUT = 95
#: The least number of models with several inputs, none of them constant, that must be equal.
WITH_SEVERAL_INPUTS = 20


@pytest.mark.sweep
def test_every_operator_is_equal_or_refused_by_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tests overflow on purpose
        tests = loader.load_model_tests(kind="node")
    if not tests:
        pytest.skip("this version of onnx has no data for its tests of operators")
    wrong, unnamed, equal = [], [], collections.Counter()
    with_one_input = with_several_inputs = 0
    for test in tests:
        original, inputs, outputs = onnx_files.contents(test)
        for model, x, y in onnx_files.variants(original, inputs, outputs):
            got, message = onnx_files.outcome(model, x, y, tmp_path / "m.onnx", test.rtol, test.atol)
            if got == "wrong":
                wrong.append(f"{test.name}: {message}")
            elif got == "equal":
                equal[original.graph.node[0].op_type] += 1
                with_one_input += len(original.graph.input) == 1
                with_several_inputs += len(model.graph.input) > 1
            elif not re.search(onnx_files.NAMED, message):
                unnamed.append(f"{test.name}: {message}")
    assert not wrong and not unnamed
    assert not {kind: equal[kind] for kind, count in AT_LEAST.items() if equal[kind] < count}
    assert with_one_input >= WITH_ONE_INPUT and with_several_inputs >= WITH_SEVERAL_INPUTS
