"""One fixture over all devices: a test is written once and runs on NumPy, on the strict stand-in and on a GPU."""

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
from strict import StrictBackend

import xpnet
from xpnet.backends import Backend

WHY_NO_GPU = xpnet.available_backends()["gpu"]
HAS_MNIST = bool(os.environ.get("XPNET_DATA_DIR"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if WHY_NO_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"no usable GPU: {WHY_NO_GPU}"))
        if not HAS_MNIST and item.get_closest_marker("mnist"):
            item.add_marker(pytest.mark.skip(reason="XPNET_DATA_DIR names no folder with the real MNIST"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, a line a reason; how many lines coverage leaves out; and what ran on which GPU."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    sources = Path(xpnet.__file__).parent.rglob("*.py")
    excluded = sum(len(re.findall(r"# gpu only$", path.read_text(encoding="utf-8"), re.M)) for path in sources)
    terminalreporter.write_line(f"lines of the package that coverage excludes as GPU-only: {excluded}")
    if not WHY_NO_GPU:
        terminalreporter.write_line("\n".join(_of_the_gpu(terminalreporter)))


def _of_the_gpu(terminalreporter: pytest.TerminalReporter) -> list[str]:
    """A block of text for benchmarks/results: the tests marked `gpu`, the device, the versions, the commit."""
    counts = {
        what: sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.stats.get(what, []))
        for what in ("passed", "failed", "error", "skipped")
    }
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    versions = []
    for name in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return [
        f"GPU tests, {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip() or 'unknown'}: "
        + ", ".join(f"{count} {what}" for what, count in counts.items()),
        *(f"  {label}: {text}" for label, text in xpnet.get_backend("gpu").describe()),
        f"  Python {platform.python_version()}, {', '.join(versions)}",
    ]


@pytest.fixture(params=["cpu", "strict", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each device in turn. `backend.asarray` and `backend.to_numpy` cross the border."""
    with without_memory_faults(made(request.param)) as backend:
        yield backend


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A GPU's backend: the emulation, and where there is one, the real thing."""
    with without_memory_faults(made(request.param)) as backend:
        yield backend


@contextlib.contextmanager
def without_memory_faults(backend: Backend) -> Iterator[Backend]:
    """Fail where the emulation has seen a memory fault, also one that was caught as a reason not to capture a step."""
    yield backend
    assert not getattr(backend.xp, "faults", []), backend.xp.faults


def made(name: str) -> Backend:
    if name == "emulated" and COMPILER is None:
        pytest.skip("the kernels of a GPU are emulated by g++, and there is none")
    stand_in = {"strict": StrictBackend, "emulated": EmulatedGPU}.get(name)
    return xpnet.get_backend(name) if stand_in is None else stand_in()


@pytest.fixture
def call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is recorded: for tests that watch each step from inside a layer."""
    monkeypatch.setenv("XPNET_CUDA_GRAPHS", "0")


@pytest.fixture
def reference() -> Backend:
    """The reference primitives on NumPy, which the strict stand-in must match bit for bit."""
    return Backend("reference", np)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1234)
