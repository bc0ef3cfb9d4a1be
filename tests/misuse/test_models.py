"""Wrong calls of a model's methods end in an error of xpnet that says what to do, and the model still works."""

import copy
import operator
import pickle
import threading

import numpy as np
import pytest
from misuse import Misuse, Subject, check

import xpnet
from xpnet import augment, layers
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    CaptureError,
    DataError,
    DeviceMemoryError,
    PositionError,
    ShapeError,
    StateError,
    XpnetError,
)

# Subjects: models of other kinds. -----------------------------------------------------------------------------------


class Images(Subject):
    """A small CNN on images of 6 × 6 pixels with 2 channels."""

    def build(self, rng, backend):
        self.x = rng.normal(size=(8, 6, 6, 2)).astype("float32")
        self.y = rng.integers(0, 3, 8)
        stack = [layers.Conv2D(4, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(), layers.Flatten(),
                 layers.Dense(3)]  # fmt: skip
        self.model = xpnet.Sequential(stack, (6, 6, 2), backend)


class Steps(Subject):
    """Sequences of three features and any length, with padding."""

    def build(self, rng, backend):
        self.x = rng.normal(size=(6, 5, 3)).astype("float32")
        self.x[0, 3:] = 0.0
        self.y = rng.integers(0, 3, 6)
        stack = [layers.Masking(), layers.GRU(4), layers.LSTM(4, return_sequences=False), layers.Dense(3)]
        self.model = xpnet.Sequential(stack, (None, 3), backend)


class Tokens(Subject):
    """A small language model, whose last layer is tied to the embedding."""

    def build(self, rng, backend):
        self.x = rng.integers(0, 7, (6, 5))
        self.y = rng.integers(0, 7, (6, 5))
        embedding = layers.Embedding(7, 4, name="words")
        stack = [
            embedding,
            layers.PositionalEmbedding(8),
            layers.TransformerBlock(2),
            layers.Dense(7, tied_to=embedding),
        ]
        self.model = xpnet.Sequential(stack, (None,), backend)


class Graph(Subject):
    """A graph of two inputs, "image" and "meta", and two outputs, "digit" and "odd"."""

    def build(self, rng, backend):
        self.x = [rng.normal(size=(6, 4)).astype("float32"), rng.normal(size=(6, 2)).astype("float32")]
        self.y = [rng.integers(0, 3, 6), rng.integers(0, 3, 6)]
        image, meta = xpnet.Input(4, name="image"), xpnet.Input(2, name="meta")
        h = layers.Dense(5, name="hidden")(layers.Concatenate()([image, meta]))
        self.model = xpnet.Model(
            [image, meta], [layers.Dense(3, name="digit")(h), layers.Dense(3, name="odd")(h)], backend
        )


class Lazy(Subject):
    """A model that is built by its first data; the check builds it."""

    def build(self, rng, backend):
        super().build(rng, backend)
        self.model = xpnet.Sequential([layers.Dense(5), layers.Dense(3)], backend=backend)


class Faulty(layers.Layer):
    """y = x · gain. `forward_fault(layer, x, y)` and `backward_fault(layer, grad_x)` replace what it returns."""

    forward_fault = backward_fault = None

    def build(self, input_shape):
        self.gain = self.add_parameter("gain", input_shape, "ones")
        return input_shape

    def forward(self, x):
        self.work.x = x
        y = x * self.gain.value
        return y if self.forward_fault is None else self.forward_fault(x, y)

    def backward(self, grad_y):
        self.gain.grad[...] = self.xp.sum(grad_y * self.work.x, axis=0)
        grad_x = grad_y * self.gain.value
        return grad_x if self.backward_fault is None else self.backward_fault(grad_x)


def row(name, call, error, *words, trains=False, subject=Subject):
    return Misuse(name, call, error, words, trains, subject)


def dense():
    return xpnet.Sequential([layers.Dense(3)], (4,), "cpu")


def graph_of(make):
    """A model of one input (N, 4), whose output is make(input)."""
    x = xpnet.Input(4)
    return xpnet.Model(x, make(x), backend="cpu")


def later(name, part):
    """Replace an item of a state dict."""

    def call(s):
        state = s.model.state_dict()
        state[name] = part(state[name])
        s.model.load_state_dict(state)

    return call


def changed(s, **entries):
    return {**s.model.state_dict(), **entries}


def assign(s, name, value, attribute="value"):
    parameter = next(p for p in s.model.parameters if p.name == name)
    setattr(parameter, attribute, value)


def set_weight(s, value):
    s.model[0].weight = value


def two_of(layer):
    return xpnet.Sequential([layer, layers.ReLU(), layer], (4,), "cpu")


def in_two_models(s):
    return xpnet.Sequential([s.model[0], layers.Dense(2)], (4,), "cpu")


def model_inside_itself(s):
    model = dense()
    model.layers = (*model.layers, model)
    model.predict(s.x)


def delete_layer(s):
    del s.model[0]


def replace_layer(s):
    s.model[0] = layers.Dense(5)


def own(forward=None, backward=None):
    """A call that makes a new model with a faulty layer, and takes a step."""

    def call(s):
        layer = Faulty(name="own")
        model = xpnet.Sequential([layers.Dense(4), layer, layers.Dense(3)], (4,), "cpu")
        before = model.state_dict()
        layer.forward_fault, layer.backward_fault = forward, backward
        try:
            model.train_on_batch(s.x, s.y, loss="softmax_cross_entropy", optimizer="sgd")
        finally:
            assert all((value == before[name]).all() for name, value in model.state_dict().items())
            layer.forward_fault = layer.backward_fault = None
            model.train_on_batch(s.x, s.y, loss="softmax_cross_entropy", optimizer="sgd")

    return call


def own_predict(fault):
    def call(s):
        layer = Faulty(name="own")
        model = xpnet.Sequential([layer, layers.Dense(3)], (4,), "cpu")
        layer.forward_fault = fault
        try:
            model.predict(s.x)
        finally:
            layer.forward_fault = None
            assert np.isfinite(model.predict(s.x)).all()

    return call


def building(build):
    """A call that builds a model with a layer of this build(layer, input_shape)."""

    def call(s):
        kind = type("Mine", (layers.Layer,), {"build": build, "forward": lambda self, x: x})
        return xpnet.Sequential([kind(), layers.Dense(3)], (4,), "cpu").predict(s.x)

    return call


def declaring(*arguments, **options):
    def build(layer, input_shape):
        layer.w = layer.add_parameter(*arguments, **options)
        return input_shape

    return building(build)


def buffering(*arguments):
    def build(layer, input_shape):
        layer.b = layer.add_buffer(*arguments)
        return input_shape

    return building(build)


def backward_before_forward(s):
    model = dense()
    model.backward(np.ones((12, 3), "float32"))


def backward_after(s, grad):
    s.model.forward(s.x)
    s.model.backward(grad)


def backward_in_another_thread(s):
    s.model.forward(s.x)
    found = []

    def work():
        try:
            s.model.backward(np.ones((12, 3), "float32"))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise found[0]


def apply_twice_trained(s):
    model = dense()
    model.apply_gradients("sgd")


def beside_fit(action):
    """A call of `action(subject)` in a second thread while fit runs, whose error is raised."""

    def call(s):
        found, started, done = [], threading.Event(), threading.Event()

        class Wait(xpnet.callbacks.Callback):
            def on_step_end(self, model, step):
                started.set()
                done.wait(20)

        def work():
            started.wait(20)
            try:
                action(s)
            except BaseException as error:
                found.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=work)
        thread.start()
        s.model.fit(s.x, s.y, "softmax_cross_entropy", "sgd", epochs=1, verbose=0, callbacks=[Wait()])
        thread.join()
        if found:
            raise found[0]

    return call


def in_callback(action):
    """A call of `action(subject)` from a callback of fit."""

    def call(s):
        class Act(xpnet.callbacks.Callback):
            def on_step_end(self, model, step):
                action(s)

        s.model.fit(s.x, s.y, "softmax_cross_entropy", "sgd", epochs=1, verbose=0, callbacks=[Act()])

    return call


def generate(**changes):
    def call(s):
        arguments = {"model": s.model, "prompt": np.zeros((2, 3), int), "length": 2, **changes}
        return xpnet.generate(**arguments)

    return call


def lone(layer, shape, x, **options):
    """Build a layer outside a model, and run it forward."""
    layer.build(shape, backend="cpu", **options)
    return layer.forward(x)


