"""A headless Chromium for tests of pages."""

import contextlib
import os
import shutil

import pytest


@contextlib.contextmanager
def chromium():
    """A browser from XPNET_CHROMIUM or PATH. Without one, or without playwright, the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = (os.environ.get("XPNET_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if program is None:
        pytest.skip("Chromium is not on the PATH, and XPNET_CHROMIUM does not name it")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
