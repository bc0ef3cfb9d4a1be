"""The whole developer interface: `nox -l` lists it, `nox -s tests-cpu` does all the set-up and runs it."""

import os
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests-cpu", "lint", "typecheck"]
nox.options.reuse_existing_virtualenvs = True
nox.needs_version = ">=2024.10"

CUPY = os.environ.get("XPNET_CUPY_EXTRA", "cuda13-ctk")  # cuda12-ctk for drivers from 525 on


@nox.session(name="tests-cpu")
def tests_cpu(session: nox.Session) -> None:
    """The test suite without CuPy, with coverage. GPU tests are skipped, with the reason."""
    session.install(".[dev]")
    # A process a core, so one BLAS thread in each; tests that are about threads ask for theirs.
    session.run("pytest", "-n", "auto", "-m", "not sweep", "--cov", "--cov-report=term", "--cov-fail-under=95",
                *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})  # fmt: skip


@nox.session(name="tests-slow")
def tests_slow(session: nox.Session) -> None:
    """Wide sweeps over random cases, which take minutes."""
    session.install(".[dev]")
    session.run("pytest", "-n", "auto", "-m", "sweep", *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})


@nox.session(name="tests-cupy")
def tests_cupy(session: nox.Session) -> None:
    """CuPy's real wheel, with or without a GPU: every name is there, every refusal says why, every kernel compiles."""
    session.install(".[dev,cuda13]", "nvidia-cuda-nvrtc>=13,<14")  # the compiler, a small part of the extra cuda13-ctk
    session.run("pytest", "tests/test_cupy_api.py", "tests/test_gpu_probe.py", "tests/test_info.py",
                "tests/test_import.py", "tests/test_gpu_kernels.py", "tests/test_compiling.py",
                *session.posargs)  # fmt: skip


@nox.session(name="tests-gpu")
def tests_gpu(session: nox.Session) -> None:
    """The tests marked `gpu`. Fails where no GPU is found, so that a GPU run cannot quietly skip everything."""
    session.install(f".[dev,{CUPY}]")
    session.run("python", "-c", "import xpnet; xpnet.get_backend('gpu')")
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session(name="tests-mpi")
def tests_mpi(session: nox.Session) -> None:
    """Several processes of a real mpiexec train one model: 2 and 4 ranks, one of them killed, and the example."""
    session.install(".[dev,mpi]")
    session.run("pytest", "tests/test_distributed.py", *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})


@nox.session(name="mnist-cpu")
def mnist_cpu(session: nox.Session) -> None:
    """Train MNIST on the CPU; the bundled digits where MNIST can be neither found nor downloaded."""
    session.install(".[examples,fast]")
    session.run("python", "examples/mnist.py", "--backend", "cpu", "--target-accuracy", "0.97", *session.posargs)


@nox.session(name="mnist-gpu")
def mnist_gpu(session: nox.Session) -> None:
    """The same on a CUDA GPU."""
    session.install(f".[examples,{CUPY}]")
    session.run("python", "examples/mnist.py", "--backend", "gpu", "--target-accuracy", "0.97", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, imports that the house forbids, formatting."""
    session.install("ruff>=0.12")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy, strict, on the package."""
    session.install(".", "mypy>=1.15")
    session.run("mypy")


@nox.session
def parity(session: nox.Session) -> None:
    """Beside PyTorch on the CPU: layers, losses, whole nets, gradients, training; its arrays; its ONNX files."""
    session.install(".[dev]", "torch==2.13.0", "jax", "onnxscript")
    session.run("pytest", "tests/parity", "tests/test_arrays.py", "tests/test_onnx.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, into site/; warnings are errors."""
    session.install(".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The page to draw on, in a real Chromium without a window: found on the PATH, or named by XPNET_CHROMIUM."""
    session.install(".[dev]", "playwright>=1.50")
    session.run("pytest", "tests/test_draw_digit.py", *session.posargs)


@nox.session(name="tests-floor")
def tests_floor(session: nox.Session) -> None:
    """The test suite on the oldest NumPy that xpnet claims."""
    session.install(".[dev]", "numpy==2.0.*")
    session.run("pytest", *session.posargs)


@nox.session
def tutorials(session: nox.Session) -> None:
    """Run every tutorial program, print one table, and write the gallery's pictures."""
    session.install(".[plots]")
    session.run("python", "-m", "examples.tutorials", "--plots", "docs/pictures", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel, and run the example from it in a clean environment, away from the source tree."""
    session.install("build")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist")
    wheel = max(Path("dist").glob("*.whl"))
    session.install(f"xpnet[examples] @ {wheel.resolve().as_uri()}")
    example = Path("examples/mnist.py").resolve()
    with session.chdir(session.create_tmp()):
        session.run("python", "-c", "import xpnet, pathlib; assert 'site-packages' in xpnet.__file__, xpnet.__file__")
        session.run("python", "-m", "xpnet", "info")
        session.run("python", str(example), "--backend", "cpu", "--target-accuracy", "0.97", *session.posargs)


@nox.session(name="benchmark-cpu")
def benchmark_cpu(session: nox.Session) -> None:
    """xpnet beside PyTorch, JAX, scikit-learn and the matrix products alone; every option of `python -m benchmarks`."""
    session.install(".[fast,plots]", "torch==2.13.0", "jax", "scikit-learn")
    session.run("python", "-m", "benchmarks", "--device", "cpu", *session.posargs)


@nox.session(name="benchmark-mpi")
def benchmark_mpi(session: nox.Session) -> None:
    """Two ranks beside one process, and the time of an all-reduce by its bytes."""
    session.install(".[fast,mpi]")
    session.run("python", "-m", "benchmarks.distributed", *session.posargs)


@nox.session(name="benchmark-gpu")
def benchmark_gpu(session: nox.Session) -> None:
    """The same on a CUDA GPU, with PyTorch's and JAX's builds for it."""
    session.install(f".[plots,{CUPY}]", "torch", "jax[cuda13]")
    session.run("python", "-m", "benchmarks", "--device", "gpu", *session.posargs)