def tied(units, size=7, features=4, between=()):
    embedding = layers.Embedding(size, features)
    return xpnet.Sequential([embedding, *between, layers.Dense(units, tied_to=embedding)], (5,), "cpu")


def tied_to_another_model():
    other = layers.Embedding(7, 4)
    xpnet.Sequential([other], (5,), "cpu")
    return xpnet.Sequential([layers.Embedding(7, 4), layers.Dense(7, tied_to=other)], (5,), "cpu")


def padded():
    """A model that labels each step of sequences, and was trained once."""
    model = xpnet.Sequential([layers.Masking(), layers.LSTM(3)], (None, 3), "cpu")
    model.train_on_batch(np.ones((6, 5, 3)), np.zeros((6, 5), int), "softmax_cross_entropy", "sgd")
    return model


ONES = np.ones((12, 4), "float32")
SHAPES = [
    row("predict_wrong_width", lambda s: s.model.predict(s.x[:, :3]), ShapeError, "(N, 4)", "(12, 3)"),
    row("predict_one_sample", lambda s: s.model.predict(s.x[0]), ShapeError, "x[None]"),
    row("predict_too_many_axes", lambda s: s.model.predict(s.x[:, None]), ShapeError, "(N, 4)"),
    row("predict_no_samples", lambda s: s.model.predict(s.x[:0]), DataError, "empty"),
    row("predict_a_number", lambda s: s.model.predict(3.0), ShapeError, "(N, 4)"),
    row("predict_an_empty_list", lambda s: s.model.predict([]), ShapeError, "(N, 4)"),
    row("predict_ragged", lambda s: s.model.predict([[1, 2, 3, 4], [1]]), ArgumentTypeError, "x"),
    row("predict_list_of_one", lambda s: s.model.predict([s.x]), ShapeError, "not a list"),
    row("predict_dict_of_other", lambda s: s.model.predict({"image": s.x}), XpnetError, "image"),
    row("predict_none", lambda s: s.model.predict(None), ArgumentTypeError, "x"),
    row("predict_zero_features", lambda s: s.model.predict(s.x[:, :0]), ShapeError, "(N, 4)"),
    row("predict_many_axes", lambda s: s.model.predict(np.ones((1,) * 30)), ShapeError, "(N, 4)"),
    row("images_channels_first", lambda s: s.model.predict(s.x.transpose(0, 3, 1, 2)), ShapeError, "moveaxis",
        subject=Images),
    row("images_without_channels", lambda s: s.model.predict(s.x[..., 0]), ShapeError, "(N, 6, 6, 2)", subject=Images),
    row("images_of_other_size", lambda s: s.model.predict(np.ones((2, 7, 6, 2))), ShapeError, "(2, 7, 6, 2)",
        subject=Images),
    row("images_flat", lambda s: s.model.predict(np.ones((2, 72))), ShapeError, "(2, 72)", subject=Images),
    row("image_alone", lambda s: s.model.predict(s.x[0]), ShapeError, "x[None]", subject=Images),
    row("images_too_small", lambda s: xpnet.Sequential([layers.Conv2D(2, 5)], (3, 3, 1), "cpu"), ShapeError, "5"),
    row("pool_too_large", lambda s: xpnet.Sequential([layers.MaxPool2D(4)], (3, 3, 1), "cpu"), ShapeError, "4"),
    row("pool_far_beyond_the_image",
        lambda s: xpnet.Sequential([layers.MaxPool2D(10**6, 1, "same")], (3, 3, 1), "cpu"), ShapeError, "500000"),
    row("pool_far_beyond_the_sequence",
        lambda s: xpnet.Sequential([layers.AvgPool1D(10**6, 1, "same")], (3, 1), "cpu"), ShapeError, "500000"),
    row("images_of_open_size", lambda s: xpnet.Sequential([layers.Conv2D(2, 3)], (None, 8, 1), "cpu"), ShapeError,
        "images of one size"),
    row("open_second_axis", lambda s: xpnet.Sequential([layers.Dense(2)], (8, None), "cpu"), ArgumentError, "shape"),
    row("open_features", lambda s: xpnet.Sequential([layers.Dense(2)], (None,), "cpu"), ShapeError, "features"),
    row("dense_on_numbers", lambda s: xpnet.Sequential([layers.Dense(2)], (), "cpu"), ShapeError, "features"),
    row("softmax_on_numbers", lambda s: xpnet.Sequential([layers.Softmax()], (), "cpu"), ShapeError, "features"),
    row("flatten_open", lambda s: xpnet.Sequential([layers.Flatten()], (None, 3), "cpu"), ShapeError, "one size"),
    row("groups", lambda s: xpnet.Sequential([layers.Conv2D(4, 1, groups=3)], (4, 4, 4), "cpu"), ShapeError, "groups"),
    row("group_norm", lambda s: xpnet.Sequential([layers.GroupNorm(3)], (4,), "cpu"), ShapeError, "groups"),
    row("reshape", lambda s: xpnet.Sequential([layers.Reshape((3, 3))], (4,), "cpu"), ShapeError, "(3, 3)"),
    row("permute", lambda s: xpnet.Sequential([layers.Permute((1, 0))], (4,), "cpu"), ShapeError, "2 axes"),
    row("slice_nothing", lambda s: xpnet.Sequential([layers.Slice(9)], (4,), "cpu"), ShapeError, "9"),
    row("slice_axis", lambda s: xpnet.Sequential([layers.Slice(0, axis=3)], (4,), "cpu"), ShapeError, "axis 3"),
    row("upsample_rank", lambda s: xpnet.Sequential([layers.Upsample2D(2)], (4,), "cpu"), ShapeError, "images"),
    row("crop_too_large", lambda s: xpnet.Sequential([augment.RandomCrop(size=9)], (4, 4, 1), "cpu"), ShapeError, "9"),
    row("flip_rank", lambda s: xpnet.Sequential([augment.RandomFlip()], (4,), "cpu"), ShapeError, "height"),
    row("huge_input", lambda s: xpnet.Sequential([layers.Dense(2)], (10**13,), "cpu"), DeviceMemoryError, "GiB"),
    row("huge_units", lambda s: xpnet.Sequential([layers.Dense(10**13)], (4,), "cpu"), DeviceMemoryError, "GiB"),
]  # fmt: skip

DTYPES = [
    row("objects", lambda s: s.model.predict(s.x.astype(object)), ArgumentTypeError, "text or objects", "astype"),
    row("complex", lambda s: s.model.predict(s.x + 1j), ArgumentTypeError, "complex"),
    row("text", lambda s: s.model.predict(s.x.astype(str)), ArgumentTypeError, "text"),
    row("bytes", lambda s: s.model.predict(s.x.astype("S")), ArgumentTypeError, "text"),
    row("dates", lambda s: s.model.predict(np.zeros((2, 4), "M8[s]")), ArgumentTypeError, "datetime64", "numbers"),
    row("durations", lambda s: s.model.predict(np.zeros((2, 4), "m8[s]")), ArgumentTypeError, "timedelta64"),
    row("records", lambda s: s.model.predict(np.zeros((2, 4), "f4,f4")), ArgumentTypeError, "x"),
    row("masked", lambda s: s.model.predict(np.ma.masked_array(s.x, s.x > 0)), ArgumentTypeError, "masked"),
    row("list_of_masked", lambda s: s.model.predict([np.ma.masked_array([1.0] * 4, [1, 0, 0, 0])]), ArgumentTypeError,
        "masked"),
    row("a_string", lambda s: s.model.predict("data.npy"), ArgumentTypeError, "x"),
    row("a_set", lambda s: s.model.predict({1, 2}), ArgumentTypeError, "x"),
    row("a_generator", lambda s: s.model.predict(iter(s.x)), ArgumentTypeError, "x"),
    row("a_function", lambda s: s.model.predict(np.ones), ArgumentTypeError, "x"),
    row("a_class", lambda s: s.model.predict(np.ndarray), ArgumentTypeError, "x"),
    row("a_module", lambda s: s.model.predict(np), ArgumentTypeError, "x"),
    row("a_model", lambda s: s.model.predict(s.model), ArgumentTypeError, "x"),
    row("list_of_none", lambda s: s.model.predict([[None] * 4]), ArgumentTypeError, "x"),
    row("train_nan", lambda s: s.model.train_on_batch(s.x * np.nan, s.y), DataError, "NaN"),
    row("train_inf", lambda s: s.model.train_on_batch(s.x + np.inf, s.y), DataError, "NaN or infinity"),
    row("train_overflow", lambda s: s.model.train_on_batch(s.x.astype("float64") * 1e300, s.y), DataError, "infinity"),
    row("embedding_of_floats", lambda s: s.model.predict(s.x + 0.5), DataError, "floats", subject=Tokens),
    row("embedding_of_whole_floats", lambda s: s.model.predict(s.x.astype(float)), DataError, "int64", subject=Tokens),
    row("embedding_too_large", lambda s: s.model.predict(s.x + 7), DataError, "0 to 6", subject=Tokens),
    row("embedding_negative", lambda s: s.model.predict(-s.x - 1), DataError, "0 to 6", subject=Tokens),
    row("embedding_trained_on_negative", lambda s: s.model.train_on_batch(s.x - 9, s.y), DataError, "0 to 6",
        subject=Tokens),
    row("embedding_beyond_64_bits", lambda s: s.model.predict(np.full((1, 5), 2**64 - 1, "uint64")), DataError,
        "0 to 6",
        subject=Tokens),
    row("positions", lambda s: s.model.predict(np.zeros((1, 9), int)), ShapeError, "8 positions", subject=Tokens),
    row("embedding_after_dense",
        lambda s: xpnet.Sequential([layers.Dense(3), layers.Embedding(4, 2)], (4,), "cpu").predict(s.x), XpnetError,
        "integers"),
]  # fmt: skip

