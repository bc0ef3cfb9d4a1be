"""examples/draw_digit.py: rendering of drawings, the server, and the page in a real browser."""

import contextlib
import http.client
import importlib
import itertools
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import xpnet
from xpnet import layers

pytest.importorskip("bottle", reason="bottle is not installed")
pytest.importorskip("waitress", reason="waitress is not installed")
EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the tests run away from the source tree")


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("draw_digit")
    finally:
        sys.path.remove(str(EXAMPLES))


def curve(x, y, count=40):
    return [(x(t / (count - 1)), y(t / (count - 1))) for t in range(count)]


def radians(t):
    return 2.0 * math.pi * t


DIGITS = {
    0: [curve(lambda t: 0.5 + 0.22 * math.sin(radians(t)), lambda t: 0.5 - 0.33 * math.cos(radians(t)))],
    1: [[(0.5, 0.15), (0.5, 0.85)]],
    2: [[*curve(lambda t: 0.5 - 0.2 * math.cos(math.pi * t), lambda t: 0.36 - 0.18 * math.sin(math.pi * t)),
         (0.66, 0.45), (0.3, 0.82), (0.72, 0.82)]],
    3: [[*curve(lambda t: 0.45 + 0.2 * math.sin(math.pi * t), lambda t: 0.34 - 0.17 * math.cos(math.pi * t)),
         *curve(lambda t: 0.45 + 0.24 * math.sin(math.pi * t), lambda t: 0.67 - 0.16 * math.cos(math.pi * t))]],
    4: [[(0.35, 0.15), (0.28, 0.55), (0.72, 0.55)], [(0.62, 0.2), (0.62, 0.88)]],
    7: [[(0.28, 0.2), (0.72, 0.2), (0.42, 0.85)]],
}  # fmt: skip


def arrays(strokes, scale=1.0, shift=(0.0, 0.0)):
    return [np.array(points) * scale + shift for points in strokes]


# Rendering ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digit", DIGITS)
def test_a_drawing_is_scaled_and_centered_like_mnist(example, digit):
    image = example.as_digit(arrays(DIGITS[digit]))
    assert image.shape == (28, 28) and image.dtype == np.uint8 and image.max() == 255
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 20 <= max(height, width) <= 22  # 20 pixels, and partly covered ones at the edges
    mass = image / image.sum()
    assert mass.sum(axis=0) @ np.arange(28) == pytest.approx(13.5, abs=0.1)
    assert mass.sum(axis=1) @ np.arange(28) == pytest.approx(13.5, abs=0.1)


def test_size_and_position_of_the_drawing_do_not_matter(example):
    for strokes in DIGITS.values():
        large = example.as_digit(arrays(strokes)).astype(int)
        small = example.as_digit(arrays(strokes, 0.4, (0.5, 0.1))).astype(int)
        assert np.abs(large - small).max() <= 1


def test_empty_drawings_and_dots_work_and_the_order_of_strokes_does_not_matter(example):
    assert not example.as_digit([]).any() and not example.as_digit([np.zeros((0, 2))]).any()
    dot = example.as_digit([np.array([[0.9, 0.1]])])
    assert dot[13:15, 13:15].min() > 250 and (dot > 0).sum() < 25
    strokes = arrays(DIGITS[4])
    np.testing.assert_array_equal(example.as_digit(strokes), example.as_digit([s[::-1] for s in strokes[::-1]]))


def test_small_digits_count_pixels(example):
    image = example.as_small_digit(arrays(DIGITS[0]))
    assert image.shape == (8, 8) and image.max() <= 16 and image[3:5, 3:5].max() < image.max()


# The server -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(example):
    """A network trained on the small digits."""
    mnist = importlib.import_module("mnist")
    task = mnist.digits_task()
    model = mnist.build_mlp((8, 8), "cpu", 0, task.largest_pixel)
    model.fit(*task.train, epochs=8, batch_size=16, verbose=0)
    return example.Classifier(model, task)


@pytest.fixture(scope="module")
def port(example, classifier):
    yield from serve(example, classifier)


def serve(example, classifier):
    with example.make_local_server(classifier) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def request(port, method, path, body=None, **headers):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize(
    ("path", "part"), [("/", b"Draw a digit"), ("/script.js", b"pointerdown"), ("/style.css", b"body")]
)
def test_the_page_uses_nothing_from_other_sites(port, path, part):
    status, content = request(port, "GET", path)
    assert status == 200 and part in content
    assert b"http://" not in content and b"https://" not in content


