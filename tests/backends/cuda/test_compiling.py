"""The compilation of kernels: it is announced at its start and timed separately from training."""

import io
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest

import xpnet
from xpnet import callbacks, layers
from xpnet.backends.cuda import compiling

X, Y = np.eye(16, dtype="float32"), np.arange(16) % 4
SLOW = 0.2


class Cache:
    """Like the cache of cupy.cuda.compiler; empty at first."""

    def __init__(self):
        self.kernels = {}

    def load(self, name):
        return self.kernels.get(name)

    def save(self, name, compiled, source):
        self.kernels[name] = compiled

    folder = "the folder of the cache"


def compiler():
    """Like cupy.cuda.compiler, with a cache."""
    module = SimpleNamespace(_kernel_cache_backend=Cache())
    module._set_kernel_cache_backend = lambda cache: setattr(module, "_kernel_cache_backend", cache)
    return module


def compile_kernel(cupy, name="kernel", seconds=SLOW):
    """Do what CuPy does when it needs a kernel."""
    cache = cupy.cuda.compiler._kernel_cache_backend
    if cache.load(name) is None:
        time.sleep(seconds)
        cache.save(name, b"compiled", "source")


@pytest.fixture
def cupy():
    return SimpleNamespace(cuda=SimpleNamespace(compiler=compiler()))


def test_compilation_is_timed_and_announced_once(cupy, caplog):
    watch, announced = compiling.watch(cupy), []
    with caplog.at_level(logging.INFO), watch.on_compile(lambda: announced.append("now")):
        compile_kernel(cupy)
        compile_kernel(cupy)
        compile_kernel(cupy, "another", seconds=0)
    compile_kernel(cupy, "after the context", seconds=0)
    assert SLOW <= watch.seconds < 10 * SLOW and announced == ["now", "now"]
    (record,) = caplog.records
    assert record.levelname == "INFO" and "compiling CUDA kernels for their first use" in record.getMessage()
    assert watch.folder == "the folder of the cache", "other attributes must be those of the cache"


def test_each_cupy_has_one_watch_and_none_without_a_cache(cupy):
    assert compiling.watch(cupy) is compiling.watch(cupy)
    assert compiling.watch(SimpleNamespace(cuda=SimpleNamespace())) is None


def test_a_failed_compilation_is_not_timed(cupy):
    watch = compiling.watch(cupy)
    assert watch.load("broken") is None
    assert watch.seconds == 0


def test_the_time_of_an_epoch_excludes_compilation(gpu):
    if gpu.name != "emulated":
        pytest.skip("a real GPU may have cached all kernels")
    gpu.xp.cuda.compiler = compiler()
    gpu._compile_watch = compiling.watch(gpu.xp)

    class Compiling(layers.Layer):
        def forward(self, x):
            compile_kernel(gpu.xp)
            return x

        def backward(self, grad_y):
            return grad_y

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    model = xpnet.Sequential([Compiling(), layers.Dense(4)], (16,), backend=gpu)
    history = model.fit(X, Y, epochs=2, callbacks=callbacks.ProgressBar(stream), verbose=0)
    assert SLOW <= history.compile_seconds < 5 * SLOW
    assert history.seconds[0] < SLOW
    assert "compiling kernels for the GPU, once" in stream.getvalue()


def test_compile_seconds_are_zero_on_the_cpu():
    model = xpnet.Sequential([layers.Dense(4)], (16,), backend="cpu")
    assert model.fit(X, Y, verbose=0).compile_seconds == 0.0


def test_the_installed_cupy_has_a_cache():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    assert compiling.watch(cupy) is cupy.cuda.compiler._kernel_cache_backend