LABELS = [
    row("labels_too_large", lambda s: s.model.train_on_batch(s.x, s.y + 3), DataError, "0 to 2"),
    row("labels_negative", lambda s: s.model.train_on_batch(s.x, s.y - 5), DataError, "0 to 2"),
    row("labels_from_one", lambda s: s.model.train_on_batch(s.x, s.y + 1), DataError, "4 outputs"),
    row("labels_fraction", lambda s: s.model.train_on_batch(s.x, s.y + 0.5), DataError, "whole"),
    row("labels_too_few", lambda s: s.model.train_on_batch(s.x, s.y[:5]), DataError, "12", "5"),
    row("labels_none", lambda s: s.model.train_on_batch(s.x, None), ArgumentTypeError, "y"),
    row("labels_text", lambda s: s.model.train_on_batch(s.x, np.array(["cat"] * 12)), ArgumentTypeError, "unique"),
    row("labels_nan", lambda s: s.model.train_on_batch(s.x, s.y * np.nan), DataError, "NaN"),
    row("labels_wrong_width", lambda s: s.model.train_on_batch(s.x, np.eye(4)[s.y]), ShapeError, "(N, 3)"),
    row("labels_no_probabilities", lambda s: s.model.train_on_batch(s.x, np.eye(3)[s.y] * 2), DataError, "sum"),
    row("labels_a_number", lambda s: s.model.train_on_batch(s.x, 1), XpnetError, "y"),
    row("labels_complex", lambda s: s.model.train_on_batch(s.x, s.y * 1j), ArgumentTypeError, "complex"),
    row("labels_dates", lambda s: s.model.train_on_batch(s.x, s.y.astype("M8[D]")), ArgumentTypeError, "datetime64"),
    row("labels_of_steps_for_samples", lambda s: s.model.train_on_batch(s.x, s.y[:, 0]), ShapeError, "(N, T)",
        subject=Tokens),
    row("labels_of_tokens_too_large", lambda s: s.model.train_on_batch(s.x, s.y + 7), DataError, "0 to 6",
        subject=Tokens),
    row("labels_of_other_length", lambda s: s.model.train_on_batch(s.x, s.y[:, :3]), XpnetError, "3", subject=Tokens),
]  # fmt: skip

DEVICES = [
    row("backend_unknown", lambda s: s.model.to("tpu"), ArgumentError, "tpu", "gpu"),
    row("backend_none", lambda s: s.model.to(None), ArgumentTypeError, "backend"),
    row("backend_number", lambda s: s.model.to(0), ArgumentTypeError, "backend"),
    row("backend_class", lambda s: s.model.to(np), ArgumentTypeError, "backend"),
    row("device_of_torch", lambda s: s.model.to("cuda:x"), ArgumentError, "cuda"),
    row("no_such_gpu", lambda s: s.model.to("gpu:99"), BackendError, "gpu"),
    row("dtype_half", lambda s: s.model.to("cpu", "float16"), ArgumentError, "float32"),
    row("dtype_int", lambda s: s.model.to("cpu", int), ArgumentError, "float32"),
    row("dtype_zero", lambda s: s.model.to("cpu", 0), ArgumentError, "dtype"),
    row("dtype_text", lambda s: s.model.to("cpu", "double precision"), ArgumentError, "dtype"),
    row("dtype_array", lambda s: s.model.to("cpu", s.x), ArgumentError, "dtype"),
    row("precision_unknown", lambda s: xpnet.Sequential([layers.Dense(2)], precision="int8"), ArgumentError,
        "precision"),
    row("precision_on_cpu", lambda s: xpnet.Sequential([layers.Dense(2)], backend="cpu", precision="float16"),
        ArgumentError, "precision"),
    row("precision_of_float64",
        lambda s: xpnet.Sequential([layers.Dense(2)], backend="cpu", dtype="float64", precision="tf32"), ArgumentError,
        "float32"),
    row("seed_negative", lambda s: xpnet.Sequential([layers.Dense(2)], seed=-1), ArgumentError, "seed"),
    row("seed_text", lambda s: xpnet.Sequential([layers.Dense(2)], seed="lucky"), ArgumentError, "seed"),
    row("moved_beside_fit", beside_fit(lambda s: s.model.to("cpu", "float64")), StateError, "fit", trains=True),
    row("moved_in_a_callback", in_callback(lambda s: s.model.to("cpu", "float64")), StateError, "fit", trains=True),
    row("models_of_two_dtypes",
        lambda s: xpnet.Model(s.model.inputs, s.model.outputs, backend="cpu", dtype="float64"), XpnetError, "float64"),
]  # fmt: skip

