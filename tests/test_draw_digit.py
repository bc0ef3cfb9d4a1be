"""examples/draw_digit.py: a drawing made to a digit, the page's server, and the page in a real browser."""

import contextlib
import http.client
import importlib
import json
import math
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import xpnet
from xpnet import layers

pytest.importorskip("bottle", reason="bottle is not installed")
EXAMPLES = Path(__file__).parents[1] / "examples"
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


def turn(t):
    return 2.0 * math.pi * t


DIGITS = {
    0: [curve(lambda t: 0.5 + 0.22 * math.sin(turn(t)), lambda t: 0.5 - 0.33 * math.cos(turn(t)))],
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


# What a drawing becomes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digit", DIGITS)
def test_a_digit_lies_as_mnists_do(example, digit):
    image = example.as_digit(arrays(DIGITS[digit]))
    assert image.shape == (28, 28) and image.dtype == np.uint8 and image.max() == 255
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 20 <= max(height, width) <= 22  # the edge's halves of a pixel count here
    mass = image / image.sum()
    assert mass.sum(axis=0) @ np.arange(28) == pytest.approx(13.5, abs=0.1)
    assert mass.sum(axis=1) @ np.arange(28) == pytest.approx(13.5, abs=0.1)


def test_size_and_place_on_the_paper_do_not_matter(example):
    for strokes in DIGITS.values():
        large = example.as_digit(arrays(strokes)).astype(int)
        small = example.as_digit(arrays(strokes, 0.4, (0.5, 0.1))).astype(int)
        assert np.abs(large - small).max() <= 1


def test_nothing_a_dot_and_the_order_of_strokes(example):
    assert not example.as_digit([]).any() and not example.as_digit([np.zeros((0, 2))]).any()
    dot = example.as_digit([np.array([[0.9, 0.1]])])
    assert dot[13:15, 13:15].min() > 250 and (dot > 0).sum() < 25
    strokes = arrays(DIGITS[4])
    np.testing.assert_array_equal(example.as_digit(strokes), example.as_digit([s[::-1] for s in strokes[::-1]]))


def test_small_digits_are_counts(example):
    image = example.as_small_digit(arrays(DIGITS[0]))
    assert image.shape == (8, 8) and image.max() <= 16 and image[3:5, 3:5].max() < image.max()


# The server -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(example):
    """A net that has learnt the small digits."""
    mnist = importlib.import_module("mnist")
    task = mnist.digits_task()
    model = mnist.build_mlp((8, 8), "cpu", 0, task.largest_pixel)
    model.fit(*task.train, epochs=8, batch_size=16, verbose=0)
    return example.Reader(model, task)


@pytest.fixture(scope="module")
def port(example, reader):
    yield from serve(example, reader)


def serve(example, reader):
    with example.server(reader) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_port
        serving.shutdown()


def ask(port, method, path, body=None, **headers):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.mark.parametrize(
    ("path", "holds"), [("/", b"Draw a digit"), ("/script.js", b"pointerdown"), ("/style.css", b"body")]
)
def test_the_page_comes_without_anything_from_elsewhere(port, path, holds):
    status, content = ask(port, "GET", path)
    assert status == 200 and holds in content
    assert b"http://" not in content and b"https://" not in content


def test_a_drawing_is_read(port, reader):
    status, content = ask(port, "POST", "/read", json.dumps({"strokes": DIGITS[0]}))
    answer = json.loads(content)
    assert status == 200 and np.argmax(answer["probabilities"]) == 0
    assert sum(answer["probabilities"]) == pytest.approx(1.0)
    assert np.array(answer["pixels"]).shape == (8, 8)
    assert [layer["name"] for layer in answer["layers"]] == ["Dense", "ReLU", "Dense"]


def test_test_images_and_mistakes(port, reader):
    about = json.loads(ask(port, "GET", "/model")[1])
    assert about["accuracy"] == pytest.approx(reader.accuracy) and about["data"] == "digits"
    assert len(about["mistakes"]) == round((1 - reader.accuracy) * len(reader.task.test.x))
    for one in about["mistakes"]:
        answer = json.loads(ask(port, "GET", f"/test/{one['index']}")[1])
        assert np.argmax(answer["probabilities"]) == one["guess"] != one["truth"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/read", "", 400),
        ("POST", "/read", "no JSON", 400),
        ("POST", "/read", "[1, 2]", 400),
        ("POST", "/read", '{"strokes": 5}', 400),
        ("POST", "/read", '{"strokes": [[1, 2, 3]]}', 400),
        ("POST", "/read", '{"strokes": [[["a", "b"]]]}', 400),
        ("POST", "/read", '{"strokes": [[[NaN, 0.5]]]}', 400),
        ("POST", "/read", '{"strokes": [[[7, 0.5]]]}', 400),
        ("POST", "/read", json.dumps({"strokes": [[[0.5, 0.5]] * 20_001]}), 400),
        ("POST", "/read", "[" * 5000, 400),
        ("GET", "/test/100000", None, 404),
        ("GET", "/test/-1", None, 404),
        ("GET", "/draw_digit.py", None, 404),
        ("GET", "/..%2fdraw_digit.py", None, 404),
    ],
)
def test_what_cannot_be_answered_is_refused(port, method, path, body, status):
    assert ask(port, method, path, body)[0] == status


