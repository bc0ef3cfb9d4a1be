"""Draw a digit, and see what a network takes it for, and what goes on inside.

    python examples/draw_digit.py                        # trains a small convolutional network, then opens the page
    python examples/draw_digit.py --model mlp
    python examples/draw_digit.py --load digits.safetensors      # one that `mnist.py --save` has written

The page is served to this machine only. It needs bottle: pip install "xpnet[draw]"
"""

import argparse
import json
import math
import sys
import threading
import webbrowser
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle
import mnist
import numpy

import xpnet

PAGE = Path(__file__).with_name("draw_digit_page")
MOST_BYTES, MOST_POINTS = 2**20, 20_000


def as_digit(strokes, size=28, ink=20.0, radius=1.2):
    """Strokes, a list of (points, 2) arrays of x and y, as MNIST has its digits: a grey image (size, size) of uint8.

    The drawing is scaled into a square of `ink` pixels, keeping its proportions, and moved so that its centre of mass
    is the image's. The pen's edge is smooth: a pixel is as dark as much as the pen covers of it. LeCun et al. 1998.
    """
    starts, ends = _segments(strokes)
    if not len(starts):
        return numpy.zeros((size, size), numpy.uint8)
    low, high = numpy.minimum(starts, ends).min(axis=0), numpy.maximum(starts, ends).max(axis=0)
    extent = max((high - low).max(), 0.1)  # a dot stays a dot
    scale, middle = (ink - 2.0 * radius) / extent, (low + high) / 2.0
    starts, ends = ((points - middle) * scale + size / 2.0 for points in (starts, ends))
    image = _ink(starts, ends, size, radius)
    place = numpy.arange(size) + 0.5
    mass = numpy.array([image.sum(axis=0) @ place, image.sum(axis=1) @ place]) / image.sum()
    shift = size / 2.0 - mass
    return numpy.round(255.0 * _ink(starts + shift, ends + shift, size, radius)).astype(numpy.uint8)


def as_small_digit(strokes):
    """The same as the digits that come with xpnet: 8×8 counts, from 0 to 16, of the inked among 4×4 pixels.

    Those fill their square, and the mean of a pixel is 4.9 among them: a pen as wide as this gives as much ink.
    """
    large = as_digit(strokes, size=32, ink=32.0, radius=3.0) >= 128
    return large.reshape(8, 4, 8, 4).sum(axis=(1, 3)).astype(numpy.uint8)


def _segments(strokes):
    """(starts, ends), each (segments, 2). A single point is a segment of no length."""
    pairs = [(points, points) if len(points) == 1 else (points[:-1], points[1:]) for points in strokes if len(points)]
    if not pairs:
        return numpy.zeros((0, 2)), numpy.zeros((0, 2))
    return tuple(numpy.concatenate(side) for side in zip(*pairs, strict=True))


def _ink(starts, ends, size, radius):
    """How much of each pixel the pen covers, (size, size): by the distance to the nearest segment."""
    y, x = numpy.mgrid[:size, :size] + 0.5
    nearest = numpy.full((size, size), math.inf)
    for (x0, y0), (x1, y1) in zip(starts, ends, strict=True):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        along = numpy.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0.0, 1.0) if length else 0.0
        distance = numpy.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))
        numpy.minimum(nearest, distance, out=nearest)
    return numpy.clip(radius + 0.5 - nearest, 0.0, 1.0)


class Reader:
    """A model, and the test images on which it errs."""

    def __init__(self, model, task, most_mistakes=60):
        self.model, self.task = model, task
        self.draw = as_small_digit if model.input_shape[:2] == (8, 8) else as_digit
        self._lock = threading.Lock()  # one thread at a time may use a model
        images, truths = task.test
        guesses = model.predict(images).argmax(axis=1)
        self.accuracy = float((guesses == truths).mean())
        self.mistakes = [
            {"index": int(i), "truth": int(truths[i]), "guess": int(guesses[i]), "pixels": self.pixels(images[i])}
            for i in numpy.flatnonzero(guesses != truths)[:most_mistakes]
        ]

    def pixels(self, image):
        """From 0 for paper to 1 for ink."""
        return numpy.round(image / self.task.largest_pixel, 3).tolist()

    def read(self, image):
        """The probability of each digit, the image, and what each layer made of it."""
        with self._lock:
            made = self.model.activations(image[None])
        scores = list(made.values())[-1][0]
        odds = numpy.exp(scores - scores.max())
        return {
            "probabilities": (odds / odds.sum()).tolist(),
            "pixels": self.pixels(image),
            "layers": [
                _picture(self.model.layers[i], values[0])
                for i, values in enumerate(made.values())
                if type(self.model.layers[i]).__name__ in ("ReLU", "MaxPool2D", "Dense", "Residual")
            ],
        }


