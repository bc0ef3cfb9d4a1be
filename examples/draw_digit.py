"""A web page on which you draw a digit and see the prediction of a network and the activations of its layers.

    python examples/draw_digit.py                        # trains a small convolutional network, then opens the page
    python examples/draw_digit.py --model mlp
    python examples/draw_digit.py --load digits.safetensors      # a model that `mnist.py --save` has written
    python examples/draw_digit.py --host 0.0.0.0                 # also for a phone in the same network

The server answers only to this machine, unless you pass --host. It needs bottle and waitress: pip install "xpnet[draw]"
"""

import argparse
import json
import math
import sys
import webbrowser
from pathlib import Path

import bottle
import mnist
import numpy
from local_server import LocalServer

import xpnet
from xpnet import attribution

PAGE = Path(__file__).with_name("draw_digit_page")
MAX_POINTS = 20_000  # of one drawing
MAX_MAPS = 64  # of one layer
SAME_NUMBERS = ("Rescale", "Reshape", "Flatten", "Dropout", "RandomAffine")  # layers that show nothing new


def as_digit(strokes, size=28, ink=20.0, radius=1.2):
    """Render strokes like a digit of MNIST (LeCun et al. 1998). Returns (image, frame).

    strokes: a list of arrays (points, 2) of x and y. The drawing is scaled to fit a square of `ink` pixels, with its
    proportions kept, and centered by its center of mass. Edges are antialiased. radius: of the pen, in pixels.

    image: grayscale, (size, size) of uint8. frame: the square of the drawing that it shows, [left, top, side].
    """
    starts, ends = _segments(strokes)
    if not len(starts):
        return numpy.zeros((size, size), numpy.uint8), [0.0, 0.0, 1.0]
    low, high = numpy.minimum(starts, ends).min(axis=0), numpy.maximum(starts, ends).max(axis=0)
    extent = max((high - low).max(), 0.1)  # at least 0.1, so that a dot stays small
    scale, middle = (ink - 2.0 * radius) / extent, (low + high) / 2.0
    starts, ends = ((points - middle) * scale + size / 2.0 for points in (starts, ends))
    image = _ink(starts, ends, size, radius)
    pixels = numpy.arange(size) + 0.5
    center = numpy.array([image.sum(axis=0) @ pixels, image.sum(axis=1) @ pixels]) / image.sum()
    shift = size / 2.0 - center
    image = numpy.round(255.0 * _ink(starts + shift, ends + shift, size, radius)).astype(numpy.uint8)
    return image, [*(middle - (shift + size / 2.0) / scale).tolist(), float(size / scale)]


def as_small_digit(strokes):
    """Render strokes like the digits that ship with xpnet: (8, 8), the number of inked pixels in each 4×4 square.

    Those digits fill their square and have a mean of 4.9; with this radius, drawings have about the same mean. Returns
    (image, frame), like `as_digit`.
    """
    large, frame = as_digit(strokes, size=32, ink=32.0, radius=3.0)
    return (large >= 128).reshape(8, 4, 8, 4).sum(axis=(1, 3)).astype(numpy.uint8), frame


def _segments(strokes):
    """(starts, ends) of the line segments, each (segments, 2). A single point is a segment of length 0."""
    pairs = [(points, points) if len(points) == 1 else (points[:-1], points[1:]) for points in strokes if len(points)]
    if not pairs:
        return numpy.zeros((0, 2)), numpy.zeros((0, 2))
    return tuple(numpy.concatenate(side) for side in zip(*pairs, strict=True))


