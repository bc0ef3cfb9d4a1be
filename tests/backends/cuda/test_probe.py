"""The GPU backend on a fake CuPy: why a GPU cannot be used, and models on a usable one."""

import copy
import ctypes
import importlib.metadata
import importlib.util
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cupy import CUDARuntimeError, FakeCupy

import xpnet
from xpnet import datasets, layers
from xpnet.backends.cuda import backend as gpu
from xpnet.backends.cuda import probe
from xpnet.errors import BackendError

INSUFFICIENT = CUDARuntimeError(
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NO_DEVICE = CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
X, Y = (a[:80] for a in datasets.digits())


@pytest.fixture(autouse=True)
def _clear_backend_cache(monkeypatch):
    monkeypatch.delenv("XPNET_BACKEND", raising=False)
    gpu.gpu_backend.cache_clear()
    yield
    gpu.gpu_backend.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Fakes an imported `cupy`, the installed CuPy wheels, and the version of CUDA that the driver supports."""

    def set_up(cupy=None, wheels=("cupy-cuda13x",), driver=13020):
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        if cupy is not None:
            monkeypatch.setitem(sys.modules, "cupy", cupy)
        found = [SimpleNamespace(metadata={"Name": name}, version="14.2.0") for name in ("numpy", *wheels, None)]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
        find_spec, spec = importlib.util.find_spec, importlib.util.find_spec("json") if wheels else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "cupy" else find_spec(name))
        monkeypatch.setattr(probe, "driver_cuda_version", lambda: driver)
        return cupy

    return set_up


# Reasons -----------------------------------------------------------------------------------------------------------

NOT_INSTALLED = "CuPy is not installed. "
MACHINES = {
    "CuPy not installed, no driver": (
        {"wheels": (), "driver": None},
        NOT_INSTALLED + "This machine has no NVIDIA driver either; install that first. "
        'Run: pip install "xpnet[cuda13]"',
    ),
    "CuPy not installed, a driver for CUDA 13": (
        {"wheels": (), "driver": 13000},
        NOT_INSTALLED + 'The NVIDIA driver supports CUDA 13.0. Run: pip install "xpnet[cuda13]"',
    ),
    "CuPy not installed, a driver for CUDA 12": (
        {"wheels": (), "driver": 12040},
        NOT_INSTALLED + 'The NVIDIA driver supports CUDA 12.4. Run: pip install "xpnet[cuda12]"',
    ),
    "two wheels": (
        {"cupy": FakeCupy(), "wheels": ("cupy-cuda13x", "CuPy-cuda12x"), "driver": 12080},
        "2 CuPy wheels are installed (cupy-cuda12x, cupy-cuda13x) and overwrite each other. "
        'Run: pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "xpnet[cuda12]"',
    ),
    "a wheel and a build from source": (
        {"cupy": FakeCupy(), "wheels": ("cupy", "cupy-cuda13x"), "driver": None},
        "2 CuPy wheels are installed (cupy, cupy-cuda13x) and overwrite each other. "
        'Run: pip uninstall -y cupy cupy-cuda13x && pip install "xpnet[cuda13]"',
    ),
    "no driver": (
        {"cupy": FakeCupy(no_devices=INSUFFICIENT), "driver": None},
        f"there is no NVIDIA driver on this machine ({INSUFFICIENT}). Install the driver, or use backend='cpu'.",
    ),
    "a driver too old": (
        {"cupy": FakeCupy(no_devices=INSUFFICIENT), "driver": 12020},
        f"the NVIDIA driver supports CUDA 12.2, too old for this CuPy ({INSUFFICIENT}). "
        'Update it, or run: pip install "xpnet[cuda12]"',
    ),
    "no device": (
        {"cupy": FakeCupy(no_devices=NO_DEVICE)},
        f"the NVIDIA driver finds no GPU ({NO_DEVICE}). Check `nvidia-smi` and CUDA_VISIBLE_DEVICES.",
    ),
    "counting fails in another way": (
        {"cupy": FakeCupy(no_devices=ImportError("libcudart.so.13: no such file"))},
        "CUDA could not count its devices: libcudart.so.13: no such file",
    ),
    "a count of 0": (
        {"cupy": FakeCupy(devices=0)},
        "there is no GPU number 0; CUDA finds 0: none. Check CUDA_VISIBLE_DEVICES.",
    ),
    "the first allocation fails": (
        {"cupy": FakeCupy(no_memory=MemoryError("Out of memory allocating 512 bytes"))},
        "the first allocation and matrix product on GPU 0 failed: Out of memory allocating 512 bytes. "
        "Does another program use all its memory?",
    ),
    "CUDA's libraries are missing": (
        {"cupy": FakeCupy(no_memory=ImportError('Failure finding "libcublasLt.so"'))},
        'the first allocation and matrix product on GPU 0 failed: Failure finding "libcublasLt.so". '
        'Install CUDA\'s libraries: pip install "xpnet[cuda13-ctk]"',
    ),
    "NVRTC is missing, and the driver is for CUDA 12": (
        {"cupy": FakeCupy(no_memory=RuntimeError("libnvrtc.so.12: cannot open shared object file")), "driver": 12080},
        "the first allocation and matrix product on GPU 0 failed: libnvrtc.so.12: cannot open shared object file. "
        'Install CUDA\'s libraries: pip install "xpnet[cuda12-ctk]"',
    ),
}


@pytest.mark.parametrize(("installed", "text"), MACHINES.values(), ids=MACHINES.keys())
def test_an_unusable_gpu_has_a_reason_that_auto_ignores_and_gpu_raises(machine, caplog, capfd, installed, text):
    machine(**installed)
    assert xpnet.available_backends() == {"cpu": None, "gpu": text}
    assert xpnet.get_backend("auto").name == "cpu"
    assert xpnet.Sequential([layers.Dense(2)], (3,)).backend.name == "cpu"
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")
    with pytest.raises(BackendError) as caught:
        xpnet.get_backend("gpu")
    assert str(caught.value) == f'the backend "gpu" cannot be used: {text}'
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("error", "message"),
    [("ImportError('libcuda.so.1: broken')", "libcuda.so.1: broken"), ("1 / 0", "division by zero")],
)
def test_the_error_of_a_failed_import_is_part_of_the_reason(machine, monkeypatch, tmp_path, error, message):
    machine()
    (tmp_path / "cupy").mkdir()
    statement = f"raise {error}" if "Error" in error else error
    (tmp_path / "cupy" / "__init__.py").write_text(statement)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert xpnet.available_backends()["gpu"] == (
        f'importing CuPy failed: {message}. Run: pip uninstall -y cupy-cuda13x && pip install "xpnet[cuda13]"'
    )


@pytest.mark.parametrize(
    ("name", "devices", "text"),
    [
        ("gpu:1", 1, "there is no GPU number 1; CUDA finds 1: gpu. Check CUDA_VISIBLE_DEVICES."),
        ("gpu:3", 2, "there is no GPU number 3; CUDA finds 2: gpu, gpu:1. Check CUDA_VISIBLE_DEVICES."),
    ],
)
def test_the_error_for_an_index_out_of_range_lists_the_devices(machine, name, devices, text):
    machine(FakeCupy(devices))
    with pytest.raises(BackendError) as caught:
        xpnet.get_backend(name)
    assert str(caught.value) == f'the backend "{name}" cannot be used: {text}'


def test_a_failure_is_probed_again_and_a_success_is_cached(machine):
    machine(FakeCupy(no_devices=NO_DEVICE))
    with pytest.raises(BackendError):
        xpnet.get_backend("gpu")
    machine(FakeCupy())
    first = xpnet.get_backend("gpu")
    assert xpnet.get_backend("gpu") is first
    assert xpnet.get_backend("gpu:0") is first
    assert xpnet.get_backend("auto") is first


@pytest.mark.parametrize(("status", "version"), [(0, 12080), (3, None)])
def test_the_version_of_the_driver_is_queried(monkeypatch, status, version):
    def version_of_driver(pointer):
        pointer._obj.value = 12080
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=version_of_driver))
    assert probe.driver_cuda_version() == version


@pytest.mark.parametrize(("platform", "library"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_the_version_of_a_missing_driver_is_none(monkeypatch, platform, library):
    loaded = []

    def missing(name):
        loaded.append(name)
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(sys, "platform", platform)
    assert probe.driver_cuda_version() is None
    assert loaded == [library]


@pytest.mark.skipif(not xpnet.available_backends()["gpu"], reason="there is a GPU")
def test_the_real_probe_gives_a_reason_without_a_gpu():
    pytest.importorskip("cupy")
    with pytest.raises(BackendError, match='^the backend "gpu" cannot be used: .*(driver|GPU|CUDA)'):
        xpnet.get_backend("gpu")


# A usable GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1])
def fake(request, machine):
    """The backend of each of two fake GPUs, and their CuPy."""
    cupy = machine(FakeCupy(devices=2))
    return xpnet.get_backend(f"gpu:{request.param}"), cupy


def test_a_gpu_backend_has_the_name_and_module_of_its_device(fake):
    backend, cupy = fake
    assert backend.name == ("gpu", "gpu:1")[backend.index]
    assert backend.xp is cupy
    assert repr(backend) == f"<xpnet backend {backend.name!r}>"
    assert xpnet.available_backends()["gpu"] is None
    assert pickle.loads(pickle.dumps(backend)) is backend and copy.deepcopy(backend) is backend


@pytest.mark.parametrize("dtype", [None, "float64", "int32"])
def test_to_numpy_is_the_inverse_of_asarray(fake, dtype):
    backend, cupy = fake
    for values in (X, X.tolist(), np.asfortranarray(X), memoryview(X)):
        device_array = backend.asarray(values, dtype=dtype)
        assert isinstance(device_array, cupy.ndarray) and device_array.device.id == backend.index
        assert device_array.dtype == np.asarray(values, dtype=dtype).dtype
        host_array = backend.to_numpy(device_array)
        assert type(host_array) is np.ndarray
        np.testing.assert_array_equal(host_array, X)
    assert backend.asarray(device_array) is device_array or backend.asarray(device_array).device == device_array.device
    np.testing.assert_array_equal(backend.to_numpy(X), X)
    assert backend.to_numpy(3.5) == 3.5


def test_arrays_on_a_gpu_are_imported_through_dlpack(fake, monkeypatch):
    class GPUArray:
        def __dlpack_device__(self):
            return 2, 0  # kDLCUDA

    backend, cupy = fake
    device_array = backend.asarray(X)
    monkeypatch.setattr(cupy, "from_dlpack", lambda a: device_array if isinstance(a, GPUArray) else None, raising=False)
    assert backend.asarray(GPUArray()) is device_array


def test_allocation_is_on_the_device(fake):
    backend, _ = fake
    for a in (backend.empty((2, 3), "float32"), backend.zeros((2, 3), np.float64)):
        assert a.shape == (2, 3) and a.device.id == backend.index


def test_synchronize_waits_on_the_device(fake):
    backend, cupy = fake
    cupy.synchronized.clear()
    backend.synchronize()
    assert cupy.synchronized == [backend.index]


def test_describe_names_device_memory_and_versions(fake):
    backend, _ = fake
    i = backend.index
    assert backend.describe() == [
        ("device", f"Fake {i}, compute capability 9.{i}"),
        ("memory", f"{3 + i}.0 GiB free of 8.0 GiB"),
        ("driver", "for CUDA 13.2; runtime 13.1"),
    ]


def small(backend):
    return xpnet.Sequential(
        [layers.Rescale(1 / 16), layers.Flatten(), layers.Dense(12), layers.ReLU(), layers.Dropout(0.2),
         layers.Dense(10)], (8, 8), backend, seed=3)  # fmt: skip


def test_a_model_on_a_gpu_trains_like_the_reference_bit_for_bit(fake, reference):
    backend, _ = fake
    on_reference, on_gpu = small(reference), small(backend)
    kwargs = {"epochs": 2, "batch_size": 16, "validation_split": 0.2, "accumulate": 2, "verbose": 0}
    one, two = (m.fit(X, Y, sample_weight=1.0 + Y, **kwargs) for m in (on_reference, on_gpu))
    assert dict(one) == dict(two)
    for a, b in zip(on_reference.state_dict().values(), on_gpu.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(on_gpu.predict(X)) is np.ndarray
    assert on_gpu.forward(X).device.id == on_gpu.backward(np.ones((80, 10))).device.id == backend.index
    assert on_gpu.parameters[0].value.device.id == backend.index
    assert set(on_gpu.evaluate(X, Y)) == {"loss", "accuracy"}


def test_a_model_can_move_to_a_gpu_and_back_during_training(fake, reference):
    backend, _ = fake
    moved, stayed = small(reference), small(reference)
    for target in (backend, reference, backend):
        moved.to(target)
        for m in (moved, stayed):
            m.fit(X, Y, batch_size=16, verbose=0)
    for a, b in zip(moved.state_dict().values(), stayed.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_model_on_a_gpu_can_be_copied_and_checked(fake, copied):
    backend, _ = fake
    model = small(backend)
    model.fit(X, Y, verbose=0)
    other = copied(model)
    assert other.backend is backend and other.parameters[0].value.device.id == backend.index
    one, two = (m.fit(X, Y, batch_size=16, verbose=0) for m in (model, other))
    assert dict(one) == dict(two)
    assert max(xpnet.check_gradients(model, X, Y, loss="softmax_cross_entropy", samples=5).values()) < 1e-6


def test_a_model_on_a_gpu_can_be_saved_and_loaded(fake, tmp_path):
    backend, _ = fake
    model = small(backend)
    model.save(tmp_path / "m")
    loaded = xpnet.load(tmp_path / "m", backend.name)
    assert loaded.backend is backend
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


def test_a_state_of_the_cpu_can_be_loaded_on_a_gpu(fake):
    model, other = small(fake[0]), small("cpu")
    other.fit(X, Y, verbose=0)
    model.load_state_dict(other.state_dict())
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name",
    ["gpu", "gpu:1"],
)
def test_a_parameter_on_a_gpu_can_be_set_from_the_host(machine, name):
    machine(FakeCupy(devices=2))
    model = small(name)
    model.parameters[1].value = np.ones(12)
    np.testing.assert_array_equal(model.state_dict()["2.bias"], 1)


def test_a_model_on_the_cpu_accepts_arrays_of_a_gpu(fake):
    backend, _ = fake
    x, y = backend.asarray(X), backend.asarray(Y)
    on_cpu, same = small("cpu"), small("cpu")
    assert dict(on_cpu.fit(x, y, verbose=0)) == dict(same.fit(X, Y, verbose=0))
    np.testing.assert_array_equal(on_cpu.predict(x), same.predict(X))


@pytest.mark.gpu
def test_the_real_gpu_is_described():
    lines = dict(xpnet.get_backend("gpu").describe())
    assert "compute capability" in lines["device"] and "GiB free of" in lines["memory"] and "CUDA" in lines["driver"]
