"""What the tutorial programs share: a command line, a table of comparisons, and figures for plots."""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import xpnet

VERDICTS = {True: "ok", False: "WRONG", None: "measured"}
SHOW = "show"  # in place of a folder: show plots in windows


class Row(NamedTuple):
    """One comparison: the value that the tutorial prints, our value with as many digits, and whether they agree.

    ok is None for a value that was only measured.
    """

    system: str
    quantity: str
    tutorial: str
    ours: str
    difference: str
    ok: bool | None


class Comparison(list):
    """The comparisons of one system."""

    def __init__(self, system):
        super().__init__()
        self.system = system

    def equal(self, quantity, tutorial, ours):
        """`tutorial` is text such as "0.7216"; our value must be the same number, rounded to the digits shown."""
        digits = len(tutorial.partition(".")[2])
        difference = float(ours) - float(tutorial)
        # Half a unit of the last digit. If all 16 digits are shown, exp of another device may differ in the last bit.
        ok = abs(difference) <= max(0.5 * 10.0**-digits, 2.0**-52 * abs(float(tutorial)))
        self._add(quantity, tutorial, f"{float(ours):.{digits}f}", f"{difference:+.0e}", ok)

    def exactly(self, quantity, tutorial, ours):
        """`tutorial` is an exact number such as "0.5"; our value may differ only by rounding errors."""
        difference = float(ours) - float(tutorial)
        self._add(quantity, tutorial, f"{float(ours):.12g}", f"{difference:+.0e}", abs(difference) <= 1e-12)

    def below(self, quantity, bound, ours):
        self._add(quantity, f"< {bound:g}", f"{ours:.4g}", f"{ours - bound:+.2g}", ours < bound)

    def above(self, quantity, bound, ours):
        self._add(quantity, f"≥ {bound:g}", f"{ours:.4g}", f"{ours - bound:+.2g}", ours >= bound)

    def holds(self, quantity, tutorial, ours, ok):
        """A statement instead of a number."""
        self._add(quantity, tutorial, ours, "", ok)

    def measured(self, quantity, tutorial, ours):
        """A value that depends on the machine, such as a time, and is only shown."""
        self._add(quantity, tutorial, ours, "", None)

    def _add(self, quantity, tutorial, ours, difference, ok):
        self.append(Row(self.system, quantity, tutorial, ours, difference, None if ok is None else bool(ok)))


def table(rows):
    header = ("system", "quantity", "tutorial", "ours", "difference", "")
    cells = [header, *((*row[:5], VERDICTS[row.ok]) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    lines = ["  ".join((*(f"{row[i]:<{widths[i]}}" for i in range(5)), row[5])).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def main(run):
    """Parse the command line, run the program and print its comparisons. The exit status is 1 if one is wrong."""
    text = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    parser.add_argument(
        "--plots", metavar="DIR", nargs="?", const=SHOW, help="write pictures into this folder; without DIR, show them"
    )
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals cannot print ŷ
    try:
        with one_thread():
            rows = run(xpnet.get_backend(options.backend), options.seed, options.plots)
    except (xpnet.errors.XpnetError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    print("\n" + table(rows), flush=True)
    sys.exit(1 if any(row.ok is False for row in rows) else 0)


def one_thread():
    """Limit BLAS to one thread, which is fastest for networks of this size."""
    try:
        import threadpoolctl  # a dependency of xpnet, but may be missing where xpnet is run from its source tree
    except ImportError:
        return contextlib.nullcontext()
    return threadpoolctl.threadpool_limits(1)


@contextlib.contextmanager
def picture(plots, name, width=6.4, height=4.2):
    """A figure to draw in, which is then saved in the folder `plots` as `name`.png, or shown in a window."""
    if plots == SHOW:
        from matplotlib import pyplot  # imported here, because it needs a display

        figure = pyplot.figure(figsize=(width, height), layout="constrained")
        yield figure
        pyplot.show()
        pyplot.close(figure)
        return
    from matplotlib.figure import Figure
    from PIL import Image  # a dependency of matplotlib

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    Path(plots).mkdir(parents=True, exist_ok=True)
    full = io.BytesIO()
    figure.savefig(full, dpi=90)
    # 256 colors are enough, and the file is a third as large.
    Image.open(full).convert("RGB").quantize(256).save(Path(plots) / f"{name}.png", optimize=True)
