"""What a prompt and a notebook show: summaries, models and histories."""

import copy
import html.parser
import pickle

import numpy as np
import pytest

import xpnet
from xpnet import layers
from xpnet.callbacks import History


class Cells(html.parser.HTMLParser):
    """The texts of an HTML table, row by row; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.caption, self.open = [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td")
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "caption":
            self.caption += data


def net(**kwargs):
    return xpnet.Sequential([layers.Flatten(), layers.Dense(4), layers.Dropout(0.5), layers.Dense(2)], **kwargs)


def test_a_summary_is_a_string_that_shows_itself_without_quotes():
    summary = net(input_shape=(2, 3), backend="cpu").summary()
    assert isinstance(summary, str) and repr(summary) == str(summary) == f"{summary}"
    assert summary.splitlines() == [
        "name  layer         output shape  parameters",
        "----  ------------  ------------  ----------",
        "0     Flatten()     (N, 6)                 0",
        "1     Dense(4)      (N, 4)                28",
        "2     Dropout(0.5)  (N, 4)                 0",
        "3     Dense(2)      (N, 2)                10",
        "38 parameters",
    ]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copied_summary_is_equal(copied):
    summary = net(input_shape=(2, 3), backend="cpu").summary()
    assert copied(summary) == summary and copied(summary)._repr_html_() == summary._repr_html_()


def test_a_notebook_shows_a_model_as_its_summary(backend):
    model = net(input_shape=(2, 3), backend=backend)
    table = Cells(model._repr_html_())
    assert table.caption == f"Sequential: input (N, 2, 3), {model.backend.name}"
    assert table.rows == [
        ["name", "layer", "output shape", "parameters"],
        ["0", "Flatten()", "(N, 6)", "0"],
        ["1", "Dense(4)", "(N, 4)", "28"],
        ["2", "Dropout(0.5)", "(N, 4)", "0"],
        ["3", "Dense(2)", "(N, 2)", "10"],
        ["38 parameters"],
    ]
    assert model.summary()._repr_html_() == model._repr_html_()


def test_a_model_that_is_not_built_is_shown_too():
    table = Cells(net()._repr_html_())
    assert table.caption == "Sequential: not built"
    assert table.rows[1] == ["0", "Flatten()", "not built", "0"]


def test_frozen_and_nested_layers_are_shown():
    inner = xpnet.Sequential([layers.Dense(3), layers.Residual(layers.Dense(3))])
    model = xpnet.Sequential([inner, layers.Dense(2)], input_shape=(3,), backend="cpu")
    inner.trainable = False
    rows = Cells(model._repr_html_()).rows
    assert rows[1][2:] == ["(N, 3)", "24"] and "Residual(Dense(3))" in rows[1][1]
    assert rows[-1] == ["32 parameters, 24 of them frozen"]
    assert Cells(inner._repr_html_()).rows[1:] == [
        ["0", "Dense(3)", "(N, 3)", "12"],
        ["1", "Residual(Dense(3))", "(N, 3)", "12"],
        ["24 parameters, 24 of them frozen"],
    ]


def test_texts_of_users_are_escaped():
    class Odd(layers.Identity):
        def __repr__(self):
            return "<b>&amp;</b><script>"

    model = xpnet.Sequential([Odd()], input_shape=(2,), backend="cpu")
    text = model._repr_html_()
    assert "<b>" not in text and "<script>" not in text
    assert Cells(text).rows[1] == ["0", "<b>&amp;</b><script>", "(N, 2)", "0"]
    assert "<b>&amp;</b><script>" in model.summary()


def test_a_notebook_shows_a_history_as_a_table_of_epochs():
    history = History()
    history.add({"loss": 0.25, "val_<f1>": 0.00012}, 1.5)
    history.add({"loss": float("nan"), "val_<f1>": 1.0}, 0.25)
    history.stopped = "diverged"
    assert Cells(history._repr_html_()).rows == [
        ["epoch", "loss", "val_<f1>", "seconds"],
        ["1", "0.2500", "0.00012", "1.5"],
        ["2", "nan", "1.0000", "0.25"],
        ["stopped: diverged"],
    ]
    assert repr(history) == repr(dict(history))


@pytest.mark.parametrize("epochs", [0, 1, 19, 20, 21, 1000])
def test_of_many_epochs_the_first_and_the_last_are_shown(epochs):
    history = History()
    for i in range(epochs):
        history.add({"loss": float(i)}, 1.0)
    rows = Cells(history._repr_html_()).rows[1:]
    shown = [row[0] for row in rows]
    if epochs <= 20:
        assert shown == [str(i + 1) for i in range(epochs)]
    else:
        assert shown == ["1", "2", "…", *[str(i + 1) for i in range(epochs - 17, epochs)]] and len(rows) == 20
    assert [row[1] for row in rows if row[0] != "…"] == [f"{float(row[0]) - 1:.4f}" for row in rows if row[0] != "…"]


def test_what_fit_returns_is_shown():
    model = net(input_shape=(2, 3), backend="cpu")
    x, y = np.ones((6, 2, 3)), np.array([0, 1] * 3)
    history = model.fit(x, y, validation_split=0.5, verbose=0)
    assert Cells(history._repr_html_()).rows[0][:5] == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy"]