BUILDING = [
    row("unbuilt_save", lambda s: xpnet.Sequential([layers.Dense(2)]).save(s.folder / "a.safetensors"), StateError,
        "built"),
    row("unbuilt_state", lambda s: xpnet.Sequential([layers.Dense(2)]).state_dict(), StateError, "built"),
    row("unbuilt_load", lambda s: xpnet.Sequential([layers.Dense(2)]).load_state_dict({}), StateError, "built"),
    row("unbuilt_apply", lambda s: xpnet.Sequential([layers.Dense(2)]).apply_gradients(), StateError, "built"),
    row("unbuilt_backward", lambda s: xpnet.Sequential([layers.Dense(2)]).backward(ONES), StateError, "built"),
    row("unbuilt_inputs", lambda s: xpnet.Sequential([layers.Dense(2)]).inputs, StateError, "built"),
    row("unbuilt_output_of", lambda s: xpnet.Sequential([layers.Dense(2)]).output_of("0"), StateError, "built"),
    row("unbuilt_memory", lambda s: xpnet.Sequential([layers.Dense(2)]).summary(32), StateError, "built"),
    row("unbuilt_explain", lambda s: xpnet.explain_step(xpnet.Sequential([layers.Dense(2)])), StateError, "built"),
    row("unbuilt_generate", lambda s: xpnet.generate(xpnet.Sequential([layers.Dense(2)]), [[0]], 1), StateError,
        "built"),
    row("unbuilt_layer_forward", lambda s: layers.Dense(2).forward(s.x), StateError, "built"),
    row("unbuilt_layer_context", lambda s: layers.Dense(2).context, StateError, "built"),
    row("built_twice", lambda s: s.model.build((4,)), StateError, "built"),
    row("layer_built_twice", lambda s: s.model[0].build((4,)), StateError, "built"),
    row("built_for_text", lambda s: xpnet.Sequential([layers.Dense(2)]).predict("abc"), ArgumentTypeError, "x"),
    row("lazy_other_width", lambda s: s.model.predict(s.x[:, :2]), ShapeError, "(N, 4)", subject=Lazy),
    row("one_object_twice", lambda s: two_of(layers.Dense(4)), StateError, "0 and 2", "only once"),
    row("layer_of_another_model", in_two_models, StateError, "built already", "xpnet.Model"),
    row("model_inside_itself", model_inside_itself, StateError, "layers"),
    row("class_as_layer", lambda s: xpnet.Sequential([layers.Dense]), ArgumentTypeError, "()"),
    row("number_as_layer", lambda s: xpnet.Sequential([layers.Dense(2), 3]), ArgumentTypeError, "item 1"),
    row("function_as_layer", lambda s: xpnet.Sequential([np.tanh]), ArgumentTypeError, "item 0"),
    row("tensor_as_layer", lambda s: xpnet.Sequential([xpnet.Input(4)]), ArgumentTypeError, "item 0"),
    row("layers_not_in_a_list", lambda s: xpnet.Sequential(layers.Dense(2)), ArgumentTypeError, "list"),
    row("layers_by_position", lambda s: xpnet.Sequential([layers.Dense(2)], (4,), "cpu", 0, "float32", None, "extra"),
        ArgumentTypeError, "by position"),
    row("names_clash", lambda s: xpnet.Sequential([layers.Dense(2, name="a"), layers.Dense(2, name="a")]),
        ArgumentError,
        "'a'"),
    row("name_is_a_number", lambda s: layers.Dense(2, name="1"), ArgumentError, "name"),
    row("name_with_dot", lambda s: layers.Dense(2, name="a.b"), ArgumentError, "name"),
    row("renamed_after_build", lambda s: setattr(s.model[0], "name", "first"), StateError, "name"),
    row("layer_deleted", delete_layer, StateError, "layers", "deleted"),
    row("layer_replaced", replace_layer, StateError, "layers", "replaced"),
    row("unbuilt_layer_deleted", lambda s: operator.delitem(xpnet.Sequential([layers.Dense(2)]), 0), StateError,
        "deleted"),
    row("unbuilt_layer_replaced", lambda s: operator.setitem(xpnet.Sequential([layers.Dense(2)]), 0, layers.Dense(3)),
        StateError, "replaced"),
    row("layers_assigned", lambda s: setattr(s.model, "layers", ()), StateError, "layers"),
    row("layers_attribute_deleted", lambda s: delattr(s.model, "layers"), StateError, "layers"),
    row("weight_deleted", lambda s: delattr(s.model[0], "weight"), StateError, "weight"),
    row("parameters_assigned", lambda s: setattr(s.model, "parameters", []), XpnetError, "parameters"),
    row("trainable_text", lambda s: setattr(s.model, "trainable", "no"), ArgumentError, "trainable"),
    row("trainable_of_layer", lambda s: setattr(s.model[0], "trainable", 1), ArgumentError, "trainable"),
    row("trainable_of_parameter", lambda s: setattr(s.model.parameters[0], "trainable", None), ArgumentError,
        "trainable"),
    row("decay_of_parameter", lambda s: setattr(s.model.parameters[0], "decay", "yes"), ArgumentError, "decay"),
    row("l2_of_parameter", lambda s: setattr(s.model.parameters[0], "l2", -1), ArgumentError, "l2"),
    row("l1_of_parameter", lambda s: setattr(s.model.parameters[0], "l1", np.nan), ArgumentError, "l1"),
    row("residual_of_other_shape", lambda s: xpnet.Sequential([layers.Residual(layers.Flatten())], (2, 2), "cpu"),
        ShapeError, "skip"),
    row("residual_of_a_list", lambda s: layers.Residual([layers.Dense(2)]), ArgumentError, "Residual"),
    row("residual_of_text", lambda s: layers.Residual("relu"), ArgumentTypeError, "'relu'"),
    row("two_mixups", lambda s: xpnet.Sequential([augment.MixUp(), augment.MixUp()], (4,), "cpu"), ArgumentError,
        "MixUp"),
    row("distortion_without_positions",
        lambda s: xpnet.Sequential([augment.Distortion()], (4, 4), "cpu").forward(np.ones((1, 4, 4)), True), XpnetError,
        "positions"),
]  # fmt: skip

GRAPHS = [
    row("graph_of_arrays", lambda s: xpnet.Model(s.x, s.y), ArgumentTypeError, "symbolic tensor"),
    row("graph_of_layers", lambda s: xpnet.Model([layers.Dense(2)], [layers.ReLU()]), ArgumentTypeError, "Sequential"),
    row("graph_without_outputs", lambda s: xpnet.Model(xpnet.Input(4), []), ArgumentTypeError, "outputs"),
    row("graph_of_none", lambda s: xpnet.Model(None, None), ArgumentTypeError, "inputs"),
    row("graph_of_a_dict", lambda s: xpnet.Model({"a": xpnet.Input(4)}, xpnet.Input(4)), ArgumentTypeError, "inputs"),
    row("disconnected", lambda s: xpnet.Model(xpnet.Input(4), layers.Dense(2)(xpnet.Input(4))), ArgumentError,
        "not among the inputs"),
    row("output_is_input", lambda s: graph_of(lambda x: x), ArgumentError, "Identity"),
    row("input_twice", lambda s: xpnet.Model([s.model.inputs[0]] * 2, s.model.outputs), ArgumentError, "twice"),
    row("inner_tensor_as_input_names",
        lambda s: xpnet.Model([xpnet.Input(4, name="a"), xpnet.Input(4, name="a")], layers.ReLU()(xpnet.Input(4))),
        XpnetError, "input"),
    row("clashing_inputs", lambda s: (lambda a, b: xpnet.Model([a, b], layers.Add()([a, b])))(
        xpnet.Input(4, name="a"), xpnet.Input(4, name="a")), ArgumentError, "'a'"),
    row("clashing_layers", lambda s: graph_of(
        lambda x: layers.Dense(2, name="a")(layers.Dense(2, name="a")(x))), ArgumentError, "'a'"),
    row("layer_on_an_array", lambda s: layers.Dense(2)(s.x), ArgumentTypeError, "symbolic"),
    row("layer_on_none", lambda s: layers.Dense(2)(None), ArgumentTypeError, "None"),
    row("layer_on_two", lambda s: layers.Add()(xpnet.Input(4), xpnet.Input(4)), ArgumentTypeError, "list"),
    row("layer_on_empty_list", lambda s: layers.Add()([]), ArgumentTypeError, "Add"),
    row("layer_on_mixed_list", lambda s: layers.Add()([xpnet.Input(4), s.x]), ArgumentTypeError, "ndarray"),
    row("dense_on_a_list", lambda s: layers.Dense(2)([xpnet.Input(4), xpnet.Input(4)]), ShapeError, "Concatenate"),
    row("add_of_one", lambda s: layers.Add()(xpnet.Input(4)), ShapeError, "list"),
    row("add_of_other_shapes", lambda s: layers.Add()([xpnet.Input(4), xpnet.Input(3)]), ShapeError, "one shape"),
    row("add_of_other_ranks", lambda s: layers.Add()([xpnet.Input(4), xpnet.Input((4, 4))]), ShapeError, "one shape"),
    row("subtract_three", lambda s: layers.Subtract()([xpnet.Input(4)] * 3), ShapeError, "two"),
    row("dot_of_three", lambda s: layers.Dot()([xpnet.Input(4)] * 3), ShapeError, "two"),
    row("concatenate_axis", lambda s: layers.Concatenate(3)([xpnet.Input(4)] * 2), ArgumentError, "axis 3"),
    row("concatenate_shapes", lambda s: layers.Concatenate()([xpnet.Input((2, 4)), xpnet.Input((3, 4))]), ShapeError,
        "axis 1"),
    row("attention_of_three", lambda s: layers.MultiHeadAttention(1)([xpnet.Input((3, 4))] * 3), ShapeError, "query"),
    row("attention_of_rows", lambda s: layers.MultiHeadAttention(1)(xpnet.Input(4)), ShapeError, "(N, T, C)"),
    row("attention_heads", lambda s: layers.MultiHeadAttention(3)(xpnet.Input((5, 4))), ShapeError, "heads=3"),
    row("attention_rotary", lambda s: layers.MultiHeadAttention(4, rotary=True)(xpnet.Input((5, 4))), ArgumentError,
        "rotary"),
    row("tensors_of_another_model", lambda s: xpnet.Model(dense().inputs, s.model.outputs), ArgumentError,
        "not among the inputs"),
    row("model_on_other_shape", lambda s: s.model(xpnet.Input(3)), ShapeError, "4"),
    row("graph_model_on_one_input", lambda s: s.model(xpnet.Input(4)), ShapeError, "2 inputs", subject=Graph),
    row("graph_predict_one_array", lambda s: s.model.predict(s.x[0]), XpnetError, "meta", subject=Graph),
    row("graph_predict_three", lambda s: s.model.predict([*s.x, s.x[0]]), XpnetError, "2", subject=Graph),
    row("graph_predict_swapped", lambda s: s.model.predict(s.x[::-1]), ShapeError, "image", subject=Graph),
    row("graph_predict_lengths", lambda s: s.model.predict([s.x[0], s.x[1][:3]]), DataError, "6", "3", subject=Graph),
    row("graph_predict_misspelled", lambda s: s.model.predict({"imag": s.x[0], "meta": s.x[1]}), ArgumentError, "image",
        subject=Graph),
    row("graph_predict_missing", lambda s: s.model.predict({"image": s.x[0]}), ArgumentError, "meta", subject=Graph),
    row("graph_predict_none_of_two", lambda s: s.model.predict([s.x[0], None]), ArgumentTypeError, "meta",
        subject=Graph),
    row("graph_one_target", lambda s: s.model.train_on_batch(s.x, s.y[0]), XpnetError, "odd", subject=Graph),
    row("graph_target_misspelled", lambda s: s.model.train_on_batch(s.x, {"digit": s.y[0], "even": s.y[1]}),
        ArgumentError, "odd", subject=Graph),
    row("graph_loss_for_other", lambda s: s.model.train_on_batch(s.x, s.y, loss={"digit": "mse"}), ArgumentError, "odd",
        subject=Graph),
    row("graph_three_losses", lambda s: s.model.train_on_batch(s.x, s.y, loss=["mse"] * 3), ArgumentError, "2",
        subject=Graph),
    row("graph_weights_negative", lambda s: s.model.train_on_batch(s.x, s.y, loss_weights=[1, -1]), ArgumentError,
        "loss_weights", subject=Graph),
    row("graph_weights_text", lambda s: s.model.train_on_batch(s.x, s.y, loss_weights="big"), XpnetError,
        "loss_weights", subject=Graph),
    row("graph_output_of", lambda s: s.model.output_of("digt"), ArgumentError, "digit", subject=Graph),
    row("graph_backward_one", lambda s: backward_after(s, np.ones((6, 3), "float32")), XpnetError, "odd",
        subject=Graph),
    row("output_of_number", lambda s: s.model.output_of(0), ArgumentTypeError, "name"),
    row("several_outputs_in_a_row", lambda s: xpnet.Sequential([s.model], ((4,),), "cpu"), XpnetError, "shape",
        subject=Graph),
]  # fmt: skip

