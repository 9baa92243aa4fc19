"""One look for every figure: colour-blind safe, told apart without colour too, legible at phone width.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color); yellow is left out, it vanishes on white.
Ink, grid and paper are exact sentinel colours, so that the HTML report can swap them for CSS variables in dark mode.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, GRID, PAPER = "#1f2328", "#5f6771", "#dfe2e6", "#fffffe"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
# 7 colours, 5 dashes, 6 markers: pairwise coprime, so that 210 curves differ.
DASHES = ("-", "--", "-.", ":", (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
BAND = 0.18  # opacity of a standard-deviation band
WIDTH = 3.8  # inches: text of 10 pt is still 11 px where a phone shrinks the figure to 310 px

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: small, selectable, read aloud
    "svg.hashsalt": "prefmesh",  # the same data gives the same file
}


@contextmanager
def house_style() -> Iterator[None]:
    """The scope in which figures are drawn and saved."""
    with rc_context(_RC):
        yield


def line_style(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the index-th curve."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def plain(label: str, limit: int = 40) -> str:
    """A user's label as matplotlib text: no formula, one line, not too long.

    >>> plain("cost $5")
    'cost \\\\$5'
    """
    text = "".join(filter(str.isprintable, " ".join(label.split())))  # XML knows no control characters
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("$", r"\$")


def new_figure(title: str, *, height: float = 2.9, rows_below: int = 0) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; rows of legend or notes below add to the height, not to the crowd."""
    figure = Figure(figsize=(WIDTH, height + 0.2 * rows_below))
    add_title(figure, title)
    return figure, figure.add_subplot()


def add_title(figure: Figure, title: str) -> None:
    """The title over the whole width: over the axes alone a long one would be cut."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=10.5, fontweight="bold")


def legend_columns(labels: Sequence[str]) -> int:
    return 2 if len(labels) > 1 and max(map(len, labels)) <= 17 else 1


def rows_below(labels: Sequence[str], notes: Sequence[str]) -> int:
    """How many rows `add_legend` will need."""
    return -(-len(labels) // legend_columns(labels)) + len(wrapped(notes))


def wrapped(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, 60)]


def add_legend(
    figure: Figure, entries: Sequence[tuple[Line2D | Patch, str]], notes: Sequence[str] = ()
) -> None:
    """Legend and small print below the axes, where they hide no data."""
    lines = wrapped(notes)
    if not entries:
        if lines:
            figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=8, color=MUTED)
        return
    labels = [label for _, label in entries]
    legend = figure.legend(
        [handle for handle, _ in entries],
        labels,
        loc="outside lower left",
        ncols=legend_columns(labels),
        borderaxespad=0.2,
        title="\n".join(lines) or None,
        title_fontsize=8,
        alignment="left",
    )
    legend.get_title().set_color(MUTED)


def label_logarithms(axis: XAxis | YAxis, formatter: Formatter) -> None:
    """Some round numbers on a logarithmic axis, also where it is shorter than a decade, and none between them."""
    low, high = axis.get_view_interval()
    if high / low < 5:  # too short a stretch to hold two of 1, 2, 5, 10
        axis.set_major_locator(MaxNLocator(nbins=5))
    elif high / low < 20:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())