def _picture(layer, values):
    """A layer's outputs as maps of its channels, or as one row, between 0 and 1."""
    top = max(float(numpy.abs(values).max()), 1e-9)
    maps = numpy.moveaxis(values, -1, 0) if values.ndim == 3 else values.reshape(1, 1, -1)
    return {"name": type(layer).__name__, "shape": values.shape, "maps": numpy.round(maps / top, 3).tolist()}


class RequestError(ValueError):
    """What the browser sent cannot be read; the message goes back to it."""


def strokes_of(body):
    """The strokes in a request, {"strokes": [[[x, y], …], …]} with numbers from 0 to 1."""
    try:
        strokes = json.loads(body)["strokes"]
        arrays = [numpy.array(stroke, dtype=float).reshape(-1, 2) for stroke in strokes]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RequestError('send {"strokes": [[[x, y], …], …]}, lists of points.') from error
    if sum(map(len, arrays)) > MOST_POINTS:
        raise RequestError(f"a drawing may have {MOST_POINTS} points at most.")
    if not all(numpy.isfinite(a).all() and (numpy.abs(a - 0.5) <= 1.0).all() for a in arrays):
        raise RequestError("points lie between 0 and 1.")
    return arrays


def application(reader, port):
    """The page and its three questions, as a WSGI application that answers only to names of this machine."""
    app = bottle.Bottle()
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    @app.hook("before_request")
    def only_this_machine():
        # Else a page from elsewhere, whose name its owner lets point here, could ask too.
        if bottle.request.get_header("Host") not in hosts:
            raise bottle.HTTPError(403, "This page is for its own machine only.")

    @app.get("/")
    @app.get("/<name:re:(script[.]js|style[.]css)>")
    def file(name="index.html"):
        bottle.response.set_header("Cache-Control", "no-store")
        return bottle.static_file(name, root=PAGE)

    @app.get("/model")
    def model():
        layers = [repr(layer) for layer in reader.model.layers]
        return {"data": reader.task.name, "accuracy": reader.accuracy, "layers": layers, "mistakes": reader.mistakes}

    @app.post("/read")
    def read():
        length = bottle.request.content_length
        if length > MOST_BYTES:
            raise bottle.HTTPError(413, "That drawing is too large.")
        try:
            strokes = strokes_of(bottle.request.environ["wsgi.input"].read(max(length, 0)))
        except RequestError as error:
            raise bottle.HTTPError(400, str(error)) from error
        return reader.read(reader.draw(strokes))

    @app.get("/test/<index:int>")
    def test(index):
        images = reader.task.test.x
        if not 0 <= index < len(images):
            raise bottle.HTTPError(404, f"There are {len(images)} test images.")
        return reader.read(images[index])

    @app.error(400)
    @app.error(403)
    @app.error(404)
    @app.error(413)
    def as_text(error):
        bottle.response.content_type = "text/plain; charset=utf-8"
        return str(error.body)

    return app


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


def server(reader, port=0):
    """A server on 127.0.0.1; port 0 takes a free one, which is then in its `server_port`."""
    made = make_server("127.0.0.1", port, None, WSGIServer, _Quiet)
    made.set_app(application(reader, made.server_port))
    return made


def trained_reader(model_name, load, data_dir, backend, epochs):
    """A reader with a model from a file, or a freshly trained one."""
    task = mnist.load_task("mnist", data_dir)
    if load:
        model = xpnet.load(load, backend)
        if model.input_shape[:2] == (8, 8):
            task = mnist.digits_task()
    else:
        recipe = mnist.recipe_for(task, model_name, epochs)
        model = recipe.build(task.train.x.shape[1:], backend, 0, task.largest_pixel)
        print(f"training on {task.name} …", flush=True)
        mnist.train(model, *task.train, recipe)
    return Reader(model, task)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=mnist.RECIPES, default="cnn", help="what to train (default: %(default)s)")
    parser.add_argument("--load", type=Path, metavar="PATH", help="a model file, instead of training")
    parser.add_argument("--epochs", type=mnist.positive(int), help="times through the data (default: the recipe's)")
    parser.add_argument("--data-dir", type=Path, help="a folder with MNIST's four files")
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" (default: %(default)s)')
    parser.add_argument("--port", type=int, default=0, help="of the page (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    options = parser.parse_args()
    try:
        reader = trained_reader(options.model, options.load, options.data_dir, options.backend, options.epochs)
    except (xpnet.errors.XpnetError, OSError) as error:
        sys.exit(f"draw_digit.py: {error}")
    with server(reader, options.port) as serving:
        address = f"http://127.0.0.1:{serving.server_port}/"
        print(f"test accuracy {reader.accuracy:.4f}; draw at {address} (Ctrl-C ends)", flush=True)
        if not options.no_browser:
            webbrowser.open(address)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
