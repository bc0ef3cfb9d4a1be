"""`python -m xpnet info`: versions, devices, and how to install what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cupy import FakeCupy

import xpnet
from xpnet import __main__ as program
from xpnet.backends.cuda.backend import gpu_backend

ROOT = Path(xpnet.__file__).parents[1]
GPU = xpnet.available_backends()["gpu"]


def info(*options, path=ROOT):
    env = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, *options, "-m", "xpnet", "info"]
    done = subprocess.run(command, env=env, cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_info_prints_versions_the_blas_and_the_state_of_the_gpu():
    lines = info()
    assert lines[0] == f"xpnet   {xpnet.__version__}"
    assert lines[1].startswith(f"Python  {platform.python_version()} on ")
    assert lines[2] == f"NumPy   {np.__version__} (needs 2.0 or later)"
    assert lines[3].startswith("CuPy    ")
    at = lines.index("cpu: ready")
    assert lines[at + 1].startswith("  device  ") and lines[at + 2].startswith("  BLAS    ")
    assert ("gpu: ready" if GPU is None else f"gpu: cannot be used: {GPU}") in lines


@pytest.fixture
def without_cupy(tmp_path):
    """A folder with xpnet and all installed packages except CuPy."""
    packages = Path(np.__file__).parents[1]
    (tmp_path / "xpnet").symlink_to(Path(xpnet.__file__).parent)
    for entry in packages.iterdir():
        if not entry.name.lower().startswith(("cupy", "xpnet")):
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def test_without_cupy_info_names_the_pip_command(without_cupy):
    lines = info("-S", path=without_cupy)
    assert lines[3] == "CuPy    not installed (needs 14.1 or later, for the GPU only)"
    (gpu,) = (line for line in lines if line.startswith("gpu: "))
    assert gpu.startswith("gpu: cannot be used: CuPy is not installed. ")
    assert gpu.split("Run: ")[1] in ('pip install "xpnet[cuda12]"', 'pip install "xpnet[cuda13]"')
    assert "cpu: ready" in lines


def test_without_cupy_a_model_trains_and_a_gpu_is_refused(without_cupy):
    code = (
        "import sys, xpnet; x, y = xpnet.datasets.blobs(60)\n"
        "model = xpnet.Sequential([xpnet.layers.Dense(3)], (2,))\n"
        "model.fit(x, y, epochs=20, optimizer=xpnet.optimizers.Adam(0.1), verbose=0)\n"
        "assert model.evaluate(x, y)['accuracy'] > 0.9 and model.backend.name == 'cpu'\n"
        "try: xpnet.get_backend('gpu')\n"
        "except xpnet.errors.BackendError as error: print(error)"
    )
    env = os.environ | {"PYTHONPATH": str(without_cupy), "XPNET_BACKEND": ""}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=env, cwd=without_cupy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('the backend "gpu" cannot be used: CuPy is not installed.')


def test_a_usable_gpu_is_described(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    found = [SimpleNamespace(metadata={"Name": "cupy-cuda13x"}, version="14.2.0")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    gpu_backend.cache_clear()
    try:
        lines = program.info()
    finally:
        gpu_backend.cache_clear()
    assert "CuPy    14.2.0 (cupy-cuda13x) (needs 14.1 or later, for the GPU only)" in lines
    at = lines.index("gpu: ready")
    assert lines[at + 1 :] == [
        "  device  Fake 0, compute capability 9.0",
        "  memory  3.0 GiB free of 8.0 GiB",
        "  driver  for CUDA 13.2; runtime 13.1",
    ]


def test_two_wheels_of_cupy_are_both_listed(monkeypatch):
    find_spec, spec = importlib.util.find_spec, importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "cupy" else find_spec(name))
    names = ["cupy-cuda13x", "numpy", None, "cupy-cuda12x"]
    found = [SimpleNamespace(metadata={"Name": name}, version="14.1.0") for name in names]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    lines = program.info()
    assert lines[3].startswith("CuPy    14.1.0 (cupy-cuda12x), 14.1.0 (cupy-cuda13x) (needs")
    assert any("pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install" in line for line in lines)


def test_the_program_prints_the_lines_of_info(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["xpnet", "info"])
    program.main()
    assert capsys.readouterr().out.splitlines() == program.info()


@pytest.mark.parametrize("arguments", [[], ["inf"]])
def test_without_a_known_command_the_program_prints_its_usage(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["xpnet", *arguments])
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 2 and "info" in capsys.readouterr().err
