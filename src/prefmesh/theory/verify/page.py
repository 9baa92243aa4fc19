"""A verification as a table, as figures, and as a page of its own."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prefmesh.reports import replace_file, style
from prefmesh.reports.html import fill
from prefmesh.reports.svg import figure_bytes, inline_svg
from prefmesh.reports.tables import plain_number
from prefmesh.theory.verify.claim import Finding, Plot, Row, Verification

if TYPE_CHECKING:
    from rich.table import Table

COMPARED = {"equal": "=", "at most": "≤", "exponent": "slope", "order": "order"}


def table(found: Verification) -> "Table":
    """One line a claim, for the terminal."""
    from rich.table import Table

    made = Table(title="Claims of the theory, checked by experiment")
    made.add_column("claim", overflow="fold")
    for header in ("predicted", "measured", "ratio"):
        made.add_column(header, justify="right", no_wrap=True)
    made.add_column("verdict", no_wrap=True)
    for row in found.rows:
        source = "paper" if row.claim.source == "paper" else ""
        name = f"{row.claim.name}{' (paper)' if source else ''}"
        if row.finding is None:
            made.add_row(name, "", "", "", row.verdict)
            continue
        mark = "[bold red]fails[/]" if row.verdict == "fails" else row.verdict
        made.add_row(name, predicted(row.finding), measured(row.finding), ratio(row.finding), mark)
    return made


def predicted(found: Finding) -> str:
    """With how it is to be compared."""
    return f"{COMPARED[found.kind]} {plain_number(found.predicted)}"


def measured(found: Finding) -> str:
    """With its standard error."""
    error = f" ± {plain_number(found.error)}" if found.error else ""
    return f"{plain_number(found.measured)}{error}"


def ratio(found: Finding) -> str:
    """Measured / predicted; an exponent or an order has none that says anything."""
    return f"{found.ratio:.3g}" if found.kind in ("equal", "at most") else "–"


def write_page(found: Verification, directory: Path) -> Path:
    """Write `verify.html` and `figures/claim_*.svg`, `.png` into `directory`; the page's path."""
    sections = []
    for row in found.rows:
        svg = None
        if row.finding is not None and row.finding.plot is not None:
            name = f"claim_{re.sub('[^a-z0-9]+', '_', row.claim.name.lower())}"
            with style.house_style():
                figure = draw(row.claim.name, row.finding.plot)
                image = figure_bytes(figure, "svg")
                replace_file(directory / "figures" / f"{name}.svg", image)
                replace_file(directory / "figures" / f"{name}.png", figure_bytes(figure, "png"))
            # Trusted: made by our own XML serialiser, which escapes labels.
            svg = Markup(
                inline_svg(image, name=name, title=row.claim.name, description=described(row.finding.plot))
            )
        sections.append({"row": row, "svg": svg, **_words(row)})
    counts = {
        word: sum(row.verdict == word for row in found.rows) for word in ("holds", "fails", "not checked")
    }
    page = fill("verify.html.jinja", sections=sections, counts=counts, effort=found.effort)
    return replace_file(directory / "verify.html", page.encode("utf-8", errors="replace"))


def _words(row: Row) -> dict[str, str]:
    if row.finding is None:
        return {"predicted": "", "measured": "", "ratio": "", "note": row.problem}
    return {
        "predicted": predicted(row.finding),
        "measured": measured(row.finding),
        "ratio": ratio(row.finding),
        "note": row.finding.note,
    }


def draw(title: str, plot: Plot) -> Figure:
    """Lines are predicted, markers measured; in the house's style, which the caller has entered."""
    labels = [series.label for series in plot.series]
    figure, axes = style.new_figure(style.plain(title, 40), rows_below=style.rows_below(labels, []))
    entries = []
    for i, series in enumerate(plot.series):
        look = style.line_style(i)
        if series.kind == "line":
            (handle,) = axes.plot(series.x, series.y, color=look["color"], linestyle=look["linestyle"])
        else:
            handle, *_ = axes.errorbar(
                series.x,
                series.y,
                yerr=None if series.error is None else [2 * e for e in series.error],
                fmt=look["marker"],
                color=look["color"],
                capsize=2,
            )
        entries.append((handle, style.plain(series.label, 52)))
    _scale(axes.xaxis, plot.log_x)
    _scale(axes.yaxis, plot.log_y)
    axes.set_xlabel(style.plain(plot.x_label, 60))
    axes.set_ylabel(style.plain(plot.y_label, 44))
    style.add_legend(figure, entries)
    return figure


def _scale(axis: Any, log: bool) -> None:
    """A logarithmic axis has few labels that do not run into each other; a linear one no offset to add in the head."""
    if not log:
        axis.get_major_formatter().set_useOffset(False)
        low, high = axis.get_view_interval()
        if high - low < 1e-6 * abs(high):  # one value: show it against 0
            axis.axes.set(**{f"{axis.axis_name}lim": (0, 2 * high)})
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    if high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def described(plot: Plot) -> str:
    """For who cannot see it."""
    parts = [
        f"{s.label}: {plain_number(float(s.y[0]))} at {plain_number(float(s.x[0]))}, "
        f"{plain_number(float(s.y[-1]))} at {plain_number(float(s.x[-1]))}."
        for s in plot.series
        if len(s.y)
    ]
    return " ".join([f"{plot.y_label} against {plot.x_label}.", *parts])
