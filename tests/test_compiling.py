"""Compiling kernels on first use: said while it happens, and counted apart from training."""

import io
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest

import xpnet
from xpnet import callbacks, layers
from xpnet.backends import gpu_compiling

X, Y = np.eye(16, dtype="float32"), np.arange(16) % 4
SLOW = 0.2


class Cache:
    """As cupy.cuda.compiler has one: it finds nothing until it was given something."""

    def __init__(self):
        self.kept = {}

    def load(self, name):
        return self.kept.get(name)

    def save(self, name, compiled, source):
        self.kept[name] = compiled

    folder = "where they are kept"


def compiler():
    """cupy.cuda.compiler, with a cache."""
    made = SimpleNamespace(_kernel_cache_backend=Cache())
    made._set_kernel_cache_backend = lambda cache: setattr(made, "_kernel_cache_backend", cache)
    return made


def compile_kernel(cupy, name="kernel", seconds=SLOW):
    """What CuPy does where it needs a kernel."""
    cache = cupy.cuda.compiler._kernel_cache_backend
    if cache.load(name) is None:
        time.sleep(seconds)
        cache.save(name, b"compiled", "source")


@pytest.fixture
def cupy():
    return SimpleNamespace(cuda=SimpleNamespace(compiler=compiler()))


def test_what_is_missing_in_the_cache_is_counted_and_told_once(cupy, caplog):
    watch, told = gpu_compiling.watch(cupy), []
    with caplog.at_level(logging.INFO), watch.telling(lambda: told.append("now")):
        compile_kernel(cupy)
        compile_kernel(cupy)
        compile_kernel(cupy, "another", seconds=0)
    compile_kernel(cupy, "unheard", seconds=0)
    assert SLOW <= watch.seconds < 10 * SLOW and told == ["now", "now"]
    (record,) = caplog.records
    assert record.levelname == "INFO" and "compiling CUDA kernels for their first use" in record.getMessage()
    assert watch.folder == "where they are kept", "all else is the cache's own"


def test_there_is_one_watch_and_without_such_a_cache_none(cupy):
    assert gpu_compiling.watch(cupy) is gpu_compiling.watch(cupy)
    assert gpu_compiling.watch(SimpleNamespace(cuda=SimpleNamespace())) is None


def test_a_kernel_that_does_not_compile_is_not_counted(cupy):
    watch = gpu_compiling.watch(cupy)
    assert watch.load("broken") is None
    assert watch.seconds == 0


def test_an_epoch_counts_without_compiling(gpu):
    if gpu.name != "emulated":
        pytest.skip("a real GPU may have compiled everything before")
    gpu.xp.cuda.compiler = compiler()
    gpu.__dict__.pop("_compiling", None)

    class Compiles(layers.Layer):
        def forward(self, x):
            compile_kernel(gpu.xp)
            return x

        def backward(self, grad_y):
            return grad_y

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    model = xpnet.Sequential([Compiles(), layers.Dense(4)], (16,), backend=gpu)
    history = model.fit(X, Y, epochs=2, callbacks=callbacks.ProgressBar(stream), verbose=0)
    assert SLOW <= history.compile_seconds < 5 * SLOW
    assert history.seconds[0] < SLOW
    assert "compiling kernels for the GPU, once" in stream.getvalue()


def test_the_cpu_compiles_nothing():
    model = xpnet.Sequential([layers.Dense(4)], (16,), backend="cpu")
    assert model.fit(X, Y, verbose=0).compile_seconds == 0.0


def test_the_installed_cupy_has_such_a_cache():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    assert gpu_compiling.watch(cupy) is cupy.cuda.compiler._kernel_cache_backend
