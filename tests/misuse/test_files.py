"""Wrong paths and foreign files are refused with the path and the reason, and change neither the model nor a file."""

import json
import os
import pathlib

import numpy as np
import pytest
from misuse import Misuse, Subject, check
from safetensors.numpy import save_file

import xpnet
from xpnet import callbacks, layers, losses, optimizers
from xpnet.errors import ArgumentError, ArgumentTypeError, BackendError, FileError, XpnetError

OPTIONS = {"loss": "softmax_cross_entropy", "optimizer": "sgd", "verbose": 0, "batch_size": 4}


def fit(subject, *given, **changed):
    return subject.model.fit(subject.x, subject.y, callbacks=list(given), **{**OPTIONS, **changed})


def csv(subject, path):
    return fit(subject, callbacks.CSVLogger(path))


def checkpoint(subject, path):
    return fit(subject, callbacks.Checkpoint(path))


def export(subject, path):
    pytest.importorskip("onnx")
    return xpnet.export_onnx(subject.model, path)


def import_(subject, path):
    pytest.importorskip("onnx")
    return xpnet.import_onnx(path, backend="cpu")


def resume(subject, path):
    return fit(subject, resume_from=path)


def load(subject, path):
    return xpnet.load(path, backend="cpu")


def write_idx(subject, path):
    return xpnet.datasets.write_idx(path, np.ones(3, "float32"))


def read_idx(subject, path):
    return xpnet.datasets.read_idx(path)


def tensorboard(subject, path):
    return fit(subject, callbacks.TensorBoard(path))


WRITERS = {"save": lambda s, path: s.model.save(path), "checkpoint": checkpoint, "csv": csv, "export_onnx": export,
           "write_idx": write_idx}  # fmt: skip
READERS = {"load": load, "resume": resume, "import_onnx": import_, "read_idx": read_idx}


class Thing:
    def __fspath__(self):
        return 3


#: Values that are no path.
NO_PATHS = {
    "none": None, "number": 3, "descriptor": 1, "half": 0.5, "bool": True, "bytes": b"a", "list": ["a"],
    "dict": {"a": 1},
    "array": np.ones(3), "class": pathlib.Path, "a_path_of_a_number": Thing(), "empty": "", "null": "a\0b",
    "surrogate": "\ud800",
}  # fmt: skip


def no_path(name, function, value):
    def wrong(subject):
        return function(subject, value)

    return Misuse(f"{name}-{value!r:.20}", wrong, XpnetError, ("path",) if name != "resume" else ())


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_what_is_no_path_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, value in NO_PATHS.items():
        if not (name == "resume" and kind == "none"):
            row = no_path(name, {**WRITERS, **READERS}[name], value)
            try:
                check(row, Subject(tmp_path))
            except (AssertionError, TypeError) as error:
                raise AssertionError(f"{kind}: {error!r}") from error
    assert not list(tmp_path.iterdir())


def content(kind, folder):
    """The path of a file of another kind."""
    path = folder / f"file.{kind}"
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "nowhere")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello\n" * 99)
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "safetensors":
        save_file({"weight": np.ones((4, 3), "float32")}, path)
    elif kind == "named_like_ours":
        save_file({"0.weight": np.ones((4, 5), "float32")}, path, metadata={"xpnet": "{}"})
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.ones(3))
    elif kind == "json":
        path.write_text(json.dumps({"layers": []}))
    elif kind == "half":
        whole = folder / "whole.safetensors"
        xpnet.Sequential([layers.Dense(3)], (4,), "cpu").save(whole)
        path.write_bytes(whole.read_bytes()[:-20])
    return path


