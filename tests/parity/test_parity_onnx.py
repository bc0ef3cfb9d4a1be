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
REFUSED = {"GLU": "operator Split", "reflection padding": "operator Pad in mode 'reflect'"}


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
    file, x, y = exported(name, dynamo)
    got, message = onnx_files.outcome(file, x, y, tmp_path / "net.onnx", rtol=1e-4, atol=1e-5)
    assert got == ("refused" if name in REFUSED else "equal"), message
    assert name not in REFUSED or REFUSED[name] in message


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
