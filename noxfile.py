"""All development tasks: `nox -l` lists them, and `nox -s tests-cpu` runs one in a virtual environment of its own."""

import json
import os
import re
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests-cpu", "lint", "typecheck"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False  # of tests-pythons, which skips them by name
nox.needs_version = ">=2024.10"

CUPY = os.environ.get("XPNET_CUPY_EXTRA", "cuda13-ctk")  # cuda12-ctk supports drivers from version 525 on
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
DEV = PROJECT["optional-dependencies"]["dev"]
TOOLS = {requirement.partition("==")[0]: requirement for requirement in DEV}  # {"ruff": "ruff==…", …}


@nox.session(name="tests-cpu")
def tests_cpu(session: nox.Session) -> None:
    """The test suite without CuPy; tests that need a GPU are skipped."""
    session.install(".[dev]")
    # One pytest process per core, each with one BLAS thread. Tests of threads set their own number.
    session.run("pytest", "-n", "auto", "-m", "not sweep", *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})


@nox.session
def coverage(session: nox.Session) -> None:
    """The same with coverage, which takes 1.6 times as long. Fails below 95 %."""
    session.install(".[dev]")
    session.run("pytest", "-n", "auto", "-m", "not sweep", "--cov", "--cov-report=term", "--cov-fail-under=95",
                *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})  # fmt: skip


@nox.session(name="tests-plain")
def tests_plain(session: nox.Session) -> None:
    """Tests of everything that Numba compiles, without Numba, as on systems for which it has no wheel."""
    session.install(".[dev]")
    session.run("pip", "uninstall", "--yes", "numba", "llvmlite", silent=True)
    session.run("pytest", "-n", "auto", "-m", "not sweep", "tests/backends/cpu", "tests/backends/test_operators.py",
                "tests/layers/test_convolution.py", "tests/layers/test_pooling.py", "tests/test_import.py",
                "tests/test_info.py", "tests/test_model.py", "tests/training/test_fit.py",
                *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})  # fmt: skip


@nox.session(name="tests-slow")
def tests_slow(session: nox.Session) -> None:
    """Tests over many random cases, which take minutes."""
    session.install(".[dev]")
    session.run("pytest", "-n", "auto", "--dist", "worksteal", "-m", "sweep", *session.posargs,
                env={"OPENBLAS_NUM_THREADS": "1"})  # fmt: skip


@nox.session(name="tests-cupy")
def tests_cupy(session: nox.Session) -> None:
    """Tests with the real CuPy that need no GPU: the names that xpnet uses, error messages, compilation of kernels."""
    session.install(".[dev,cuda13]", "nvidia-cuda-nvrtc>=13,<14")  # NVRTC, a small part of the extra cuda13-ctk
    # The emulated GPU, which tests-cpu tests, does not use CuPy. Work is stolen, because the compilations are next to
    # each other.
    session.run("pytest", "-n", "auto", "--dist", "worksteal", "-m", "not gpu", "-k", "not emulated",
                "tests/backends/cuda", "tests/test_info.py", "tests/test_import.py", *session.posargs)  # fmt: skip


@nox.session(name="tests-gpu")
def tests_gpu(session: nox.Session) -> None:
    """The tests marked `gpu`. Fails if there is no usable GPU."""
    session.install(f".[dev,{CUPY}]")
    session.run("python", "-c", "import xpnet; xpnet.get_backend('gpu')")
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session(name="tests-mpi")
def tests_mpi(session: nox.Session) -> None:
    """Tests of distributed training on 2 and 4 processes of a real mpiexec."""
    session.install(".[dev,mpi]")
    session.run("pytest", "tests/distributed", *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})


@nox.session(name="mnist-cpu")
def mnist_cpu(session: nox.Session) -> None:
    """Train MNIST on the CPU, or the digits that ship with xpnet if MNIST can be neither found nor downloaded."""
    session.install(".[examples]")
    session.run("python", "examples/mnist.py", "--backend", "cpu", "--target-accuracy", "0.97", *session.posargs)


