"""What the tutorial programs share: a command line, a table of comparisons, and somewhere to draw."""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import xpnet

VERDICTS = {True: "ok", False: "WRONG", None: "measured"}
SHOW = "show"  # in place of a folder: pictures in windows


class Row(NamedTuple):
    """One comparison: the tutorial's figure as printed there, ours in as many digits, and whether they agree.

    ok is None where nothing was compared, only measured.
    """

    system: str
    figure: str
    tutorial: str
    ours: str
    difference: str
    ok: bool | None


class Comparison(list):
    """The rows of one system."""

    def __init__(self, system):
        super().__init__()
        self.system = system

    def equal(self, figure, tutorial, ours):
        """`tutorial` is text such as "0.7216": ours must be the same number, rounded to the digits shown there."""
        digits = len(tutorial.partition(".")[2])
        difference = float(ours) - float(tutorial)
        # Half a unit of the last digit; where all 16 digits are shown, the last bit of another device's exp is allowed.
        ok = abs(difference) <= max(0.5 * 10.0**-digits, 2.0**-52 * abs(float(tutorial)))
        self._add(figure, tutorial, f"{float(ours):.{digits}f}", f"{difference:+.0e}", ok)

    def exactly(self, figure, tutorial, ours):
        """The same for a number such as "0.5" that is no rounded one: ours may differ by rounding errors alone."""
        difference = float(ours) - float(tutorial)
        self._add(figure, tutorial, f"{float(ours):.12g}", f"{difference:+.0e}", abs(difference) <= 1e-12)

    def below(self, figure, bound, ours):
        self._add(figure, f"< {bound:g}", f"{ours:.4g}", f"{ours - bound:+.2g}", ours < bound)

    def above(self, figure, bound, ours):
        self._add(figure, f"≥ {bound:g}", f"{ours:.4g}", f"{ours - bound:+.2g}", ours >= bound)

    def holds(self, figure, tutorial, ours, ok):
        """A statement rather than a number."""
        self._add(figure, tutorial, ours, "", ok)

    def measured(self, figure, tutorial, ours):
        """A figure of this machine, such as a time: for the reader, neither right nor wrong."""
        self._add(figure, tutorial, ours, "", None)

    def _add(self, figure, tutorial, ours, difference, ok):
        self.append(Row(self.system, figure, tutorial, ours, difference, None if ok is None else bool(ok)))


def table(rows):
    heads = ("system", "figure", "tutorial", "ours", "difference", "")
    cells = [heads, *((*row[:5], VERDICTS[row.ok]) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    lines = ["  ".join((*(f"{row[i]:<{widths[i]}}" for i in range(5)), row[5])).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def main(run):
    """Read the command line, run the program, print its comparisons; the exit status is 1 where one is wrong."""
    text = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--seed", type=int, default=0, help="decides random weights (default: %(default)s)")
    parser.add_argument(
        "--plots", metavar="DIR", nargs="?", const=SHOW, help="write pictures into this folder; without DIR, show them"
    )
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the letter ŷ shall not end the run
    try:
        with one_thread():
            rows = run(xpnet.get_backend(options.backend), options.seed, options.plots)
    except (xpnet.errors.XpnetError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    print("\n" + table(rows), flush=True)
    sys.exit(1 if any(row.ok is False for row in rows) else 0)


def one_thread():
    """Nets as small as these are quickest on one thread of the CPU; the others would do little but wait for it."""
    try:
        import threadpoolctl  # comes with xpnet, but its source tree also runs on machines that have little else
    except ImportError:
        return contextlib.nullcontext()
    return threadpoolctl.threadpool_limits(1)


@contextlib.contextmanager
def picture(plots, name, width=6.4, height=4.2):
    """A figure to draw on, written to the folder `plots` as `name`.png, or shown in a window."""
    if plots == SHOW:
        from matplotlib import pyplot  # only here, for it wants a screen

        figure = pyplot.figure(figsize=(width, height), layout="constrained")
        yield figure
        pyplot.show()
        pyplot.close(figure)
        return
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    Path(plots).mkdir(parents=True, exist_ok=True)
    full = io.BytesIO()
    figure.savefig(full, dpi=90)
    # 256 colours are enough, and make a third of the bytes.
    Image.open(full).convert("RGB").quantize(256).save(Path(plots) / f"{name}.png", optimize=True)