def _ink(starts, ends, size, radius, together=32):
    """The share of each pixel that the pen covers, (size, size), from the distance to the nearest segment.

    together: the number of segments that are computed at once.
    """
    pixels = numpy.arange(size) + 0.5
    nearest = numpy.full((size, size), math.inf)  # the square of the distance
    for i in range(0, len(starts), together):
        start, end = (points[i : i + together, :, None, None] for points in (starts, ends))  # (segments, 2, 1, 1)
        (dx, dy), (x, y) = (end - start).swapaxes(0, 1), (pixels - start[:, 0], pixels[:, None] - start[:, 1])
        length = dx**2 + dy**2
        along = numpy.clip((x * dx + y * dy) / numpy.where(length > 0.0, length, 1.0), 0.0, 1.0)
        squares = (x - along * dx) ** 2 + (y - along * dy) ** 2
        numpy.minimum(nearest, squares.min(axis=0), out=nearest)
    return numpy.clip(radius + 0.5 - numpy.sqrt(nearest), 0.0, 1.0)


class Classifier:
    """A model and the test images that it misclassifies."""

    def __init__(self, model, task, max_mistakes=60):
        self.model, self.task = model, task
        self.render = as_small_digit if model.input_shape[:2] == (8, 8) else as_digit
        images, labels = task.test
        predictions = model.predict(images).argmax(axis=1)
        self.accuracy = float((predictions == labels).mean())
        self.mistakes = [
            {
                "index": int(i),
                "label": int(labels[i]),
                "prediction": int(predictions[i]),
                "pixels": self.pixels(images[i]),
            }
            for i in numpy.flatnonzero(predictions != labels)[:max_mistakes]
        ]

    def pixels(self, image):
        """The pixels as lists of numbers from 0 for paper to 1 for ink."""
        return numpy.round(image / self.task.largest_pixel, 3).tolist()

    def classify(self, image, frame=(0.0, 0.0, 1.0), saliency=False):
        """The probability of each digit, the image, the outputs of the layers and, if wanted, the saliency."""
        activations = self.model.activations(image[None])
        logits = list(activations.values())[-1][0]
        exponentials = numpy.exp(logits - logits.max())
        result = {
            "probabilities": (exponentials / exponentials.sum()).tolist(),
            "pixels": self.pixels(image),
            "frame": frame,
            "layers": [
                _feature_maps(self.model.layers[i], values[0])
                for i, values in enumerate(activations.values())
                if type(self.model.layers[i]).__name__ not in SAME_NUMBERS
            ],
        }
        if saliency:
            gradient = attribution.saliency(self.model, image[None].astype(numpy.float32))[0]
            result["saliency"] = _from_minus_one_to_one(gradient)
        return result


def _feature_maps(layer, values):
    """The outputs of a layer, from -1 to 1: one map for each of the first channels, or one row."""
    maps = numpy.moveaxis(values, -1, 0) if values.ndim == 3 else values.reshape(1, 1, -1)
    return {"name": type(layer).__name__, "shape": values.shape, "maps": _from_minus_one_to_one(maps)[:MAX_MAPS]}


def _from_minus_one_to_one(values):
    values = values.astype(float)  # because those of float32 would have all their digits in JSON
    return numpy.round(values / max(numpy.abs(values).max(), 1e-9), 2).tolist()


class RequestError(ValueError):
    """A request of the browser is invalid; the message is sent back."""


def strokes_of(body):
    """The strokes of a request {"strokes": [[[x, y], …], …]}, with coordinates from 0 to 1."""
    try:
        strokes = json.loads(body)["strokes"]
        if not isinstance(strokes, list) or not all(isinstance(stroke, list) for stroke in strokes):
            raise TypeError("not a list of lists")
        if len(strokes) > MAX_POINTS or sum(map(len, strokes)) > MAX_POINTS:
            raise RequestError(f"a drawing must have at most {MAX_POINTS} points.")
        arrays = [numpy.array(stroke) if stroke else numpy.zeros((0, 2)) for stroke in strokes]
        if not all(a.ndim == 2 and a.shape[1] == 2 and a.dtype.kind in "iuf" for a in arrays):
            raise TypeError("not points")
    except RequestError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RequestError('the request must be {"strokes": [[[x, y], …], …]}, lists of points.') from error
    arrays = [a.astype(float) for a in arrays]
    if not all(numpy.isfinite(a).all() and (numpy.abs(a - 0.5) <= 1.0).all() for a in arrays):
        raise RequestError("coordinates must be between 0 and 1.")
    return arrays


