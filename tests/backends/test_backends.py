"""Backends: their names, and the methods of each."""

import copy
import inspect
import math
import os
import pickle
import platform
import sys

import numpy as np
import pytest
from strict import StrictBackend

import xpnet
from xpnet import layers
from xpnet.backends import Backend
from xpnet.backends.cpu import backend as cpu
from xpnet.backends.cpu.backend import CPUBackend
from xpnet.backends.cuda.backend import GPUBackend
from xpnet.errors import ArgumentError, ArgumentTypeError, BackendError

NO_GPU = xpnet.available_backends()["gpu"]
no_gpu = pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
A = np.arange(6, dtype="float32").reshape(2, 3)
A.flags.writeable = False


@pytest.fixture(autouse=True)
def _unset_environment(monkeypatch):
    monkeypatch.delenv("XPNET_BACKEND", raising=False)


# Names ---------------------------------------------------------------------------------------------------------------


def test_available_backends_maps_names_to_reasons(backend):
    reasons = xpnet.available_backends()
    assert list(reasons) == ["cpu", "gpu"] and reasons["cpu"] is None
    assert reasons["gpu"] is None or (isinstance(reasons["gpu"], str) and reasons["gpu"])


@pytest.mark.parametrize("name", ["cpu", "CPU", " cpu "])
def test_there_is_one_cpu_backend(name):
    found = xpnet.get_backend(name)
    assert found is xpnet.get_backend("cpu") and found.name == "cpu" and found.xp is np


def test_a_backend_is_passed_through(backend):
    assert xpnet.get_backend(backend) is backend
    assert xpnet.Sequential([layers.Dense(2)], (3,), backend).backend is backend


def test_auto_is_the_gpu_if_it_can_be_used():
    assert xpnet.get_backend("auto").name == xpnet.get_backend().name == ("cpu" if NO_GPU else "gpu")


@pytest.mark.parametrize(("value", "name"), [("cpu", "cpu"), (" CPU ", "cpu"), ("", None), ("auto", None)])
def test_the_environment_decides_what_auto_is(monkeypatch, value, name):
    expected = name or xpnet.get_backend("auto").name
    monkeypatch.setenv("XPNET_BACKEND", value)
    assert xpnet.get_backend("auto").name == expected
    assert xpnet.Sequential([layers.Dense(2)], (3,)).backend.name == expected


@no_gpu
def test_an_unusable_gpu_named_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("XPNET_BACKEND", "gpu")
    with pytest.raises(BackendError, match="cannot be used"):
        xpnet.get_backend("auto")
    assert xpnet.get_backend("cpu").name == "cpu"  # an explicit name takes precedence


@pytest.mark.gpu
def test_the_environment_can_keep_auto_off_the_gpu(monkeypatch):
    assert xpnet.get_backend("auto").name == "gpu"
    monkeypatch.setenv("XPNET_BACKEND", "cpu")
    assert xpnet.get_backend("auto").name == "cpu"
    assert xpnet.get_backend("gpu") is xpnet.get_backend("gpu:0")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("cup", "'cpu'"),
        ("gqu", "'gpu'"),
        ("gpu1", "'gpu:1'"),
        ("gpu:", "'gpu'"),
        ("gpu:-1", "'gpu:1'"),
        ("aut", "'auto'"),
    ],
)
def test_the_nearest_name_is_suggested_for_a_misspelled_one(name, suggestion):
    with pytest.raises(
        ArgumentError, match=f"unknown backend .*Did you mean.*{suggestion}.*Known: auto, cpu, gpu, gpu:1"
    ):
        xpnet.get_backend(name)


def test_the_error_for_a_misspelled_name_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("XPNET_BACKEND", "cup")
    with pytest.raises(ArgumentError, match="XPNET_BACKEND"):
        xpnet.get_backend("auto")


@pytest.mark.parametrize("value", [None, 0, np, b"cpu", ["cpu"]])
def test_anything_but_a_name_is_a_type_error(value):
    with pytest.raises(ArgumentTypeError, match="backend must be"):
        xpnet.get_backend(value)


# Each backend --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CPUBackend, GPUBackend, StrictBackend])
def test_backends_have_the_signatures_of_the_base_class(kind):
    for name, function in inspect.getmembers(Backend, inspect.isfunction):
        if not name.startswith("_"):
            ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (function, getattr(kind, name)))
            assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs], name


@pytest.mark.parametrize("dtype", [None, "float32", np.float64, np.dtype("int64")])
@pytest.mark.parametrize("values", [A, A.tolist(), A.T, A[:, ::2], 3.5, [True, False]], ids=repr)
def test_to_numpy_is_the_inverse_of_asarray(backend, values, dtype):
    device_array = backend.asarray(values, dtype=dtype)
    assert isinstance(device_array, backend.xp.ndarray)
    expected = np.asarray(values, dtype=dtype)
    assert device_array.dtype == expected.dtype and device_array.shape == expected.shape
    host_array = backend.to_numpy(device_array)
    assert type(host_array) is np.ndarray and host_array.dtype == expected.dtype
    np.testing.assert_array_equal(host_array, expected)


def test_asarray_of_a_device_array_does_not_copy(backend):
    device_array = backend.asarray(A.copy())
    same_array = backend.asarray(device_array)
    same_array[0, 0] = 9
    assert float(device_array[0, 0]) == 9
    assert backend.asarray(device_array, dtype="float64").dtype == np.float64


def test_the_cpu_does_not_copy_numpy_arrays():
    assert xpnet.get_backend("cpu").asarray(A) is A and xpnet.get_backend("cpu").to_numpy(A) is A


