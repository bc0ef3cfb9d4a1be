"""examples/draw_digit.py: rendering of drawings, the server, and the page in a real browser."""

import contextlib
import http.client
import importlib
import itertools
import json
import math
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from chromium import chromium

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
    image, _ = example.as_digit(arrays(DIGITS[digit]))
    assert image.shape == (28, 28) and image.dtype == np.uint8 and image.max() == 255
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 20 <= max(height, width) <= 22  # 20 pixels, and partly covered ones at the edges
    mass = image / image.sum()
    assert mass.sum(axis=0) @ np.arange(28) == pytest.approx(13.5, abs=0.1)
    assert mass.sum(axis=1) @ np.arange(28) == pytest.approx(13.5, abs=0.1)


def test_size_and_position_of_the_drawing_do_not_matter(example):
    for strokes in DIGITS.values():
        large, _ = example.as_digit(arrays(strokes))
        small, _ = example.as_digit(arrays(strokes, 0.4, (0.5, 0.1)))
        assert np.abs(large.astype(int) - small.astype(int)).max() <= 1


def test_empty_drawings_and_dots_work_and_the_order_of_strokes_does_not_matter(example):
    assert not example.as_digit([])[0].any() and not example.as_digit([np.zeros((0, 2))])[0].any()
    dot, _ = example.as_digit([np.array([[0.9, 0.1]])])
    assert dot[13:15, 13:15].min() > 250 and (dot > 0).sum() < 25
    strokes = arrays(DIGITS[4])
    reverse = [s[::-1] for s in strokes[::-1]]
    np.testing.assert_array_equal(example.as_digit(strokes)[0], example.as_digit(reverse)[0])


def test_small_digits_count_pixels(example):
    image, _ = example.as_small_digit(arrays(DIGITS[0]))
    assert image.shape == (8, 8) and image.max() <= 16 and image[3:5, 3:5].max() < image.max()


@pytest.mark.parametrize("digit", DIGITS)
@pytest.mark.parametrize("render", ["as_digit", "as_small_digit"])
def test_the_frame_tells_which_pixel_shows_a_point_of_the_drawing(example, render, digit):
    for strokes in (arrays(DIGITS[digit]), arrays(DIGITS[digit], 0.4, (0.5, 0.1))):
        image, (left, top, side) = getattr(example, render)(strokes)
        pixels = ((np.concatenate(strokes) - (left, top)) / side * len(image)).astype(int)
        inside = pixels[((pixels >= 0) & (pixels < len(image))).all(axis=1)]  # 8 × 8 pixels may cut an end off
        assert len(inside) >= 0.6 * len(pixels) and image[inside[:, 1], inside[:, 0]].min() > 0


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


def test_all_layers_that_compute_something_are_shown(example, classifier):
    model = importlib.import_module("mnist").build_cnn((8, 8), "cpu", 0, 16)
    shown = example.Classifier(model, classifier.task).classify(classifier.task.test.x[0])["layers"]
    assert [layer["name"] for layer in shown] == [*["Conv2D", "MaxPool2D", "BatchNorm", "ReLU"] * 2, "Dense"]
    outputs = model.activations(classifier.task.test.x[:1])
    for layer, values in zip(shown[:2], [outputs["2"][0], outputs["3"][0]], strict=True):
        maps = np.moveaxis(values, -1, 0) / np.abs(values).max()
        np.testing.assert_allclose(layer["maps"], maps, atol=0.006)


def test_many_maps_are_not_all_sent(example, classifier):
    model = xpnet.Sequential(
        [layers.Reshape((8, 8, 1)), layers.Conv2D(100, 1), layers.Flatten(), layers.Dense(10)], (8, 8)
    )
    shown = example.Classifier(model, classifier.task).classify(classifier.task.test.x[0])["layers"]
    assert shown[0]["shape"] == (8, 8, 100) and np.shape(shown[0]["maps"]) == (64, 8, 8)


