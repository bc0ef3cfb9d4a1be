"""A pytest plugin for `benchmarks.gpu_check`: `-p benchmarks.pytest_plugin`. Environment variables enable its parts.

XPNET_CHECK_RESULTS: the file to which each result is appended at once, so that a killed run keeps its results.
XPNET_CHECK_SECONDS: the number of seconds after which no test starts. Tests run in random order, so that those that ran
    are a sample of all tests.
XPNET_CHECK_NO_POOL: makes CuPy allocate each array separately, so that compute-sanitizer detects accesses out of
    bounds; it cannot detect them inside a block of CuPy's memory pool.
"""

import json
import os
import random
import time
from typing import Any

import pytest

START = time.monotonic()
MAX_LENGTH = 160  # characters of a line of a message
_results: list[str] = []  # the path of the results file, if there is one


def pytest_configure(config: pytest.Config) -> None:
    # With pytest-xdist, the controller receives all results; its workers write none.
    path = os.environ.get("XPNET_CHECK_RESULTS")
    _results.extend([path] if path and not hasattr(config, "workerinput") else [])
    if os.environ.get("XPNET_CHECK_NO_POOL"):
        import cupy

        cupy.cuda.set_allocator(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("XPNET_CHECK_SECONDS"):
        random.Random(0).shuffle(items)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    limit = os.environ.get("XPNET_CHECK_SECONDS")
    if limit and time.monotonic() - START > float(limit):
        item.session.shouldstop = "the time is up"


def pytest_collection_finish(session: pytest.Session) -> None:
    write("collected", count=len(session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    write("collected", count=len(ids))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write("failed", test=report.nodeid or "collection", message=message_of(report.longrepr))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        write("failed", test=report.nodeid, message=message_of(report.longrepr))
    elif report.skipped:
        write("skipped", test=report.nodeid)
    elif report.when == "call":
        write("passed", test=report.nodeid)


def message_of(longrepr: Any) -> str:
    """The first and the last line of the message of a failure."""
    crash = getattr(longrepr, "reprcrash", None)
    text = str(longrepr if crash is None else crash.message)
    lines = [line.strip()[:MAX_LENGTH] for line in text.splitlines() if line.strip()]
    return " … ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else ""


def write(kind: str, **values: Any) -> None:
    for path in _results:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