@nox.session(name="mnist-gpu")
def mnist_gpu(session: nox.Session) -> None:
    """Train MNIST on a CUDA GPU."""
    session.install(f".[examples,{CUPY}]")
    session.run("python", "examples/mnist.py", "--backend", "gpu", "--target-accuracy", "0.97", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, forbidden imports and formatting with ruff."""
    session.install(TOOLS["ruff"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of the package with mypy, strict."""
    session.install(".[plots]", TOOLS["mypy"])  # with Matplotlib, since xpnet.plots derives classes from it
    session.run("mypy")


@nox.session
def parity(session: nox.Session) -> None:
    """Compare layers, losses, networks, training and ONNX files with PyTorch on the CPU. Test subword tokenizers."""
    session.install(".[dev,text]", "torch==2.13.0", "jax", "onnxscript")
    session.run("pytest", "tests/parity", "tests/backends/test_arrays.py", "tests/onnx",
                "tests/datasets/test_tokens.py", *session.posargs)  # fmt: skip


def install_atheris(session: nox.Session) -> bool:
    """Install Atheris, the coverage-guided fuzzer, if it has a wheel for this Python and system."""
    try:
        session.install("--only-binary=atheris", "atheris>=3.0")
    except nox.command.CommandFailed:
        return False
    return True


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the readers of files, guided by coverage, for `--seconds 60` each; failing inputs go to `--findings`."""
    session.install(".[dev]")
    if not install_atheris(session):
        session.skip("Atheris, the coverage-guided fuzzer, has no wheel for this Python and system")
    session.run("python", "-m", "reliability.coverage_fuzzing", *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site into site/, with warnings as errors."""
    session.install(".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def accessibility(session: nox.Session) -> None:
    """Build the site, and test all its pages in a headless Chromium: axe-core's rules, overflow, pictures, search."""
    session.install(".[docs,dev]", "playwright>=1.50", "axe-playwright-python>=0.1.5")
    session.run("mkdocs", "build", "--strict")
    session.run("pytest", "tests/docs/test_site.py", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Test the page of examples/draw_digit.py in a headless Chromium, from PATH or XPNET_CHROMIUM."""
    session.install(".[dev]", "playwright>=1.50")
    session.run("pytest", "tests/examples/test_draw_digit.py", *session.posargs)


@nox.session
def notebook(session: nox.Session) -> None:
    """Run the notebooks of docs/, and test what a real Jupyter kernel shows, with and without ipywidgets."""
    session.install(".[dev,notebooks]", "ipywidgets")
    session.run("pytest", "tests/display/test_notebook.py", "tests/docs/test_notebooks.py",
                "tests/plots/test_notebook.py", *session.posargs)  # fmt: skip


@nox.session
def reliability(session: nox.Session) -> None:
    """Attack xpnet: wrong calls, altered files, faults, long runs. Write a table into docs/reliability.md."""
    session.install(".[dev]")
    install_atheris(session)
    session.run("python", "-m", "reliability", "--write", "docs/reliability.md", *session.posargs,
                env={"OPENBLAS_NUM_THREADS": "1"})  # fmt: skip


@nox.session(name="tests-oldest-numpy")
def tests_oldest_numpy(session: nox.Session) -> None:
    """The test suite with the oldest supported NumPy."""
    session.install(".[dev]", "numpy==2.0.*")
    session.run("pytest", "-n", "auto", "-m", "not sweep", *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})


@nox.session(name="tests-pythons", python=["3.11", "3.12", "3.13", "3.14"])
def tests_pythons(session: nox.Session) -> None:
    """The test suite with each supported Python and the newest NumPy for it. A missing interpreter is skipped."""
    session.install(".[dev]")
    session.run("pytest", "-n", "auto", "-m", "not sweep", *session.posargs, env={"OPENBLAS_NUM_THREADS": "1"})


@nox.session
def audit(session: nox.Session) -> None:
    """Look up the oldest and the newest dependencies that pyproject.toml admits in a database of vulnerabilities.

    Passes, and says why, where the database cannot be reached.
    """
    parts = ("draw", "onnx", "plots", "sklearn", "text")
    session.install(f".[{','.join(parts)}]", "pip-audit")
    given = [*PROJECT["dependencies"], *[one for part in parts for one in PROJECT["optional-dependencies"][part]]]
    oldest = sorted({f"{found[1]}=={found[2]}" for one in given if (found := re.match(r"([\w-]+)>=([\d.]+)", one))})
    installed = session.run("pip", "freeze", "--exclude", "xpnet", silent=True) or ""
    newest = [line for line in installed.splitlines() if "==" in line]
    for label, versions in (("oldest", oldest), ("newest", newest)):
        wanted = Path(session.create_tmp(), f"{label}.txt")
        wanted.write_text("\n".join(versions) + "\n", encoding="utf-8")
        options = ("--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off")
        report = session.run("pip-audit", "-r", str(wanted), *options, silent=True, success_codes=[0, 1])
        start = (report or "").find('{"dependencies"')
        if start < 0:
            session.warn(f"the {label} versions were not audited: {(report or '').strip()[-300:]}")
            continue
        checked, _ = json.JSONDecoder().raw_decode(report[start:])
        skipped = [one["name"] for one in checked["dependencies"] if "skip_reason" in one]
        if len(skipped) == len(checked["dependencies"]):
            session.warn(f"the {label} versions were not audited: the database of vulnerabilities cannot be reached")
        elif skipped:
            session.warn(f"not in the database: {', '.join(skipped)}")
        bad = [f"{one['name']} {one['version']}: {', '.join(hole['id'] for hole in one['vulns'])}"
               for one in checked["dependencies"] if one.get("vulns")]  # fmt: skip
        if bad:
            session.error(f"known vulnerabilities in the {label} versions: {'; '.join(bad)}")
        session.log(f"{len(checked['dependencies']) - len(skipped)} of the {label} versions were audited")


@nox.session
def tutorials(session: nox.Session) -> None:
    """Run all tutorial programs, print their comparisons, and write their pictures into a temporary folder.

    `nox -s tutorials -- --plots docs/pictures` replaces those of docs/tutorials.md. The picture of loops_and_matrices
    shows measured times, and so is never the same.
    """
    session.install(".[plots]")
    session.run("python", "-m", "examples.tutorials", "--plots", session.create_tmp(), *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel, install it in a clean environment, and run the MNIST example with it."""
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
    """Measure xpnet, PyTorch, JAX, scikit-learn and the matrix products alone; see `python -m benchmarks --help`."""
    session.install(".[plots]", "torch==2.13.0", "jax", "scikit-learn")
    session.run("python", "-m", "benchmarks", "--device", "cpu", *session.posargs)


@nox.session(name="benchmark-mpi")
def benchmark_mpi(session: nox.Session) -> None:
    """Measure training on two ranks and on one process, and all-reduces of several sizes."""
    session.install(".[mpi]")
    session.run("python", "-m", "benchmarks.distributed", *session.posargs)


@nox.session(name="benchmark-gpu")
def benchmark_gpu(session: nox.Session) -> None:
    """Measure xpnet, PyTorch, JAX and the matrix products alone on a CUDA GPU."""
    session.install(f".[plots,{CUPY}]", "torch", "jax[cuda13]")
    session.run("python", "-m", "benchmarks", "--device", "gpu", *session.posargs)