def test_the_saliency_is_the_gradient_of_the_score_of_the_prediction(port, classifier):
    for method, path, body in (("POST", "/classify", json.dumps({"strokes": DIGITS[4]})), ("GET", "/test/3", None)):
        plain = json.loads(request(port, method, path, body)[1])
        result = json.loads(request(port, method, f"{path}?saliency", body)[1])
        saliency = np.array(result.pop("saliency"))
        assert result == plain and len(result["frame"]) == 3
        x = np.array([result["pixels"]]) * classifier.task.largest_pixel
        gradient = xpnet.attribution.saliency(classifier.model, x, int(np.argmax(result["probabilities"])))[0]
        np.testing.assert_allclose(saliency, gradient / np.abs(gradient).max(), atol=0.006)


@pytest.mark.parametrize(("last", "largest"), [([layers.Softmax()], 1.0), ([layers.ReLU()], 0.0)])
def test_the_saliency_of_any_loaded_model_is_drawn(example, classifier, last, largest):
    model = xpnet.Sequential([layers.Flatten(), layers.Dense(10), *last], (8, 8), "cpu")
    if not largest:
        model.parameters[1].value[:] = -1e3  # no ReLU is active
    result = example.Classifier(model, classifier.task).classify(classifier.task.test.x[0], saliency=True)
    assert np.abs(result["saliency"]).max() == largest


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


