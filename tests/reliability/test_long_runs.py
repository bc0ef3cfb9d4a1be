"""Small runs of the attacks by threads, long runs and requests, and that each of them notices what it looks for."""

import socket
import threading
import time

import numpy as np
import pytest

from reliability import long_runs, page, threads
from reliability.processes import in_a_process
from xpnet.training import captured_inference, captured_step

pytestmark = pytest.mark.skipif(not hasattr(threads.os, "fork"), reason="the attacks read /proc and use forks")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few measurements, each of which takes as long as hundreds of steps, and no setting that outlasts a test."""
    monkeypatch.setattr(long_runs, "SAMPLES", 8)
    monkeypatch.setattr(threads.sys, "setswitchinterval", lambda seconds: None)


# Threads and processes ------------------------------------------------------------------------------------------------

IN_THREADS = {
    "predictions": 320,
    "generations": 48,
    "copies": 80,
    "building": 24,
    "beside_fit": 150,
    "several_models": 8,
}


@pytest.mark.parametrize("name", IN_THREADS)
def test_models_in_threads(name):
    tried, bad = threads.CASES[name][-1](IN_THREADS[name], 0)
    assert tried >= IN_THREADS[name] // 2 and bad == []


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "count"), [("fork_beside_fit", 10), ("ends", 5)])
def test_processes(name, count):
    result = in_a_process("reliability.threads", name, "cases", count, 0, 120)
    assert result.tried == count and result.bad == []


def test_wrong_predictions_in_threads_are_noticed():
    model = threads.mlp()
    x, _ = threads.data(model, 17, 0)
    want = model.predict(x)
    numbers = iter(range(1000))

    def sometimes_wrong():
        return model.predict(x) + (next(numbers) == 20)

    tried, bad = threads.compare([("predict", sometimes_wrong, want)], 64)
    assert tried == 64 and len(bad) == 1 and "another result" in bad[0]
    assert "ZeroDivisionError" in threads.in_threads(lambda thread: [1 / 0], 2)[0]


def test_calls_beside_fit_that_see_half_a_step_or_are_not_refused_are_noticed(monkeypatch):
    monkeypatch.setattr(threads, "MAKERS", (threads.mlp,))
    monkeypatch.setattr(threads, "disturbances", lambda model, x, y: {"predict": lambda: model.predict(x)})
    assert any("predict was not refused" in text for text in threads.beside_fit(20, 0)[1])
    monkeypatch.setattr(threads, "same", lambda one, other: False)
    assert any("a prediction of no step" in text for text in threads.beside_fit(20, 0)[1])


def test_a_process_that_hangs_or_fails_is_noticed():
    hangs = in_a_process("time", "x", "cases", 3, 0, 1.0)  # this module has no CASES
    assert "exit status 1" in hangs.bad[0]
    code = "reliability.threads as m, time; time.sleep(60); m.CASES = {'x': (lambda n, s: (1, []),)}; import time"
    assert "still ran after 2 s" in in_a_process(code, "x", "cases", 3, 0, 2.0).bad[0]


# Long runs ------------------------------------------------------------------------------------------------------------

LONG = {"captured": 1600, "graphs": 800, "eager": 2400, "one_fit": 800, "streams": 400, "by_hand": 160,
        "checkpoints": 80, "callbacks": 160, "errors": 80, "evaluations": 4000, "dropped": 10, "emulated": 200,
        "dropped_emulated": 40}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("name", LONG)
def test_long_runs(name, monkeypatch):
    monkeypatch.setattr(long_runs, "ALLOWED", {"memory": 20.0, "objects": 100, "blocks": 5})
    monkeypatch.setenv("XPNET_CAPTURE", "1")
    for module, setting in (
        (captured_step, "_MIN_STEPS"),
        (captured_inference, "_EAGER_ON_CPU"),
        (captured_inference, "_EAGER_ON_GPU"),
    ):
        monkeypatch.setattr(module, setting, getattr(module, setting))  # which some runs change
    run = long_runs.CASES[name][-1]
    run(LONG[name], 0)  # fills all caches, for which the warm-up of so short a run does not suffice
    tried, bad, note = run(LONG[name], 0)
    assert tried >= LONG[name] and bad == [] and note.startswith("memory ")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["memory", "objects", "file handles", "threads"])
def test_what_grows_in_a_long_run_is_noticed(kind):
    kept, stop = [], threading.Event()

    def leak(i):
        if kind == "memory":
            kept.append(np.ones(5 * 2**20))  # so large that malloc takes new pages
        elif kind == "objects":
            kept.extend([{}] for _ in range(100))
        elif kind == "file handles":
            kept.append(socket.socket())
        else:
            kept.append(threading.Thread(target=stop.wait))
            kept[-1].start()
        return 1

    try:
        _, bad, _ = long_runs.watched(16, leak)
    finally:
        stop.set()
        for item in kept:
            if kind == "file handles":
                item.close()
            elif kind == "threads":
                item.join()
    assert any(text.startswith(f"{kind} grew by") for text in bad), bad


def test_a_measurement_does_not_count_its_own_objects(monkeypatch):
    monkeypatch.setattr(long_runs, "ALLOWED", {"memory": 20.0, "objects": 50})
    quantities = dict.fromkeys(map(str, range(300)), 1.0)
    _, bad, _ = long_runs.watched(16, lambda i: 1, lambda: dict(quantities))
    assert bad == []


@pytest.mark.sweep
def test_models_that_something_keeps_are_noticed(monkeypatch):
    kept = []
    monkeypatch.setattr(long_runs, "MAKERS", (lambda: kept.append(long_runs.mlp()) or kept[-1],))
    _, bad, _ = long_runs.dropped(16, 0)
    assert any(text.startswith("objects of Sequential grew by") for text in bad)


# Requests -------------------------------------------------------------------------------------------------------------


def test_fuzzed_requests_to_the_page(tmp_path):
    pytest.importorskip("bottle", reason="bottle is not installed")
    pytest.importorskip("waitress", reason="waitress is not installed")
    if not (page.ROOT / "examples").exists():
        pytest.skip("the tests run away from the source tree")
    for host in ("127.0.0.1", "0.0.0.0"):
        fuzzed, correct = page.attacked(host, 150, 0, tmp_path)
        assert fuzzed.tried == 150 and correct.tried > 0
        assert (
            fuzzed.bad == [] and [text for text in correct.bad if "'' in" not in text] == []
        )  # however slow the machine


@pytest.mark.parametrize(("cookie", "count"), [(b"Cookie: session=x\r\n", 6), (b"", 0)])
def test_pages_that_are_shown_without_the_cookie_are_noticed(cookie, count, monkeypatch):
    answer = b"HTTP/1.1 200 OK\r\nX-Content-Type-Options: nosniff\r\n\r\n"
    monkeypatch.setattr(page, "_exchange", lambda *_, **__: answer)
    monkeypatch.setattr(page, "_with_cookie", lambda request, _: request)
    monkeypatch.setattr(page, "KINDS", {"correct": page.KINDS["correct"]})
    fuzzed, _ = page.attack(0, 6, 0, lambda: 0.0, threads=1, cookie=cookie, used="/?token=x")
    assert [text for text in fuzzed.bad if "without the cookie" in text] == fuzzed.bad and len(fuzzed.bad) == count


@pytest.mark.parametrize("fault", ["errors", "blocks"])
def test_a_server_that_fails_or_is_blocked_is_noticed(fault, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 0.2)
    kinds = {"errors": "request line", "blocks": "half open"}
    server = socket.create_server(("127.0.0.1", 0))
    good = b"HTTP/1.1 200 OK\r\nX-Content-Type-Options: nosniff\r\n\r\n" + b'{"probabilities": [1.0]}'

    def answer():
        while True:
            connection, _ = server.accept()
            with connection:
                if fault == "blocks":
                    connection.settimeout(1.0)
                content = b""
                try:
                    while b"\r\n\r\n" not in content and (part := connection.recv(2**16)):
                        content += part
                    correct = content.endswith(page.GOOD)
                    connection.sendall(good if correct else b"HTTP/1.1 500 Oh\r\n\r\n" if fault == "errors" else good)
                except OSError:
                    time.sleep(0)

    threading.Thread(target=answer, daemon=True).start()
    monkeypatch.setattr(page, "KINDS", {kind: page.KINDS[kind] for kind in [kinds[fault]]})
    fuzzed, correct = page.attack(server.getsockname()[1], 6, 0, lambda: 0.0, threads=2)
    assert any("status 500" in text for text in fuzzed.bad) if fault == "errors" else correct.bad
