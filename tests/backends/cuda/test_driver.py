"""Launches by the CUDA driver: kernels of a graph that may begin while the one before still ends."""

from types import SimpleNamespace

import numpy as np
import pytest
from captured_trainings import emulated_cupy, fit, mlp

from xpnet.backends.cuda import driver, kernels
from xpnet.backends.cuda.driver import Driver


def test_captured_kernels_are_launched_by_the_driver(gpu):
    cupy = emulated_cupy(gpu)
    _, watch = fit(mlp(gpu))
    assert watch.captured and watch.fallback_reason is None
    assert cupy.driver.launches > 5  # more than those of the check


def test_eager_kernels_are_launched_by_cupy(gpu):
    cupy = emulated_cupy(gpu)
    with gpu.device():
        assert gpu.driver is not None
        before = cupy.driver.launches
        x = gpu.asarray(np.array([-1.0, 2.0], "float32"))
        assert gpu.to_numpy(gpu.relu(x, x)).tolist() == [0.0, 2.0]
    assert cupy.driver.launches == before


@pytest.mark.parametrize("arguments", ["arrays and numbers", "a struct"])
def test_arguments_of_every_kind_arrive(gpu, arguments):
    with gpu.device(), gpu.stream():
        if gpu.driver is None:
            pytest.skip("this device has no programmatic dependent launch")
        x, out = gpu.asarray(np.arange(6, dtype="float32")), gpu.zeros((6,), "float32")
        numbers = gpu.zeros((8,), "float64")
        stream = gpu.xp.cuda.get_current_stream()
        gpu.rescale(x, 2.0, 0.5, out), gpu.launch("set_numbers", numbers, given=np.zeros(8))  # compiles the kernels
        stream.synchronize()
        stream.begin_capture()
        if arguments == "a struct":
            gpu.launch("set_numbers", numbers, given=np.arange(8.0))
        else:
            gpu.rescale(x, 3.0, 0.5, out)
        stream.end_capture().launch()
        got = gpu.to_numpy(numbers if arguments == "a struct" else out)
    np.testing.assert_array_equal(got, np.arange(8.0) if arguments == "a struct" else 3 * np.arange(6) + 0.5)


class Library:
    """A driver whose launches return this status, and do nothing."""

    def __init__(self, status):
        self.status = status

    def cuLaunchKernelEx(self, *given):  # noqa: N802
        return self.status


@pytest.mark.parametrize(
    ("library", "reason"),
    [(Library(801), "cuLaunchKernelEx failed with status 801"), (Library(0), "a small graph computes wrong numbers")],
    ids=["unsupported", "wrong numbers"],
)
def test_a_driver_that_cannot_is_not_used(gpu, monkeypatch, caplog, library, reason):
    cupy = emulated_cupy(gpu)
    caplog.set_level("INFO")
    monkeypatch.setattr(type(gpu), "_driver_library", lambda self: library)
    _, watch = fit(mlp(gpu))
    assert watch.captured and watch.fallback_reason is None
    assert gpu.driver is None and cupy.driver.launches == 0
    assert reason in caplog.text


def test_older_devices_launch_one_kernel_after_the_other(gpu, monkeypatch):
    cupy = emulated_cupy(gpu)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda i: {"name": b"Old", "major": 8, "minor": 0})
    assert fit(mlp(gpu))[1].captured and gpu.driver is None


def test_every_kernel_begins_with_a_wait():
    source = kernels.with_waits(kernels.SOURCE)
    assert source.count("{ await_previous_kernel();") == len(kernels.signatures())
    assert kernels.signatures(source) == kernels.signatures()


def test_a_status_other_than_success_is_an_error():
    kernel = SimpleNamespace(kernel=SimpleNamespace(ptr=1))
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed with status 7"):
        Driver(Library(7)).launch(kernel, (1,), (32,), (np.int32(3),), 0, 0)


def test_the_library_of_the_system_is_loaded(monkeypatch):
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: name)
    for platform, name in (("win32", "nvcuda.dll"), ("linux", "libcuda.so.1")):
        monkeypatch.setattr(driver.sys, "platform", platform)
        assert driver.load.__wrapped__() == name