OWN_LAYERS = [
    row("returns_list", own(lambda x, y: [y]), ShapeError, "own", "list"),
    row("returns_none", own(lambda x, y: None), ShapeError, "own", "None"),
    row("returns_text", own(lambda x, y: "y"), ShapeError, "own", "'y'"),
    row("returns_other_shape", own(lambda x, y: y[:, :2]), ShapeError, "own", "(N, 4)"),
    row("returns_fewer_rows", own(lambda x, y: y[:5]), ShapeError, "own", "12"),
    row("returns_a_sum", own(lambda x, y: y.sum()), ShapeError, "own"),
    row("returns_float64", own(lambda x, y: y.astype("float64")), ShapeError, "own", "float64"),
    row("returns_integers", own(lambda x, y: y.astype(int)), ShapeError, "own", "int64"),
    row("returns_complex", own(lambda x, y: y + 0j), ShapeError, "own", "complex"),
    row("returns_a_view_of_other_axes", own(lambda x, y: y[:, :, None]), ShapeError, "own", "(12, 4, 1)"),
    row("writes_into_x", own(lambda x, y: x.__imul__(2)), XpnetError, "own"),
    row("backward_none", own(backward=lambda g: None), XpnetError, "own", "None"),
    row("own_backward_list", own(backward=lambda g: [g]), XpnetError, "own", "list"),
    row("backward_other_shape", own(backward=lambda g: g[:, :2]), XpnetError, "own", "(N, 4)"),
    row("backward_float64", own(backward=lambda g: g.astype("float64")), XpnetError, "own", "float64"),
    row("backward_number", own(backward=lambda g: 1.0), XpnetError, "own", "1.0"),
    row("predict_list", own_predict(lambda x, y: [y]), ShapeError, "own", "list"),
    row("predict_float64", own_predict(lambda x, y: y.astype("float64")), ShapeError, "own", "float64"),
    row("predict_fewer_rows", own_predict(lambda x, y: y[:5]), ShapeError, "own", "12"),
    row("predict_none_returned", own_predict(lambda x, y: None), ShapeError, "own", "None"),
    row("build_returns_none", building(lambda self, shape: None), XpnetError, "Mine", "build"),
    row("build_returns_text", building(lambda self, shape: "wide"), XpnetError, "Mine", "build"),
    row("build_returns_floats", building(lambda self, shape: (2.5,)), XpnetError, "Mine", "build"),
    row("build_returns_negative", building(lambda self, shape: (-1,)), XpnetError, "Mine", "build"),
    row("build_returns_zero", building(lambda self, shape: (0,)), XpnetError, "Mine", "build"),
    row("build_returns_batch", building(lambda self, shape: (None, 4)), ShapeError, "Mine", "build"),
    row("build_returns_strings", building(lambda self, shape: ("4",)), XpnetError, "Mine", "build"),
    row("parameter_of_negative_shape", declaring("w", (-1,), "zeros"), XpnetError, "w"),
    row("parameter_of_text_shape", declaring("w", "4", "zeros"), XpnetError, "w"),
    row("parameter_of_float_shape", declaring("w", (2.5,), "zeros"), XpnetError, "w"),
    row("parameter_of_huge_shape", declaring("w", (10**13,), "zeros"), DeviceMemoryError, "w"),
    row("parameter_of_too_many_axes", declaring("w", (1,) * 70, "zeros"), XpnetError, "w"),
    row("parameter_without_name", declaring("", (4,), "zeros"), XpnetError, "name"),
    row("parameter_named_by_number", declaring(3, (4,), "zeros"), XpnetError, "name"),
    row("parameter_of_unknown_initializer", declaring("w", (4,), "zeroes"), ArgumentError, "zeros"),
    row("parameter_of_nan", declaring("w", (4,), np.nan), ArgumentError, "NaN"),
    row("parameter_of_other_array", declaring("w", (4,), np.ones(3)), ShapeError, "w"),
    row("parameter_of_text_penalty", declaring("w", (4,), "zeros", l2="small"), ArgumentError, "l2"),
    row("parameter_of_text_decay", declaring("w", (4,), "zeros", decay="no"), ArgumentError, "decay"),
    row("buffer_of_text", buffering("b", "abc"), XpnetError, "b"),
    row("buffer_of_objects", buffering("b", np.array([None])), XpnetError, "b"),
    row("buffer_of_none", buffering("b", None), XpnetError, "b"),
    row("buffer_of_complex", buffering("b", np.ones(3) * 1j), XpnetError, "b"),
    row("buffer_named_by_number", buffering(3, np.ones(3)), XpnetError, "name"),
    row("no_forward", lambda s: xpnet.Sequential([type("Mine", (layers.Layer,), {})()], (4,), "cpu").predict(s.x),
        ArgumentTypeError, "Mine", "forward"),
]  # fmt: skip


class Declares(layers.Layer):
    """Declares a parameter in forward, which is too late."""

    def forward(self, x):
        self.w = self.add_parameter("w", (4,), "zeros")
        return x