def application(classifier):
    """The WSGI application that serves the page and answers its requests. LocalServer checks their origin."""
    app = bottle.Bottle()

    @app.get("/")
    @app.get("/<name:re:(script[.]js|style[.]css)>")
    def file(name="index.html"):
        return bottle.static_file(name, root=PAGE)

    @app.get("/model")
    def model():
        layers = [repr(layer) for layer in classifier.model.layers]
        return {
            "data": classifier.task.name,
            "accuracy": classifier.accuracy,
            "layers": layers,
            "mistakes": classifier.mistakes,
        }

    @app.post("/classify")
    def classify():
        try:
            strokes = strokes_of(bottle.request.environ["wsgi.input"].read())
        except RequestError as error:
            raise bottle.HTTPError(400, str(error)) from error
        return classifier.classify(*classifier.render(strokes), saliency="saliency" in bottle.request.query)

    @app.get("/test/<index:int>")
    def test(index):
        images = classifier.task.test.x
        if not 0 <= index < len(images):
            raise bottle.HTTPError(404, f"There are {len(images)} test images.")
        return classifier.classify(images[index], saliency="saliency" in bottle.request.query)

    def as_text(error):
        bottle.response.content_type = "text/plain; charset=utf-8"
        return str(error.body)

    app.default_error_handler = as_text
    return app


def make_local_server(classifier, port=0, host="127.0.0.1"):
    """A server of the page. Port 0 means a free port; its number is in `server_port`."""
    return LocalServer(application(classifier), port, host)


def make_classifier(model_name, load, data_dir, backend, epochs):
    """A classifier with a model from the file `load`, or else with a newly trained model."""
    if load:
        model = xpnet.load(load, backend)
        small = model.input_shape[:2] == (8, 8)
        task = mnist.digits_task() if small else mnist.load_task("mnist", data_dir)
    else:
        task = mnist.load_task("mnist", data_dir)
        recipe = mnist.recipe_for(task, model_name, epochs)
        model = recipe.build(task.train.x.shape[1:], backend, 0, task.largest_pixel)
        print(f"training on {task.name} …", flush=True)
        mnist.train(model, *task.train, recipe)
    return Classifier(model, task)


def port(text):
    if not 0 <= (value := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, not {text}")
    return value


HOST = "an address of this machine at which other devices may open the page, 0.0.0.0 for all (default: %(default)s)"
SHARED = """
Warning: every device that can reach this machine, such as those in the same Wi-Fi, can connect to this port.
Only a browser that has opened the link above can use the page; the link works once, also on a phone. The connection is
not encrypted: others in the network may be able to read it, and to use the page with what they read. Do this only in a
network whose users you trust."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=mnist.RECIPES, default="cnn", help="(default: %(default)s)")
    parser.add_argument("--load", type=Path, metavar="PATH", help="load this model file instead of training")
    parser.add_argument("--epochs", type=mnist.positive(int), help="epochs of training (default: the model's recipe)")
    parser.add_argument("--data-dir", type=Path, help="a folder with the four files of MNIST")
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=HOST)
    parser.add_argument("--port", type=port, default=0, help="the port of the server (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    options = parser.parse_args()
    try:
        server = LocalServer(None, options.port, options.host)  # before the training, in case it fails
    except OSError as error:
        sys.exit(f"draw_digit.py: the page cannot be served at {options.host}, port {options.port}: {error}")
    with server:
        try:
            classifier = make_classifier(options.model, options.load, options.data_dir, options.backend, options.epochs)
        except (xpnet.errors.XpnetError, OSError) as error:
            sys.exit(f"draw_digit.py: {error}")
        server.answers = application(classifier)
        server.on_entry = lambda: print(f"The link was opened. For another browser: {server.new_link()}", flush=True)
        link = server.new_link()
        print(f"test accuracy {classifier.accuracy:.4f}; stop with Ctrl-C; draw at {link}", flush=True)
        if server.is_shared:
            print(SHARED, flush=True)
        elif not options.no_browser:
            webbrowser.open(link)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
