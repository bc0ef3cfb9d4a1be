"""What a real Jupyter kernel shows of plots, and of curves that are redrawn while a model trains: `nox -s notebook`."""

import base64
import os
from pathlib import Path

import pytest

import xpnet

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: see nox -s notebook")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytest.importorskip("matplotlib", reason="the extra plots is missing")

SETUP = """
import numpy as np
import xpnet
from xpnet import callbacks, datasets, layers, plots
history = {"loss": [0.9, 0.4], "val_loss": [1.0, 0.5]}
images = np.eye(4)[None].repeat(3, axis=0)
"""
TRAIN = """
x, y = datasets.digits()
model = xpnet.Sequential([layers.Flatten(), layers.Dense(10)], input_shape=(8, 8), backend="cpu", seed=0)
model.fit(x, y, epochs=4, validation_split=0.2, verbose=0, callbacks=plots.LivePlot(seconds={seconds}));
"""
#: A cell, and the number of pictures that it shows.
CELLS = [
    ("plots.curves(history)", 1),
    ("plots.curves(history)\nprint('end')", 1),
    ("plots.curves(history).figure", 1),
    ("display(plots.curves(history).figure)\nprint('end')", 1),
    ("plots.image_grid(images)", 1),
    ("plots.image_grid(images)[0, 0].figure", 1),
    ("ax = plots.curves(history)\nax.set_title('a title')\nplots.curves(history);", 2),
    ("ax", 1),  # of an earlier cell
    ("from matplotlib import pyplot\nplots.curves(history, ax=pyplot.subplots()[1]);", 1),
    ("assert not pyplot.get_fignums()", 0),  # no figure is kept
    ("%config InlineBackend.figure_format = 'retina'\nplots.curves(history)", 1),
    (TRAIN.format(seconds=0), 1),
    (TRAIN.format(seconds=1000), 1),
    ("assert not pyplot.get_fignums()", 0),
    ("pyplot.switch_backend('agg')\nplots.curves(history)", 1),
    ("plots.curves(history).figure", 1),
    ("assert not pyplot.get_fignums()", 0),
]


class Client(nbclient.NotebookClient):
    """A client that keeps the pictures which replace others, by the number of the cell."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "update_display_data":
            self.updates.setdefault(cell_index, []).append(msg["content"]["data"])
        return super().process_message(msg, cell, cell_index)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages of Jupyter
def test_a_notebook_shows_each_plot_once_and_redraws_live_plots(monkeypatch, tmp_path):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(xpnet.__file__).parents[1]), os.getenv("PYTHONPATH", "")])
    )
    codes = [SETUP, *(code for code, _ in CELLS)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    client = Client(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.updates = {}
    client.execute()
    shown = {}
    for cell, (code, count) in zip(notebook.cells[1:], CELLS, strict=True):
        shown[code] = [output for output in cell.outputs if output["output_type"] != "stream"]
        assert all("image/png" in output["data"] for output in shown[code]), cell
        assert len(shown[code]) == count, cell
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell
    (sharp,) = [outputs for code, outputs in shown.items() if "retina" in code]
    assert sharp[0]["metadata"]["image/png"]["width"] > 100  # half the number of pixels
    frequent, rare = [i for i, code in enumerate(codes) if "LivePlot" in code]
    assert [len(client.updates[i]) for i in (frequent, rare)] == [3, 1]  # after the first picture
    (last,) = shown[TRAIN.format(seconds=0)]
    assert last["data"]["image/png"] == client.updates[frequent][-1]["image/png"]
    assert len({update["image/png"] for update in client.updates[frequent]}) == 3
    assert base64.b64decode(last["data"]["image/png"]).startswith(b"\x89PNG")
