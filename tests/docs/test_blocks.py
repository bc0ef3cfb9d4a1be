"""The Python blocks of the README and of each page of the documentation run without changes."""

import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if page.exists() and "```python\n" in page.read_text(encoding="utf-8")]


def test_pages_with_blocks_are_found():
    assert not (ROOT / "docs").exists() or len(WITH_BLOCKS) >= 9


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    packages = {"sklearn": "sklearn", "onnx": "onnx", "plots": "matplotlib", "tensorboard": "tensorboardX"}
    for extra in re.findall(r'pip install "xpnet\[(\w+)\]"', page.read_text(encoding="utf-8")):
        if extra in packages:
            pytest.importorskip(packages[extra], reason=f"the extra {extra} is missing")
    monkeypatch.chdir(tmp_path)  # the blocks write files
    namespace = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
    for picture in tmp_path.glob("*.png"):
        kept = page.parent / "images" / picture.name
        if f"(images/{picture.name})" in page.read_text(encoding="utf-8"):
            if os.environ.get("XPNET_WRITE_PICTURES"):  # how the pictures of a page are made
                shutil.copy(picture, kept)
            assert kept.exists()