def test_a_drawing_is_classified(port, classifier):
    status, content = request(port, "POST", "/classify", json.dumps({"strokes": DIGITS[0]}))
    result = json.loads(content)
    assert status == 200 and np.argmax(result["probabilities"]) == 0
    assert sum(result["probabilities"]) == pytest.approx(1.0)
    assert np.array(result["pixels"]).shape == (8, 8)
    assert [layer["name"] for layer in result["layers"]] == ["Dense", "ReLU", "Dense"]


def test_mistakes_are_test_images_with_a_wrong_prediction(port, classifier):
    about = json.loads(request(port, "GET", "/model")[1])
    assert about["accuracy"] == pytest.approx(classifier.accuracy) and about["data"] == "digits"
    assert len(about["mistakes"]) == round((1 - classifier.accuracy) * len(classifier.task.test.x))
    for mistake in about["mistakes"]:
        result = json.loads(request(port, "GET", f"/test/{mistake['index']}")[1])
        assert np.argmax(result["probabilities"]) == mistake["prediction"] != mistake["label"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/classify", "", 400),
        ("POST", "/classify", "no JSON", 400),
        ("POST", "/classify", "[1, 2]", 400),
        ("POST", "/classify", '{"strokes": 5}', 400),
        ("POST", "/classify", '{"strokes": [[1, 2, 3]]}', 400),
        ("POST", "/classify", '{"strokes": [[["a", "b"]]]}', 400),
        ("POST", "/classify", '{"strokes": [[[NaN, 0.5]]]}', 400),
        ("POST", "/classify", '{"strokes": [[[7, 0.5]]]}', 400),
        ("POST", "/classify", json.dumps({"strokes": [[[0.5, 0.5]] * 20_001]}), 400),
        ("POST", "/classify", "[" * 5000, 400),
        ("GET", "/test/100000", None, 404),
        ("GET", "/test/-1", None, 404),
        ("GET", "/draw_digit.py", None, 404),
        ("GET", "/..%2fdraw_digit.py", None, 404),
    ],
)
def test_invalid_requests_are_refused(port, method, path, body, status):
    assert request(port, method, path, body)[0] == status


def test_a_drawing_that_is_too_large_is_refused_before_it_is_read(port):
    assert request(port, "POST", "/classify", None, **{"Content-Length": str(2**20 + 1)})[0] == 413


#: To the first and the third, waitress by itself gives no answer and closes the connection.
ODD = [
    b"GET http://[ HTTP/1.1\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"GET /%ff\xff HTTP/1.1\r\nHost: \xe9\r\n\r\n",
]


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_malformed_requests_are_refused(port, content):
    assert b" 4" in exchange(port, content)[:12]


@pytest.mark.parametrize(
    "number", ["1" + "0" * 400, "null", '"0.5"', "1e400"], ids=("long", "null", "text", "infinite")
)
def test_coordinates_that_are_no_finite_numbers_are_refused(port, number):
    assert request(port, "POST", "/classify", f'{{"strokes": [[[0.5, {number}]]]}}')[0] == 400


