"""docs/notebooks: the notebooks run, and their exercises tell right solutions from blank and wrong ones."""

import importlib
import itertools
import os
import re
import sys
from pathlib import Path

import pytest

import xpnet
from xpnet import layers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"

if not FOLDER.exists():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)

TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.py"))}
del TEXTS["solutions"], TEXTS["exercises"]
EXERCISE = '# %% tags=["exercise"]\n'


def code_cells(name):
    """The code cells of a notebook in the percent format, each with its first line."""
    cells = re.split(r"^(?=# %%)", TEXTS[name], flags=re.MULTILINE)
    return [cell for cell in cells if cell and not cell.startswith("# %% [markdown]")]


def exercises():
    """(notebook, class, the cell of the exercise, the cell of the check) of all exercises."""
    for name in TEXTS:
        cells = code_cells(name)
        for cell, check in itertools.pairwise(cells):
            if cell.startswith(EXERCISE):
                yield pytest.param(name, re.search(r"^class (\w+)", cell, re.MULTILINE)[1], cell, check, id=name)


def solved(blank):
    """The class of an exercise with its solution."""
    return type(blank.__name__, (getattr(importlib.import_module("solutions"), blank.__name__), blank), {})


@pytest.fixture(autouse=True)
def in_the_folder_of_the_notebooks(monkeypatch):
    """Let the notebooks import exercises.py and solutions.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("exercises", "solutions"):
        sys.modules.pop(name, None)


def test_every_notebook_has_an_exercise_and_is_a_page():
    assert {param.values[0] for param in exercises()} == {*TEXTS} and len(TEXTS) >= 6
    site, index = ((ROOT / path).read_text(encoding="utf-8") for path in ("mkdocs.yml", "docs/index.md"))
    for name in TEXTS:
        assert f"notebooks/{name}.md" in site and f"notebooks/{name}.py" in index


@pytest.mark.parametrize(("name", "kind", "cell", "check"), [*exercises()])
def test_a_right_solution_passes_and_blank_and_wrong_ones_get_a_hint(name, kind, cell, check, capsys):
    pytest.importorskip("matplotlib", reason="the extra plots is missing")
    namespace = {"__name__": name}
    setup = code_cells(name)[0]
    assert "from exercises import grade\n" in setup

    def graded(layer_class):
        namespace[kind] = layer_class
        exec(check, namespace)
        return capsys.readouterr().out

    exec(setup + cell, namespace)
    capsys.readouterr()
    blank = graded(namespace[kind])
    assert blank.startswith("Not yet:") and "\nHint: " in blank
    assert "∂L/∂x is missing." in blank or "∂L/∂x is wrong" in blank
    solution = solved(namespace[kind])
    assert graded(solution).startswith("Right: backward agrees")

    class Doubled(solution):
        def backward(self, grad_y):
            return 2 * super().backward(grad_y)

    wrong = graded(Doubled)
    assert wrong.startswith("Not yet:\n  ∂L/∂x is wrong: relative error 0.33.\nHint: ")

    class Fails(solution):
        def backward(self, grad_y):
            return grad_y * slope  # noqa: F821

    assert graded(Fails).startswith("Not yet: NameError: name 'slope' is not defined\nHint: ")


def test_a_gradient_of_a_parameter_that_is_wrong_or_forgotten_is_named(capsys):
    grade = importlib.import_module("exercises").grade
    namespace = {"layers": layers}
    exec(next(param.values[2] for param in exercises() if param.values[1] == "Scale"), namespace)
    right = solved(namespace["Scale"])

    class OneRow(right):
        def backward(self, grad_y):
            grad_x = super().backward(grad_y)
            self.weight.grad[...] = (grad_y * self.work.x)[0]
            return grad_x

    class Adds(right):
        def backward(self, grad_y):
            self.weight.grad += self.xp.sum(grad_y * self.work.x, axis=0)
            return grad_y * self.weight.value

    grade(OneRow(), (3,), "sum")
    assert re.match(r"Not yet:\n  ∂L/∂weight is wrong: relative error [\d.]+\.\nHint: sum\n", capsys.readouterr().out)
    grade(Adds(), (3,), "assign")
    assert capsys.readouterr().out == "Not yet:\n  ∂L/∂weight is missing.\nHint: assign\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages of Jupyter
@pytest.mark.parametrize("name", [*TEXTS])
def test_a_notebook_runs_in_jupyter_and_accepts_its_solutions(name, monkeypatch):
    """Each exercise is first left blank, and then solved."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: see nox -s notebook")
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed: see nox -s notebook")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: see nox -s notebook")
    from nbformat.v4 import new_code_cell

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(xpnet.__file__).parents[1]), os.getenv("PYTHONPATH", "")])
    )
    notebook = jupytext.reads(TEXTS[name], "py:percent")
    cells, pairs = [], []
    for cell in notebook.cells:
        cells.append(cell)
        if len(cells) > 1 and "exercise" in cells[-2].metadata.get("tags", []):
            kind = re.search(r"^class (\w+)", cells[-2].source, re.MULTILINE)[1]
            right = f"import solutions\nclass {kind}(solutions.{kind}, {kind}): pass\n{cell.source}"
            pairs.append((cell, new_code_cell(right)))
            cells.append(pairs[-1][1])
    notebook.cells = cells
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for pair in pairs:
        blank, right = ("".join(output["text"] for output in cell.outputs) for cell in pair)
        assert blank.startswith("Not yet:") and right.startswith("Right:")
    # What a cell shows at its end is a picture, a table or a number, not the name of an object of matplotlib.
    plain = [output["data"] for output in outputs if "data" in output]
    assert not [data for data in plain if data.keys() == {"text/plain"} and "matplotlib" in data["text/plain"]]