# Other devices --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(example, classifier):
    """A server for the whole network."""
    with example.make_local_server(classifier, host="0.0.0.0") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answer(port, path, method="GET", body=None, **headers):
    """(status, headers, content) of the answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def path_of(link):
    """The path with the token of a link."""
    return "/" + link.partition("//")[2].partition("/")[2]


def test_without_a_link_nothing_of_a_shared_server_can_be_read(shared):
    shared.new_link()
    for path in ("/", "/model", "/script.js", "/test/1", "/?token=", "/?token=None", "/?token=" + "x" * 43, "/nothing"):
        status, headers, content = answer(shared.server_port, path)
        assert status == 403 and "Set-Cookie" not in headers and b"Open the link" in content
    assert answer(shared.server_port, "/classify", "POST", json.dumps({"strokes": DIGITS[0]}))[0] == 403


def test_a_link_works_once_and_gives_its_browser_a_cookie(shared):
    port, path = shared.server_port, path_of(shared.new_link())
    for wrong in (path[:-1], path + "x", path + "&a=b", "/model" + path[1:], path.replace("?", "?&")):
        assert answer(port, wrong)[0] == 403  # and the link still works
    assert answer(port, path, "HEAD")[0] == 403
    status, headers, content = answer(port, path)
    assert status == 200 and b"Draw a digit" in content
    cookie, *attributes = headers["Set-Cookie"].split("; ")
    assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Strict"} and len(cookie.partition("=")[2]) >= 43
    assert answer(port, path)[0] == 403  # of another browser
    assert answer(port, path, Cookie=cookie)[0] == 200  # of the same browser, which loads the page again
    body = json.dumps({"strokes": DIGITS[0]})
    for header in (cookie, f"a=b; {cookie}; c", f"{cookie.partition('=')[0]}=x;{cookie}"):
        assert answer(port, "/classify", "POST", body, Cookie=header)[0] == 200
    for header in ("", cookie[:-1], cookie + "x", cookie.replace("=", "x="), cookie.partition("=")[2], "\xe9=\xff; ="):
        assert answer(port, "/classify", "POST", body, Cookie=header.encode("latin-1"))[0] == 403
    assert "Set-Cookie" not in answer(port, "/model", Cookie=cookie)[1]


def test_of_browsers_that_open_a_link_at_once_one_is_answered(shared, monkeypatch):
    module = importlib.import_module("local_server")
    equal = module._equal
    monkeypatch.setattr(module, "_equal", lambda *texts: (equal(*texts), time.sleep(0.01))[0])  # so that they meet
    for _ in range(2):
        path, start, statuses = path_of(shared.new_link()), threading.Barrier(8), []

        def visit(path=path, start=start, statuses=statuses):
            start.wait(10)
            statuses.append(answer(shared.server_port, path)[0])

        threads = [threading.Thread(target=visit) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200] + [403] * 7


def test_a_new_link_ends_the_one_before_and_a_visit_is_reported(shared):
    visits, first, second = [], shared.new_link(), shared.new_link()
    shared.on_entry = lambda: visits.append(shared.new_link())
    assert answer(shared.server_port, path_of(first))[0] == 403 and not visits
    assert answer(shared.server_port, path_of(second))[0] == 200 and len(visits) == 1
    assert answer(shared.server_port, path_of(visits[0]))[0] == 200 and len(set(visits)) == 2


def test_a_shared_server_answers_only_to_addresses_of_its_machine_and_to_its_own_pages(shared):
    port = shared.server_port
    cookie = answer(port, path_of(shared.new_link()))[1]["Set-Cookie"].partition(";")[0]
    for host in (f"127.0.0.1:{port}", f"LocalHost:{port}"):
        assert answer(port, "/model", Host=host, Cookie=cookie)[0] == 200
        assert answer(port, "/model", Host=host, Cookie=cookie, Origin=f"http://{host.lower()}")[0] == 200
    for host in (
        "example.org",
        f"example.org:{port}",
        "127.0.0.1",
        f"0.0.0.0:{port}",
        f"192.0.2.77:{port}",
        f":{port}",
    ):
        status, _, content = answer(port, "/model", Host=host, Cookie=cookie)
        assert status == 403 and b"its own addresses" in content
    link = shared.new_link()  # which another name does not use up
    assert answer(port, path_of(link), Host=f"example.org:{port}")[0] == 403
    assert answer(port, path_of(link))[0] == 200
    for origin in ("null", "http://example.org", f"https://127.0.0.1:{port}", f"http://192.0.2.77:{port}", ""):
        assert answer(port, "/model", Cookie=cookie, Origin=origin)[0] == 403


def test_the_link_of_a_shared_server_leads_to_the_address_of_the_machine(shared):
    host, _, path = shared.new_link().removeprefix("http://").partition("/")
    assert host.endswith(f":{shared.server_port}") and host != f"0.0.0.0:{shared.server_port}"
    with contextlib.closing(http.client.HTTPConnection(host, timeout=10)) as connection:
        connection.request("GET", f"/{path}", headers={"Origin": f"http://{host}"})
        response = connection.getresponse()
        assert response.status == 200 and b"Draw a digit" in response.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "::1"])
def test_a_server_for_this_machine_needs_no_token(example, classifier, host):
    try:
        server = example.make_local_server(classifier, host=host)
    except OSError as error:
        pytest.skip(f"{host} is not an address of this machine: {error}")
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        link = server.new_link()
        assert not server.is_shared and link.endswith(f":{server.server_port}/") and link == server.new_link()
        with contextlib.closing(http.client.HTTPConnection(link[7:-1], timeout=10)) as connection:
            connection.request("GET", "/model")
            response = connection.getresponse()
            assert response.status == 200 and "Set-Cookie" not in response.headers
        server.shutdown()


def test_a_model_of_small_digits_is_loaded_without_mnist(example, classifier, monkeypatch, tmp_path):
    monkeypatch.setattr(example.mnist, "load_task", None)
    classifier.model.save(tmp_path / "small.safetensors")
    loaded = example.make_classifier("cnn", tmp_path / "small.safetensors", None, "cpu", None)
    assert loaded.task.name == "digits" and loaded.accuracy == classifier.accuracy


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_the_program_warns_of_the_network_and_prints_a_link(example, classifier, host, monkeypatch, capsys):
    opened, served = [], []

    def serve_once(server):
        served.append(server)
        server.on_entry()
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "make_classifier", lambda *_: classifier)
    monkeypatch.setattr(example.webbrowser, "open", opened.append)
    monkeypatch.setattr(example.LocalServer, "serve_forever", serve_once)
    monkeypatch.setattr(sys, "argv", ["draw_digit.py", "--host", host])
    example.main()
    (server,), text = served, capsys.readouterr().out
    tokens = {word for word in text.split() if "?token=" in word}
    if host == "127.0.0.1":
        assert opened == [server.new_link()] and opened[0] in text and not tokens and "Warning" not in text
    else:
        assert not opened and len(tokens) == 2 and "Warning: every device that can reach this machine" in text


def test_a_host_or_port_that_cannot_be_used_is_an_error_before_the_training(example, monkeypatch):
    monkeypatch.setattr(example, "make_classifier", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, part in (
            (["--host", "no such host"], "'no such host' is not a name or an address of this machine"),
            (["--host", ""], "'' is not a name or an address"),
            (["--host", "203.0.113.9"], "at 203.0.113.9, port 0: "),
            (["--port", port], f"at 127.0.0.1, port {port}: "),
            (["--port", "65536"], "2"),
        ):
            monkeypatch.setattr(sys, "argv", ["draw_digit.py", *options])
            with pytest.raises(SystemExit) as caught:
                example.main()
            assert part in str(caught.value)


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
    errors = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 1400})
        page.on("pageerror", lambda error: errors.append(error))
        yield page
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


def inked(page, canvas):
    """The number of pixels of a canvas that something is drawn on."""
    code = (
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length"
    )
    return page.locator(canvas).evaluate(code)


@pytest.mark.slow
def test_the_hint_is_shown_while_nothing_is_drawn(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    assert page.get_by_text("Draw here").is_visible()
    box = page.locator("#paper").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down(button="right")  # which does not draw
    page.mouse.up(button="right")
    assert page.get_by_text("Draw here").is_visible()
    for button in ("Clear", "Undo"):
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.down()
        assert page.get_by_text("Draw here").is_hidden() and inked(page, "#paper") > 100
        page.mouse.up()
        page.get_by_role("button", name=button).click()
        assert page.get_by_text("Draw here").is_visible() and inked(page, "#paper") == 0
    page.locator("#mistakes button").first.click()
    assert page.get_by_text("Draw here").is_hidden() and inked(page, "#paper") > 100
    page.get_by_role("button", name="Clear").click()
    expect_prediction(page, "nothing yet")
    assert page.get_by_text("Draw here").is_visible() and inked(page, "#paper") == 0


@pytest.mark.slow
def test_the_keyboard_draws(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "paper" and page.locator("#pencil").is_visible()
    page.keyboard.press("ArrowUp")
    assert inked(page, "#paper") == 0
    for key in ("Space", *["ArrowDown"] * 20, "Space"):
        page.keyboard.press(key)
    expect_prediction(page, "1")
    page.keyboard.press("Backspace")
    expect_prediction(page, "nothing yet")
    page.keyboard.press("Space")
    page.keyboard.down("ArrowUp")
    for _ in range(5):
        page.keyboard.press("ArrowLeft")  # both keys are held
    page.keyboard.up("ArrowUp")
    (points,) = page.evaluate("strokes")
    moved = np.diff(points, axis=0)
    np.testing.assert_allclose(moved[1:], [[-0.025, -0.025]] * 5, atol=1e-6)
    page.keyboard.press("Tab")  # leaves, and lifts the pen
    assert page.locator("#pencil").is_hidden() and page.evaluate("stroke") is None


def touch(session, kind, *points):
    points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
    session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@pytest.mark.slow
def test_a_finger_draws_and_a_second_one_does_not(page, port):
    page = page.context.browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True).new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    session, box = page.context.new_cdp_session(page), page.locator("#paper").bounding_box()
    x, top, bottom = box["x"] + box["width"] / 2, box["y"] + 40, box["y"] + box["height"] - 40
    touch(session, "touchStart", (x, top))
    for i in range(1, 11):
        touch(session, "touchMove", (x, top + i * (bottom - top) / 10), *[(box["x"] + 20, top + i)] * (i > 2))
    touch(session, "touchEnd")
    expect_prediction(page, "1")
    (points,) = page.evaluate("strokes")
    np.testing.assert_allclose(np.array(points)[:, 0], 0.5, atol=0.01)
    assert page.evaluate("scrollY") == 0


@pytest.mark.slow
def test_the_switch_shows_what_the_network_looks_at_while_one_draws(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    switch = page.get_by_role("switch", name="Show what the network looks at")
    switch.check()
    assert page.get_by_text("More ink here would lower it.").is_visible() and inked(page, "#overlay") == 0
    box = page.locator("#paper").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 400, steps=10)
    page.wait_for_function("() => latest?.saliency && latest.probabilities")
    assert inked(page, "#overlay") > 10_000  # before the pen is lifted
    page.mouse.up()
    expect_prediction(page, "1")
    switch.uncheck()
    assert inked(page, "#overlay") == 0
    page.wait_for_function("() => latest && !latest.saliency")
    page.locator("#mistakes button").first.click()
    switch.check()
    page.wait_for_function("() => latest?.saliency")
    assert inked(page, "#overlay") > 10_000
    page.get_by_role("button", name="Clear").click()
    assert inked(page, "#overlay") == 0


@pytest.mark.slow
def test_one_request_runs_at_a_time_and_a_late_response_is_not_shown(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    held = []
    page.route("**/classify", lambda route: held.append(route))
    draw(page, [*DIGITS[4], *DIGITS[1]])
    page.wait_for_timeout(300)
    assert len(held) == 1
    held.pop().continue_()
    page.wait_for_timeout(300)
    assert len(held) == 1 and len(json.loads(held[0].request.post_data)["strokes"]) == 3  # all that was drawn meanwhile
    page.get_by_role("button", name="Clear").click()
    held.pop().continue_()
    page.wait_for_timeout(300)
    assert page.locator("#prediction").inner_text() == "nothing yet" and not held


@pytest.mark.slow
def test_errors_are_told_in_words(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    alert = page.get_by_role("alert")
    for part, answer in (
        ("The program does not answer.", lambda route: route.abort()),
        ("Look for errors where draw_digit.py runs.", lambda route: route.fulfill(status=500, body="Traceback")),
        ("Look for errors where draw_digit.py runs.", lambda route: route.fulfill(status=200, body="{")),
    ):
        page.route("**/classify", answer)
        draw(page, [[(0.4, 0.4)]])
        alert.filter(has_text=part).wait_for(timeout=2000)
        page.unroute("**/classify")
        page.get_by_role("button", name="Undo").click()
        draw(page, DIGITS[1])
        alert.wait_for(state="hidden", timeout=2000)
        page.get_by_role("button", name="Clear").click()
    page.evaluate("strokes = [Array(20001).fill([0.5, 0.5])]; classify()")
    alert.filter(has_text="a drawing must have at most 20000 points.").wait_for(timeout=2000)


@pytest.mark.slow
def test_the_page_fits_the_window_and_its_buttons_fit_a_finger(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    page.get_by_role("switch").check()
    draw(page, DIGITS[2])
    expect_prediction(page, "2")
    for width, scheme in itertools.product((1360, 390, 320), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for control in page.locator("button, .switch").all():
            box = control.bounding_box()
            assert box["width"] >= 44 and box["height"] >= 44
        style = "getComputedStyle(document.body)"
        colors = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        assert colors == {"light": ["rgb(244, 242, 238)", "rgb(22, 32, 42)"],
                          "dark": ["rgb(18, 23, 29)", "rgb(238, 241, 244)"]}[scheme]  # fmt: skip


@pytest.mark.slow
def test_a_browser_opens_a_link_once(page, shared):
    link = f"http://127.0.0.1:{shared.server_port}{path_of(shared.new_link())}"
    page.goto(link)
    draw(page, DIGITS[1])
    expect_prediction(page, "1")
    assert page.url == f"http://127.0.0.1:{shared.server_port}/"  # the token is not left in the address bar
    page.reload()
    assert page.get_by_text("Draw here").is_visible()
    assert page.evaluate("document.cookie") == ""
    other = page.context.browser.new_context().new_page()
    assert other.goto(link).status == 403 and "Open the link" in other.inner_text("body")
    assert other.goto(page.url).status == 403


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
        assert page.locator(".layer").count() == 9 and page.locator(".maps canvas").count() > 90
        page.click("#clear")
        expect_prediction(page, "nothing yet")
    next(serving, None)
