"""Progress of fit: the width of the line on a terminal, and what a notebook shows."""

import io
import os
import re
import sys
import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
from tqdm import auto, notebook
from tqdm.utils import disp_len

import xpnet
from xpnet import datasets, layers
from xpnet.callbacks import Callback, ProgressBar
from xpnet.display import progress

X, Y = datasets.blobs(50, classes=3, seed=1)
LOGS = ["loss 0.1234", "accuracy 0.9612", "val_loss 0.2345", "val_accuracy 0.9512"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True

    def lines(self):
        """Each state of the line, without the spaces that erase the one before."""
        return [line.rstrip() for line in re.split(r"[\r\n]+", self.getvalue()) if line.strip()]


def fit(*callbacks, epochs=2, **kwargs):
    model = xpnet.Sequential([layers.Dense(3)], input_shape=(2,), backend="cpu")
    return model.fit(X, Y, callbacks=callbacks, epochs=epochs, batch_size=20, **kwargs)


def line(monkeypatch, columns, texts, done=1000, total=1437, description="epoch 12/20"):
    """The line with these metrics, at this width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    bar = progress.terminal_bar(terminal, description, total, 0)
    bar.update(done)
    bar.show(texts)
    bar.close()
    assert all(disp_len(shown) < columns or columns == 1 for shown in terminal.lines())
    return terminal.lines()[-1] if terminal.lines() else ""


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (200, r"epoch 12/20:  70%\|█+.* *\| 1\.00k/1\.44k \[\d\d:\d\d<\d\d:\d\d, .* samples/s, {all}\]"),
        (120, r"epoch 12/20:  70%\|█+.* *\| \[\d\d:\d\d<\d\d:\d\d, {all}\]"),
        (100, r"epoch 12/20:  70%\|█+.* *\| {all}"),
        (80, r"epoch 12/20: {all}"),
        (75, r"12/20 {all}"),
        (68, r"{all}"),
        (60, r"12/20 accuracy 0\.9612  val_loss 0\.2345  val_accuracy 0\.9512"),
        (40, r"val_loss 0\.2345  val_accuracy 0\.9512"),
        (30, r"12/20 val_accuracy 0\.9512"),
        (20, r"val_accuracy 0\.9512"),
        (16, r"val_ac\.\. 0\.9512"),
        (9, r"0\.9512"),
    ],
)
def test_counters_and_rates_give_way_to_metrics(monkeypatch, columns, expected):
    assert re.fullmatch(expected.replace("{all}", re.escape("  ".join(LOGS))), line(monkeypatch, columns, LOGS))


@pytest.mark.parametrize("columns", [1, 2, 5, 10, 20, 33, 40, 57, 60, 80, 81, 120, 250])
@pytest.mark.parametrize("total", [1437, None])
@pytest.mark.parametrize(
    "texts",
    [
        [],
        LOGS,
        [f"metric_{i} 0.5000" for i in range(12)],
        ["loss 0.5000", "val_" + "long" * 30 + " 0.7500"],
        ["损失 0.5000", "精度精度精度精度 0.7500"],
        ["{odd} 0.5", "%s{} 0.7500"],
    ],
)
def test_a_line_never_wraps(monkeypatch, columns, total, texts):
    shown = line(monkeypatch, columns, texts, total=total)  # checks the width
    if texts and columns >= 10:
        assert "0.7500" in shown or "0.5000" in shown or "0.9512" in shown


def test_the_last_metrics_are_kept_at_every_width(monkeypatch):
    for columns in range(21, 150):
        assert "val_accuracy 0.9512" in line(monkeypatch, columns, LOGS)
    for columns in range(70, 150):
        assert "  ".join(LOGS) in line(monkeypatch, columns, LOGS)


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_bar_of_fit_ends_with_the_validation_metrics(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    history = fit(ProgressBar(terminal, seconds=0.0), validation_data=(X, Y), metrics=["accuracy", "f1"], verbose=1)
    lines = terminal.lines()
    assert max(map(len, lines)) < columns
    assert re.search(rf"val_f1 {history['val_f1'][-1]:.4f}\]?$", lines[-1])
    if columns >= 60:
        assert f"val_accuracy {history['val_accuracy'][-1]:.4f}" in lines[-1]
    assert any(f"accuracy {history['accuracy'][-1]:.4f}" in shown for shown in lines)  # during the epoch


def test_without_a_known_width_everything_is_shown(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", os.terminal_size)
    terminal = Terminal()
    bar = progress.terminal_bar(terminal, "epoch 1/2", 1437, 0)
    bar.update(1437)
    bar.show(LOGS * 3)
    bar.close()
    assert re.search(r"100%\|█+\| 1\.44k/1\.44k .*samples/s, " + "  ".join(LOGS * 3), terminal.lines()[-1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_the_width_of_the_terminal_counts_and_may_change(monkeypatch):
    import fcntl
    import pty
    import select
    import struct
    import termios

    def resize(columns):
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    monkeypatch.setenv("COLUMNS", "200")  # the terminal knows better
    screen, side = pty.openpty()
    with os.fdopen(side, "w") as stream:
        resize(100)
        bar = progress.terminal_bar(stream, "epoch 1/2", 1437, 0)
        for columns, shown in ((100, rf"epoch 1/2:   0%\|█* *\| {re.escape('  '.join(LOGS))}"),
                               (60, "1/2 " + "  ".join(LOGS[1:]))):  # fmt: skip
            resize(columns)
            bar.show(LOGS)
            stream.flush()
            text = b""
            while select.select([screen], [], [], 0.3)[0]:
                text += os.read(screen, 4096)
            last = re.split(r"[\r\n]+", text.decode())[-1].rstrip()
            assert re.fullmatch(shown, last) and len(last) < columns
        bar.close()
    os.close(screen)


# Notebooks -----------------------------------------------------------------------------------------------------------


class TerminalInteractiveShell:
    """What IPython's shell on a terminal is called."""


class ZMQInteractiveShell:
    """The shell of Jupyter."""


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        (None, False),
        (TerminalInteractiveShell(), False),
        (type("InteractiveShellEmbed", (TerminalInteractiveShell,), {})(), False),
        (ZMQInteractiveShell(), True),
        (type("Shell", (ZMQInteractiveShell,), {})(), True),  # Colab
    ],
)
def test_a_notebook_is_recognized_by_the_shell_of_ipython(monkeypatch, shell, expected):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert progress.in_notebook() == expected


