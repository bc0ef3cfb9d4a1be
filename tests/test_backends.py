"""Backends: which name means which, and what every one of them can do."""

import copy
import inspect
import os
import pickle
import platform
import sys

import numpy as np
import pytest
from strict import StrictBackend

import xpnet
from xpnet import layers
from xpnet.backends import Backend, cpu
from xpnet.backends.cpu import CPUBackend
from xpnet.backends.gpu import GPUBackend
from xpnet.errors import ArgumentError, ArgumentTypeError, BackendError

NO_GPU = xpnet.available_backends()["gpu"]
no_gpu = pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
A = np.arange(6, dtype="float32").reshape(2, 3)
A.flags.writeable = False


@pytest.fixture(autouse=True)
def _no_choice_in_the_environment(monkeypatch):
    monkeypatch.delenv("XPNET_BACKEND", raising=False)


# Names -------------------------------------------------------------------------------------------------------------


def test_the_keys_of_available_backends_are_names(backend):
    reasons = xpnet.available_backends()
    assert list(reasons) == ["cpu", "gpu"] and reasons["cpu"] is None
    assert reasons["gpu"] is None or (isinstance(reasons["gpu"], str) and reasons["gpu"])


@pytest.mark.parametrize("name", ["cpu", "CPU", " cpu "])
def test_there_is_one_cpu(name):
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
def test_a_gpu_in_the_environment_is_no_wish_but_a_demand(monkeypatch):
    monkeypatch.setenv("XPNET_BACKEND", "gpu")
    with pytest.raises(BackendError, match="cannot be used"):
        xpnet.get_backend("auto")
    assert xpnet.get_backend("cpu").name == "cpu"  # a plain name is not overruled


@pytest.mark.gpu
def test_the_environment_keeps_auto_off_the_gpu(monkeypatch):
    assert xpnet.get_backend("auto").name == "gpu"
    monkeypatch.setenv("XPNET_BACKEND", "cpu")
    assert xpnet.get_backend("auto").name == "cpu"
    assert xpnet.get_backend("gpu") is xpnet.get_backend("gpu:0")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cup", "'cpu'"),
        ("gqu", "'gpu'"),
        ("gpu1", "'gpu:1'"),
        ("gpu:", "'gpu'"),
        ("gpu:-1", "'gpu:1'"),
        ("aut", "'auto'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ArgumentError, match=f"unknown backend .*Did you mean.*{near}.*Known: auto, cpu, gpu, gpu:1"):
        xpnet.get_backend(name)


def test_a_misspelt_name_in_the_environment_is_traced_to_it(monkeypatch):
    monkeypatch.setenv("XPNET_BACKEND", "cup")
    with pytest.raises(ArgumentError, match="XPNET_BACKEND"):
        xpnet.get_backend("auto")


@pytest.mark.parametrize("given", [None, 0, np, b"cpu", ["cpu"]])
def test_what_is_no_name_is_a_type_error(given):
    with pytest.raises(ArgumentTypeError, match="backend must be"):
        xpnet.get_backend(given)


# What each can do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CPUBackend, GPUBackend, StrictBackend])
def test_backends_agree_on_the_signatures_of_the_base(kind):
    for name, function in vars(Backend).items():
        if not name.startswith("_") and inspect.isfunction(function):
            ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (function, getattr(kind, name)))
            assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs], name


@pytest.mark.parametrize("dtype", [None, "float32", np.float64, np.dtype("int64")])
@pytest.mark.parametrize("given", [A, A.tolist(), A.T, A[:, ::2], 3.5, [True, False]], ids=repr)
def test_asarray_and_to_numpy_are_there_and_back(backend, given, dtype):
    there = backend.asarray(given, dtype=dtype)
    assert isinstance(there, backend.xp.ndarray)
    expected = np.asarray(given, dtype=dtype)
    assert there.dtype == expected.dtype and there.shape == expected.shape
    back = backend.to_numpy(there)
    assert type(back) is np.ndarray and back.dtype == expected.dtype
    np.testing.assert_array_equal(back, expected)


def test_asarray_of_the_devices_own_array_copies_nothing(backend):
    there = backend.asarray(A.copy())
    again = backend.asarray(there)
    again[0, 0] = 9
    assert float(there[0, 0]) == 9
    assert backend.asarray(there, dtype="float64").dtype == np.float64


def test_the_cpu_does_not_copy_what_it_can_use():
    assert xpnet.get_backend("cpu").asarray(A) is A and xpnet.get_backend("cpu").to_numpy(A) is A


