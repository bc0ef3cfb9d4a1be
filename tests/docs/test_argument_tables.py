"""docs/argument_tables.py: explanations of arguments and attributes become tables of the reference."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from xpnet import callbacks, optimizers

PATH = Path(__file__).parents[2] / "docs" / "argument_tables.py"

if not PATH.exists():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)


@pytest.fixture
def tables(monkeypatch):
    """The module, which only derives from a class of Griffe."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    spec = importlib.util.spec_from_file_location("argument_tables", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_explanations_become_rows_and_all_other_text_stays(tables):
    text = """Fit a line.

x (N, 1): the inputs; see also: other.  y, weight (N,): targets,
over two lines.  mode: "a" | `b|c`. Returns the slope: a float.

    x: in an example

other: no argument."""
    assert (
        tables.with_tables(text, {"x", "y", "weight", "mode"})
        == """Fit a line.

| name | meaning |
|---|---|
| `x` (N, 1) | the inputs; see also: other. |
| `y`,<br>`weight` (N,) | targets, over two lines. |
| `mode` | "a" &#124; `b|c`. |

Returns the slope: a float.

    x: in an example

other: no argument."""
    )


def test_comments_of_attributes_become_rows(tables):
    source = [
        "class A:",
        "    #: Whether it",
        "    #: counts.",
        "    counts = True",
        "    plain = 1",
        "    #: Internal.",
        "    _own = 2",
    ]
    table = tables.with_comments(source, {"counts": 3, "plain": 4, "_own": 6})
    assert table == "\n\n| attribute | meaning |\n|---|---|\n| `counts` | Whether it counts. |"
    assert tables.with_comments(source, {"plain": 4}) == ""


@pytest.mark.parametrize("kind", [optimizers.Optimizer, callbacks.LearningRateFinder, callbacks.TensorBoard])
def test_every_argument_of_these_classes_has_a_row(tables, kind):
    names = {*inspect.signature(kind).parameters}
    table = tables.with_tables(inspect.getdoc(kind), names)
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert all(any(f"`{name}`" in cell for cell in cells) for name in names)