def test_without_ipython_there_is_no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not progress.in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())  # while it is being imported
    assert not progress.in_notebook()


@pytest.fixture
def in_notebook(monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)


@pytest.mark.usefixtures("in_notebook")
def test_a_notebook_without_ipywidgets_shows_a_line_per_epoch_and_no_warning(monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "tqdm.auto")
    monkeypatch.delitem(sys.modules, "tqdm.autonotebook")
    # With these modules, tqdm.auto looks for ipywidgets; it warns, if there are none.
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    monkeypatch.setattr(notebook, "IProgress", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(validation_data=(X, Y))
    assert not caught
    out, err = capfd.readouterr()
    assert err == ""
    pattern = "epoch {}/2  " + "".join(rf"{name} [\d.]+  " for name in ("loss", "accuracy", "val_loss", "val_accuracy"))
    assert len(out.splitlines()) == 2
    for epoch, text in enumerate(out.splitlines(), 1):
        assert re.match(pattern.format(epoch), text), text


class FakeWidget(notebook.tqdm):
    """Stands in for the widget, which needs ipywidgets and a running notebook."""

    made: ClassVar[list] = []

    def __init__(self, total, initial, desc, unit, unit_scale):
        self.total, self.n, self.desc, self.shown, self.closed, self.disable = total, initial, desc, [], False, True
        self.made.append(self)

    def update(self, n):
        self.n += n

    def set_postfix_str(self, text):
        self.shown.append(text)

    def close(self):
        self.closed = True

    def __del__(self):
        pass


@pytest.fixture
def widgets(monkeypatch, in_notebook):
    monkeypatch.setattr(FakeWidget, "made", [])
    monkeypatch.setattr(auto, "tqdm", FakeWidget)
    return FakeWidget.made


def test_a_notebook_with_ipywidgets_shows_the_widget_of_tqdm(widgets, capfd):
    history = fit(validation_data=(X, Y))
    assert capfd.readouterr() == ("", "")
    assert [(w.desc, w.n, w.total, w.closed) for w in widgets] == [
        ("epoch 1/2", 50, 50, True),
        ("epoch 2/2", 50, 50, True),
    ]
    assert widgets[-1].shown[-1] == "  ".join(f"{name} {values[-1]:.4f}" for name, values in history.items()
                                              if name != "learning_rate")  # fmt: skip


def test_the_widget_is_closed_after_an_error(widgets):
    class Fail(Callback):
        def on_step_end(self, model, step):
            raise KeyError

    with pytest.raises(KeyError):
        fit(Fail())
    assert [w.closed for w in widgets] == [True]


@pytest.mark.parametrize("verbose", [0, 2])
def test_other_settings_of_verbose_show_no_widget(widgets, verbose, capfd):
    fit(verbose=verbose)
    assert not widgets and len(capfd.readouterr().out.splitlines()) == verbose


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_a_stream_that_was_given_is_used_in_a_notebook_too(widgets, capfd, stream, shown):
    stream = stream()
    fit(ProgressBar(stream), verbose=1)
    assert not widgets and bool(stream.getvalue()) == shown and capfd.readouterr() == ("", "")


def test_without_standard_error_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as in a window without a console
    fit(verbose=1)