OWN_LAYERS += [
    row("parameter_in_forward", lambda s: xpnet.Sequential([Declares()], (4,), "cpu").predict(s.x), StateError,
        "build"),
    row("lone_layer_wrong_shape", lambda s: lone(layers.Dense(2), (4,), s.x[:, :2]), ShapeError, "(N, 4)"),
    row("lone_layer_text", lambda s: lone(layers.Dense(2), (4,), "abc"), XpnetError, "x"),
    row("lone_layer_none", lambda s: lone(layers.Dense(2), (4,), None), XpnetError, "x"),
    row("lone_layer_ragged", lambda s: lone(layers.ReLU(), (4,), [[1.0] * 4, [1.0]]), ArgumentTypeError, "x"),
    row("lone_layer_objects", lambda s: lone(layers.ReLU(), (4,), s.x.astype(object)), XpnetError, "x"),
    row("lone_layer_empty", lambda s: lone(layers.Dense(2), (4,), s.x[:0]), XpnetError, "x"),
    row("lone_embedding_range", lambda s: lone(layers.Embedding(3, 2), (4,), np.full((2, 4), 3)), DataError, "0 to 2"),
    row("lone_add_of_one_array", lambda s: lone(layers.Add(), [(4,), (4,)], s.x), XpnetError, "(N, 4), (N, 4)"),
    row("lone_backward_first", lambda s: (lambda d: (d.build((4,), backend="cpu"), d.backward(s.x)))(layers.Dense(4)),
        StateError, "forward"),
    row("lone_backward_shape",
        lambda s: (lambda d: (lone(d, (4,), s.x), d.backward(s.x[:, :2])))(layers.Dense(4)), XpnetError, "grad"),
    row("lone_backward_none", lambda s: (lambda d: (lone(d, (4,), s.x), d.backward(None)))(layers.Dense(4)), XpnetError,
        "grad"),
    row("lone_seed", lambda s: lone(layers.Dense(2), (4,), s.x, seed="x"), ArgumentError, "seed"),
    row("lone_dtype", lambda s: lone(layers.Dense(2), (4,), s.x, dtype="int8"), ArgumentError, "dtype"),
]  # fmt: skip

STATE = [
    row("state_list", lambda s: s.model.load_state_dict([1, 2]), ArgumentTypeError, "dict"),
    row("state_none", lambda s: s.model.load_state_dict(None), ArgumentTypeError, "dict"),
    row("state_path", lambda s: s.model.load_state_dict("model.safetensors"), ArgumentTypeError, "dict"),
    row("state_empty", lambda s: s.model.load_state_dict({}), ArgumentError, "missing"),
    row("state_of_another_model", lambda s: s.model.load_state_dict(dense().state_dict()), ArgumentError, "2.weight"),
    row("state_extra", lambda s: s.model.load_state_dict(changed(s, extra=np.ones(3))), ArgumentError, "extra"),
    row("state_number_as_name", lambda s: s.model.load_state_dict({**s.model.state_dict(), 7: np.ones(3)}),
        ArgumentError, "7"),
    row("state_transposed", later("0.weight", np.transpose), ShapeError, "0.weight"),
    row("state_shape_unstrict", lambda s: s.model.load_state_dict({"0.weight": np.ones(3)}, strict=False), ShapeError,
        "0.weight"),
    row("state_none_inside", later("2.bias", lambda a: None), ArgumentTypeError, "2.bias"),
    row("state_text_inside", later("2.bias", lambda a: "zeros"), ArgumentTypeError, "2.bias"),
    row("state_objects_inside", later("2.bias", lambda a: a.astype(object)), ArgumentTypeError, "2.bias"),
    row("state_complex_inside", later("2.bias", lambda a: a * 1j), ArgumentTypeError, "2.bias"),
    row("state_ragged_inside", later("2.bias", lambda a: [[1], [1, 2]]), ArgumentTypeError, "2.bias"),
    row("state_masked_inside", later("2.bias", lambda a: np.ma.masked_array(a, a > 9)), ArgumentTypeError, "masked"),
    row("state_too_large", later("2.bias", lambda a: a.astype("float64") + 1e300), DataError, "2.bias"),
    row("state_strict_text", lambda s: s.model.load_state_dict(s.model.state_dict(), strict="yes"), ArgumentError,
        "strict"),
    row("state_beside_fit", beside_fit(lambda s: s.model.load_state_dict(s.model.state_dict())), StateError, "fit",
        trains=True),
    row("value_shape", lambda s: assign(s, "0.weight", np.ones(3)), ShapeError, "0.weight"),
    row("value_text", lambda s: assign(s, "0.weight", "ones"), ArgumentTypeError, "0.weight"),
    row("value_none", lambda s: assign(s, "0.weight", None), ArgumentTypeError, "0.weight"),
    row("value_ragged", lambda s: assign(s, "0.weight", [[1], [1, 2]]), ArgumentTypeError, "0.weight"),
    row("value_complex", lambda s: assign(s, "0.weight", 1j), ArgumentTypeError, "0.weight"),
    row("value_too_large_array", lambda s: assign(s, "0.weight", np.full((4, 5), 1e300)), DataError, "0.weight"),
    row("value_too_large", lambda s: assign(s, "0.weight", 1e300), DataError, "0.weight"),
    row("value_masked", lambda s: assign(s, "0.bias", np.ma.masked_array(np.ones(5), [1, 0, 0, 0, 0])),
        ArgumentTypeError, "masked"),
    row("grad_shape", lambda s: assign(s, "0.weight", np.ones(3), "grad"), ShapeError, "gradient of 0.weight"),
    row("grad_text", lambda s: assign(s, "0.weight", "none", "grad"), ArgumentTypeError, "gradient of 0.weight"),
    row("weight_attribute_shape", lambda s: set_weight(s, np.ones((5, 4))), ShapeError, "weight"),
    row("weight_attribute_text", lambda s: set_weight(s, "x"), ArgumentTypeError, "weight"),
    row("weight_before_build", lambda s: (lambda d: (set_weight(type("S", (), {"model": [d]}), np.ones((4, 3))),
        xpnet.Sequential([d], (4,), "cpu")))(layers.Dense(3)), StateError, "weight_initializer"),
    row("value_beside_fit", beside_fit(lambda s: assign(s, "0.weight", 1.0)), StateError, "fit", trains=True),
    row("get_layer_unknown", lambda s: s.model.get_layer("dense"), ArgumentError, "dense"),
    row("get_layer_number", lambda s: s.model.get_layer(0), ArgumentTypeError, "model[0]"),
    row("get_layer_empty", lambda s: s.model.get_layer(""), ArgumentError, "layer"),
    row("get_layer_inside_dense", lambda s: s.model.get_layer("0.1"), ArgumentError, "0.1"),
    row("index_too_large", lambda s: s.model[3], PositionError, "0 to 2"),
    row("index_negative", lambda s: s.model[-4], PositionError, "0 to 2"),
    row("index_text", lambda s: s.model["0"], ArgumentTypeError, "get_layer"),
    row("index_float", lambda s: s.model[1.0], ArgumentTypeError, "integer"),
    row("index_huge", lambda s: s.model[2**70], PositionError, "0 to 2"),
    row("index_none", lambda s: s.model[None], ArgumentTypeError, "integer"),
    row("slice_text", lambda s: s.model["a":"b"], ArgumentTypeError, "integer"),
    row("summary_zero", lambda s: s.model.summary(0), ArgumentError, "batch_size"),
    row("summary_text", lambda s: s.model.summary("big"), ArgumentError, "batch_size"),
    row("activations_width", lambda s: s.model.activations(s.x[:, :2]), ShapeError, "(N, 4)"),
    row("activations_none", lambda s: s.model.activations(None), ArgumentTypeError, "x"),
    row("activations_empty", lambda s: s.model.activations(s.x[:0]), DataError, "empty"),
    row("pickle_damaged", lambda s: xpnet.load(_written(s, pickle.dumps(s.model))), XpnetError, "model"),
]  # fmt: skip


def _written(s, data):
    (s.folder / "model.safetensors").write_bytes(data)
    return s.folder / "model.safetensors"


