"""The fixture `backend`: a test that uses it runs on NumPy, on the strict and the emulated stand-in, and on a GPU."""

import collections
import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from emulated_cuda import COMPILER, EmulatedGPU
from guarded import Guarded
from strict import StrictBackend

import xpnet
from xpnet.backends import Backend
from xpnet.backends.cuda.backend import GPUBackend
from xpnet.training import captured_step

GPU_UNAVAILABLE = xpnet.available_backends()["gpu"]
HAS_MNIST = bool(os.environ.get("XPNET_DATA_DIR"))


@pytest.fixture(autouse=True)
def _short_runs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a GPU capture the steps of short runs, although that does not pay."""
    monkeypatch.setattr(captured_step, "_MIN_STEPS", 3)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_UNAVAILABLE and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"no usable GPU: {GPU_UNAVAILABLE}"))
        if not HAS_MNIST and item.get_closest_marker("mnist"):
            item.add_marker(pytest.mark.skip(reason="XPNET_DATA_DIR, a folder with the real MNIST, is not set"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the reasons for skipped tests, the lines that coverage leaves out, and what ran on which GPU."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    sources = Path(xpnet.__file__).parent.rglob("*.py")
    excluded = sum(len(re.findall(r"# gpu only$", path.read_text(encoding="utf-8"), re.M)) for path in sources)
    terminalreporter.write_line(f"lines of the package that coverage excludes as GPU-only: {excluded}")
    if not GPU_UNAVAILABLE:
        terminalreporter.write_line("\n".join(_gpu_summary(terminalreporter)))


def _gpu_summary(terminalreporter: pytest.TerminalReporter) -> list[str]:
    """A block of text for benchmarks/results: the tests marked `gpu`, the device, the versions, the commit."""
    counts = {
        outcome: sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    versions = []
    for name in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return [
        f"GPU tests, {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip() or 'unknown'}: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
        *(f"  {label}: {text}" for label, text in xpnet.get_backend("gpu").describe()),
        f"  Python {platform.python_version()}, {', '.join(versions)}",
    ]


@pytest.fixture(params=["cpu", "strict", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each device in turn."""
    with no_memory_faults(make_backend(request.param)) as backend:
        yield backend


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend of the emulated GPU, and of a real one if there is one."""
    with no_memory_faults(make_backend(request.param)) as backend:
        yield backend


@pytest.fixture
def guarded(gpu: Backend) -> Iterator[Guarded]:
    """Makes arrays on the GPU, and fails if a kernel has written outside of them."""
    assert gpu.kernels_unavailable is None and gpu.cublas_unavailable is None
    arrays = Guarded(gpu)
    with gpu.device():
        yield arrays
        arrays.check()


@contextlib.contextmanager
def no_memory_faults(backend: Backend) -> Iterator[Backend]:
    """Fail if the emulation has seen a memory fault, even if the fault was caught and made a step eager."""
    yield backend
    assert not getattr(backend.xp, "faults", []), backend.xp.faults
    if isinstance(backend, EmulatedGPU):
        backend.close()


def make_backend(name: str) -> Backend:
    if name == "emulated" and COMPILER is None:
        pytest.skip("the emulated GPU needs g++, which is not installed")
    stand_in = {"strict": StrictBackend, "emulated": EmulatedGPU}.get(name)
    return xpnet.get_backend(name) if stand_in is None else stand_in()


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the capture of steps, for tests in which a layer observes each step."""
    monkeypatch.setenv("XPNET_CAPTURE", "0")


@pytest.fixture
def exact_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out fused operators that round differently, so that a replay equals an eager step bit for bit.

    In the emulation that is one operator. A GPU rounds differently in most of them, and in its choice of products.
    """
    monkeypatch.setattr(GPUBackend, "fits_dense_cross_entropy", lambda self, *sizes: False)
    if not GPU_UNAVAILABLE:
        monkeypatch.setattr("xpnet.capture.gpu.fused", lambda calls, memory, backend: calls)
        monkeypatch.setattr(GPUBackend, "_in_chosen_way", lambda self, *product: False)


@pytest.fixture
def reference() -> Backend:
    """The reference operators on NumPy, which the strict stand-in must match bit for bit."""
    return Backend("reference", np)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1234)