KINDS = ["missing", "folder", "pipe", "loop", "dangling", "empty", "text", "noise", "safetensors", "named_like_ours",
         "npy", "json", "half"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_files_of_another_kind_are_refused(name, kind, tmp_path):
    path = content(kind, tmp_path)
    check(Misuse(name, lambda s: READERS[name](s, path), FileError, (str(path),)), Subject(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "loop", "below_a_file", "no_folder", "long_name", "dot", "root"])
@pytest.mark.parametrize("name", WRITERS)
def test_files_that_cannot_be_written_are_refused(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind in ("folder", "loop"):
        path = content(kind, tmp_path)
    else:
        (tmp_path / "file").write_text("old")
        places = {"below_a_file": "file/a", "no_folder": "no/folder/a", "long_name": "a" * 300, "dot": ".", "root": "/"}
        path = places[kind]
    before = sorted(tmp_path.iterdir())
    check(Misuse(name, lambda s: WRITERS[name](s, path), XpnetError, ()), Subject(tmp_path))
    assert sorted(tmp_path.iterdir()) == before
    assert kind in ("folder", "loop") or (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write and read everything")
@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_a_lack_of_permission_is_reported(name, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    try:
        action = {**WRITERS, **READERS}[name]
        check(Misuse(name, lambda s: action(s, folder / "a"), FileError, ("ermission",)), Subject(tmp_path))
    finally:
        folder.chmod(0o700)


SUFFIXES = [".h5", ".keras", ".pt", ".pth", ".pkl", ".joblib", ".onnx", ".tflite", ".H5"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["save", "checkpoint"])
def test_the_suffix_of_another_format_is_refused(name, suffix, tmp_path):
    row = Misuse(name, lambda s: WRITERS[name](s, s.folder / f"a{suffix}"), ArgumentError, (f"'{suffix.lower()}'",))
    row = Misuse(name, row.call, ArgumentError, ("suffix",))
    check(row, Subject(tmp_path))
    assert not list(tmp_path.iterdir())


def saved(subject):
    path = subject.folder / "model.safetensors"
    subject.model.save(path)
    return path


class Other(layers.Layer):
    def build(self, input_shape):
        return input_shape


ARGUMENTS = [
    Misuse("backend_misspelled", lambda s: xpnet.load(saved(s), backend="gqu"), ArgumentError, ("'gpu'",)),
    *(Misuse(f"backend_{i}", lambda s, v=v: xpnet.load(saved(s), backend=v), XpnetError, ("backend",))
      for i, v in enumerate([None, 3, "", [], b"cpu", np, 0.5])),
    Misuse("backend_gpu_7", lambda s: xpnet.load(saved(s), backend="gpu:99"), BackendError, ()),
    *(Misuse(f"custom_layers_{i}", lambda s, v=v: xpnet.load(saved(s), "cpu", v), XpnetError, ("custom_layers",))
      for i, v in enumerate([3, "Dense", [3], [Other()], {"Other": Other}, None, [int], Other])),
    Misuse("load_without_a_path", lambda s: xpnet.load(), ArgumentTypeError, ("path",)),
    Misuse("load_with_a_dtype", lambda s: xpnet.load(saved(s), dtype="float32"), ArgumentTypeError, ("dtype",)),
    *(Misuse(f"export_{i}", lambda s, v=v: export_of(s, v), XpnetError, ())
      for i, v in enumerate([None, 3, "model", layers.Dense(3), xpnet.Sequential([layers.Dense(2)]), np.ones(3)])),
    *(Misuse(f"export_dtype_{i}", lambda s, v=v: export_as(s, v), XpnetError, ("dtype",))
      for i, v in enumerate(["float16", 3, "", np.ones(3), int, "int64"])),
    *(Misuse(f"import_backend_{i}", lambda s, v=v: import_to(s, v), XpnetError, ("backend",))
      for i, v in enumerate([3, "", "gqu"])),
]  # fmt: skip


def export_of(subject, model):
    pytest.importorskip("onnx")
    return xpnet.export_onnx(model, subject.folder / "a.onnx")


def export_as(subject, dtype):
    pytest.importorskip("onnx")
    return xpnet.export_onnx(subject.model, subject.folder / "a.onnx", dtype=dtype)


def import_to(subject, backend):
    pytest.importorskip("onnx")
    xpnet.export_onnx(subject.model, subject.folder / "a.onnx")
    return xpnet.import_onnx(subject.folder / "a.onnx", backend=backend)


@pytest.mark.parametrize("row", ARGUMENTS, ids=lambda row: row.name)
def test_wrong_arguments_of_load_and_export(row, tmp_path):
    check(row, Subject(tmp_path))


# Checkpoints of other runs --------------------------------------------------------------------------------------------


class SaveAt(callbacks.Callback):
    """Writes a checkpoint within the epoch, after the step of this number."""

    def __init__(self, path, step=1):
        self.path, self.step = path, step

    def on_step_end(self, model, step):
        if step == self.step:
            self.run.save(self.path)


def other_run(
    folder, make=lambda: [layers.Dense(5), layers.Tanh(), layers.Dense(3)], seed=0, samples=12, within=False, **changed
):
    path = folder / "other.safetensors"
    subject = Subject(folder)
    model = xpnet.Sequential(make(), (4,), "cpu", seed=seed)
    x, y = np.resize(subject.x, (samples, 4)), np.resize(subject.y, samples)
    model.fit(x, y, callbacks=[SaveAt(path) if within else callbacks.Checkpoint(path)], **{**OPTIONS, **changed})
    return path


OTHERS = {
    "another_width": ({"make": lambda: [layers.Dense(6), layers.Tanh(), layers.Dense(3)]}, {}),
    "another_activation": ({"make": lambda: [layers.Dense(5), layers.ReLU(), layers.Dense(3)]}, {}),
    "more_layers": ({"make": lambda: [layers.Dense(5), layers.Tanh(), layers.Dense(5), layers.Dense(3)]}, {}),
    "another_optimizer": ({"optimizer": "adam"}, {}),
    "another_rate": ({"optimizer": optimizers.SGD(0.5)}, {}),
    "another_loss": ({"loss": losses.SoftmaxCrossEntropy(label_smoothing=0.1)}, {}),
    "other_metrics": ({"metrics": ["f1"]}, {}),
    "more_samples": ({"samples": 20, "within": True}, {}),
    "another_batch_size": ({"batch_size": 6, "within": True}, {}),
    "another_order": ({"shuffle": False, "within": True}, {}),
    "another_accumulate": ({"accumulate": 2, "within": True}, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_run_is_refused_and_nothing_changes(name, tmp_path):
    there, here = OTHERS[name]
    path = other_run(tmp_path, **there)
    subject = Subject(tmp_path)
    row = Misuse(name, lambda s: fit(s, resume_from=path, epochs=3, **here), ArgumentError, (str(path),))
    check(row, subject)


def test_a_model_file_is_no_checkpoint(tmp_path):
    check(Misuse("model_file", lambda s: resume(s, saved(s)), FileError, ("no training state",)), Subject(tmp_path))


def test_a_checkpoint_of_more_epochs_is_complete(tmp_path):
    path = other_run(tmp_path, epochs=3)
    subject = Subject(tmp_path)
    history = fit(subject, resume_from=path, epochs=2)
    assert len(history["loss"]) == 3