def test_asarray_copies_from_another_device(backend):
    if backend.name == "gpu":
        pytest.skip("a fake device array on a real GPU")
    np.testing.assert_array_equal(backend.to_numpy(backend.asarray(StrictBackend().asarray(A))), A)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), [2, 3], (7, 1, 3)])
@pytest.mark.parametrize("dtype", ["float32", np.float64, "uint8"])
def test_empty_and_zeros_allocate_on_the_device(backend, shape, dtype):
    for a in (backend.empty(shape, dtype), backend.zeros(shape, dtype)):
        assert isinstance(a, backend.xp.ndarray) and a.shape == tuple(shape) and a.dtype == np.dtype(dtype)
        assert a.flags.c_contiguous
    assert not backend.to_numpy(backend.zeros(shape, dtype)).any()


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (1000, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_the_cpu_allocates_on_cache_lines(shape, dtype):
    backend = xpnet.get_backend("cpu")
    for _ in range(5):
        assert backend.empty(shape, dtype).ctypes.data % 64 == 0
        assert backend.zeros(shape, dtype).ctypes.data % 64 == 0


def test_every_parameter_on_the_cpu_starts_on_a_cache_line():
    for dtype in ("float32", "float64"):
        model = xpnet.Sequential([layers.Dense(3), layers.Dense(5), layers.Dense(1)], (7,), "cpu", dtype=dtype)
        assert all(p.value.ctypes.data % 64 == p.grad.ctypes.data % 64 == 0 for p in model.parameters)


def test_synchronize_and_device_work_on_every_backend(backend):
    with backend.device():
        assert float(backend.xp.sum(backend.asarray(A))) == 15
    assert backend.synchronize() is None


def test_describe_names_the_device(backend):
    lines = backend.describe()
    assert lines[0][0] == "device" and all(isinstance(text, str) and text for pair in lines for text in pair)


def test_repr_names_the_backend_and_copies_are_the_same_object(backend):
    assert repr(backend) == f"<xpnet backend {backend.name!r}>"
    assert copy.deepcopy(backend) is backend and pickle.loads(pickle.dumps(backend)) is backend


def test_lowest_is_the_lowest_finite_number(backend):
    assert backend.lowest("float32") == np.finfo("float32").min and type(backend.lowest("float64")) is float


# The CPU -------------------------------------------------------------------------------------------------------------


def test_the_cpu_names_its_blas_and_threads():
    import threadpoolctl

    lines = dict(xpnet.get_backend("cpu").describe())
    assert "logical cores" in lines["device"]
    with threadpoolctl.threadpool_limits(1):
        assert dict(xpnet.get_backend("cpu").describe())["BLAS"].endswith(", 1 threads")


def test_a_blas_unknown_to_threadpoolctl_is_named_by_the_build_of_numpy(monkeypatch):
    monkeypatch.setattr("threadpoolctl.threadpool_info", list)
    name, threads = cpu.blas_and_threads()
    assert name and threads >= 1


@pytest.mark.parametrize(
    ("content", "name"),
    [(None, "x86"), ("flags : none\n", "x86"), ("model name\t: A fast one\nmodel name\t: Another\n", "A fast one")],
)
def test_the_processor_is_named_if_the_system_reports_it(monkeypatch, tmp_path, content, name):
    real_open = open

    def fake_open(path, *args, **kwargs):
        assert path == "/proc/cpuinfo"
        return real_open(tmp_path / "cpuinfo", *args, **kwargs)

    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr("builtins.open", fake_open)
    monkeypatch.setattr(platform, "processor", str)
    monkeypatch.setattr(platform, "machine", lambda: "x86")
    assert cpu._processor() == name


class GPUArray:
    """An array on a GPU, of CuPy (with the method `get`) or of PyTorch (`cpu`)."""

    __cuda_array_interface__ = {"version": 3}  # noqa: RUF012

    def __init__(self, method):
        setattr(self, method, lambda: A)


@pytest.mark.parametrize("method", ["get", "cpu"])
def test_the_cpu_copies_arrays_of_other_libraries_from_a_gpu(method):
    np.testing.assert_array_equal(xpnet.get_backend("cpu").asarray(GPUArray(method)), A)
    np.testing.assert_array_equal(xpnet.get_backend("cpu").to_numpy(GPUArray(method)), A)


def test_the_cpu_reports_its_memory():
    backend = xpnet.get_backend("cpu")
    before = backend.memory()
    assert before.held == before.used
    if sys.platform == "linux":
        large = backend.zeros((2**26,), "uint8") + 1
        after = backend.memory()
        assert after.used - before.used > 2**25 and 0 < after.free < after.total and len(large)
    backend.free_memory()


def test_unreported_memory_of_the_cpu_is_none(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert xpnet.get_backend("cpu").memory() == (0, 0, None, None)


@pytest.mark.parametrize("bad", [0, -1, None, "x", True, math.nan, math.inf])
def test_workspace_bytes_must_be_a_positive_number(bad):
    backend = Backend("reference", np)
    with pytest.raises(ArgumentError, match="workspace_bytes"):
        backend.workspace_bytes = bad
    backend.workspace_bytes = 1e5
    assert backend.workspace_bytes == 100_000


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1), (" CUDA ", 0), ("gpu:1", 1)])
def test_cuda_is_another_name_of_gpu(monkeypatch, name, index):
    monkeypatch.setattr("xpnet.backends.cuda.backend.gpu_backend", lambda index: f"device {index}")
    assert xpnet.get_backend(name) == f"device {index}"


def test_a_misspelled_cuda_gets_cuda_suggested():
    with pytest.raises(ArgumentError, match="unknown backend 'cdua'. Did you mean 'cuda'"):
        xpnet.get_backend("cdua")
