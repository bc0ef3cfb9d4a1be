"""Several threads and processes with models: answers are exact, or refused by an error of xpnet, and nothing hangs.

Each case runs in a process of its own with a time limit, because a deadlock is one of the faults that it may find.
"""

import contextlib
import copy
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy

import xpnet
from reliability.processes import in_a_process
from reliability.results import Result, scaled
from xpnet import callbacks, layers
from xpnet.errors import XpnetError

THREADS = 8
SIZES = (1, 3, 17, 64, 130, 33, 5, 90)

Report = tuple[int, list[str]]  # the calls that were tried, and a line for each that went wrong


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    results = []
    for name, (cases, calls, seconds, _) in CASES.items():
        count = scaled(calls, scale, 2)
        results.append(in_a_process("reliability.threads", name, cases, count, seed, 30 + seconds * scale))
    return results


# Models and data ------------------------------------------------------------------------------------------------------


def mlp() -> xpnet.Sequential:
    stack = [layers.Dense(32), layers.ReLU(), layers.LayerNorm(), layers.Dropout(0.3), layers.Dense(10)]
    return xpnet.Sequential(stack, (20,), "cpu")


def cnn() -> xpnet.Sequential:
    stack = [layers.Conv2D(4, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten()]
    return xpnet.Sequential([*stack, layers.Dense(10)], (8, 8, 2), "cpu")


def lstm() -> xpnet.Sequential:
    return xpnet.Sequential([layers.LSTM(12, return_sequences=False), layers.Dense(10)], (6, 5), "cpu")


def graph() -> xpnet.Model:
    x = xpnet.Input((20,))
    h = layers.ReLU()(layers.Dense(16)(x))
    return xpnet.Model(x, layers.Dense(10)(layers.Concatenate()([h, layers.Dense(4)(h), x])), "cpu")


def language() -> xpnet.Sequential:
    stack = [layers.Embedding(20, 16), layers.PositionalEmbedding(24), layers.TransformerBlock(2), layers.Dense(20)]
    return xpnet.Sequential(stack, (None,), "cpu")


MAKERS: tuple[Callable[[], Any], ...] = (mlp, cnn, lstm, graph)


def data(model: Any, rows: int, seed: int) -> tuple[Any, Any]:
    draw = numpy.random.default_rng([seed, rows])
    return draw.normal(size=(rows, *model.input_shape)).astype("float32"), numpy.arange(rows) % 10


def in_threads(work: Callable[[int], Iterable[str]], threads: int = THREADS) -> list[str]:
    """What went wrong in work(0), work(1), …, each in a thread of its own. An error is reported like a wrong result."""

    def guarded(thread: int) -> list[str]:
        try:
            return list(work(thread))
        except BaseException as error:
            return [f"thread {thread}: {error!r}"]

    with ThreadPoolExecutor(threads) as pool:
        return [text for part in pool.map(guarded, range(threads)) for text in part]


def same(one: Any, other: Any) -> bool:
    return bool(one == other) if isinstance(one, dict) else numpy.array_equal(one, other)


def prediction_calls(model: Any, seed: int) -> list[tuple[str, Callable[[], Any], Any]]:
    """(name, call, its result in one thread) of everything that may run in several threads."""
    model.fit(*data(model, 200, seed), epochs=1, verbose=0)
    calls: list[tuple[str, Callable[[], Any]]] = []
    for rows in SIZES:
        x, y = data(model, rows, seed)
        calls += [
            (f"predict {rows}", lambda x=x: model.predict(x)),
            (f"predict {rows} by 50", lambda x=x: model.predict(x, batch_size=50)),
            (f"predict_proba {rows}", lambda x=x: model.predict_proba(x)),
            (f"evaluate {rows}", lambda x=x, y=y: model.evaluate(x, y, batch_size=50)),
        ]  # fmt: skip
    return [(name, call, call()) for name, call in calls]


def compare(calls: list[tuple[str, Callable[[], Any], Any]], count: int, threads: int = THREADS) -> Report:
    """Make `count` of these calls in several threads."""
    each = max(1, count // threads)

    def work(thread: int) -> Iterable[str]:
        for i in range(each):
            name, call, want = calls[(7 * thread + i) % len(calls)]
            if not same(call(), want):
                yield f"{name} in thread {thread}, call {i}: another result than in one thread"

    return each * threads, in_threads(work, threads)


# One model ------------------------------------------------------------------------------------------------------------


def predictions(count: int, seed: int) -> Report:
    sys.setswitchinterval(1e-5)
    calls = [call for make in MAKERS for call in prediction_calls(make(), seed)]
    return compare(calls, count)


def estimators(count: int, seed: int) -> Report:
    from xpnet.estimators import XPClassifier, XPRegressor

    sys.setswitchinterval(1e-5)
    (x, y), calls = data(mlp(), 300, seed), list[tuple[str, Callable[[], Any], Any]]()
    for estimator in (XPClassifier((16,), max_iter=3, random_state=0), XPRegressor((16,), max_iter=3, random_state=0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged
            estimator.fit(x, y)
        for name, rows in itertools.product(("predict", "predict_proba", "predict_log_proba", "score"), SIZES):
            if hasattr(estimator, name):
                method, arguments = getattr(estimator, name), (x[:rows], y[:rows]) if name == "score" else (x[:rows],)
                if name == "score" and rows == 1:
                    continue  # R² needs two samples
                call = lambda method=method, arguments=arguments: numpy.asarray(method(*arguments))  # noqa: E731
                calls.append((f"{type(estimator).__name__}.{name} {rows}", call, call()))
    return compare(calls, count)


def generations(count: int, seed: int) -> Report:
    sys.setswitchinterval(1e-5)
    model, draw, calls = language(), numpy.random.default_rng(seed), list[tuple[str, Callable[[], Any], Any]]()
    for length, top_k, rows in itertools.product((3, 30), (None, 4), (1, 5)):
        prompt = draw.integers(0, 20, size=(rows, 7))
        call = lambda prompt=prompt, length=length, top_k=top_k: xpnet.generate(model, prompt, length, top_k=top_k)  # noqa: E731
        calls.append((f"generate {length}, top_k {top_k}, {rows} rows", call, call()))
    tokens = draw.integers(0, 20, size=(9, 11))
    calls.append(("predict", lambda: model.predict(tokens), model.predict(tokens)))
    return compare(calls, count)


def copies(count: int, seed: int) -> Report:
    """Copies, states and summaries, taken while other threads predict."""
    sys.setswitchinterval(1e-5)
    model = graph()
    calls, (x, _) = prediction_calls(model, seed), data(model, 17, seed)
    want, state = model.predict(x), model.state_dict()
    calls += [
        ("copy", lambda: copy.deepcopy(model).predict(x), want),
        ("state_dict", lambda: numpy.concatenate([a.ravel() for a in model.state_dict().values()]),
         numpy.concatenate([a.ravel() for a in state.values()])),
        ("activations", lambda: list(model.activations(x).values())[-1], model.activations(x)[model.output_names[0]]),
        ("summary", lambda: numpy.array(model.summary()), numpy.array(model.summary())),
    ]  # fmt: skip
    return compare(calls, count)


def building(count: int, seed: int) -> Report:
    """The first prediction of a model, which builds it, in several threads at once."""
    sys.setswitchinterval(1e-5)
    bad, models = list[str](), max(1, count // THREADS)
    for i in range(models):
        make = MAKERS[i % 3]
        built = make()
        x, _ = data(built, 9, seed + i)
        want = built.predict(x)
        model = xpnet.Sequential([type(layer).from_config(layer.get_config()) for layer in built.layers], backend="cpu")
        wrong = [f"model {i}: another prediction"]
        bad += in_threads(lambda _, m=model, x=x, w=want, wrong=wrong: [] if same(m.predict(x), w) else wrong)
    return models * THREADS, bad


# Beside fit -----------------------------------------------------------------------------------------------------------


class AfterSteps(callbacks.Callback):
    """The predictions for x before the first step and after each."""

    def __init__(self, x: Any) -> None:
        self.x, self.seen = x, list[Any]()

    def on_train_begin(self, model: Any) -> None:
        self.seen.append(model.predict(self.x))

    def on_step_end(self, model: Any, step: int) -> None:
        self.seen.append(model.predict(self.x))


def disturbances(model: Any, x: Any, y: Any) -> dict[str, Callable[[], Any]]:
    """Calls that fit refuses while it runs in another thread."""
    return {
        "fit": lambda: model.fit(x, y, verbose=0),
        "train_on_batch": lambda: model.train_on_batch(x, y, "softmax_cross_entropy", "adam"),
        "apply_gradients": lambda: model.apply_gradients("adam"),
        "to": lambda: model.to("cpu", "float64"),
        "load_state_dict": lambda: model.load_state_dict(model.state_dict()),
        "forward": lambda: model.forward(x, training=True),
        "backward": lambda: (model.forward(x), model.backward(numpy.ones((len(x), 10)))),
        "value": lambda: setattr(model.parameters[0], "value", 0.0),
        "grad": lambda: setattr(model.parameters[0], "grad", 0.0),
        "unplace": lambda: model.unplace(),
    }


def beside_fit(count: int, seed: int) -> Report:
    """Everything in 7 threads while one fits: predictions are those after some step, other calls are refused."""
    sys.setswitchinterval(1e-5)
    tried, bad = 0, list[str]()
    for i in itertools.count():
        if tried >= count or len(bad) > 20:
            break
        make = MAKERS[i % len(MAKERS)]
        alone, model = make(), make()
        (x, y), (few, labels) = data(alone, 160, seed + i), data(alone, 17, seed + i)
        steps = AfterSteps(few)
        want = alone.fit(x, y, epochs=4, batch_size=32, callbacks=[steps], verbose=0)
        begun, ended, counts = threading.Event(), threading.Event(), [0] * THREADS

        class Watched(callbacks.Callback):
            def on_train_begin(self, model: Any, begun: threading.Event = begun) -> None:
                begun.set()

            def on_step_end(self, model: Any, step: int) -> None:
                time.sleep(0.002)

            def on_train_end(self, model: Any, ended: threading.Event = ended) -> None:
                ended.set()  # soon, other threads may change the model

        def work(thread: int, *, model: Any = model, x: Any = x, y: Any = y, few: Any = few, labels: Any = labels,
                 steps: Any = steps, want: Any = want, begun: Any = begun, ended: Any = ended, counts: Any = counts
                 ) -> Iterable[str]:  # fmt: skip
            if thread == 0:
                try:
                    if model.fit(x, y, epochs=4, batch_size=32, callbacks=[Watched()], verbose=0) != want:
                        yield "fit: another history than without other threads"
                finally:
                    ended.set()
                    begun.set()
                return
            begun.wait()
            calls = disturbances(model, few, labels)
            for j in itertools.count():
                name, problem = list(calls)[(j + thread) % len(calls)], ""
                if thread < 5:
                    got = model.predict(few) if thread < 3 else copy.deepcopy(model).predict(few)
                    if not any(same(got, seen) for seen in steps.seen):
                        problem = f"thread {thread}: a prediction of no step"
                else:
                    try:
                        calls[name]()
                        problem = f"{name} was not refused beside fit"
                    except XpnetError:
                        pass
                if ended.is_set():
                    return
                counts[thread] += 1
                if problem:
                    yield problem

        problems = in_threads(work)
        tried += sum(counts)
        bad += [f"model {i}, {make.__name__}: {text}" for text in problems]
    return tried, bad


def several_models(count: int, seed: int) -> Report:
    """Several models train and predict in several threads, with histories and weights as alone."""
    sys.setswitchinterval(1e-5)
    wanted: list[tuple[Any, Any]] = []
    for make in MAKERS:
        model = make()
        history = model.fit(*data(model, 120, seed), epochs=3, batch_size=16, verbose=0)
        wanted.append((dict(history), model.state_dict()))
    rounds = max(1, count // THREADS)

    def work(thread: int) -> Iterable[str]:
        for i in range(rounds):
            number = (thread + i) % len(MAKERS)
            model = MAKERS[number]()
            history = model.fit(*data(model, 120, seed), epochs=3, batch_size=16, verbose=0)
            state = model.state_dict()
            if dict(history) != wanted[number][0] or not all(same(state[n], a) for n, a in wanted[number][1].items()):
                yield f"{MAKERS[number].__name__} in thread {thread}: another training than alone"

    return rounds * THREADS, in_threads(work)


# Processes ------------------------------------------------------------------------------------------------------------


def _predict_in_child(model: Any, x: Any, want: Any, answers: Any) -> None:
    state = "same" if same(model.predict(x), want) else "other"
    with contextlib.suppress(XpnetError):
        model.train_on_batch(x, numpy.arange(len(x)) % 10, "softmax_cross_entropy", "adam")  # or it is refused
    answers.put(state)


def _in_children(method: str, model: Any, x: Any, want: Any, children: int) -> list[str]:
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    processes = [context.Process(target=_predict_in_child, args=(model, x, want, answers)) for _ in range(children)]
    bad = []
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            bad.append(f"a child made by {method} hangs")
            process.kill()
        elif process.exitcode:
            bad.append(f"a child made by {method} ended with {process.exitcode}")
        elif answers.get(timeout=10) != "same":
            bad.append(f"a child made by {method} predicted something else")
    return bad


def processes(count: int, seed: int) -> Report:
    """Children by fork, spawn and forkserver, after predictions in several threads."""
    model, bad = mlp(), list[str]()
    compare(prediction_calls(model, seed), 64)
    x, _ = data(model, 17, seed)
    want, rounds = model.predict(x), max(1, count // 6)
    for _ in range(rounds):
        for method in ("fork", "spawn", "forkserver"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of fork beside threads
                bad += _in_children(method, model, x, want, 2)
    return rounds * 6, bad


def fork_beside_fit(count: int, seed: int) -> Report:
    """Fork while another thread trains: the child predicts with the weights of some step."""
    os.environ["OPENBLAS_NUM_THREADS"] = "2"
    bad, tried = list[str](), 0
    for i in range(max(1, count // 10)):
        make = MAKERS[i % len(MAKERS)]
        model, training = make(), threading.Event()
        (x, y), (few, _) = data(model, 640, seed), data(model, 17, seed)

        class Begun(callbacks.Callback):
            def on_step_end(self, model: Any, step: int, training: threading.Event = training) -> None:
                training.set()

        thread = threading.Thread(
            target=lambda model=model, x=x, y=y: model.fit(
                x, y, epochs=60, batch_size=16, callbacks=[Begun()], verbose=0
            )
        )
        thread.start()
        training.wait()
        for _ in range(10):
            tried += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                try:
                    fine = bool(numpy.isfinite(model.predict(few)).all())
                    other = make()  # and a model of its own trains there
                    other.fit(x[:64], y[:64], verbose=0)
                    os._exit(0 if fine else 3)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(4)
            status = _wait(child, 20.0)
            if status != 0:
                bad.append(f"{make.__name__}: the child {'hangs' if status is None else f'ended with {status}'}")
            time.sleep(0.003)
        thread.join()
    return tried, bad


def _wait(child: int, seconds: float) -> int | None:
    """The exit status of a child; None if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (status := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(status[1])
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def joblib_backends(count: int, seed: int) -> Report:
    """scikit-learn's cross_val_score and GridSearchCV in processes of loky and in threads, with n_jobs=2."""
    import joblib
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import GridSearchCV, cross_val_score

    from xpnet.estimators import XPClassifier

    warnings.simplefilter("ignore")
    x, y = data(mlp(), 150, seed)
    y = (x[:, 0] > 0).astype(int)
    classifier = XPClassifier((8,), max_iter=3, random_state=0)
    fitted = XPClassifier((8,), max_iter=3, random_state=0).fit(x, y)

    def results(jobs: int) -> list[Any]:
        search = GridSearchCV(classifier, {"alpha": [1e-4, 1e-2]}, cv=2, n_jobs=jobs).fit(x, y)
        importance = permutation_importance(fitted, x, y, n_repeats=2, random_state=0, n_jobs=jobs)
        return [cross_val_score(classifier, x, y, cv=3, n_jobs=jobs), search.cv_results_["mean_test_score"],
                importance.importances_mean, search.predict_proba(x)]  # fmt: skip

    want, bad, rounds = results(1), list[str](), max(1, count // 8)
    for _, backend in itertools.product(range(rounds), ("loky", "threading")):
        with joblib.parallel_config(backend=backend):
            for name, one, other in zip(
                ("scores", "search", "importance", "probabilities"), results(2), want, strict=True
            ):
                if not numpy.allclose(one, other, rtol=1e-6, atol=1e-7):
                    bad.append(f"{name} with {backend}: {one} instead of {other}")
    return rounds * 8, bad


# The end of the process -----------------------------------------------------------------------------------------------

ENDS = {
    "fit at exit": """
import atexit, sys
from reliability import threads
model = threads.{maker}()
x, y = threads.data(model, 400, 0)
def last():
    model.fit(x, y, verbose=0)
    model.predict(x)
    print("trained")
atexit.register(last)
model.predict(x)
""",
    "training in a daemon thread": """
import threading, time
from reliability import threads
model = threads.{maker}()
x, y = threads.data(model, 4000, 0)
threading.Thread(target=lambda: model.fit(x, y, epochs=100000, verbose=0), daemon=True).start()
time.sleep({pause})
print("trained")
""",
    "training in a thread that is waited for": """
import threading, time
from reliability import threads
model = threads.{maker}()
x, y = threads.data(model, 400, 0)
def train():
    time.sleep({pause} / 10)
    model.fit(x, y, epochs=3, verbose=0)
    print("trained")
threading.Thread(target=train).start()
""",
    "sys.exit in a callback": """
import sys
from reliability import threads
from xpnet import callbacks
class Exit(callbacks.Callback):
    def on_step_end(self, model, step):
        print("trained", flush=True)
        sys.exit(0)
model = threads.{maker}()
model.fit(*threads.data(model, 400, 0), callbacks=[Exit()], verbose=0)
""",
    "exec in a child while another thread trains": """
import subprocess, sys, threading, time
from reliability import threads
model = threads.{maker}()
x, y = threads.data(model, 4000, 0)
threading.Thread(target=lambda: model.fit(x, y, epochs=100000, verbose=0), daemon=True).start()
time.sleep({pause})
print(subprocess.run([sys.executable, "-c", "print('trained')"], capture_output=True, text=True).stdout)
""",
}


def ends(count: int, seed: int) -> Report:
    """Processes that end while a model trains, or train while they end."""
    bad, kinds, tried = list[str](), list(ENDS), 0
    for i in range(count):
        kind, maker = kinds[i % len(kinds)], MAKERS[i // len(kinds) % len(MAKERS)].__name__
        code = ENDS[kind].format(maker=maker, pause=(0.3, 0.05, 0.6)[i % 3])
        tried += 1
        try:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            bad.append(f"{kind}, {maker}: the process hangs")
            continue
        if done.returncode or "trained" not in done.stdout or done.stderr.strip():
            bad.append(
                f"{kind}, {maker}: exit status {done.returncode}, printed {done.stdout!r}, {done.stderr[-800:]!r}"
            )
    return tried, bad


#: {name: (what is counted, calls at scale 1, seconds that they may take, the function)}.
CASES: dict[str, tuple[str, int, float, Callable[[int, int], Report]]] = {
    "predictions": ("predictions and evaluations in 8 threads on one model", 20_000, 300, predictions),
    "estimators": ("predictions of estimators in 8 threads", 8_000, 300, estimators),
    "generations": ("generations and predictions in 8 threads on one model", 1_600, 300, generations),
    "copies": ("copies, states and predictions in 8 threads on one model", 8_000, 300, copies),
    "building": ("first predictions in 8 threads on one model", 4_000, 300, building),
    "beside_fit": ("calls in 7 threads beside a fit", 20_000, 600, beside_fit),
    "several_models": ("models trained in 8 threads", 800, 300, several_models),
    "processes": ("children made by fork, spawn and forkserver", 60, 300, processes),
    "fork_beside_fit": ("children forked while a thread trains", 400, 300, fork_beside_fit),
    "joblib_backends": ("results of scikit-learn with n_jobs=2", 40, 300, joblib_backends),
    "ends": ("processes that end while a model trains", 100, 600, ends),
}
