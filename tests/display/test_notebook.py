"""What a real Jupyter kernel shows, with and without ipywidgets: `nox -s notebook`."""

import os
import re
from pathlib import Path

import pytest

import xpnet

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: see nox -s notebook")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

CELLS = [
    """
import sys
if {hidden}:
    sys.modules["ipywidgets"] = None  # importing it fails
import xpnet
from xpnet import datasets, layers
x, y = datasets.digits()
model = xpnet.Sequential([layers.Flatten(), layers.Dense(10)], input_shape=(8, 8), backend="cpu")
history = model.fit(x, y, epochs=2, validation_split=0.2)
""",
    "model",
    "model.summary()",
    "history",
    "xpnet.Sequential([layers.Dense(3)], backend='cpu')",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages of Jupyter
@pytest.mark.parametrize("hidden", [False, True], ids=["ipywidgets", "no ipywidgets"])
def test_a_notebook_shows_training_model_summary_and_history(hidden, monkeypatch, tmp_path):
    if not hidden:
        pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(xpnet.__file__).parents[1]), os.getenv("PYTHONPATH", "")])
    )
    cells = [nbformat.v4.new_code_cell(code.replace("{hidden}", str(hidden))) for code in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    training, *shown = [cell.outputs for cell in notebook.cells]
    assert not [output for output in training if output.get("name") == "stderr"], training
    if hidden:
        lines = "".join(output["text"] for output in training).splitlines()
        assert [re.split("  ", line)[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
        assert all("val_accuracy 0." in line for line in lines)
    else:
        assert len(training) == 2
        assert all("application/vnd.jupyter.widget-view+json" in output["data"] for output in training)
    for (output,), text in zip(shown, ["Dense(10)", "Dense(10)", "val_accuracy", "not built"], strict=True):
        assert output["data"]["text/html"].startswith("<table>") and text in output["data"]["text/html"]
    plain = shown[1][0]["data"]["text/plain"]
    assert plain.splitlines()[0].startswith("name  layer ") and plain.endswith("650 parameters")
