"""benchmarks/gpu_check.py, the check of a machine with a GPU. No test needs a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from emulated_cuda import COMPILER

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import __main__ as program
from benchmarks import gpu_check, gpu_steps, measures, messages, peers, report, rounds, versions
from benchmarks.gpu_check import Outcome, Part, Record, Section

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(gpu_check, "MIN_SECONDS", 0.1)
    monkeypatch.setenv("XPNET_COMMIT", "abc1234")


def printed(outcome):
    return Section([message["text"] for message in outcome.messages], outcome.status == 0)


def part(name, code, limit=20.0, report=printed, **more):
    return Part(name, f"The part {name}", lambda seconds: [PYTHON, "-c", code], report, limit, 0.0, **more)


def sends(text):
    return f"from benchmarks.messages import send; send('fact', text={text!r}); "


def record_of(stages, folder, seconds=30.0):
    """Run the stages; return (the text of the finished record, the names of the parts with problems)."""
    record = Record(folder, [part for stage in stages for part in stage], emulated=False)
    gpu_check.run(stages, seconds, record)
    record.complete = True
    record.write()
    return record.path.read_text(encoding="utf-8"), record.problems


# Parsing of output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "counts"), [
    ("10 passed in 2.31s", {"passed": 10}),
    ("== 3 failed, 2850 passed, 12 deselected, 1 error in 120.51s (0:02:00) ==",
     {"failed": 3, "passed": 2850, "deselected": 12, "error": 1}),
    ("2 errors in 0.10s", {"error": 2}),
    ("GPU tests, 2026-11-27, commit abc: 5 passed, 0 failed, 0 error, 0 skipped", {}),
    ("", {}),
])  # fmt: skip
def test_the_summary_line_of_pytest_is_parsed(line, counts):
    assert gpu_check.summary_counts(f"...F...\nFAILED tests/a.py::b - 7 passed\n{line}\n") == counts


def test_the_results_file_of_the_plugin_is_parsed():
    lines = [
        {"kind": "collected", "count": 6},
        {"kind": "passed", "test": "a.py::one"},
        {"kind": "failed", "test": "a.py::two[x]", "message": "assert 1 == 2"},
        {"kind": "passed", "test": "a.py::three"},
        {"kind": "failed", "test": "a.py::three", "message": "in its teardown"},
        {"kind": "skipped", "test": "a.py::four"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"kind": "passed", "te'
    tests = gpu_check.parse_results(text)
    assert tests == (1, {"a.py::two[x]": "assert 1 == 2", "a.py::three": "in its teardown"}, 1, 6)


@pytest.mark.parametrize(("text", "errors"), [
    ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
    ("========= ERROR SUMMARY: 1 error\n", 1),
    ("========= ERROR SUMMARY: 2 errors\n========= ERROR SUMMARY: 3 errors\n", 5),
    ("========= COMPUTE-SANITIZER\n", None),
])  # fmt: skip
def test_the_summary_of_compute_sanitizer_is_parsed(text, errors):
    assert gpu_check.sanitizer_errors(text) == errors
    section = gpu_check.report_sanitizer(Outcome(0, 1.0, text), "/bin/compute-sanitizer", needed=True)
    assert section.ok == (errors == 0)


def test_the_errors_of_compute_sanitizer_are_counted_by_kind():
    text = "========= Invalid __global__ write of size 4 bytes\n=========     at fold+0x10\n" * 3
    text += "========= Program hit cudaErrorInvalidValue (error 1)\n========= ERROR SUMMARY: 4 errors\n"
    section = gpu_check.report_sanitizer(Outcome(0, 1.0, text), "/bin/compute-sanitizer", needed=True)
    assert not section.ok and "ERROR SUMMARY: 4 errors" in section.lines
    assert "- 3 times: ``Invalid __global__ write of size 4 bytes``" in section.lines


def test_a_missing_compute_sanitizer_is_reported():
    for needed in (True, False):
        section = gpu_check.report_sanitizer(Outcome(0, 1.0, "5 passed in 1.0s"), None, needed)
        assert "was not found" in section.lines[0] and section.ok != needed


def test_messages_are_found_among_other_output(capsys):
    messages.send("fact", text="1")
    text = "a warning" + capsys.readouterr().out + 'noise\nRESULT {"kind": "fact", "text": "cut o'
    assert messages.parse(text) == [{"kind": "fact", "text": "1"}]


def test_the_output_of_the_example_is_parsed():
    text = (
        "epoch 1/2  loss 0.37  accuracy 0.89  1.2 s  3,849 samples/s\n"
        "epoch 2/2  loss 0.08  accuracy 0.97  0.1 s  1,400,000 samples/s\n"
        "trained for 0.3 s, after 8.1 s of compiling kernels for the GPU, once\n\ntest accuracy: 0.9770\n"
    )
    section = gpu_check.report_example(Outcome(0, 9.0, text))
    assert section.ok and "- test accuracy: 0.9770" in section.lines
    assert all(any(text in line for line in section.lines) for text in ("0.3 s, after 8.1 s", "1,400,000"))
    assert not gpu_check.report_example(Outcome(0, 9.0, "MNIST was not found\n" + text)).ok


# Parts ---------------------------------------------------------------------------------------------------------------


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_part_that_exceeds_its_limit_is_killed_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    sleeper = [PYTHON, "-c", "import time; time.sleep(60)"]
    code = sends("what it sent before") + (
        f"import os, subprocess, time; child = subprocess.Popen({sleeper}); "
        f"other = subprocess.Popen({sleeper}, process_group=0); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}} {{other.pid}}'); time.sleep(60)"
    )
    start = time.monotonic()
    text, problems = record_of(
        [[part("slow", code, limit=2.0), part("beside", sends("beside"))], [part("after", sends("later"))]], tmp_path
    )
    assert time.monotonic() - start < 10
    assert not any(alive(pid) for pid in pids.read_text().split())
    assert problems == ["slow"]
    assert all(line in text for line in ("what it sent before", "killed at its limit of 2 s", "beside", "later"))


def test_parts_that_raise_do_not_affect_the_others(tmp_path):
    def nothing(outcome):
        raise KeyError("a missing value")

    def unstarted(seconds):
        raise OSError("no such tool")

    stages = [
        [part("broken", sends("so far") + "raise ValueError('in the part')")],
        [part("unread", "pass", report=nothing), part("unstarted", "pass")._replace(command=unstarted)],
        [
            part("absent", "pass")._replace(command=lambda seconds: ["/no/such/program"]),
            part("good", sends("all well")),
        ],
    ]
    text, problems = record_of(stages, tmp_path)
    assert set(problems) == {"broken", "unread", "unstarted", "absent"}
    assert all(line in text for line in ("so far", "ValueError: in the part", "KeyError", "no such tool", "all well"))
    assert "Parts with problems" in text.split("##")[0]


def test_a_part_is_not_started_if_no_time_is_left(tmp_path):
    stages = [[part("first", "import time; time.sleep(60)")], [part("second", sends("ran"))._replace(reserve=5.0)]]
    text, problems = record_of(stages, tmp_path, seconds=6.0)
    assert problems == ["first"] and "ran" in text  # the first part left the reserve of the second
    text, problems = record_of([[part("third", sends("ran"))]], tmp_path, seconds=0.0)
    assert problems == ["third"] and "no time was left" in text


def test_the_record_is_written_after_each_part(tmp_path):
    seen = []

    def report(outcome):
        seen.append((tmp_path / record.path.name).read_text(encoding="utf-8"))
        return printed(outcome)

    stages = [[part("one", sends("sent by one"), report=report)], [part("two", sends("sent by two"), report=report)]]
    record = Record(tmp_path, [part for stage in stages for part in stage], emulated=False)
    gpu_check.run(stages, 30.0, record)
    assert "Not run." in seen[0] and "sent by one" not in seen[0]
    assert "sent by one" in seen[1] and "was still running" in seen[1]


# The record ----------------------------------------------------------------------------------------------------------


def counted(tmp_path, results, text, status):
    path = tmp_path / "results"
    path.write_text("\n".join(map(json.dumps, results)), encoding="utf-8")
    return gpu_check.report_tests(Outcome(status, 1.0, text), path, "2026-11-27", "abc", emulated=False)


def test_one_line_has_the_number_of_passed_tests(tmp_path):
    results = [{"kind": "failed", "test": f"a.py::t[{i}]", "message": f"wrong by `{i}`"} for i in range(70)]
    section = counted(tmp_path, results, "70 failed, 2823 passed in 120.00s (0:02:00)", status=1)
    assert section.lines[0] == "GPU tests, 2026-11-27, commit abc: 2823 passed, 70 failed"
    assert sum(line.startswith("GPU tests, ") for line in section.lines) == 1
    assert sum(line.startswith("- `a.py::t[") for line in section.lines) == 60 and section.lines[-1] == "- and 10 more"
    assert "- `a.py::t[3]`: ``wrong by '3'``" in section.lines
    assert not section.ok
    assert counted(tmp_path, [], "2893 passed in 99.00s", status=0).ok
    assert not counted(tmp_path, [], "5 deselected in 1.00s", status=5).ok


def test_the_results_of_a_killed_test_run_are_counted(tmp_path):
    results = [{"kind": "collected", "count": 9}, *({"kind": "passed", "test": str(i)} for i in range(7))]
    section = counted(tmp_path, results, "......", status=None)
    assert (
        section.lines[0].endswith(": 7 passed, 0 failed") and "7 of 9 tests ran" in section.lines[2] and not section.ok
    )


def test_the_summary_of_the_tests_is_not_repeated():
    text = "GPU tests, 2026-11-27, commit abc: 3 passed, 0 failed, 0 error, 0 skipped\nlast line\n"
    assert gpu_check.tail(text) == ["The end of its output:", "", "```text", "last line", "```"]


def test_the_report_has_a_table_for_each_precision():
    seconds = {
        "xpnet": 50e-6,
        "xpnet-tf32": 40e-6,
        "floor": 25e-6,
        "torch-graph-tf32": 80e-6,
        "jax-scan-float32": 25e-6,
    }
    ratios = {"xpnet": 1.0, "xpnet-tf32": 1.25, "floor": 2.0, "torch-graph-tf32": 0.5, "jax-scan-float32": 2.0}
    steps = {"kind": "steps", "situation": "mlp, batch 128", "rounds": 9, "seconds": seconds, "ratios": ratios}
    failed = {"kind": "failed", "what": "torch-tf32", "where": "mlp, batch 128", "why": "RuntimeError: no GPU"}
    text = "".join(messages.MARK + json.dumps(message) + "\n" for message in (steps, failed))
    section = gpu_check.report_steps(Outcome(0, 1.0, text))
    assert section.ok  # a peer that fails is left out
    assert "|  | xpnet, float32 | floor, float32 | jax-scan-float32 |" in section.lines
    assert "| mlp, batch 128 | 50.0 | 25.0 (2.00) | 25.0 (2.00) |" in section.lines
    assert "| mlp, batch 128 | 40.0 | 80.0 (0.50) |" in section.lines
    assert "- failed: torch-tf32 (mlp, batch 128): ``RuntimeError: no GPU``" in section.lines
    assert not gpu_check.report_steps(Outcome(0, 1.0, text.replace("torch-tf32", "xpnet-tf32"))).ok


def test_the_commit_of_a_copy_without_a_repository_comes_from_the_environment(monkeypatch):
    assert versions.commit() == "abc1234"
    monkeypatch.delenv("XPNET_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert versions.commit() == "unknown"


# Peers ---------------------------------------------------------------------------------------------------------------


def test_peers_on_a_gpu_have_their_precision_in_the_name():
    names = program.names_of(["torch", "torch-compile", "jax"], gpu=True)
    assert {"torch-float32", "torch-tf32", "torch-graph-tf32", "jax-scan-float32", "jax-tf32", "floor-tf32"} <= set(
        names
    )
    assert set(gpu_steps.NAMES) <= peers.KINDS.keys()
    for name in {*names, *gpu_steps.NAMES}:
        precision = peers.precision_of(name)
        assert precision in peers.label(name)
        assert name.startswith(("xpnet", "floor")) or name.endswith(precision)
        assert gpu_check.precision_of(name) == precision
        assert peers.KINDS[name].option.split()[-1:] in ([], [precision])


def test_peers_on_the_cpu_keep_their_names():
    names = program.names_of(["torch", "jax", "sklearn"], gpu=False)
    assert names == ["xpnet", "xpnet-plain", "floor", "torch", "torch-channels-last", "jax", "sklearn"]
    assert all(peers.precision_of(name) == "float32" for name in names)


def test_measurements_are_compared_in_the_same_precision():
    times = {"xpnet": 8.0, "xpnet-tf32": 4.0, "torch-tf32": 2.0, "torch-float32": 2.0, "floor-bfloat16": 1.0}
    row = measures.Row("step", "mlp", {name: rounds.Measurement([time]) for name, time in times.items()})
    heads, _, cells = report.markdown([row]).splitlines()
    assert heads == (
        "| step | xpnet (float32), ms | to xpnet-tf32 | xpnet-tf32 to torch-tf32 | to torch-float32 | "
        "xpnet-bfloat16 to floor-bfloat16 |"
    )
    assert cells == "| mlp | 8000 | 2.00 | 2.00 | 4.00 |  |"
    assert "torch-tf32 2000 (2.00)" in report.line(row, first=True)
    assert report._as_json(row)["measurements"]["torch-tf32"]["xpnet-tf32 / this"] == 2.0


class Peer:
    """A peer whose steps fail after a number of calls."""

    def __init__(self, name, turns=1000):
        self.name, self.turns, self.closed = name, turns, False

    def step(self):
        self.turns -= 1
        if self.turns < 0:
            raise RuntimeError("a long\nstory")

    def synchronize(self):
        pass

    def close(self):
        self.closed = True


def test_peers_that_fail_leave_the_comparison(monkeypatch, capsys):
    started = {}

    def start(name, net, batch, device):
        if name.startswith("jax"):
            raise ModuleNotFoundError("No module named 'jax'")
        started[name] = Peer(name, turns=9 if name == "torch-tf32" else 10**6)
        return started[name]

    monkeypatch.setattr(gpu_steps, "start", start)
    comparison = gpu_steps.Comparison(gpu_steps.NAMES, time.monotonic() + 60, 1e-4, (3, 4))
    comparison.measure("mlp", 128)
    sent = messages.parse(capsys.readouterr().out)
    (steps,) = [message for message in sent if message["kind"] == "steps"]
    assert set(steps["seconds"]) == {n for n in gpu_steps.NAMES if not n.startswith("jax") and n != "torch-tf32"}
    assert steps["ratios"].keys() == steps["seconds"].keys()
    failed = {message["what"]: message["why"] for message in sent if message["kind"] == "failed"}
    assert failed == {  # a peer that is not installed is tried only once
        "torch-tf32": "RuntimeError: story", "jax-scan-float32": "ModuleNotFoundError: No module named 'jax'"
    }  # fmt: skip
    assert all(peer.closed for name, peer in started.items() if name != "torch-tf32")
    comparison.deadline = time.monotonic()
    comparison.measure("cnn", 512)
    (dropped,) = messages.parse(capsys.readouterr().out)
    assert dropped["kind"] == "dropped" and dropped["where"] == "cnn, batch 512"


# The check as a program ----------------------------------------------------------------------------------------------

TESTS = """
import pytest
@pytest.mark.parametrize("i", range(6))
def test_good(i): pass
def test_bad(): assert 1 == 2, "first\\n\\nlast"
@pytest.fixture
def broken(): yield; raise ValueError("in the teardown")
def test_teardown(broken): pass
def test_skipped(): pytest.skip("why")
"""


def pytest_with_plugin(folder, *arguments, **variables):
    (folder / "test_it.py").write_text(TESTS, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XPNET_CHECK_RESULTS": str(folder / "results"), **variables}
    command = [PYTHON, "-m", "pytest", "-q", "-p", "benchmarks.pytest_plugin", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    results = folder / "results"
    return done, gpu_check.parse_results(results.read_text(encoding="utf-8") if results.exists() else "")


@pytest.mark.parametrize("processes", ["0", "2"])
def test_each_result_is_written_once_by_any_number_of_processes(tmp_path, processes):
    done, tests = pytest_with_plugin(tmp_path, "-n", processes)
    assert gpu_check.summary_counts(done.stdout) == {"failed": 1, "passed": 7, "skipped": 1, "error": 1}
    assert tests.passed == 6 and tests.skipped == 1 and tests.collected == 9
    assert tests.failed.keys() == {"test_it.py::test_bad", "test_it.py::test_teardown"}
    assert tests.failed["test_it.py::test_bad"].endswith("… assert 1 == 2")
    assert tests.failed["test_it.py::test_teardown"] == "ValueError: in the teardown"


def test_a_test_run_stops_after_its_time_limit(tmp_path):
    done, tests = pytest_with_plugin(tmp_path, XPNET_CHECK_SECONDS="0")
    assert done.returncode == 2 and "the time is up" in done.stdout
    assert gpu_check.summary_counts(done.stdout) and tests.passed + len(tests.failed) + tests.skipped == 1


def check(*arguments):
    command = [PYTHON, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_an_unknown_part_is_an_error():
    done = check("--emulated", "--only", "nothing")
    assert done.returncode == 2 and "unknown part: nothing" in done.stderr


@pytest.mark.skipif(COMPILER is None, reason="the emulation needs g++")
def test_the_check_runs_with_an_emulated_gpu_and_says_so(tmp_path):
    only = ["environment", "mnist-mlp", "sanitizer-kernels"]
    done = check("--emulated", "--only", *only, "--data", str(tmp_path), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-emulated-*.md")
    text = path.read_text(encoding="utf-8")
    assert text in done.stdout
    assert re.match(r"\*\*Everything .* emulated .* Its times mean nothing\.\*\*\n", text)
    assert "device: Emulated" in text and "test accuracy" in text and "compute-sanitizer was not found" in text
