"""Files of both exporters of PyTorch: everyday nets, and published architectures, against PyTorch and ONNX Runtime."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_files
import onnxruntime
import pytest
import torch
import torch_nets
import torch_published

import xpnet

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters give many warnings

#: What xpnet has no layer for, and what the refusal names.
REFUSED = {("reflection padding", dynamo): "operator Pad in mode 'reflect'" for dynamo in (False, True)}
REFUSED["RNN", True] = "operator Add"  # PyTorch's newer exporter writes each step of an RNN as nodes of its own


@pytest.fixture(autouse=True)
def operators_of_the_cpu():
    """In place of the fixture of all parity tests: the import does not depend on the operators."""


@functools.cache
def exported(name, dynamo):
    """(the file, inputs, outputs) of a net, exported once for all tests."""
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    net, x, y = torch_nets.made(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        torch_nets.exported(net, x, path, dynamo)
        return onnx.load(path), [a.numpy() for a in x], [a.numpy() for a in y]


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", torch_nets.NETS)
def test_an_everyday_net_is_equal_or_refused_by_name(tmp_path, name, dynamo):
    if name in torch_nets.WITHOUT_OLD_EXPORTER and not dynamo:
        pytest.skip("the exporter cannot write this net")
    file, x, y = exported(name, dynamo)
    got, message = onnx_files.outcome(file, x, y, tmp_path / "net.onnx", rtol=1e-4, atol=1e-5)
    reason = REFUSED.get((name, dynamo))
    assert got == ("equal" if reason is None else "refused"), message
    assert reason is None or reason in message


@pytest.mark.parametrize("name", torch_published.NETS)
def test_a_published_architecture_is_equal(tmp_path, name):
    make, parameters = torch_published.NETS[name]
    torch.manual_seed(0)
    net, path, x = make(), tmp_path / "net.onnx", torch.randn(2, 3, 96, 96)
    assert sum(p.numel() for p in net.parameters()) == parameters
    with torch.no_grad():
        net(x)  # changes the running statistics
        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "N"}}}
        torch.onnx.export(net.eval(), (x,), path, dynamo=False, opset_version=17, **names)
    x = np.array(x)
    want = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    got = xpnet.import_onnx(path, "cpu").predict(x.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * abs(want).max())