def exchange(port, content):
    """What the server answers to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(content)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_clients_that_send_half_a_request_or_read_nothing_block_nobody(example, port):
    body = json.dumps({"strokes": DIGITS[0]})
    page = f"GET /model HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for i in range(100):  # more than the server keeps
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall((b"", b"GET / HT", page * 50)[i % 3])
        start = time.monotonic()
        assert request(port, "POST", "/classify", body)[0] == 200
        assert time.monotonic() - start < 2.0


def test_a_connection_is_closed_after_some_time_also_if_its_client_goes_on_sending(example, classifier, monkeypatch):
    monkeypatch.setattr(importlib.import_module("local_server"), "MAX_SECONDS", 0.5)
    for port in serve(example, classifier):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            sent = list(itertools.takewhile(lambda _: still_sends(connection), range(100)))
        assert len(sent) < 100


def still_sends(connection):
    time.sleep(0.05)
    try:
        return connection.send(b"X")
    except OSError:
        return 0


def test_a_request_without_a_body_that_expects_to_be_asked_for_it_is_answered(port):
    lines = f"GET /style.css HTTP/1.1\r\nHost: localhost:{port}\r\nExpect: 100-continue\r\n\r\n"
    assert exchange(port, lines.encode()).startswith(b"HTTP/1.1 200")


def test_each_connection_carries_one_request(port):
    answer = exchange(port, f"GET /style.css HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode() * 3)
    assert answer.count(b"HTTP/1.1 200") == 1 and b"Connection: close" in answer


def test_answers_have_security_headers(port):
    for line in ("GET / HTTP/1.1", "GET /model HTTP/1.1", "GET /nothing HTTP/1.1", "BREW / HTTP/1.1"):
        head = exchange(port, f"{line}\r\nHost: localhost:{port}\r\n\r\n".encode()).partition(b"\r\n\r\n")[0]
        assert b"default-src 'none'" in head and b"frame-ancestors 'none'" in head and b"\r\nX-Content-Type" in head
        assert b"Referrer-Policy: no-referrer" in head and head.count(b"Cache-Control") == 1 and b"Server:" not in head


def test_requests_by_pages_of_other_sites_are_refused(port):
    body = json.dumps({"strokes": DIGITS[0]})
    assert request(port, "POST", "/classify", body, Origin=f"http://127.0.0.1:{port}")[0] == 200
    for origin in ("null", "http://example.org", f"https://127.0.0.1:{port}", ""):
        assert request(port, "POST", "/classify", body, Origin=origin)[0] == 403


def test_only_requests_for_this_machine_are_answered(port):
    assert request(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for host in ("example.org", f"example.org:{port}", "127.0.0.1", ""):
        assert request(port, "GET", "/model", Host=host)[0] in (400, 403)


def test_activations_returns_the_outputs_of_the_layers(backend, rng):
    stack = [layers.Dense(5), layers.ReLU(), layers.Dropout(0.5), layers.Sequential([layers.Dense(3), layers.Tanh()])]
    model, x = xpnet.Sequential(stack, (4,), backend), rng.normal(size=(6, 4)).astype("float32")
    outputs = model.activations(x)
    assert list(outputs) == ["0", "1", "2", "3"] and [a.shape for a in outputs.values()] == [(6, 5)] * 3 + [(6, 3)]
    np.testing.assert_array_equal(outputs["1"], np.maximum(outputs["0"], 0.0))
    np.testing.assert_array_equal(outputs["2"], outputs["1"])
    np.testing.assert_allclose(outputs["3"], model.predict(x), rtol=1e-6)


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page():
    """A page in a headless Chromium. An error on the page fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = (os.environ.get("XPNET_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if program is None:
        pytest.skip("Chromium is not on the PATH, and XPNET_CHROMIUM does not name it")
    errors = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1400})
        page.on("pageerror", lambda error: errors.append(error))
        yield page
        browser.close()
    assert not errors


def draw(page, strokes):
    box = page.locator("#paper").bounding_box()
    for points in strokes:
        positions = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        page.mouse.move(*positions[0])
        page.mouse.down()
        for position in positions[1:]:
            page.mouse.move(*position, steps=3)
        page.mouse.up()


def expect_prediction(page, text):
    page.wait_for_function("text => document.querySelector('#prediction').textContent === text", arg=text, timeout=2000)


@pytest.mark.slow
def test_small_digits_drawn_in_a_browser_are_classified_correctly(page, port, classifier):
    page.goto(f"http://127.0.0.1:{port}/")
    for digit in DIGITS:
        draw(page, DIGITS[digit])
        expect_prediction(page, str(digit))
        assert page.locator(".layer").count() == 3
        page.click("#clear")
        expect_prediction(page, "nothing yet")
    wrong = classifier.mistakes[0]
    page.locator("#mistakes button").first.click()
    expect_prediction(page, str(wrong["prediction"]))
    assert f"{wrong['label']} → {wrong['prediction']}" in page.locator("#mistakes button").first.inner_text()
    draw(page, [[(0.3, 0.3), (0.6, 0.6)]])
    page.click("#undo")
    expect_prediction(page, "nothing yet")


@pytest.mark.slow
@pytest.mark.mnist
def test_digits_drawn_in_a_browser_are_classified_correctly(page, example):
    classifier = example.make_classifier("cnn", None, None, "cpu", epochs=1)
    assert classifier.accuracy > 0.98
    serving = serve(example, classifier)
    page.goto(f"http://127.0.0.1:{next(serving)}/")
    for digit, strokes in DIGITS.items():
        draw(page, strokes)
        expect_prediction(page, str(digit))
        assert page.locator(".layer").count() == 5 and page.locator(".maps canvas").count() > 90
        page.click("#clear")
        expect_prediction(page, "nothing yet")
    next(serving, None)
