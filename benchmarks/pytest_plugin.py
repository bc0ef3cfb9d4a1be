"""A plugin of pytest for `benchmarks.gpu_check`: `-p benchmarks.pytest_plugin`. Environment variables turn it on.

XPNET_CHECK_RESULTS: a file to which each result is appended as it comes, so that a run that is killed keeps them.
XPNET_CHECK_SECONDS: after so many seconds no test begins; tests run in a mixed order, so that those that did run are a
    sample of all.
XPNET_CHECK_NO_POOL: CuPy allocates each array by itself, so that compute-sanitizer sees an access beside it. Within a
    block of CuPy's memory pool it sees none.
"""

import json
import os
import random
import time
from typing import Any

import pytest

BEGUN = time.monotonic()
LONGEST = 160  # characters of a line of a message
_results: list[str] = []  # where they are written: one file, or none


def pytest_configure(config: pytest.Config) -> None:
    # Of several processes of pytest-xdist, the one that distributes the tests hears of all results.
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
    if limit and time.monotonic() - BEGUN > float(limit):
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
    """The first line of a failure's message and the last one."""
    crash = getattr(longrepr, "reprcrash", None)
    text = str(longrepr if crash is None else crash.message)
    lines = [line.strip()[:LONGEST] for line in text.splitlines() if line.strip()]
    return " … ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else ""


def write(kind: str, **facts: Any) -> None:
    for path in _results:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **facts}) + "\n")