PASSES = [
    row("backward_before_forward", backward_before_forward, StateError, "forward"),
    row("backward_shape", lambda s: backward_after(s, np.ones((12, 2), "float32")), ShapeError, "(12, 3)"),
    row("backward_rows", lambda s: backward_after(s, np.ones((5, 3), "float32")), XpnetError, "12"),
    row("backward_none_given", lambda s: backward_after(s, None), ArgumentTypeError, "grad_output"),
    row("backward_text", lambda s: backward_after(s, "ones"), ArgumentTypeError, "grad_output"),
    row("backward_objects", lambda s: backward_after(s, np.full((12, 3), None)), ArgumentTypeError, "grad_output"),
    row("backward_list", lambda s: backward_after(s, [np.ones((12, 3))]), XpnetError, "grad_output"),
    row("backward_dict", lambda s: backward_after(s, {"digit": np.ones((12, 3))}), XpnetError, "digit"),
    row("backward_after_step", lambda s: (s.model.forward(s.x), s.step(), s.model.backward(np.ones((12, 3)))),
        StateError,
        "forward", trains=True),
    row("backward_in_another_thread", backward_in_another_thread, StateError, "thread"),
    row("forward_masked", lambda s: s.model.forward(np.ma.masked_array(s.x, s.x > 0)), ArgumentTypeError, "masked"),
    row("forward_text", lambda s: s.model.forward("x"), ArgumentTypeError, "x"),
    row("apply_before_backward", apply_twice_trained, StateError, "gradients"),
    row("apply_after_forward_only", lambda s: (s.model.forward(s.x, training=True), s.model.apply_gradients("sgd")),
        StateError, "gradients"),
    row("apply_unknown", lambda s: s.model.apply_gradients("adamm"), ArgumentError, "adam"),
    row("apply_none", lambda s: s.model.apply_gradients(None), ArgumentTypeError, "optimizer"),
    row("apply_class", lambda s: s.model.apply_gradients(xpnet.optimizers.SGD), ArgumentTypeError, "SGD(...)"),
    row("fit_in_a_callback", in_callback(lambda s: s.model.fit(s.x, s.y)), StateError, "fit", trains=True),
    row("train_in_a_callback", in_callback(lambda s: s.model.train_on_batch(s.x, s.y)), StateError, "fit", trains=True),
    row("fit_beside_fit", beside_fit(lambda s: s.model.fit(s.x, s.y, verbose=0)), StateError, "fit", trains=True),
    row("forward_training_beside_fit", beside_fit(lambda s: s.model.forward(s.x, training=True)), StateError, "fit",
        trains=True),
    row("predict_wrong_beside_fit", beside_fit(lambda s: s.model.predict(s.x[:, :2])), ShapeError, "(N, 4)",
        trains=True),
    row("predict_batch_size_zero", lambda s: s.model.predict(s.x, batch_size=0), ArgumentError, "batch_size"),
    row("predict_batch_size_text", lambda s: s.model.predict(s.x, batch_size="all"), ArgumentError, "batch_size"),
    row("predict_unknown_argument", lambda s: s.model.predict(s.x, verbose=0), ArgumentTypeError, "verbose"),
    row("proba_of_regression", lambda s: (lambda m: (m.train_on_batch(s.x, s.x[:, :3], "mse",
        "sgd"), m.predict_proba(s.x)))(
        dense()), ArgumentError, "MeanSquaredError"),
    row("check_gradients_loss", lambda s: xpnet.check_gradients(s.model, s.x, s.y, loss="crossentropy"), ArgumentError,
        "softmax_cross_entropy"),
    row("check_gradients_targets", lambda s: xpnet.check_gradients(s.model, s.x, s.y), ShapeError, "y"),
    row("check_gradients_step", lambda s: xpnet.check_gradients(s.model, s.x, s.x[:, :3], step=0), ArgumentError,
        "step"),
    row("check_gradients_samples", lambda s: xpnet.check_gradients(s.model, s.x, s.x[:, :3], samples=0), ArgumentError,
        "samples"),
    row("check_gradients_none", lambda s: xpnet.check_gradients(None, s.x, s.y), ArgumentTypeError, "model"),
    row("check_gradients_layer", lambda s: xpnet.check_gradients(s.model[0], s.x, s.y), ArgumentTypeError, "model"),
    row("explain_batch", lambda s: xpnet.explain_step(s.model, 0), ArgumentError, "batch_size"),
    row("explain_loss", lambda s: xpnet.explain_step(s.model, loss="nothing"), ArgumentError, "loss"),
    row("explain_optimizer", lambda s: xpnet.explain_step(s.model, optimizer="nothing"), ArgumentError, "optimizer"),
    row("explain_none", lambda s: xpnet.explain_step(None), ArgumentTypeError, "model"),
    row("explain_times", lambda s: xpnet.explain_step(s.model, times="yes"), ArgumentError, "times"),
    row("explain_uncapturable", lambda s: xpnet.explain_step(
        xpnet.Sequential([Declares()], (4,), "cpu")), CaptureError, "Declares", "build"),
    row("user_optimizer_of_other_kind", lambda s: s.model.train_on_batch(s.x, s.y, optimizer=object()),
        ArgumentTypeError, "optimizer"),
]  # fmt: skip

GENERATE = [
    row(f"generate_{name}", call, error, *words, subject=subject)
    for name, call, error, words, subject in [
        ("prompt_of_one_axis", generate(prompt=[0, 1]), ShapeError, ("prompt[None]",), Tokens),
        ("prompt_of_three_axes", generate(prompt=np.zeros((1, 2, 3), int)), ShapeError, ("(N, T)",), Tokens),
        ("prompt_empty", generate(prompt=np.zeros((2, 0), int)), DataError, ("empty",), Tokens),
        ("prompt_no_sequences", generate(prompt=np.zeros((0, 2), int)), DataError, ("empty",), Tokens),
        ("prompt_of_floats", generate(prompt=[[0.5]]), ArgumentTypeError, ("integers",), Tokens),
        ("prompt_of_flags", generate(prompt=[[True]]), ArgumentTypeError, ("integers",), Tokens),
        ("prompt_of_text", generate(prompt="once upon"), ArgumentTypeError, ("prompt",), Tokens),
        ("prompt_none", generate(prompt=None), ArgumentTypeError, ("prompt",), Tokens),
        ("prompt_ragged", generate(prompt=[[0], [0, 1]]), ArgumentTypeError, ("prompt",), Tokens),
        ("prompt_too_large", generate(prompt=[[7]]), DataError, ("0 to 6",), Tokens),
        ("prompt_negative", generate(prompt=[[-1]]), DataError, ("0 to 6",), Tokens),
        ("prompt_masked", generate(prompt=np.ma.masked_array([[1, 2]], [[0, 1]])), ArgumentTypeError,
        ("masked",), Tokens),
        ("length_negative", generate(length=-1), ArgumentError, ("length",), Tokens),
        ("length_fraction", generate(length=1.5), ArgumentError, ("length",), Tokens),
        ("length_none", generate(length=None), ArgumentError, ("length",), Tokens),
        ("length_huge", generate(length=10**15), XpnetError, ("length",), Tokens),
        ("temperature_negative", generate(temperature=-1), ArgumentError, ("temperature",), Tokens),
        ("temperature_nan", generate(temperature=np.nan), ArgumentError, ("temperature",), Tokens),
        ("temperature_inf", generate(temperature=np.inf), ArgumentError, ("temperature",), Tokens),
        ("temperature_text", generate(temperature="hot"), ArgumentError, ("temperature",), Tokens),
        ("temperature_array", generate(temperature=np.ones(2)), ArgumentError, ("temperature",), Tokens),
        ("top_k_zero", generate(top_k=0), ArgumentError, ("top_k",), Tokens),
        ("top_k_text", generate(top_k="all"), ArgumentError, ("top_k",), Tokens),
        ("seed_negative", generate(seed=-1), ArgumentError, ("seed",), Tokens),
        ("seed_text", generate(seed="a"), ArgumentError, ("seed",), Tokens),
        ("model_of_numbers", generate(), ArgumentError, ("tokens",), Images),
        ("model_of_two_outputs", generate(), ArgumentError, ("tokens",), Graph),
        ("model_none", generate(model=None), ArgumentTypeError, ("model",), Tokens),
        ("model_a_layer", generate(model=layers.ReLU()), ArgumentTypeError, ("model",), Tokens),
        ("looks_ahead", lambda s: xpnet.generate(xpnet.Sequential(
            [layers.Embedding(7, 4), layers.Bidirectional(layers.LSTM(3)), layers.Dense(7)], (None,), "cpu"), [[0]], 2),
            ArgumentError, ("later steps",), Tokens),
        ("other_vocabulary", lambda s: xpnet.generate(xpnet.Sequential(
            [layers.Embedding(7, 4), layers.Dense(9)], (None,), "cpu"), [[0]], 2), ArgumentError,
            ("9 tokens",), Tokens),
    ]
]  # fmt: skip

