"""The attacks by files, graphs and architectures run, in small, and report planted faults."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import xpnet
from reliability import architectures, coverage_fuzzing, file_fuzzing, onnx_graphs
from reliability.cases import Cases, refused, run_cases
from xpnet.errors import ArgumentError, XpnetError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bounds of memory are those of Linux")

KINDS = [file_fuzzing.IdxFiles, file_fuzzing.GzipFiles, file_fuzzing.ModelFiles, file_fuzzing.Checkpoints,
         file_fuzzing.OnnxFiles, onnx_graphs.OnnxGraphs, onnx_graphs.ExportedModels,
         architectures.Architectures]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_some_cases_of_each_attack_are_right(tmp_path, kind):
    cases = kind(tmp_path, seed=0)
    outcomes = {cases.run(case) for case in range(12)}
    assert outcomes <= set(kind.OUTCOMES)
    assert len(outcomes) > 1 or kind in (file_fuzzing.GzipFiles, architectures.Architectures)


def test_the_parts_of_the_program_report_their_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(file_fuzzing, "KINDS", [("mutated IDX files", file_fuzzing.IdxFiles)])
    (result,) = file_fuzzing.run(0.0005, 0, tmp_path)
    assert (result.cases, result.tried, result.bad) == ("mutated IDX files", 50, [])
    assert sum(int(part.split()[0]) for part in result.note.split(", ")) == 50


class Planted(Cases):
    """Cases that fail in every way."""

    OUTCOMES = ("refused", "right")
    SECONDS = 0.3

    def run(self, case):
        match case:
            case 0:
                raise KeyError("planted")
            case 1:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 2:
                while True:
                    pass
            case 3:
                bytearray(2**28)
            case 4:
                try:
                    bytearray(2**28)
                except MemoryError as error:
                    return refused(_error_from(error))
            case 5:
                with self.in_reference():
                    os.kill(os.getpid(), signal.SIGSEGV)
            case 6:
                return refused(ArgumentError("no."))
            case 7:
                return refused(ArgumentError("Unable to allocate 3.7 GiB"))
            case 8:
                time.sleep(0.5)  # which needs no processor time
        return "right"


def _error_from(cause):
    error = ArgumentError("no.")
    error.__cause__ = cause
    return error


def test_planted_faults_are_reported_each_with_its_case(tmp_path, monkeypatch):
    folder = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(Planted, "__module__", Path(__file__).stem)
    monkeypatch.syspath_prepend(folder)
    result = run_cases("planted", Planted, 10, 7, tmp_path)
    assert result.tried == 10
    assert result.note == "1 refused, 2 right, 1 the reference failed"
    found = {int(text.split()[2].rstrip(":")): text for text in result.bad}
    assert sorted(found) == [0, 1, 2, 3, 4, 7]
    assert "KeyError: 'planted'" in found[0] and "signal 11" in found[1] and "processor time" in found[2]
    assert "MemoryError" in found[3] and "too much memory" in found[4] and "too much memory" in found[7]
    assert all(text.startswith("test_fuzzing:Planted 7 ") for text in result.bad)


def test_a_worker_that_does_not_start_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="failed outside of its cases"):
        run_cases("nothing", type("Missing", (Cases,), {"__module__": "reliability.none"}), 3, 0, tmp_path)


@pytest.mark.parametrize("kind", KINDS[:5], ids=lambda kind: kind.__name__)
def test_a_reader_that_reads_wrong_is_found(tmp_path, monkeypatch, kind):
    cases = kind(tmp_path, seed=0)
    readers = {"IdxFiles": (xpnet.datasets, "read_idx"), "GzipFiles": (xpnet.datasets, "read_idx"),
               "ModelFiles": (xpnet, "load"), "OnnxFiles": (xpnet, "import_onnx")}  # fmt: skip

    def changed(read):
        def wrong(*args):
            result = read(*args)
            if hasattr(result, "parameters"):
                for parameter in result.parameters:
                    parameter.value += 1.0
                return result
            return result + 1

        return wrong

    if kind is file_fuzzing.Checkpoints:  # one that is refused after a change
        fit = cases._fit
        monkeypatch.setattr(cases, "_fit", lambda model, *args: (_add_one(model), fit(model, *args)))
    else:
        owner, name = readers[kind.__name__]
        monkeypatch.setattr(owner, name, changed(getattr(owner, name)))
    with pytest.raises(AssertionError):
        run_all(cases, 200)


def run_all(cases, count):
    for case in range(count):
        cases.run(case)


def _add_one(model):
    model.parameters[0].value += 1.0


def test_a_reader_with_foreign_errors_is_found(tmp_path, monkeypatch):
    cases = file_fuzzing.IdxFiles(tmp_path, seed=0)

    def read(path):
        raise ValueError("planted")

    monkeypatch.setattr(xpnet.datasets, "read_idx", read)
    with pytest.raises(ValueError, match="planted"):
        cases.run(0)


def test_a_layer_that_loads_with_other_arguments_is_found(tmp_path, monkeypatch):
    cases = architectures.Architectures(tmp_path, seed=0)
    monkeypatch.setattr(xpnet, "load", lambda path, backend: xpnet.Sequential([xpnet.layers.Dense(2)], (4,), "cpu"))
    with pytest.raises((AssertionError, XpnetError, ValueError)):
        run_all(cases, 10)


def test_the_coverage_guided_fuzzer_says_that_atheris_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (result,) = coverage_fuzzing.run(0.01, 0, tmp_path)
    assert result.tried == 0 and "nox -s fuzz" in result.note