def test_a_drawing_that_is_too_large_is_refused_unread(port):
    assert ask(port, "POST", "/read", None, **{"Content-Length": str(2**20 + 1)})[0] == 413


def test_only_this_machine_is_answered(port):
    assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for host in ("example.org", f"example.org:{port}", "127.0.0.1", ""):
        assert ask(port, "GET", "/model", Host=host)[0] in (400, 403)


def test_activations_are_what_the_layers_make(backend, rng):
    stack = [layers.Dense(5), layers.ReLU(), layers.Dropout(0.5), layers.Sequential([layers.Dense(3), layers.Tanh()])]
    model, x = xpnet.Sequential(stack, (4,), backend), rng.normal(size=(6, 4)).astype("float32")
    made = model.activations(x)
    assert list(made) == ["0", "1", "2", "3"] and [a.shape for a in made.values()] == [(6, 5)] * 3 + [(6, 3)]
    np.testing.assert_array_equal(made["1"], np.maximum(made["0"], 0.0))
    np.testing.assert_array_equal(made["2"], made["1"])
    np.testing.assert_allclose(made["3"], model.predict(x), rtol=1e-6)


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page():
    """A page of a real Chromium without a window; its errors fail the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = (os.environ.get("XPNET_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if program is None:
        pytest.skip("there is no Chromium on the PATH, and XPNET_CHROMIUM names none")
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
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=3)
        page.mouse.up()


def expect_guess(page, text):
    page.wait_for_function("text => document.querySelector('#guess').textContent === text", arg=text, timeout=2000)


@pytest.mark.slow
def test_small_digits_drawn_in_a_browser(page, port, reader):
    page.goto(f"http://127.0.0.1:{port}/")
    for digit in DIGITS:
        draw(page, DIGITS[digit])
        expect_guess(page, str(digit))
        assert page.locator(".layer").count() == 3
        page.click("#clear")
        expect_guess(page, "nothing yet")
    wrong = reader.mistakes[0]
    page.locator("#mistakes button").first.click()
    expect_guess(page, str(wrong["guess"]))
    assert f"{wrong['truth']} → {wrong['guess']}" in page.locator("#mistakes button").first.inner_text()
    draw(page, [[(0.3, 0.3), (0.6, 0.6)]])
    page.click("#undo")
    expect_guess(page, "nothing yet")


@pytest.mark.slow
@pytest.mark.mnist
def test_digits_drawn_in_a_browser_are_read_as_they_are(page, example):
    reader = example.trained_reader("cnn", None, None, "cpu", epochs=1)
    assert reader.accuracy > 0.98
    serving = serve(example, reader)
    page.goto(f"http://127.0.0.1:{next(serving)}/")
    for digit, strokes in DIGITS.items():
        draw(page, strokes)
        expect_guess(page, str(digit))
        assert page.locator(".layer").count() == 5 and page.locator(".maps canvas").count() > 90
        page.click("#clear")
        expect_guess(page, "nothing yet")
    next(serving, None)