SEQUENCES = [
    row("steps_of_other_width", lambda s: s.model.predict(s.x[..., :2]), ShapeError, "(N, T, 3)", subject=Steps),
    row("steps_of_no_length", lambda s: s.model.predict(s.x[:, :0]), DataError, "empty", subject=Steps),
    row("steps_of_two_axes", lambda s: s.model.predict(s.x[:, 0]), ShapeError, "(N, T, 3)", subject=Steps),
    row("steps_ragged", lambda s: s.model.predict([s.x[0], s.x[1, :2]]), ArgumentTypeError, "x", subject=Steps),
    row("masking_rows", lambda s: xpnet.Sequential([layers.Masking()], (4,), "cpu"), ShapeError, "(N, T, features)"),
    row("masking_nan", lambda s: layers.Masking(np.nan), ArgumentError, "value"),
    row("lstm_on_rows", lambda s: xpnet.Sequential([layers.LSTM(3)], (4,), "cpu"), ShapeError, "(N, T, features)"),
    row("lstm_on_images", lambda s: xpnet.Sequential([layers.LSTM(3)], (4, 4, 1), "cpu"), ShapeError,
        "(N, T, features)"),
    row("lstm_after_last_state",
        lambda s: xpnet.Sequential([layers.GRU(3, return_sequences=False), layers.GRU(3)], (5, 2), "cpu"), ShapeError,
        "(N, T, features)"),
    row("bidirectional_dense", lambda s: layers.Bidirectional(layers.Dense(3)), ArgumentTypeError, "recurrent"),
    row("bidirectional_class", lambda s: layers.Bidirectional(layers.LSTM), ArgumentTypeError, "recurrent"),
    row("bidirectional_reverse", lambda s: layers.Bidirectional(layers.LSTM(3, reverse=True)), ArgumentError,
        "reverse"),
    row("bidirectional_twice", lambda s: layers.Bidirectional(layers.Bidirectional(layers.LSTM(3))), ArgumentTypeError,
        "recurrent"),
    row("bidirectional_of_a_built_layer", lambda s: xpnet.Sequential([layers.Bidirectional(s.model[1])], (None, 3),
        "cpu"),
        StateError, "built already", subject=Steps),
    row("conv1d_on_rows", lambda s: xpnet.Sequential([layers.Conv1D(2, 3)], (4,), "cpu"), ShapeError, "Reshape"),
    row("conv1d_too_short", lambda s: xpnet.Sequential([layers.Conv1D(2, 5)], (3, 2), "cpu"), ShapeError, "5"),
    row("conv1d_open_too_short",
        lambda s: xpnet.Sequential([layers.Conv1D(2, 5)], (None, 2), "cpu").predict(np.ones((1, 3, 2))), ShapeError,
        "5"),
    row("pool_of_rows", lambda s: xpnet.Sequential([layers.GlobalAveragePool1D()], (4,), "cpu"), ShapeError,
        "GlobalAv"),
    row("positions_too_long", lambda s: xpnet.Sequential([layers.PositionalEmbedding(3)], (5, 2), "cpu"), ShapeError,
        "3"),
    row("transformer_of_rows", lambda s: xpnet.Sequential([layers.TransformerBlock(1)], (4,), "cpu"), ShapeError,
        "(N, T, C)"),
    row("transformer_heads", lambda s: xpnet.Sequential([layers.TransformerBlock(3)], (5, 4), "cpu"), ShapeError,
        "heads=3"),
    row("padding_index_too_large", lambda s: layers.Embedding(7, 2, padding_index=7), ArgumentError, "padding_index"),
    row("tied_units", lambda s: tied(6), ArgumentError, "units", "7"),
    row("tied_features", lambda s: tied(7, between=[layers.Dense(5)]), ShapeError, "4 features"),
    row("tied_to_a_dense", lambda s: layers.Dense(7, tied_to=layers.Dense(7)), ArgumentTypeError, "Embedding"),
    row("tied_to_a_class", lambda s: layers.Dense(7, tied_to=layers.Embedding), ArgumentTypeError, "Embedding"),
    row("tied_with_initializer",
        lambda s: layers.Dense(7, tied_to=layers.Embedding(7, 4), weight_initializer="zeros"), ArgumentError,
        "tied_to"),
    row("tied_to_a_later_layer", lambda s: (lambda e: xpnet.Sequential(
        [layers.Dense(7, tied_to=e), e], (5, 4), "cpu"))(layers.Embedding(7, 4)), StateError, "before"),
    row("tied_to_an_unused_layer", lambda s: xpnet.Sequential(
        [layers.Embedding(7, 4), layers.Dense(7, tied_to=layers.Embedding(7, 4))], (5,), "cpu"), StateError,
        "same model"),
    row("tied_saved_elsewhere", lambda s: tied_to_another_model().save(s.folder / "a.safetensors"), XpnetError,
        "Embedding"),
    row("add_of_two_lengths", lambda s: (lambda a, b: xpnet.Model([a, b], layers.Add()([a, b]), "cpu").predict(
        [np.ones((2, 3, 4)), np.ones((2, 5, 4))]))(xpnet.Input((None, 4)), xpnet.Input((None, 4))), ShapeError,
        "length"),
    row("labels_all_ignored", lambda s: s.model.train_on_batch(
        s.x, s.y * 0, loss=xpnet.losses.SoftmaxCrossEntropy(ignore=0)), DataError, "ignored", subject=Tokens),
    row("all_steps_masked", lambda s: padded().train_on_batch(s.x * 0, np.zeros((6, 5), int)), DataError, "masks",
        subject=Steps),
    row("all_steps_masked_in_fit", lambda s: padded().fit(s.x * 0, np.zeros((6, 5), int), verbose=0),
        DataError, "masks",
        subject=Steps),
    row("all_steps_masked_in_evaluate", lambda s: padded().evaluate(s.x * 0, np.zeros((6, 5), int)), DataError, "masks",
        subject=Steps),
]  # fmt: skip

ROWS = [*SHAPES, *DTYPES, *LABELS, *DEVICES, *BUILDING, *GRAPHS, *OWN_LAYERS, *STATE, *PASSES, *GENERATE, *SEQUENCES]


def test_no_two_rows_have_one_name():
    names = [one.name for one in ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_misuse(row, tmp_path):
    check(row, row.subject(tmp_path))


class MineError(Exception):
    """An error of the user's."""


def raising(error):
    def fault(*given):
        raise error

    return fault


def call_with_a_fault(method, error, layer):
    """Call a method of a model in which the user's code raises this error. Return the model, if it was built."""
    x, y = np.ones((3, 4), "float32"), np.zeros(3, int)
    if method == "build":
        kind = type("Built", (layers.Layer,), {"build": raising(error)})
        return xpnet.Sequential([kind()], (4,), "cpu")
    if method == "initializer":
        kind = type("Drawn", (xpnet.initializers.Initializer,), {"__call__": raising(error)})
        return xpnet.Sequential([layers.Dense(2, weight_initializer=kind())], (4,), "cpu")
    model = xpnet.Sequential([layer, layers.Dense(3)], (4,), "cpu")
    layer.model = model
    if method == "backward":
        model.forward(x)
        layer.backward_fault = raising(error)
        return model.backward(np.ones((3, 3), "float32"))
    layer.forward_fault = raising(error)
    if method == "train":
        return model.train_on_batch(x, y, "softmax_cross_entropy", "sgd")
    return getattr(model, method)(x)


@pytest.mark.parametrize("error", [MineError("why"), KeyError("k"), ZeroDivisionError(), TypeError("t"), OSError("o")])
@pytest.mark.parametrize("method", ["predict", "train", "forward", "activations", "backward", "build", "initializer"])
def test_an_exception_of_a_users_layer_passes_through_unchanged(method, error):
    """The same object comes out, without another one around it, and the model works afterwards."""
    layer = Faulty(name="own")
    with pytest.raises(type(error)) as found:
        call_with_a_fault(method, error, layer)
    assert found.value is error and found.value.__cause__ is None
    if method not in ("build", "initializer"):
        layer.forward_fault = layer.backward_fault = None
        fresh = xpnet.Sequential([Faulty(name="own"), layers.Dense(3)], (4,), "cpu").state_dict()
        assert all((layer.model.state_dict()[name] == value).all() for name, value in fresh.items())
        layer.model.train_on_batch(np.ones((3, 4)), np.zeros(3, int), "softmax_cross_entropy", "sgd")


def test_a_copy_and_a_pickle_of_a_misused_model_work():
    s = Subject(None)
    with pytest.raises(ShapeError):
        s.model.predict(s.x[:, :2])
    for twin in (copy.deepcopy(s.model), pickle.loads(pickle.dumps(s.model))):
        np.testing.assert_array_equal(twin.predict(s.x), s.model.predict(s.x))
        twin.train_on_batch(s.x, s.y, "softmax_cross_entropy", "sgd")
