"""The attacks by faults and interrupts still run, on a few cases each, and report a fault that is planted."""

import os
import sys

import numpy as np
import pytest

import xpnet
from reliability import interrupts, kills, memory_faults, storage_faults
from reliability.processes import attack
from reliability.results import Result
from xpnet import callbacks, datasets
from xpnet.backends.shortage import is_shortage, shortage, size_text
from xpnet.datasets import download
from xpnet.errors import DeviceMemoryError, FileError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits, signals and mounts of Linux")

#: By part: the task of a worker, and how many of its cases to try.
TASKS = {
    "interrupts": ({"subject": "MLP", "calls": ["fit"], "seed": 0}, 6),
    "memory_faults": ({"device": "cpu", "seed": 0}, 4),
    "storage_faults": ({"suite": "others", "seed": 0, "step": 1}, 4),
}


@pytest.mark.parametrize("part", TASKS)
@pytest.mark.parametrize("plant", [False, True])
def test_a_few_cases_of_an_attack(part, plant, tmp_path):
    task, count = TASKS[part]
    result = Result(part)
    attack(part, {**task, "plant": plant}, count, tmp_path, result, 60.0, OPENBLAS_NUM_THREADS="1")
    assert result.tried == count
    assert bool(result.bad) == plant, str(result)


@pytest.mark.parametrize("plant", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_a_kill_of_a_training(plant, tmp_path):
    result = Result("kills")
    kills.kill_often("SGD", 1, np.random.default_rng(0), tmp_path / "own", result, plant)
    assert result.tried == 1
    assert bool(result.bad) == plant, str(result)


def test_the_parts_cover_what_they_say():
    assert len(kills.CONFIGURATIONS) == 12 and sum(interrupts._FITS.values()) == 2000
    assert {"fit", "load", "generate"} <= {*memory_faults.CALLS} and {"save", "download"} <= {*storage_faults.WRITERS}


# The faults that the attacks have found ----------------------------------------------------------------------------


def test_a_model_of_sequences_of_any_length_resumes_within_an_epoch(tmp_path):
    def fit(**arguments):
        model = xpnet.Sequential([xpnet.layers.Embedding(4, 3), xpnet.layers.Dense(4)], (None,), "cpu", seed=0)
        model.fit(x, x, epochs=2, batch_size=2, verbose=0, **arguments)
        return model.state_dict()

    class Stop(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 3:
                raise ZeroDivisionError

    x = np.arange(32).reshape(8, 4) % 4
    with pytest.raises(ZeroDivisionError):
        fit(callbacks=[callbacks.Checkpoint(tmp_path / "run", minutes=0), Stop()])
    resumed, whole = fit(resume_from=tmp_path / "run"), fit()
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


def test_a_csv_log_into_a_pipe_and_an_onnx_file_that_is_one_are_refused(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    os.mkfifo(tmp_path / "pipe")
    model = xpnet.Sequential([xpnet.layers.Dense(2)], (3,), "cpu")
    with pytest.raises(FileError, match="a named pipe"):
        model.fit(np.ones((2, 3)), [0, 1], callbacks=[callbacks.CSVLogger(tmp_path / "pipe")], verbose=0)
    with pytest.raises(FileError, match="a named pipe"):
        xpnet.import_onnx(tmp_path / "pipe")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(FileError, match="0 bytes and no graph"):
        xpnet.import_onnx(tmp_path / "empty.onnx")


def test_the_temporary_file_of_a_killed_save_is_deleted_by_the_next_one(tmp_path):
    stale, other = tmp_path / "a.xpnet-0123456789abcdef.tmp", tmp_path / "b.xpnet-0123456789abcdef.tmp"
    for path in (stale, other):
        path.write_bytes(b"half")
    datasets.write_idx(tmp_path / "a", np.zeros(3, "uint8"))
    assert not stale.exists() and other.exists()


def test_a_file_is_flushed_before_and_its_folder_after_the_renaming(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.path.isdir(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    datasets.write_idx(tmp_path / "a", np.zeros(3, "uint8"))
    assert events == [False, "rename", True]


def test_a_download_is_bounded_in_size_and_time():
    watch = download._Watch(100)
    watch.update(download._CHUNK)
    with pytest.raises(ValueError, match="more than the 100 bytes"):
        watch.update(download._CHUNK)
    with pytest.raises(ValueError, match="more than the 100 bytes"):
        download._Watch(100).total = 101


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 3 MiB"), RuntimeError("can't start new thread")])
def test_every_shortage_of_memory_is_explained(monkeypatch, error):
    model = xpnet.Sequential([xpnet.layers.Embedding(4, 3), xpnet.layers.Dense(4)], (None,), "cpu", seed=0)

    def short(*_):
        raise error

    x = np.zeros((9, 2), int)
    want = model.predict(x)
    with monkeypatch.context() as patched:
        patched.setattr(model.layers[1], "forward", short)
        for call, remedy in (
            (lambda: model.predict(x), "try batch_size=4"),
            (lambda: model.fit(x, x, batch_size=8, verbose=0), "try batch_size=4"),
            (lambda: model.evaluate(x, x, "softmax_cross_entropy"), "try batch_size=4"),
            (lambda: model.forward(x), "9 samples: give fewer at a time, such as 4"),
            (lambda: xpnet.generate(model, x, 3), "9 sequences: give fewer at a time, such as 4"),
        ):
            with pytest.raises(DeviceMemoryError, match=f"{remedy}.*{error}. Of .* are free"):
                call()
    np.testing.assert_array_equal(model.predict(x), want)


def test_without_memory_a_model_is_neither_saved_nor_loaded(tmp_path, monkeypatch):
    model = xpnet.Sequential([xpnet.layers.Dense(4)], (3,), "cpu")
    model.save(tmp_path / "m")

    def short(size):
        raise MemoryError(f"Unable to allocate {size} bytes")

    monkeypatch.setattr("xpnet.training.model_files.refuse_without_memory", short)
    for call in (lambda: model.save(tmp_path / "m"), lambda: xpnet.load(tmp_path / "m", "cpu")):
        with pytest.raises(DeviceMemoryError, match="Unable to allocate"):
            call()


def test_sizes_are_told_in_units():
    assert [size_text(n) for n in (0, 1023, 1536, 5 * 2**20, 2**41)] == [
        "0 bytes", "1023 bytes", "1.5 KiB", "5.0 MiB", "2.0 TiB",
    ]  # fmt: skip
    assert not is_shortage(DeviceMemoryError("short")) and is_shortage(MemoryError())
    assert "Of " in str(shortage("it is short", MemoryError()))
