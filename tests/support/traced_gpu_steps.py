"""Lists of the calls of steps on a GPU, shared by the tests of tests/capture."""

import numpy as np
from captured_trainings import X, Y

from xpnet import callbacks
from xpnet.capture.gpu import CallList, TracedGPU
from xpnet.capture.trace import Trace
from xpnet.training.graph_step import GraphStep


def listed(gpu, work, *arrays):
    """The list of the calls of work(backend, *arrays)."""
    trace = Trace(gpu.xp)
    work(TracedGPU(gpu, trace), *[trace.wrap(a, writable=True) for a in arrays])
    trace.stop()
    return CallList(trace, gpu)


def checked_list(gpu, work, given, rtol, atol):
    """The list of work(backend, *given), after asserting that it computes what `work` computes."""
    start = [gpu.to_numpy(a).copy() for a in given]
    calls = listed(gpu, work, *given)
    results = []
    for run in (calls, lambda: work(gpu, *given)):
        for array, value in zip(given, start, strict=True):
            array[...] = gpu.asarray(value)
        run()
        results.append([gpu.to_numpy(a).copy() for a in given])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    return calls


class Steps(callbacks.Callback):
    """Keeps the captured steps."""

    def on_step_end(self, model, step):
        kinds = self.run.executor._kinds.values()
        self.captured = [kind for kind in kinds if isinstance(kind, GraphStep)]


def captured_steps(model, x=X, y=Y, **options):
    """The captured steps of a training."""
    steps = Steps()
    model.fit(x, y, callbacks=[steps], epochs=3, batch_size=20, verbose=0, **options)
    assert steps.captured and all(step.verified for step in steps.captured)
    return steps.captured


def names(calls):
    """The names of the operators and functions, without CuPy's prefix."""
    return [call.name.removeprefix("cupy_") for call in calls.calls]


def arrays(gpu, *shapes):
    rng = np.random.default_rng(3)
    return [gpu.asarray(rng.normal(size=shape).astype("float32")) for shape in shapes]