def test_arrays_come_from_another_device(backend):
    if backend.name == "gpu":
        pytest.skip("a pretended device array on a real GPU")
    np.testing.assert_array_equal(backend.to_numpy(backend.asarray(StrictBackend().asarray(A))), A)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), [2, 3], (7, 1, 3)])
@pytest.mark.parametrize("dtype", ["float32", np.float64, "uint8"])
def test_empty_and_zeros_allocate_on_the_device(backend, shape, dtype):
    for made in (backend.empty(shape, dtype), backend.zeros(shape, dtype)):
        assert isinstance(made, backend.xp.ndarray) and made.shape == tuple(shape) and made.dtype == np.dtype(dtype)
        assert made.flags.c_contiguous
    assert not backend.to_numpy(backend.zeros(shape, dtype)).any()


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (1000, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_the_cpu_allocates_on_cache_lines(shape, dtype):
    backend = xpnet.get_backend("cpu")
    for _ in range(5):
        assert backend.empty(shape, dtype).ctypes.data % 64 == 0
        assert backend.zeros(shape, dtype).ctypes.data % 64 == 0


def test_every_parameter_of_a_model_on_the_cpu_lies_on_a_cache_line():
    for dtype in ("float32", "float64"):
        model = xpnet.Sequential([layers.Dense(3), layers.Dense(5), layers.Dense(1)], (7,), "cpu", dtype=dtype)
        assert all(p.value.ctypes.data % 64 == p.grad.ctypes.data % 64 == 0 for p in model.parameters)


def test_synchronize_and_device_are_for_all(backend):
    with backend.device():
        assert float(backend.xp.sum(backend.asarray(A))) == 15
    assert backend.synchronize() is None


def test_describe_names_the_device(backend):
    lines = backend.describe()
    assert lines[0][0] == "device" and all(isinstance(text, str) and text for pair in lines for text in pair)


def test_repr_and_copies(backend):
    assert repr(backend) == f"<xpnet backend {backend.name!r}>"
    assert copy.deepcopy(backend) is backend and pickle.loads(pickle.dumps(backend)) is backend


def test_lowest_is_the_lowest_finite_number(backend):
    assert backend.lowest("float32") == np.finfo("float32").min and type(backend.lowest("float64")) is float


# The CPU -----------------------------------------------------------------------------------------------------------


def test_the_cpu_names_its_blas_and_threads():
    import threadpoolctl

    lines = dict(xpnet.get_backend("cpu").describe())
    assert "logical cores" in lines["device"]
    with threadpoolctl.threadpool_limits(1):
        assert dict(xpnet.get_backend("cpu").describe())["BLAS"].endswith(", 1 threads")


def test_a_blas_that_threadpoolctl_does_not_know_is_named_by_numpys_build(monkeypatch):
    monkeypatch.setattr("threadpoolctl.threadpool_info", list)
    name, threads = cpu.blas_and_threads()
    assert name and threads >= 1


@pytest.mark.parametrize(
    ("content", "name"),
    [(None, "x86"), ("flags : none\n", "x86"), ("model name\t: A fast one\nmodel name\t: Another\n", "A fast one")],
)
def test_the_processor_is_named_as_well_as_can_be(monkeypatch, tmp_path, content, name):
    opened = open

    def fake(path, *args, **kwargs):
        assert path == "/proc/cpuinfo"
        return opened(tmp_path / "cpuinfo", *args, **kwargs)

    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr("builtins.open", fake)
    monkeypatch.setattr(platform, "processor", str)
    monkeypatch.setattr(platform, "machine", lambda: "x86")
    assert cpu._processor() == name


class Cuda:
    """An array on some GPU, as CuPy (`get`) or PyTorch (`detach`, `cpu`) hand it out."""

    __cuda_array_interface__ = {"version": 3}  # noqa: RUF012

    def __init__(self, way):
        setattr(self, way, lambda: A)


@pytest.mark.parametrize("way", ["get", "cpu"])
def test_arrays_of_other_libraries_on_a_gpu_come_to_the_cpu(way):
    np.testing.assert_array_equal(xpnet.get_backend("cpu").asarray(Cuda(way)), A)
    np.testing.assert_array_equal(xpnet.get_backend("cpu").to_numpy(Cuda(way)), A)


def test_the_cpu_tells_its_memory():
    backend = xpnet.get_backend("cpu")
    before = backend.memory()
    assert before.held == before.used
    if sys.platform == "linux":
        room = backend.zeros((2**26,), "uint8") + 1
        after = backend.memory()
        assert after.used - before.used > 2**25 and 0 < after.free < after.total and len(room)
    backend.free_memory()


def test_memory_that_the_system_does_not_tell_is_none(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert xpnet.get_backend("cpu").memory() == (0, 0, None, None)
